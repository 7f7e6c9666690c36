"""Several machines, as two torchruns on this one: the command line in real processes, over loopback and gloo."""

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.conftest import TINY
from tests.test_launch import make_job
from tests.warm_program import WarmProgram
from wanexp.outer_watcher import OuterWatcher
from wanexp.record import Record, read_record

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = (
    "parallelism=hybrid",
    "parallelism.cfg=1",
    "parallelism.ulysses=2",
    "parallelism.ring=2",
    "gpus=[0,1]",
)
RING = ("parallelism=context_parallel", "parallelism.ulysses=1", "parallelism.ring=2", "gpus=[0]")


@dataclass
class Ended:
    """How the two torchruns ended; rank 0 was on the first."""

    folders: tuple[Path, Path]
    codes: tuple[int, int]
    outputs: tuple[str, str]
    seconds: float

    @property
    def record(self) -> Record:
        (run,) = (self.folders[0] / "multirun" / "runs").iterdir()
        assert not (self.folders[1] / "multirun").exists(), "rank 0 alone leaves a folder"
        return read_record(run)


@pytest.fixture
def two_machines(tmp_path: Path):
    """The same command under two torchruns of `ranks` processes; `second`: what the second one has more."""
    started: list[WarmProgram] = []

    def call(
        *arguments: str, program: tuple[str, ...] = ("wanexp",), ranks: int = 2, second: tuple[str, ...] = ()
    ) -> Ended:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        outer = ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "HYDRA_FULL_ERROR", "MLFLOW_TRACKING_URI")
        environment = {key: value for key, value in os.environ.items() if key not in outer}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        folders, outputs = (tmp_path / "a", tmp_path / "b"), []
        for folder, is_host, more in zip(folders, ("1", "0"), ((), second), strict=True):
            folder.mkdir()
            outputs.append(folder / "output")
            words = [
                *("torch.distributed.run", "--nnodes", "2"),
                *("--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"),
                *("--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", f"is_host={is_host}"),
                *("-m", *program, *TINY, *arguments, *more),
            ]
            started.append(
                WarmProgram(words, cwd=folder, env=environment, stdout=outputs[-1], stderr=outputs[-1])
            )
        begin = time.monotonic()
        codes = tuple(process.wait(timeout=120) for process in started)
        seconds = time.monotonic() - begin
        return Ended(folders, codes, tuple(output.read_text() for output in outputs), seconds)

    yield call
    for process in started:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)


def faulty(fault: str) -> tuple[str, ...]:
    return ("tests.faulty_program", fault)


def left_behind(folder: Path) -> list[int]:
    """Processes that still work there."""
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        if process.info["cwd"] == str(folder) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def assert_nobody_is_left(ended: Ended, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while left := [pid for folder in ended.folders for pid in left_behind(folder)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_hybrid_across_machines_leaves_one_record_with_both_in_it(two_machines):
    ended = two_machines(*CONTEXT)
    assert ended.codes == (0, 0), ended.outputs
    record = ended.record
    assert record.outcome == "finished", record.message
    assert record.metrics["parity/rel_l2"] < 1e-5
    first, second = (device["node"] for device in record.effective["devices"][::2])
    assert first != second and first.rpartition("-")[0] == second.rpartition("-")[0] == socket.gethostname()
    labels = [f"cpu{index}.{node}" for node in (first, second) for index in (0, 1)]
    assert [device["label"] for device in record.effective["devices"]] == labels
    assert all(f"memory/{label}/peak_allocated_gib" in record.metrics for label in labels)
    assert list(record.environment["machines"]) == [second]
    assert record.environment["machines"][second]["host"]["name"] == socket.gethostname()
    assert ended.outputs[0].count("finished") == 1 and "finished" not in ended.outputs[1]
    read = [record.metrics[f"load/rank{rank}/read_gib"] for rank in range(4)]
    assert read[0] + read[1] == pytest.approx(read[2] + read[3]), "each machine reads all weights once"
    assert_nobody_is_left(ended)


def test_machines_that_were_asked_for_different_things(two_machines):
    ended = two_machines(*RING, "seed=1", second=("seed=2",), ranks=1)
    names = [f"{socket.gethostname()}-{number}" for number in (0, 1)]
    line = f"seed differs between rank 0 on {names[0]} (1) and rank 1 on {names[1]} (2); give all machines the same"
    assert ended.outputs[0].count(f"error: {line}") == 1, ended.outputs
    assert "rank 1: rank 0 handed out no run; its output says why" in ended.outputs[1]
    assert (ended.record.outcome, ended.record.message) == ("failed", line)
    assert ended.codes == (1, 1)


def test_a_machine_that_dies_is_named(two_machines):
    ended = two_machines(*RING, program=faulty("its_machine_dies"), ranks=1)
    assert ended.codes == (1, -signal.SIGKILL), ended.outputs
    record = ended.record
    assert record.outcome == "failed"
    assert record.message == f"rank 1 on {socket.gethostname()}-1 is gone: no answer for 5 s"
    assert len(record.samples["rank_step_ms"]["0"]) == 2, "what was measured until then is kept"
    assert_nobody_is_left(ended)


def test_a_rank_of_another_machine_that_hangs_is_named_within_the_stall_limit(two_machines):
    ended = two_machines(*RING, "limits.stall_s=6", program=faulty("hangs"), ranks=1)
    record = ended.record
    assert record.outcome == "timeout", record.message
    assert f"rank 1 on {socket.gethostname()}-1 holds up the others" in record.message
    assert "limits.stall_s" in record.message and ended.codes == (1, 1)
    assert_nobody_is_left(ended)


def test_a_machine_that_cannot_write_is_named(two_machines):
    ended = two_machines(*RING, program=faulty("cannot_write"), ranks=1)
    assert ended.record.outcome == "failed" and ended.codes == (1, 1), ended.outputs
    name = f"{socket.gethostname()}-1"
    expected = f"on {name}: rank 1: PermissionError: [Errno 13] Permission denied: '/home/a'"
    assert ended.record.message == expected
    assert ended.seconds < 60
    assert_nobody_is_left(ended)


def test_a_report_that_comes_with_the_end_counts(run_config, tmp_path):
    """The end of a rank is looked at before its events."""
    own = SimpleNamespace(exit_code=None, new_events=list)

    def collect() -> list[dict]:
        own.exit_code, own.new_events = 0, lambda: [{"kind": "report", "rank": 0, "time": 1.0}]
        return []

    meeting = SimpleNamespace(collect=collect)
    watcher = OuterWatcher(make_job(run_config(), tmp_path), meeting, own, lambda _event: None)
    assert watcher.poll() == [] and watcher.exit_codes == {}
    assert [event["kind"] for event in watcher.poll()] == ["report"] and watcher.exit_codes == {}


def test_a_rank_that_never_arrives_is_named_within_the_stall_limit(two_machines):
    ended = two_machines(*RING, "limits.stall_s=3", program=faulty("never_arrives"), ranks=1)
    line = f"rank 1 did not arrive within 3 s (limits.stall_s); here: rank 0 on {socket.gethostname()}; "
    assert ended.record.outcome == "failed" and ended.record.message.startswith(line)
    assert ended.outputs[0].count(f"error: {line}") == 1
    assert ended.codes[0] == 1
