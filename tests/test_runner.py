"""Real runs through wanexp.runner.run, with real processes and logical devices: outcomes, records, parity."""

import errno
import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import faults
from tests.conftest import CLIP, PER_TOKEN, TWO_EXPERTS, Composer, cpu_devices
from wanexp import launch as launch_module
from wanexp.errors import UserError
from wanexp.hardware.devices import Device
from wanexp.job import Job
from wanexp.measure import parity
from wanexp.parallel.layout import Layout
from wanexp.planning.plan import make_plan
from wanexp.record import SCHEMA_VERSION, Record, read_record
from wanexp.runner import (
    NO_KERNEL,
    compare_with_reference,
    effective_settings,
    prepare,
    run,
    take_telemetry,
)
from wanexp.sweep import SweepCell
from wanexp.wan.flash_attention import CannotRun
from wanexp.wan.weights import RandomWeights
from wanexp.wan.write_checkpoint import write_checkpoint

FEW = ("workload.num_steps=3",)
MODES = {
    "data_parallel": ("parallelism=data_parallel", "gpus=[0,1]"),
    "distributed": ("parallelism=distributed", "gpus=[0,1]"),
    "four_processes": ("parallelism=data_parallel", "gpus=[0,1,2,3]", "workload.batch_size=5"),
    "block_distribution": ("parallelism=block_distribution", "gpus=[0,1,2,3]"),
}
WORKLOADS = {
    "cfg": (),
    "no_cfg": ("workload.guidance_scale=[1]",),
    "two_experts": TWO_EXPERTS,
    "i2v_clip": CLIP,
    "ti2v": PER_TOKEN,
}


@pytest.fixture
def execute(run_config: Composer, tmp_path: Path):
    """Runs a config made of overrides; the record it leaves on disk."""

    def call(*overrides: str, sweep: SweepCell | None = None) -> Record:
        (tmp_path / "run" / "record.json").unlink(missing_ok=True)
        record = run(run_config(*FEW, *overrides), folder=tmp_path / "run", overrides=overrides, sweep=sweep)
        on_disk = json.loads((tmp_path / "run" / "record.json").read_text())
        assert on_disk == json.loads(json.dumps(asdict(record)).replace("NaN", "null"))
        return read_record(tmp_path / "run")

    return call


# One workload with every mode would be 15 runs of two launches: each mode meets each workload in the in-process
# tests of tests/parallel, and here every mode meets two of them and every workload two modes.
@pytest.mark.parametrize(
    ("mode", "workload"),
    [
        ("data_parallel", "cfg"),
        ("data_parallel", "i2v_clip"),
        ("four_processes", "two_experts"),
        ("distributed", "no_cfg"),
        ("distributed", "ti2v"),
        ("block_distribution", "two_experts"),
        ("block_distribution", "i2v_clip"),
        ("block_distribution", "ti2v"),
    ],
)
def test_a_mode_gives_the_answer_of_mode_none_to_the_bit(execute, mode, workload):
    record = execute(*MODES[mode], *WORKLOADS[workload], "verify=always")
    assert record.outcome == "finished", record.message
    assert record.metrics["parity/rel_l2"] <= 1e-5
    assert record.metrics["parity/bit_equal"] == 1.0
    assert record.metrics["parity/num_blocks"] == 4
    assert record.effective["verified"] == "flow, all 4 blocks"


def test_uneven_shares_and_the_whole_record(execute, tmp_path):
    """Three samples on two replicas; every key and metric that the record promises."""
    record = execute(*MODES["data_parallel"], "workload.batch_size=3", "precision=bf16")
    assert record.outcome == "finished", record.message
    document = json.loads((tmp_path / "run" / "record.json").read_text())
    assert document["schema_version"] == SCHEMA_VERSION
    assert {"outcome", "requested", "effective", "metrics", "samples", "environment"} <= set(document)
    assert {"mode", "layout", "attention", "precision", "device_type", "devices"} <= set(
        document["effective"]
    )

    assert document["requested"]["workload"]["batch_size"] == 3
    effective = record.effective
    assert (effective["mode"], effective["layout"]) == ("data_parallel", Layout(dp=2).degrees())
    assert (effective["precision"], effective["device_type"]) == ("bf16", "cpu")
    assert effective["attention"].startswith("sdpa_") and document["requested"]["attention"] == "auto"
    assert [device["label"] for device in effective["devices"]] == ["cpu0", "cpu1"]
    assert effective["weights"] == [{"source": "random", "seed": 0}]
    assert effective["batch_size"] == 3
    assert [rank["num_samples"] for rank in record.plan["ranks"]] == [2, 1]

    metrics = record.metrics
    for name in (
        "latency/step_ms",
        "latency/forward_ms",
        "latency/warmup_s",
        "throughput/videos_per_hour",
        "throughput/frames_per_second",
        "throughput/tokens_per_second",
        "memory/peak_allocated_gib",
        "memory/cpu0/peak_allocated_gib",
        "memory/cpu1/peak_allocated_gib",
        "memory/rank0/peak_rss_gib",
        "memory/rank1/peak_rss_gib",
        "load/seconds",
        "load/gib_per_second",
        "communication/scatter_ms",
        "communication/gather_ms",
    ):
        assert metrics[name] > 0, name
    assert not [name for name in metrics if name.endswith("_gib_per_forward")], "replicas exchange nothing"
    assert metrics["parity/bit_equal"] == 1.0 and metrics["parity/rel_l2"] == 0.0
    assert all(math.isfinite(value) for value in metrics.values())

    assert len(record.samples["step_ms"]) == 3
    assert len(record.samples["forward_ms"]) == 6, "two forwards a step"
    assert record.samples["losses"] == []
    for index, step in enumerate(record.samples["step_ms"]):
        assert step == max(times[index] for times in record.samples["rank_step_ms"].values())
    assert {"torch", "host", "packages", "git"} <= set(record.environment)
    assert record.error is None and record.message == ""
    assert record.started < (record.ended or "")


def test_blocks_are_spread_and_the_seams_counted(execute):
    record = execute("parallelism=block_distribution", "gpus=[3,1]", "verify=never")
    assert record.plan["block_owner"] == [0, 0, 1, 1]
    assert [device["label"] for device in record.effective["devices"]] == ["cpu3", "cpu1"]
    metrics = record.metrics
    weights = [metrics[f"memory/{label}/weights_gib"] for label in ("cpu3", "cpu1")]
    assert weights == pytest.approx(record.plan["weight_gib"])
    assert metrics["memory/peak_allocated_gib"] == max(weights)
    # Hidden states twice (there and back as patches), and what all blocks share once: see test_block_distribution.
    assert metrics["communication/blocks_gib_per_forward"] > 0
    assert "verified" not in record.effective and "parity/rel_l2" not in metrics


def test_training_in_processes(execute):
    record = execute(
        *MODES["distributed"], "workload=train", "workload.batch_size=4", "workload.learning_rate=1e-3"
    )
    assert record.outcome == "finished", record.message
    assert record.effective["verified"] == "gradients, all 4 blocks"
    assert record.metrics["parity/rel_l2"] <= 1e-5
    assert len(record.samples["losses"]) == 3
    assert record.metrics["train/loss"] > 0
    assert "throughput/videos_per_hour" not in record.metrics
    bare = execute("workload=train", "workload.batch_size=4", "workload.learning_rate=1e-3")
    assert bare.metrics["train/loss"] == pytest.approx(record.metrics["train/loss"], rel=1e-5)
    # fp32 weights and two moments of AdamW: gradients are freed after a step
    assert bare.metrics["memory/cpu0/peak_allocated_gib"] >= 3 * bare.metrics["memory/cpu0/weights_gib"]


@pytest.mark.parametrize(
    ("layout", "shards", "dtype"),
    [("native", 3, torch.bfloat16), ("diffusers", 1, torch.float32), ("fp8_scaled", 2, torch.float16)],
)
def test_a_run_from_a_checkpoint(execute, run_config, tmp_path, layout, shards, dtype):
    weights = RandomWeights(run_config().model.architecture, seed=7)
    write_checkpoint(weights, tmp_path / "checkpoint", layout=layout, num_shards=shards, dtype=dtype)
    record = execute(*MODES["block_distribution"], f"checkpoint={tmp_path / 'checkpoint'}", "verify=always")
    assert record.outcome == "finished", record.message
    assert record.metrics["parity/bit_equal"] == 1.0
    (source,) = record.effective["weights"]
    assert source["source"] != "random" and layout.split("_")[0] in json.dumps(source)
    assert record.requested["checkpoint"] == str(tmp_path / "checkpoint")


def test_a_run_does_not_write_over_another(run_config, tmp_path):
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run; write another folder"):
        run(run_config(), folder=tmp_path)
    assert (tmp_path / "record.json").read_text() == "{}"


def test_weights_that_give_nan_are_no_result(execute, run_config, tmp_path):
    write_checkpoint(RandomWeights(run_config().model.architecture), tmp_path / "checkpoint")
    (file,) = (tmp_path / "checkpoint").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if name.endswith("self_attn.q.weight")).fill_(math.nan)
    save_file(tensors, file, metadata)
    record = execute(*MODES["data_parallel"], f"checkpoint={tmp_path / 'checkpoint'}")
    assert record.outcome == "failed"
    assert record.message.startswith("the latents are not finite (nan or inf)")
    assert "parity/rel_l2" not in record.metrics and len(record.samples["step_ms"]) == 3


def test_a_checkpoint_of_another_model_is_a_user_error_before_any_launch(execute, run_config, tmp_path):
    weights = RandomWeights(run_config("model.architecture.num_layers=2").model.architecture)
    write_checkpoint(weights, tmp_path / "checkpoint")
    with pytest.raises(UserError, match="4"):
        execute(f"checkpoint={tmp_path / 'checkpoint'}")
    assert list((tmp_path / "run").iterdir()) == [], "bad input is no run"


def test_profile_leaves_a_trace_and_a_table(execute, tmp_path):
    record = execute("parallelism=data_parallel", "gpus=[0,1]", "profile=true", "verify=never")
    assert record.artifacts == sorted(
        f"profile/{name}"
        for rank in (0, 1)
        for name in (f"kernels_rank{rank}.txt", f"trace_rank{rank}.json.gz")
    )
    for name in record.artifacts:
        assert (tmp_path / "run" / name).stat().st_size > 1000
    assert "aten::" in (tmp_path / "run" / "profile" / "kernels_rank1.txt").read_text()


@pytest.mark.parametrize(
    ("overrides", "peak_tflops"),
    [
        (("precision=bf16",), 989),
        (("precision=fp32",), None),
        (("precision=fp8",), None),
        (("precision=bf16", "attention=fa3_fp8"), None),
        (("precision=int8_weight",), 989),  # multiplied in bf16
    ],
)
def test_the_peak_that_mfu_is_of(run_config, monkeypatch, overrides, peak_tflops):
    gpu = Device("cuda", 0, "NVIDIA H200", 2**37, 2**37, compute_capability=(9, 0))
    monkeypatch.setattr("wanexp.runner.find_devices", lambda _: (gpu,))
    assert prepare(run_config(*overrides), in_sweep=False).peak_tflops == peak_tflops


def test_auto_compares_the_first_blocks_where_all_would_take_too_long(execute, monkeypatch, tmp_path):
    monkeypatch.setattr(launch_module.worker, "main", faults.has_no_time_for_a_whole_reference)
    record = execute(*MODES["block_distribution"])
    assert record.outcome == "finished", record.message
    assert record.metrics["parity/num_blocks"] == 1
    assert record.metrics["parity/bit_equal"] == 1.0
    assert record.effective["verified"] == "flow, the first 1 of 4 blocks"
    assert not (tmp_path / "run" / parity.FILE_NAME).exists()


def test_auto_has_nothing_to_compare_mode_none_with(execute):
    record = execute()
    assert record.outcome == "finished" and "parity/rel_l2" not in record.metrics


def test_always_repeats_mode_none(execute, capsys):
    assert execute("verify=always", "workload.batch_size=2").metrics["parity/bit_equal"] == 1.0
    assert "\nreference: load weights ...\n" in capsys.readouterr().out


def test_a_wrong_answer_is_inexact(execute, monkeypatch):
    monkeypatch.setattr(launch_module.worker, "main", faults.answers_wrongly)
    record = execute(*MODES["data_parallel"])
    assert record.outcome == "inexact" and record.exit_code() == 1
    assert record.metrics["parity/rel_l2"] == pytest.approx(0.01, rel=1e-3)
    assert record.message == "the flow differs from mode none by 0.01 relative L2; fp32 allows 1e-05"


@pytest.mark.parametrize(
    ("precision", "attention", "rel_l2", "allowed_by"),
    [
        ("fp8", "fa3_fp8", 0.176, None),  # as measured: docs/results/float8.json
        ("bf16", "fa3_fp8", 0.176, None),
        ("fp8", "auto", 0.051, None),
        ("bf16", "fa3_fp8", 0.5, "attention=fa3_fp8 allows 0.3"),
        ("fp8", "auto", 0.176, "fp8 allows 0.12"),
        ("bf16", "auto", 0.03, "bf16 allows 0.02"),
    ],
)
def test_a_lossy_run_may_be_as_far_off_as_it_was_measured_to_be_and_no_further(
    run_config: Composer, tmp_path, monkeypatch, precision, attention, rel_l2, allowed_by
):
    config = run_config(f"precision={precision}", f"attention={attention}")
    plan = make_plan(config, cpu_devices(1))
    record = Record("id", "name", "now", {}, outcome="finished", effective=effective_settings(config, plan))
    record.effective |= {"attention": attention, "cross_attention": attention}
    launched = SimpleNamespace(outcome="finished", reports={0: {"rel_l2": rel_l2, "bit_equal": False}})
    monkeypatch.setattr("wanexp.runner._launch", lambda *_: launched)
    compare_with_reference(record, Job(config, plan, tmp_path, tmp_path, 1), 4, lambda *_: None)
    assert record.outcome == ("inexact" if allowed_by else "finished")
    assert record.message.endswith(allowed_by or "")
    assert record.effective["is_lossy"] == (precision != "bf16" or attention != "auto")
    assert record.effective["tolerance"] == {"fa3_fp8": 0.3}.get(attention, config.precision.tolerance)


def test_an_answer_of_nan_is_inexact_and_its_record_is_still_written(execute, monkeypatch):
    monkeypatch.setattr(launch_module.worker, "main", faults.answers_nan)
    record = execute(*MODES["data_parallel"])
    assert record.outcome == "inexact"
    assert "parity/rel_l2" not in record.metrics and record.metrics["parity/bit_equal"] == 0
    assert "inf" in record.message


def test_a_run_without_warm_up_says_what_its_first_step_has_in_it(execute):
    cold, warm = (execute("verify=never", f"workload.num_warmup_steps={number}") for number in (0, 1))
    words = "the first timed step has one-time set-up in it (workload.num_warmup_steps=0)"
    assert any(warning.startswith(words) for warning in cold.warnings)
    assert not any("warm" in warning for warning in warm.warnings)


def test_a_loss_of_nan_is_kept_out_of_the_metrics(execute):
    record = execute("workload=train", "workload.learning_rate=1e30", "workload.num_warmup_steps=0")
    assert record.outcome == "failed"
    assert record.message.startswith("a loss is not finite (nan or inf)")
    assert record.samples["losses"][-1] is None and record.samples["losses"][0] is not None
    assert "train/loss" not in record.metrics
    assert any("train/loss" in warning for warning in record.warnings)


@pytest.mark.parametrize(("verify", "outcome"), [("auto", "finished"), ("always", "oom")])
def test_a_reference_that_cannot_run(execute, monkeypatch, tmp_path, verify, outcome):
    monkeypatch.setattr(launch_module.worker, "main", faults.reference_fails)
    record = execute(*MODES["block_distribution"], f"verify={verify}")
    assert record.outcome == outcome
    assert any("not compared" in warning for warning in record.warnings)
    assert not list((tmp_path / "run").glob("parity*")), "what is compared does not stay"
    assert len(record.samples["step_ms"]) == 3, "what was measured stays"


def test_a_run_that_fails_halfway_keeps_its_samples(execute, monkeypatch):
    monkeypatch.setattr(launch_module.worker, "main", faults.raises)
    record = execute(*MODES["data_parallel"], "workload.num_steps=6")
    assert (record.outcome, record.message) == ("failed", "rank 1: ValueError: a fault of the test")
    assert len(record.samples["step_ms"]) == 2
    assert record.metrics["latency/num_samples"] == 2 and record.metrics["throughput/videos_per_hour"] > 0
    assert "latency/forward_ms" not in record.metrics
    assert record.error is not None and "Traceback" in record.error["traceback"]
    assert record.effective["mode"] == "data_parallel" and record.environment["host"]


SENSELESS = [
    (("parallelism=block_distribution", "gpus=[0,1,2,3,4]"), "5 GPUs for 4 transformer blocks"),
    (("parallelism=data_parallel", "gpus=[0,1]", "workload.batch_size=1"), "smaller than the 2 replicas"),
    (("parallelism=data_parallel", "gpus=[0,1]", "workload=train"), "write parallelism=distributed"),
    (("parallelism=distributed", "gpus=[0,1]", "workload=train", "workload.batch_size=3"), "multiple of 2"),
    (("parallelism=data_parallel", "gpus=[0,1]", "parallelism.dp=3"), "needs dp 3 = 3 GPUs"),
]


@pytest.mark.parametrize(("overrides", "words"), SENSELESS)
def test_a_senseless_layout_is_skipped_in_a_sweep_and_an_error_alone(execute, tmp_path, overrides, words):
    record = execute(*overrides, sweep=SweepCell("a_sweep", 0, 2))
    assert record.outcome == "skipped" and words in record.message
    assert record.sweep_id == "a_sweep" and record.exit_code() == 0
    (tmp_path / "run" / "record.json").unlink()
    with pytest.raises(UserError, match=words):
        execute(*overrides)
    assert not (tmp_path / "run" / "record.json").exists()


def test_mode_none_takes_the_first_of_several_gpus_in_a_sweep_and_refuses_them_alone(execute):
    record = execute("gpus=[1,0]", sweep=SweepCell("a_sweep", 0, 2))
    assert record.outcome == "finished" and record.requested["gpus"] == [1, 0]
    assert [device["label"] for device in record.effective["devices"]] == ["cpu1"]
    assert record.message == "gpus names 2 devices; mode none uses the first of them"
    with pytest.raises(UserError, match="mode none uses one device, gpus names 2"):
        execute("gpus=[1,0]")


def test_a_kernel_that_the_device_lacks_is_skipped_in_a_sweep_and_fails_alone(execute, monkeypatch, tmp_path):
    monkeypatch.setattr(launch_module.worker, "main", faults.lacks_a_kernel)
    record = execute("verify=never", sweep=SweepCell("a_sweep", 0, 2))
    assert (record.outcome, record.error) == ("skipped", None)
    assert "fa3 cannot run here" in record.message
    with pytest.raises(UserError, match="fa3 cannot run here"):
        execute("verify=never")
    record = read_record(tmp_path / "run")  # what shows once ranks have begun is kept
    assert record.outcome == "failed" and record.error["type"] == NO_KERNEL == CannotRun.__name__


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("attention=fa3", "attention=fa3 cannot run on cpu: it needs a CUDA device"),
        ("attention=sdpa_cudnn", "attention=sdpa_cudnn cannot run on cpu: it needs a CUDA device"),
        ("kernels=triton", "kernels=triton cannot be had: they run on CUDA GPUs, found cpu"),
    ],
)
def test_a_kernel_that_is_not_for_these_devices_is_refused_before_any_launch(
    execute, tmp_path, override, words
):
    with pytest.raises(UserError, match=words):
        execute(override)
    assert not (tmp_path / "run" / "ranks").exists()
    record = execute(override, sweep=SweepCell("a_sweep", 0, 2))
    assert record.outcome == "skipped" and words in record.message


@pytest.mark.parametrize(
    ("gpus", "words"),
    [("[0,8]", "there is no device 8; found: 8 logical CPU devices, 0 to 7"), ("[9,10]", "no device 9, 10")],
)
def test_a_device_that_is_not_there(execute, gpus, words):
    with pytest.raises(UserError, match=words):
        execute("parallelism=data_parallel", f"gpus={gpus}")
    record = execute("parallelism=data_parallel", f"gpus={gpus}", sweep=SweepCell("a_sweep", 0, 2))
    assert record.outcome == "failed", "a mistake, not a cell that makes no sense"


def test_gpus_null_takes_two_logical_devices(execute):
    record = execute("parallelism=block_distribution", "verify=never")
    assert [device["label"] for device in record.effective["devices"]] == ["cpu0", "cpu1"]


def test_a_mistake_of_our_own_leaves_its_record_too(run_config: Composer, tmp_path, monkeypatch, capsys):
    def broken(*_arguments: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("wanexp.runner.execute", broken)
    record = run(run_config(), folder=tmp_path)
    assert record.exit_code() == 1
    kept = read_record(tmp_path)
    assert (kept.outcome, kept.message) == ("failed", "RuntimeError: a bug")
    assert "in broken" in kept.error["traceback"]
    assert "wanexp itself failed (RuntimeError)" in capsys.readouterr().out


def test_an_error_that_showed_once_ranks_had_begun_is_tracked(run_config, tmp_path, monkeypatch, capsys):
    def execute(_config, _prepared, record: Record, *_) -> None:
        record.effective = {"mode": "none"}
        raise UserError("a kernel is not there")

    def track(record: Record, folder: Path, _config) -> SimpleNamespace:
        return SimpleNamespace(lines=[f"MLflow: {read_record(folder).outcome}"])

    monkeypatch.setattr("wanexp.runner.execute", execute)
    monkeypatch.setattr("wanexp.runner.track", track)
    with pytest.raises(UserError, match="a kernel is not there"):
        run(run_config("tracking.enabled=true"), folder=tmp_path)
    assert "MLflow: failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("has_all_devices", "names"), [(True, {"joules", "joules_per_step"}), (False, set())]
)
def test_the_energy_of_one_machine_of_several_is_no_total(run_config, has_all_devices, names):
    telemetry = SimpleNamespace(summarise=lambda *_: ({"energy/joules": 6.0, "telemetry/x": 1.0}, []))
    launched = SimpleNamespace(reports={0: {"window": (1.0, 2.0)}})
    record = Record("id", "none tiny", "now", {})
    take_telemetry(record, run_config(), telemetry, launched, has_all_devices=has_all_devices)
    assert set(record.metrics) == {"telemetry/x", *(f"energy/{name}" for name in names)}


def test_a_full_disk_costs_the_record_and_not_the_end_table(run_config, tmp_path, monkeypatch, capsys):
    def write(record: Record, folder: Path) -> Path:
        (folder / "record.json.partial").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    def execute(_config, _prepared, record: Record, *_) -> None:
        record.outcome, record.metrics = "finished", {"latency/step_ms": 12.5}

    monkeypatch.setattr(Record, "write", write)
    monkeypatch.setattr("wanexp.runner.execute", execute)
    record = run(run_config(), folder=tmp_path)
    out, err = capsys.readouterr()
    assert "finished" in out and "12.50 ms" in out
    line = f"cannot write {tmp_path}/record.json: No space left on device"
    assert err == f"error: {line}; the numbers above are not kept\n"
    assert (record.outcome, record.message, record.exit_code()) == ("failed", line, 1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):  # a sweep stops
        run(run_config(), folder=tmp_path, sweep=SweepCell("a_sweep", 0, 2))
