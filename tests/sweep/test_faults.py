"""Real CPU sweeps that are killed, hung, starved and corrupted; then the same command with resume=true.

After each fault the table is whole, MLflow has every run once and none RUNNING, and what had been measured before the
fault is still there, the same run.
"""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import faults
from tests.conftest import TINY
from tests.tracking.conftest import empty_database, sqlite_uri, working_folder  # noqa: F401
from wanexp import __main__ as program
from wanexp import launch as launch_module
from wanexp import runner
from wanexp.record import Record, read_record
from wanexp.sweep import fingerprint
from wanexp.wan.weights import RandomWeights
from wanexp.wan.write_checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
BASE = (
    *(word for word in TINY if not word.startswith(("tracking", "limits"))),
    "limits.run_s=60",
    "workload.num_steps=3",
    "sweep_name=s",
)
ONE = (*BASE, "verify=never", "limits.stall_s=30")
TWO_RANKS = ("parallelism=data_parallel", "gpus=[0,1]")


class Sweep:
    """A sweep's folder, its MLflow experiment, and what was finished when it was last looked at."""

    def __init__(self, folder: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.uri, self.patch = folder, uri, monkeypatch

    def __call__(self, *arguments: str) -> int:
        self.patch.setattr(sys, "argv", ["wanexp", "-m", *arguments])
        return program.main()

    def with_faults(self, cells: dict[str, Callable], *arguments: str) -> int:
        with self.patch.context() as patch:
            patch.setattr(launch_module.worker, "main", faults.InCells(cells))
            return self(*arguments)

    def document(self) -> dict:
        return json.loads((self.folder / "sweep.json").read_text())

    def outcomes(self) -> list[str | None]:
        return [cell["outcome"] for cell in sorted(self.document()["cells"], key=lambda cell: cell["index"])]

    def records(self) -> dict[str, Record]:
        """By folder; those that cannot be read are left out."""
        found = {}
        for path in self.folder.glob("[0-9]*/record.json"):
            try:
                found[path.parent.name] = read_record(path)
            except ValueError:
                continue
        return found

    def finished(self) -> dict[str, str]:
        """Folder -> run id of what is measured."""
        return {name: r.run_id for name, r in self.records().items() if r.outcome == "finished"}

    def mlflow_runs(self) -> list[tuple[str, str]]:
        """(run id of the record, status) of all runs that are not deleted."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        experiment = client.get_experiment_by_name("wanexp")
        runs = client.search_runs([experiment.experiment_id]) if experiment else []
        return sorted((run.data.tags["wanexp.run_id"], run.info.status) for run in runs)

    def resumes_whole(self, *arguments: str, redone: int) -> None:
        """Resume, and check everything that must hold afterwards."""
        before = self.finished()
        assert self(*arguments, "resume=true") == 0
        document, records = self.document(), self.records()
        assert document["state"] == "finished" and document["superseded"] == []
        assert set(self.outcomes()) == {"finished"}
        assert sorted(cell["folder"] for cell in document["cells"]) == sorted(records)
        assert len(records) == len(document["cells"]), "no run is lost or twice in the folder"
        assert before.items() <= self.finished().items(), "what was measured is still there"
        assert sum(not cell["kept"] for cell in document["cells"]) == redone
        whole = sorted((record.run_id, "FINISHED") for record in records.values())
        assert self.mlflow_runs() == whole, "each run once, none RUNNING"
        progress = json.loads((self.folder / "progress.json").read_text())
        assert progress["state"] == "finished" and progress["counts"]["finished"] == len(records)


@pytest.fixture
def sweep(run_config, sqlite_uri, tmp_path, monkeypatch, capsys) -> Sweep:  # noqa: F811
    # Other people may change wanexp/ between two invocations of a test; what counts is tested in test_fingerprint.py.
    monkeypatch.setattr(fingerprint, "source_digest", lambda: "of the test")
    return Sweep(tmp_path / "multirun" / "s", sqlite_uri, monkeypatch)


def test_ranks_that_raise_die_run_out_of_memory_hang_and_starve(sweep):
    """Five faults in one sweep, which goes on after each."""
    command = (*BASE, "verify=never", "limits.stall_s=3", *TWO_RANKS, "seed=range(6)")
    cells = {
        "000": faults.raises,
        "001": faults.is_killed,
        "002": faults.runs_out_of_host_memory,
        "003": faults.hangs,
        "004": faults.is_stopped,
    }
    assert sweep.with_faults(cells, *command) == 1
    assert sweep.outcomes() == ["failed", "failed", "oom", "timeout", "timeout", "finished"]
    assert len(sweep.mlflow_runs()) == 6
    reasons = [cell["reason"] for cell in sweep.document()["cells"]]
    assert "a fault of the test" in reasons[0] and "SIGKILL" in reasons[1] and "rank 1" in reasons[4]
    sweep.resumes_whole(*command, redone=5)
    assert len(list((sweep.folder / "replaced").iterdir())) == 5


def test_an_inexact_answer(sweep):
    command = (*BASE, "verify=always", "limits.stall_s=30", *TWO_RANKS, "seed=1,2")
    assert sweep.with_faults({"000": faults.answers_wrongly}, *command) == 1
    assert sweep.outcomes() == ["inexact", "finished"]
    sweep.resumes_whole(*command, redone=1)
    assert all(record.metrics["parity/bit_equal"] == 1.0 for record in sweep.records().values())


def test_sigterm_then_ctrl_c_twice(sweep):
    command = (*ONE, "seed=1,2,3")
    assert sweep.with_faults({"001": faults.terminates_the_parent}, *command) == 130
    assert sweep.outcomes() == ["finished", "interrupted", None]
    assert sweep.document()["state"] == "interrupted"
    assert len(sweep.records()["001_none_1gpu"].samples["rank_step_ms"]["0"]) == 2, "the steps until then"
    first = sweep.finished()
    assert sweep.with_faults({"001": faults.presses_ctrl_c_twice}, *command, "resume=true") == 130
    assert sweep.outcomes()[0] == "finished" and sweep.outcomes()[2] is None
    assert sweep.finished() == first
    sweep.resumes_whole(*command, redone=2)


def test_sigkill_of_the_parent_while_it_logs_and_while_ranks_run(sweep, tmp_path):
    command = [*ONE, "seed=1,2,3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}

    def killed(when: str, *more: str) -> int:
        words = [sys.executable, "-m", "tests.sweep.killed_program", when, "-m", *command, *more]
        return subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, timeout=120
        ).returncode

    assert killed("logging") == -9
    first = sweep.finished()
    assert list(first) == ["000_none_1gpu"], "the record is written before MLflow is told"
    assert sweep.mlflow_runs() == [(first["000_none_1gpu"], "RUNNING")]
    assert killed("running", "resume=true") == -9
    assert sweep.outcomes() == ["finished", None, None] and sweep.document()["state"] == "running"
    assert sweep.mlflow_runs() == [(first["000_none_1gpu"], "FINISHED")], "half a run was replaced by a whole"
    sweep.resumes_whole(*command, redone=2)
    assert first.items() <= sweep.finished().items()


def test_a_tracking_server_that_is_dead_from_the_start(sweep):
    command = (*ONE, "seed=1,2")
    assert sweep(*command, "tracking.uri=http://127.0.0.1:9", "tracking.timeout_s=0.5") == 0
    assert sweep.mlflow_runs() == [] and sweep.outcomes() == ["finished", "finished"]
    sweep.resumes_whole(*command, redone=0)


def test_a_tracking_server_that_dies_in_the_middle(sweep):
    from mlflow.tracking import MlflowClient

    command = (*ONE, "seed=1,2")
    seen = []

    def log_batch(client, run_id, *arguments, **keywords):
        seen.append(run_id)
        if run_id != seen[0] and seen.count(run_id) > 1:  # the second run is half told
            raise ConnectionError("the server is gone")
        return original(client, run_id, *arguments, **keywords)

    original = MlflowClient.log_batch
    with sweep.patch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", log_batch)
        patch.setattr("wanexp.tracking.mlflow_store._alive", lambda *_: False)
        assert sweep(*command) == 0
    assert "RUNNING" in {status for _, status in sweep.mlflow_runs()}
    sweep.resumes_whole(*command, redone=0)


def test_a_full_disk_stops_the_sweep_cleanly(sweep, capsys):
    command = (*ONE, "seed=1,2,3")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    execute = runner.execute

    def then_fills_the_disk(config, prepared, record, folder, console):
        execute(config, prepared, record, folder, console)
        if folder.name.startswith("001"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    with sweep.patch.context() as patch:
        patch.setattr(runner, "execute", then_fills_the_disk)
        try:
            assert sweep(*command) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sweep.outcomes() == ["finished", None, None]
    captured = capsys.readouterr()
    assert "error: the sweep stopped: File too large" in captured.err and "resume=true" in captured.out
    sweep.resumes_whole(*command, redone=2)


def test_a_folder_that_becomes_read_only_stops_the_sweep_cleanly(sweep, capsys):
    """By an error from the file system: to root no folder is read-only by its mode."""
    command = (*ONE, "seed=1,2")
    write_text, mkdir = Path.write_text, Path.mkdir
    refused = []

    def refuse(function):
        def call(path, *arguments, **keywords):
            if sweep.folder in path.parents and (sweep.folder / "000_none_1gpu" / "record.json").exists():
                refused.append(path)
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return function(path, *arguments, **keywords)

        return call

    with sweep.patch.context() as patch:
        patch.setattr(Path, "write_text", refuse(write_text))
        patch.setattr(Path, "mkdir", refuse(mkdir))
        assert sweep(*command) == 1
    assert refused and "the sweep stopped: Read-only file system" in capsys.readouterr().err
    assert list(sweep.finished()) == ["000_none_1gpu"]
    sweep.resumes_whole(*command, redone=1)


def test_damaged_records_and_sweep_files(sweep, capsys):
    command = (*ONE, "seed=1,2")
    assert sweep(*command) == 0
    record = sweep.folder / "001_none_1gpu" / "record.json"
    record.write_text(record.read_text()[:700])
    (sweep.folder / "000_none_1gpu" / "cell.json").write_bytes(b"\x00\xff")
    sweep.resumes_whole(*command, redone=1)
    assert "001_none_1gpu/record.json is not a readable record" in capsys.readouterr().out
    (sweep.folder / "000_none_1gpu" / "record.json").unlink()
    sweep.resumes_whole(*command, redone=1)
    (sweep.folder / "sweep.json").write_text('{"cells": [{"index"')
    sweep.resumes_whole(*command, redone=0)
    assert "sweep.json cannot be read" in capsys.readouterr().out
    (sweep.folder / "sweep.json").unlink()
    sweep.resumes_whole(*command, redone=0)


def test_a_half_written_checkpoint(sweep, tmp_path, run_config):
    path = tmp_path / "model.safetensors"
    architecture = run_config().model.architecture
    write_checkpoint(RandomWeights(architecture), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert sweep(*ONE, f"checkpoint={path}", "seed=1,2") == 2
    assert not sweep.folder.exists(), "nothing that could run, no sweep"
    command = (*ONE, f"checkpoint=null,{path}")
    assert sweep(*command) == 1
    assert sweep.outcomes() == ["finished", "failed"]
    path.write_bytes(whole)
    sweep.resumes_whole(*command, redone=1)
