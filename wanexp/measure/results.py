"""From the reports of the ranks to the metrics of the run. Pure."""

from collections.abc import Mapping
from typing import Any

from wanexp.config import RunConfig
from wanexp.measure.statistics import summarise_samples
from wanexp.planning.plan import Plan
from wanexp.workloads.sizes import num_tokens

Report = Mapping[str, Any]
GIB = 1024**3
# A lead at the end of a step below which its kernels cannot have been waiting in a queue.
HOST_BOUND_S = 0.0005
TRAIN_FLOPS_FACTOR = 3  # forward and twice as much backward; recomputation is no useful work


def step_seconds(per_rank: Mapping[int, list[float]]) -> list[float]:
    """Seconds of each step that all ranks finished: its slowest rank's."""
    return [max(times) for times in zip(*per_rank.values(), strict=False)]


def latency_metrics(config: RunConfig, plan: Plan, steps: list[float]) -> dict[str, float]:
    """What follows from the step times alone, so that it survives a run that failed halfway.

    A video is `model.sampling_steps` steps of its transformer; text encoder and VAE are not in it.
    """
    if not steps:
        return {}
    summary = summarise_samples(steps)
    step_s, batch = summary.median, plan.batch_size
    metrics = {
        "latency/step_ms": step_s * 1000,
        "latency/step_ms_iqr": summary.iqr * 1000,
        "latency/step_ms_min": summary.minimum * 1000,
        "latency/step_ms_max": summary.maximum * 1000,
        "latency/num_samples": float(summary.n),
        "throughput/samples_per_second": batch / step_s,
    }
    if config.workload.name == "denoise":
        video_s = step_s * config.model.sampling_steps / batch
        metrics |= {
            "throughput/videos_per_hour": 3600 / video_s,
            "throughput/frames_per_second": config.video.num_frames / video_s,
        }
    return metrics


def run_metrics(
    config: RunConfig, plan: Plan, reports: Mapping[int, Report], *, peak_tflops: float | None
) -> dict[str, float]:
    """All metrics of a launch whose ranks came to their end. peak_tflops: dense peak of one device, if known."""
    reports = dict(sorted(reports.items()))  # they came in any order
    steps = step_seconds({rank: report["step_s"] for rank, report in reports.items()})
    metrics = latency_metrics(config, plan, steps)
    step_s = metrics["latency/step_ms"] / 1000
    first = reports[min(reports)]
    tokens = num_tokens(config.model, config.video)
    forwards = first["forwards_per_step"]
    metrics["latency/forward_ms"] = 1000 * max(
        summarise_samples(report["forward_s"]).median for report in reports.values()
    )
    metrics["throughput/tokens_per_second"] = plan.batch_size * tokens * forwards / step_s
    if leads := _host_leads(config, plan, reports):
        metrics["latency/host_lead_ms"] = 1000 * min(leads.values())
    metrics["latency/warmup_s"] = max(report["warmup_s"] for report in reports.values())
    metrics |= _memory_metrics(reports)
    metrics |= _load_metrics(reports)
    for axis in first["bytes_per_forward"]:
        sent = sum(report["bytes_per_forward"][axis] for report in reports.values())
        metrics[f"communication/{axis}_gib_per_forward"] = sent / GIB
    if any(report["swap"]["bytes_per_forward"] for report in reports.values()):
        swaps = [report["swap"] for report in reports.values()]
        metrics["swap/gib_per_forward"] = sum(swap["bytes_per_forward"] for swap in swaps) / GIB
        metrics["swap/stall_ms_per_step"] = 1000 * max(swap["stall_s"] for swap in swaps)
        metrics["swap/host_gib"] = sum(report["load"]["swapped_bytes"] for report in reports.values()) / GIB
    stalls = [report["gather_stall_s"] for report in reports.values() if report["gather_stall_s"] is not None]
    if stalls:
        metrics["communication/shard_stall_ms_per_step"] = 1000 * max(stalls)
    for axis in {link["axis"] for link in first["links"]}:
        speeds = [
            link["gb_s"] for report in reports.values() for link in report["links"] if link["axis"] == axis
        ]
        metrics[f"communication/{axis}_link_gb_s"] = min(speeds)
    for name in ("scatter_s", "gather_s"):
        if name in first:
            metrics[f"communication/{name.removesuffix('_s')}_ms"] = first[name] * 1000
    if first["losses"]:
        shares = plan.replica_shares
        last = [reports[rank]["losses"][-1] for rank in plan.layout.replica_leaders]
        metrics["train/loss"] = sum(n * loss for n, loss in zip(shares, last, strict=True)) / sum(shares)
    if peak_tflops:
        factor = TRAIN_FLOPS_FACTOR if config.workload.name == "train" else 1
        flops = config.model.architecture.forward_flops(tokens) * forwards * plan.batch_size * factor
        metrics["mfu"] = flops / (step_s * len(plan.devices) * peak_tflops * 1e12)
    return metrics


def _host_leads(config: RunConfig, plan: Plan, reports: Mapping[int, Report]) -> dict[int, float]:
    """Of each rank on GPUs the median of `Stopwatch.lead_s`.

    None where a step itself waits for its GPUs: in training for the loss, between the devices of a rank for copies.
    """
    if config.workload.name == "train" or plan.layout.blocks > 1:
        return {}
    return {
        rank: summarise_samples(report["lead_s"]).median
        for rank, report in reports.items()
        if report["lead_s"]
    }


def host_warning(config: RunConfig, plan: Plan, reports: Mapping[int, Report]) -> str | None:
    """Says which ranks' GPUs had to wait for their hosts."""
    leads = sorted(_host_leads(config, plan, reports).items())
    slow = [str(rank) for rank, lead in leads if lead < HOST_BOUND_S]
    if not slow:
        return None
    alone = len(leads) == 1
    ranks = "" if alone else f" of rank{'s' if len(slow) > 1 else ''} {', '.join(slow)}"
    advice = "" if alone else ", and others for it; free CPU cores, or fewer GPUs for this size, would help"
    return (
        f"host-bound: the GPU{ranks} was done once the last kernel of a step was launched, so it had waited for the "
        f"CPU{advice}"
    )


def _memory_metrics(reports: Mapping[int, Report]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    peaks = []
    for rank, report in reports.items():
        for label, device_peaks in report["memory"].items():
            metrics |= {f"memory/{label}/{name}": value for name, value in device_peaks.items()}
            peaks.append(device_peaks["peak_allocated_gib"])
        for label, weight_gib in zip(report["memory"], report["weight_gib"], strict=True):
            metrics[f"memory/{label}/weights_gib"] = weight_gib
        metrics[f"memory/rank{rank}/peak_rss_gib"] = report["peak_rss_gib"]
    metrics["memory/peak_allocated_gib"] = max(peaks)
    return metrics


def _load_metrics(reports: Mapping[int, Report]) -> dict[str, float]:
    loads = [report["load"] for report in reports.values()]
    seconds = max(load["seconds"] for load in loads)
    num_bytes = sum(load["num_bytes"] for load in loads)
    return {
        "load/seconds": seconds,
        **{
            f"load/rank{rank}/read_gib": report["load"]["bytes_read"] / GIB
            for rank, report in reports.items()
        },
        "load/read_gib": sum(load["bytes_read"] for load in loads) / GIB,
        "load/received_gib": sum(load["bytes_received"] for load in loads) / GIB,
        "load/gib": num_bytes / GIB,
        "load/gib_per_second": num_bytes / GIB / seconds,
        "load/anonymous_growth_gib": max(load["anonymous_growth_bytes"] for load in loads) / GIB,
    }
