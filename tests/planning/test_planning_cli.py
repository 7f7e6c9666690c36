"""The planner from the command line: task=plan, parallelism=auto, and a run that cannot fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.planning.test_planner import composed
from wanexp import plan_task
from wanexp.record import Record, read_record

ROOT = Path(__file__).resolve().parents[2]


def wanexp(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "wanexp", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def record_in(folder: Path) -> Record:
    (run,) = (folder / "multirun" / "runs").iterdir()
    return read_record(run)


def test_a_plan_needs_no_gpu_and_leaves_no_run(tmp_path):
    done = wanexp(
        tmp_path, "task=plan", "kernels=torch", "model=wan2.1_t2v_14b", "hardware=4x_rtx3080", "video=480p"
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "4 x NVIDIA GeForce RTX 3080, 10.0 GiB free" in done.stdout
    assert "none: needs 30.2 GiB on gpu0, 10.0 free" in done.stdout
    assert "write video.num_frames=53 parallelism=block_distribution" in done.stdout
    assert not list((tmp_path / "multirun" / "runs").iterdir())


def test_a_plan_as_json(tmp_path):
    done = wanexp(tmp_path, "task=plan", "plan_json=true", "model=wan2.1_t2v_14b", "hardware=2x_rtx4090")
    plan = json.loads(done.stdout)
    assert plan["winner"] == "parallelism=hybrid parallelism.ulysses=1 parallelism.shard=2 'gpus=[0,1]'"
    assert plan["advice"] is None
    assert {row["layout"] for row in plan["layouts"] if row["feasible"]} == {
        "hybrid x 2, cfg=2 x shard=2",
        "hybrid x 2, ring=2 x shard=2",
        "hybrid x 2, ulysses=2 x shard=2",
        "fsdp x 2",
        "tensor_parallel x 2",
        "block_distribution x 2",
        "block_distribution x 2, interleaved 20",
    }


def test_a_plan_is_no_cell_of_a_sweep(tmp_path):
    done = wanexp(tmp_path, "-m", "task=plan", "tracking=none", "seed=0,1")
    assert done.returncode == 2
    assert done.stderr == "error: task=plan prints one plan and runs nothing; leave out -m and +sweep\n"
    assert not list((tmp_path / "multirun").iterdir())


def test_training_on_many_gpus_is_planned(capsys):
    config = composed("task=plan", "model=wan2.1_t2v_14b", "hardware=8x_h100", "video=720p", "workload=train")
    plan_task.print_plan(config)
    out = capsys.readouterr().out
    assert "needs GiB" in out and "distributed x 2: needs" in out


def test_auto_runs_what_the_planner_chose_and_records_both(tmp_path):
    done = wanexp(
        tmp_path, "parallelism=auto", "objective=throughput", "hardware=cpu", "tracking=none", "verify=never"
    )
    assert done.returncode == 0, done.stderr
    record = record_in(tmp_path)
    assert record.requested["parallelism"]["mode"] == "auto"
    assert record.effective["mode"] == "none", "logical devices share the cores: no layout is faster"
    assert any("parallelism=auto: no rates are known" in warning for warning in record.warnings)
    assert record.plan["prediction"]["feasible"] is True
    assert record.plan["prediction"]["devices"][0]["weights_gib"] == pytest.approx(
        record.metrics["memory/cpu0/weights_gib"], rel=1e-6
    )
    assert record.metrics["plan/predicted_peak_gib"] > record.metrics["memory/cpu0/weights_gib"]


def test_a_run_that_cannot_fit_ends_before_any_weight_is_read(tmp_path):
    done = wanexp(
        tmp_path,
        "model=wan2.1_t2v_14b",
        "model.architecture.num_layers=4000",  # 2.6 TiB
        "hardware=cpu",
        "tracking=none",
    )
    assert done.returncode == 1
    record = record_in(tmp_path)
    assert record.outcome == "infeasible"
    assert "GiB of host memory" in record.message and record.message.endswith(
        "force=true runs it all the same"
    )
    assert record.plan["prediction"]["feasible"] is False
    assert record.metrics["plan/predicted_peak_gib"] > 2600
    assert "start workers" not in done.stdout
