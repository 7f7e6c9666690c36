"""The planner from the command line: task=plan, parallelism=auto, and a run that cannot fit."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.planning.test_planner import composed
from tests.warm_program import run_warm
from wanexp import plan_task
from wanexp.record import Record, read_record
from wanexp.terminal.plan_table import not_by_default

ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = ("fp16", "fp32", "fp8", "fp8_weight", "int8_weight")


def wanexp(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return run_warm(["wanexp", *arguments], cwd=folder, env=environment, timeout=120)


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
    assert "Would fit     write offload=block_swap parallelism=hybrid parallelism.ring=2" in done.stdout
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


def test_a_plan_says_what_is_swapped_and_repeats_it_to_be_pasted(capsys, monkeypatch):
    words = ("task=plan", "model=wan2.1_t2v_14b", "hardware=1x_rtx4090", "offload=block_swap")
    monkeypatch.setenv("COLUMNS", "120")
    plan_task.print_plan(composed(*words))
    out = capsys.readouterr().out
    assert "on host" in out and "10 blocks, 6.5 GiB" in out
    assert "Settings      offload=block_swap" in out
    assert "Best for latency  offload=block_swap parallelism=none 'gpus=[0]'" in out
    plan_task.print_plan(composed(*words, "plan_json=true"))
    (row,) = json.loads(capsys.readouterr().out)["layouts"]
    assert row["swapped_blocks"] == 10 and row["host_gib"] == pytest.approx(10 * 0.6545, abs=0.01)


def test_a_plan_with_block_swap_fits_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = ("task=plan", "model=wan2.1_t2v_14b", "hardware=2x_rtx3080", "offload=block_swap")
    plan_task.print_plan(composed(*words, "parallelism=tensor_parallel"))
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith("asked for"))
    assert "21, 13.7 GiB" in row and len(row) <= 80


def test_a_plan_of_defaults_says_nothing_of_the_host(capsys):
    plan_task.print_plan(composed("task=plan", "model=wan2.1_t2v_14b", "hardware=1x_h200"))
    out = capsys.readouterr().out
    assert "on host" not in out and "Settings" not in out and "Ranked by" not in out


@pytest.mark.parametrize(
    ("overrides", "written"),
    [
        ([], ""),
        (["precision=bf16", "offload=none", "workload.guidance_scale=[5]"], ""),
        *((words, " ".join(words)) for words in ([f"precision={name}"] for name in PRECISIONS)),
        (["offload=block_swap", "offload.blocks=7", "offload.buffers=3"], None),
        (["precision.linear=int8_weight", "precision.residual_fp32=true"], None),
        (["precision=fp8", "precision.linear=dtype"], None),
        (["workload.guidance_scale=[1]"], "'workload.guidance_scale=[1]'"),
        (["workload=train", "workload.guidance_scale=[1]"], "workload=train"),
        (["workload=train", "workload.batch_size=2", "workload.activation_checkpointing=false"], None),
        (["attention=sdpa_flash", "kernels=torch", "transport=collectives", "ffn_chunks=8"], None),
    ],
)
def test_settings_that_are_not_the_default(overrides, written):
    written = " ".join(overrides) if written is None else written
    assert not_by_default(composed(*overrides)) == written


def test_a_plan_of_training_says_what_it_ranks_by(capsys):
    plan_task.print_plan(composed("task=plan", "hardware=4x_rtx3080", "workload=train"))
    out = capsys.readouterr().out
    assert "Ranked by     throughput: in training nobody waits for one sample" in out
    assert "Best for throughput  workload=train parallelism=distributed" in out


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
    done = wanexp(tmp_path, *TINY, "parallelism=auto", "objective=throughput", "verify=never")
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
