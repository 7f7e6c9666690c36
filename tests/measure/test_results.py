"""From reports to metrics, by hand numbers."""

import pytest

from tests.conftest import Composer, cpu_devices
from wanexp.measure.results import GIB, host_warning, latency_metrics, run_metrics
from wanexp.planning.plan import make_plan


def load(seconds: float, growth: int) -> dict:
    return {
        "seconds": seconds,
        "num_bytes": GIB,
        "bytes_read": GIB // 2,
        "bytes_received": GIB // 2,
        "swapped_bytes": 0,
        "anonymous_growth_bytes": growth,
    }


def report(step_s: list[float], label: str, **changes) -> dict:
    return {
        "step_s": step_s,
        "forward_s": [step / 2 for step in step_s for _ in range(2)],
        "lead_s": [],
        "forwards_per_step": 2,
        "warmup_s": 3.0,
        "load": load(2.0, GIB // 4),
        "memory": {label: {"peak_allocated_gib": 4.0, "peak_reserved_gib": 5.0}},
        "weight_gib": [1.0],
        "peak_rss_gib": 0.5,
        "bytes_per_forward": {},
        "swap": {"bytes_per_forward": 0.0, "stall_s": 0.0},
        "gather_stall_s": None,
        "links": [],
        "losses": [],
    } | changes


@pytest.fixture
def config(run_config: Composer):
    return run_config("parallelism=data_parallel", "workload.batch_size=3", "model.sampling_steps=10")


@pytest.fixture
def plan(config):
    return make_plan(config, cpu_devices(2))


def test_latency_and_throughput(config, plan):
    metrics = latency_metrics(config, plan, [2.0, 4.0, 3.0])
    assert metrics["latency/step_ms"] == 3000.0
    assert (metrics["latency/step_ms_min"], metrics["latency/step_ms_max"]) == (2000.0, 4000.0)
    assert metrics["latency/step_ms_iqr"] == 1000.0 and metrics["latency/num_samples"] == 3
    assert metrics["throughput/samples_per_second"] == 1.0
    # a video of 10 steps: 3 videos in 30 s, 5 frames each
    assert metrics["throughput/videos_per_hour"] == pytest.approx(360.0)
    assert metrics["throughput/frames_per_second"] == pytest.approx(0.5)
    assert latency_metrics(config, plan, []) == {}


def test_a_gpu_that_waits_for_its_host(config, plan, run_config: Composer):
    """The lead of the rank that has the least; a warning where that is no queue of kernels at all."""
    reports = {
        0: report([1.0], "a", lead_s=[0.04, 0.05]),
        1: report([1.0], "b", lead_s=[0.002, 0.0001, 0.0003]),
    }
    metrics = run_metrics(config, plan, reports, peak_tflops=None)
    assert metrics["latency/host_lead_ms"] == pytest.approx(0.3)
    assert "host-bound: the GPU of rank 1 was done once" in host_warning(config, plan, reports)
    reports[1]["lead_s"] = [0.002, 0.003]
    assert host_warning(config, plan, reports) is None
    reports[1]["lead_s"] = reports[0]["lead_s"] = [0.0]
    assert "the GPU of ranks 0, 1 was" in host_warning(config, plan, reports)
    alone = host_warning(config, plan, {0: reports[0]})
    assert alone.startswith("host-bound: the GPU was done") and "fewer GPUs" not in alone
    assert host_warning(run_config("workload=train"), plan, reports) is None
    assert "latency/host_lead_ms" not in run_metrics(
        config, plan, {rank: report([1.0], "a") for rank in range(2)}, peak_tflops=None
    )


def test_training_makes_no_videos(run_config: Composer):
    config = run_config("workload=train")
    metrics = latency_metrics(config, make_plan(config, cpu_devices(1)), [1.0])
    assert not [name for name in metrics if "video" in name or "frames" in name]


def test_all_metrics(config, plan):
    slow = report(
        [1.0, 4.0],
        "cpu1",
        load=load(4.0, GIB),
        memory={"cpu1": {"peak_allocated_gib": 6.0}},
        peak_rss_gib=0.7,
        bytes_per_forward={"cfg": float(GIB)},
        links=[{"axis": "cfg", "gb_s": 11.0}],
        warmup_s=7.0,
    )
    first = report(
        [2.0, 2.0],
        "cpu0",
        scatter_s=0.25,
        gather_s=0.5,
        bytes_per_forward={"cfg": GIB / 2},
        links=[{"axis": "cfg", "gb_s": 12.0}],
    )
    metrics = run_metrics(config, plan, {1: slow, 0: first}, peak_tflops=1.0)
    order = [name for name in metrics if name.endswith(("peak_rss_gib", "/read_gib"))]
    assert order == [
        "memory/rank0/peak_rss_gib", "memory/rank1/peak_rss_gib", "load/rank0/read_gib", "load/rank1/read_gib",
        "load/read_gib",
    ], "by rank, in whatever order they came"  # fmt: skip
    expected = {
        "latency/step_ms": 3000.0,  # the slower rank's: 2 and 4
        "latency/forward_ms": 1250.0,  # median of 0.5, 0.5, 2, 2
        "latency/warmup_s": 7.0,
        "throughput/tokens_per_second": 3 * 32 * 2 / 3.0,
        "memory/peak_allocated_gib": 6.0,
        "memory/cpu0/peak_allocated_gib": 4.0,
        "memory/cpu0/peak_reserved_gib": 5.0,
        "memory/cpu1/peak_allocated_gib": 6.0,
        "memory/cpu1/weights_gib": 1.0,
        "memory/rank0/peak_rss_gib": 0.5,
        "memory/rank1/peak_rss_gib": 0.7,
        "load/seconds": 4.0,
        "load/gib": 2.0,
        "load/gib_per_second": 0.5,
        "load/anonymous_growth_gib": 1.0,
        "load/rank0/read_gib": 0.5,
        "load/read_gib": 1.0,
        "load/received_gib": 1.0,
        "communication/cfg_gib_per_forward": 1.5,  # of both ranks
        "communication/cfg_link_gb_s": 11.0,  # the slower one
        "communication/scatter_ms": 250.0,
        "communication/gather_ms": 500.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    flops = config.model.architecture.forward_flops(32) * 2 * 3
    assert metrics["mfu"] == pytest.approx(flops / (3.0 * 2 * 1e12))
    assert "train/loss" not in metrics


def test_no_mfu_without_a_known_peak(config, plan):
    reports = {0: report([1.0], "cpu0"), 1: report([1.0], "cpu1")}
    assert "mfu" not in run_metrics(config, plan, reports, peak_tflops=None)


def test_training_counts_the_backward_pass_and_joins_the_losses(run_config: Composer):
    config = run_config("workload=train", "parallelism=distributed", "workload.batch_size=4")
    plan = make_plan(config, cpu_devices(2))
    reports = {
        rank: report([1.0], f"cpu{rank}", forwards_per_step=1, losses=[9.0, loss])
        for rank, loss in ((0, 1.0), (1, 3.0))
    }
    metrics = run_metrics(config, plan, reports, peak_tflops=1.0)
    assert metrics["train/loss"] == 2.0
    flops = config.model.architecture.forward_flops(32) * 4 * 3
    assert metrics["mfu"] == pytest.approx(flops / 2e12)
