"""The real command line in processes of its own: runs, sweeps, exit codes, an outer torchrun.

README's first command begins with a new interpreter; the others are forked from one that has torch loaded.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.warm_program import run_warm
from wanexp.record import Record, read_record
from wanexp.sweep import sweep_name_of

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture
def command(tmp_path: Path):
    """`python -m ...` in an empty folder."""

    def call(
        *arguments: str, program: tuple[str, ...] = ("wanexp",), is_warm: bool = True
    ) -> subprocess.CompletedProcess:
        outer = ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "HYDRA_FULL_ERROR", "MLFLOW_TRACKING_URI")
        environment = {key: value for key, value in os.environ.items() if key not in outer}
        environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
        words = [*program, *arguments]
        if is_warm:
            return run_warm(words, cwd=tmp_path, env=environment, timeout=240)
        return subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return call


def only_run(folder: Path) -> tuple[Path, Record]:
    (run,) = (folder / "multirun" / "runs").iterdir()
    return run, read_record(run)


def cells(folder: Path, name: str) -> dict[str, str]:
    sweep = json.loads((folder / "multirun" / name / "sweep.json").read_text())
    return {cell["folder"]: cell["outcome"] for cell in sweep["cells"]}


@pytest.mark.slow
def test_the_first_command_of_the_readme(command, tmp_path):
    """No argument at all: MLflow included."""
    done = command(is_warm=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run, record = only_run(tmp_path)
    assert record.outcome == "finished" and record.requested["model"]["name"] == "tiny"
    assert (tmp_path / "mlflow.db").exists()
    assert "finished" in done.stdout and "record.json" in done.stdout
    assert "logical CPU device" in done.stdout or "GPU" in done.stdout
    assert "Traceback" not in done.stderr
    assert (run / ".hydra" / "config.yaml").exists()


@pytest.mark.slow
def test_the_sweep_of_the_issue(command, tmp_path):
    done = command(
        "-m",
        *TINY,
        "parallelism=none,data_parallel,block_distribution,distributed",
        "gpus=[0],[0,1]",
        "sweep_name=issue",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert cells(tmp_path, "issue") == {
        "000_none_1gpu": "finished",
        "001_none_1gpu": "skipped",
        "002_data_parallel_1gpu": "finished",
        "003_data_parallel_2gpus": "finished",
        "004_block_distribution_1gpu": "skipped",
        "005_block_distribution_2gpus": "finished",
        "006_distributed_1gpu": "finished",
        "007_distributed_2gpus": "finished",
    }
    for folder, outcome in cells(tmp_path, "issue").items():
        record = read_record(tmp_path / "multirun" / "issue" / folder)
        assert (record.outcome, sweep_name_of(record.sweep_id)) == (outcome, "issue")
        assert record.metrics.get("parity/bit_equal", 1.0) == 1.0
        assert ("parity/rel_l2" in record.metrics) == (outcome == "finished" and "none" not in folder)


def test_an_experiment_by_name(command, tmp_path):
    done = command("+experiment=quick_blocks", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    _, record = only_run(tmp_path)
    assert record.outcome == "finished" and record.effective["mode"] == "block_distribution"


@pytest.mark.slow
def test_a_sweep_by_name(command, tmp_path):
    done = command("+sweep=modes", "parallelism=none,tensor_parallel", *TINY, "sweep_name=modes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(cells(tmp_path, "modes").values()) == ["finished", "finished"]


def test_a_user_error_of_a_run_is_one_line_and_leaves_no_run(command, tmp_path):
    done = command(*TINY, "gpus=[9]")
    assert done.returncode == 2
    assert done.stderr.startswith("error: gpus=[9]: there is no device 9") and done.stderr.count("\n") == 1
    assert list((tmp_path / "multirun" / "runs").iterdir()) == []


def test_a_run_that_takes_too_long_exits_with_1(command, tmp_path):
    done = command(*TINY, "limits.run_s=2", "workload.num_steps=100000")
    assert done.returncode == 1, done.stdout + done.stderr
    _, record = only_run(tmp_path)
    assert record.outcome == "timeout" and "limits.run_s" in record.message
    assert "timeout" in done.stdout


def test_under_an_outer_torchrun_rank_0_alone_leaves_a_record(command, tmp_path):
    done = command(
        *TINY, "parallelism=data_parallel", "gpus=[0,1]", "workload.batch_size=3",
        program=(*TORCHRUN, "2", "-m", "wanexp"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run, record = only_run(tmp_path)
    assert record.outcome == "finished", record.message
    assert record.metrics["parity/bit_equal"] == 1.0
    assert set(record.samples["rank_step_ms"]) == {"0", "1"}
    assert {"memory/cpu0/weights_gib", "memory/cpu1/weights_gib"} <= set(record.metrics)
    assert done.stdout.count("finished") == 1, "one rank talks"
    assert sorted(path.name for path in (run / "ranks").glob("*.jsonl")) == ["rank0.jsonl", "rank1.jsonl"]


def test_an_outer_torchrun_of_the_wrong_size(command, tmp_path):
    done = command(*TINY, "parallelism=block_distribution", program=(*TORCHRUN, "2", "-m", "wanexp"))
    assert done.returncode == 1
    line = "error: torchrun started 2 processes, the layout (blocks=2) has 1 ranks; write --nproc-per-node 1"
    assert done.stderr.count(line) == 1
    assert only_run(tmp_path)[1].outcome == "failed"


def test_a_rank_that_raises_under_an_outer_torchrun_is_in_the_record(command, tmp_path):
    done = command(
        "raises", *TINY, "parallelism=data_parallel", "gpus=[0,1]",
        program=(*TORCHRUN, "2", "-m", "tests.faulty_program"),
    )  # fmt: skip
    assert done.returncode == 1
    _, record = only_run(tmp_path)
    assert (record.outcome, record.message) == ("failed", "rank 1: ValueError: a fault of the test")
    assert record.error is not None and "faulty_program" in record.error["traceback"]
    assert len(record.samples["rank_step_ms"]["1"]) == 2


def test_a_rank_that_is_killed_under_an_outer_torchrun_leaves_a_record(command, tmp_path):
    done = command(
        "is_killed", *TINY, "parallelism=data_parallel", "gpus=[0,1]",
        program=(*TORCHRUN, "2", "-m", "tests.faulty_program"),
    )  # fmt: skip
    assert done.returncode == 1
    _, record = only_run(tmp_path)
    assert record.outcome in ("failed", "interrupted") and record.message
    assert len(record.samples["rank_step_ms"]["1"]) == 2
