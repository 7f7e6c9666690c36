"""The guide's modes on a checkpoint: real wanexp runs, each a program of its own, and what their records say."""

import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import wanexp
from wanexp.config import RunConfig
from wanexp.errors import UserError
from wanexp.guide.configuration import (
    GUIDE_MODES,
    checkpoint_overrides,
    compose_config,
    open_all_experts,
    quoted,
)
from wanexp.parallel.layout import REPLICA_MODES
from wanexp.record import Record, read_record


def benchmark_checkpoint(path: str | Path, input_data: Any, num_runs: int) -> dict[str, dict[str, Any]]:
    """Figures of every mode; see `wanexp.multi_gpu_utils.benchmark_multi_gpu_performance`."""
    path = Path(path).expanduser().resolve()
    overrides = [
        *checkpoint_overrides(path, open_all_experts(path)),
        f"workload.num_steps={num_runs}",
        "workload.num_warmup_steps=2",
        "workload.guidance_scale=[1.0]",  # a step is one forward
        "tracking=none",
    ]
    overrides += _video(compose_config(overrides), input_data)
    compose_config(overrides)  # what is wrong with them is said once, not by each run
    runs, now = Path("multirun/runs").resolve(), datetime.now()
    results = {
        mode: _run([*overrides, f"parallelism={mode}"], runs / f"{now:%Y-%m-%d_%H-%M-%S-%f}_benchmark_{mode}")
        for mode in GUIDE_MODES
    }
    base = results["none"].get("samples_per_s")
    for mode, figures in results.items():
        if figures["ran"] and base and mode != "none":
            figures["throughput_ratio" if mode in REPLICA_MODES else "speedup"] = (
                figures["samples_per_s"] / base
            )
    return results


def _video(config: RunConfig, input_data: Any) -> list[str]:
    """The video whose latent is the first tensor of `input_data`; None: the model's usual one."""
    if input_data is None:
        return []
    values = list(input_data.values()) if isinstance(input_data, Mapping) else input_data
    latent = input_data["latent"] if isinstance(input_data, Mapping) and "latent" in input_data else values[0]
    shape = tuple(getattr(latent, "shape", ()))
    if len(shape) != 5:
        raise UserError(f"the latent must be [batch, channels, frames, height, width]; found {list(shape)}")
    frames, rows, columns = config.model.vae_stride
    return [
        f"video.num_frames={(shape[2] - 1) * frames + 1}",
        f"video.height={shape[3] * rows}",
        f"video.width={shape[4] * columns}",
    ]


def _run(overrides: list[str], folder: Path) -> dict[str, Any]:
    """One run. Random samples of the seed; a sample a replica."""
    command = [sys.executable, "-m", "wanexp", *overrides, f"hydra.run.dir={quoted(folder)}"]
    # Also where wanexp is not installed but found in the current folder
    path = [str(Path(wanexp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment
    )
    try:
        record = read_record(folder)
    except UserError:
        lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
        return {"ran": False, "reason": lines[-1].removeprefix("error: ")}
    if record.outcome not in ("finished", "inexact"):
        return {"ran": False, "reason": f"{record.outcome}: {record.message}", "record": str(folder)}
    return {"ran": True, **figures_of(record), "record": str(folder)}


def figures_of(record: Record) -> dict[str, Any]:
    """What the record says, under the names of a live model's figures."""
    metrics = record.metrics
    figures: dict[str, Any] = {
        "devices": [device["label"] for device in record.effective["devices"]],
        "num_runs": int(metrics["latency/num_samples"]),
        "median_ms": metrics["latency/step_ms"],
        "iqr_ms": metrics["latency/step_ms_iqr"],
        "min_ms": metrics["latency/step_ms_min"],
        "max_ms": metrics["latency/step_ms_max"],
        "samples_ms": record.samples["step_ms"],
        "samples_per_run": int(metrics["setup/batch_size"]),
        "samples_per_s": metrics["throughput/samples_per_second"],
        "peak_gib": {
            name.split("/")[1]: value
            for name, value in metrics.items()
            if name.startswith(("memory/gpu", "memory/cpu")) and name.endswith("/peak_allocated_gib")
        },
    }
    if "parity/rel_l2" in metrics:
        figures |= {"rel_l2": metrics["parity/rel_l2"], "bit_equal": bool(metrics["parity/bit_equal"])}
    if record.warnings or record.message:
        figures["warning"] = "; ".join(filter(None, [record.message, *record.warnings]))
    return figures
