"""Sweeps over GPUs that do not exist: every number here is MADE UP, only the shapes of the curves are plausible."""

import json
import math
import random
from pathlib import Path
from typing import Any

from wanexp.record import Record

ONE_GPU_MS = 6483.0
WEIGHTS_GIB, ACTIVATIONS_GIB = 26.6, 2.7
OVERHEAD = {  # share of a step that an ideal split does not make shorter
    "none": 0.0,
    "block_distribution": 0.0,
    "cfg_parallel": 0.005,
    "context_parallel": 0.02,
    "tensor_parallel": 0.08,
    "data_parallel": 0.0,
    "distributed": 0.0,
    "fsdp": 0.0,
}
REPLICAS = ("data_parallel", "distributed", "fsdp")
SPLIT_WEIGHTS = ("block_distribution", "tensor_parallel", "fsdp")


def record_of(
    mode: str,
    num_gpus: int,
    *,
    repeat: int = 0,
    sweep_id: str = "made_up",
    outcome: str = "finished",
    slowdown: float = 1.0,
    seed: int = 0,
    num_steps: int = 5,
    usd_per_gpu_hour: float | None = 3.5,
    **requested: Any,
) -> Record:
    """A 14B run on some of eight H200s that nobody has."""
    rng = random.Random(f"{mode} {num_gpus} {repeat} {seed}")
    batch = num_gpus if mode in REPLICAS else 1
    overhead = OVERHEAD[mode] * (1 - 1 / num_gpus)
    ideal = ONE_GPU_MS if mode in (*REPLICAS, "block_distribution") else ONE_GPU_MS / num_gpus
    drift = rng.gauss(1, 0.004)
    middle = (ideal + overhead * (ONE_GPU_MS - ideal) + 20 * math.log2(num_gpus)) * slowdown * drift
    steps = [middle * rng.gauss(1, 0.002) for _ in range(num_steps)]
    weights = WEIGHTS_GIB / (num_gpus if mode in SPLIT_WEIGHTS else 1)
    gpus = list(range(num_gpus))
    finished = outcome == "finished"
    metrics = {"setup/num_gpus": float(num_gpus), "setup/batch_size": float(batch)}
    metrics |= {"plan/predicted_peak_gib": weights + 1.01 * ACTIVATIONS_GIB}
    if finished:
        step = sorted(steps)[num_steps // 2]
        metrics |= {
            "latency/step_ms": step,
            "throughput/videos_per_hour": 3_600_000 * batch / step / 50,
            "plan/predicted_step_ms": middle * 1.03,
            "energy/joules_per_step": step / 1000 * num_gpus * (650 if mode != "block_distribution" else 400),
            "parity/rel_l2": 0.0 if mode in REPLICAS else 0.003,
            "load/seconds": 5.3,
        }
        for gpu in gpus:
            own = weights * (1.04 if gpu == 0 and mode == "block_distribution" else 1)
            peak = own + ACTIVATIONS_GIB
            metrics |= {
                f"memory/gpu{gpu}/weights_gib": own,
                f"memory/gpu{gpu}/peak_allocated_gib": peak,
                f"memory/gpu{gpu}/nvml_used_gib": peak + 1.7,
            }
        metrics["memory/peak_allocated_gib"] = max(metrics[f"memory/gpu{g}/peak_allocated_gib"] for g in gpus)
    overrides = [
        f"parallelism={mode}",
        f"gpus={json.dumps(gpus, separators=(',', ':'))}",
        "model=wan2.1_t2v_14b",
    ]
    return Record(
        run_id=f"{sweep_id}-{mode}-{num_gpus}-{repeat}-{json.dumps(requested, sort_keys=True)}",
        name=f"{mode} wan2.1_t2v_14b",
        started=f"2026-11-22T20:{repeat:02d}:00+00:00",
        ended=f"2026-11-22T20:{repeat:02d}:45+00:00",
        requested={
            "model": {"name": "wan2.1_t2v_14b", "sampling_steps": 50, "vae_stride": [4, 8, 8]},
            "video": {"name": "480p", "width": 832, "height": 480, "num_frames": 81},
            "workload": {"name": "denoise", "num_steps": num_steps, "batch_size": None},
            "parallelism": {"mode": mode, "dp": -1},
            "precision": {"name": "bf16", "dtype": "bfloat16"},
            "hardware": {"name": "made_up", "usd_per_gpu_hour": usd_per_gpu_hour},
            "gpus": gpus,
            "checkpoint": None,
            "sweep_name": sweep_id,
            **requested,
        },
        command=["python", "-m", "wanexp", *overrides],
        overrides=overrides,
        sweep_id=sweep_id,
        outcome=outcome,
        message=""
        if finished
        else "gpu0 ran out of memory: asked for 3.1 GiB <more> than it has | see rank0.log",
        effective={
            "mode": mode,
            "layout": {"dp": batch, "blocks": 1},
            "attention": "sdpa_cudnn",
            "precision": "bf16",
            "device_type": "cuda",
            "batch_size": batch,
            "devices": [
                {"type": "cuda", "index": gpu, "label": f"gpu{gpu}", "name": "MADE-UP H200"} for gpu in gpus
            ],
        },
        metrics=metrics,
        samples={
            "step_ms": steps if finished else [],
            "phase_s": {"set-up": 0.0, "load weights": 2.0, "warm-up": 8.0, "measure": 16.0},
        },
        telemetry={
            f"gpu{gpu}/memory_used_gib": [
                [0.25 * i, min(weights, max(0.0, (0.25 * i - 2) / 6 * weights)) + (4.4 if i > 32 else 0.6)]
                for i in range(180)
            ]
            for gpu in gpus
        },
        environment={
            "wanexp": "0.1.0",
            "python": "3.12.3",
            "driver": "580.0",
            "packages": {"torch": "2.11.0"},
            "torch": {"version": "2.11.0+cu130", "cuda": "13.0", "nccl": "2.28.9"},
            "host": {"name": "nowhere", "cpu": "MADE-UP CPU", "memory_gib": 512.0},
            "gpus": {
                f"gpu{g}": {"name": "MADE-UP H200", "memory_gib": 139.8, "power_limit_w": 700.0} for g in gpus
            },
            "topology": {"gpu0-gpu1": {"ancestor": "same NUMA node", "p2p_read": True, "p2p_nvlink": True}},
            "git": {"commit": "0" * 40, "dirty": False},
        },
    )


def scaling_sweep(repeats: int = 3, **changes: Any) -> list[Record]:
    """Eight modes on one to eight GPUs, interleaved repeats, one cell out of memory."""
    found = []
    for repeat in range(repeats):
        for mode in OVERHEAD:
            counts = {"none": (1,), "cfg_parallel": (2,)}.get(mode, (2, 4, 8))
            for count in counts:
                oom = mode == "distributed" and count == 8
                outcome = "oom" if oom else "finished"
                found.append(record_of(mode, count, repeat=repeat, outcome=outcome, **changes))
    return found


def write_sweep(folder: Path, records: list[Record], *, absent: bool = True) -> Path:
    """A sweep's folder as the launcher leaves it; with `absent`, one cell skipped and one not run yet."""
    entries: list[dict[str, Any]] = []
    for index, record in enumerate(records):
        mode = record.effective["mode"]
        place = folder / f"{index:04d}_{mode}_{len(record.requested['gpus'])}gpus"
        place.mkdir(parents=True)
        record.write(place)
        entries.append(
            {
                "index": index,
                "overrides": [*record.overrides, "resume=True"],  # as after a resumption
                "run_id": record.run_id,
                "folder": place.name,
                "outcome": record.outcome,
                "message": record.message,
            }
        )
    if absent:
        for outcome, reason, gpus in (
            ("skipped", "cfg_parallel uses two devices, gpus names 4; write gpus=[0,1]", "[0,1,2,3]"),
            (None, "", "[0,1,2,3,4,5,6,7]"),
        ):
            entries.append(
                {
                    "index": len(entries),
                    "overrides": ["parallelism=cfg_parallel", f"gpus={gpus}", "model=wan2.1_t2v_14b"],
                    "folder": f"{len(entries):04d}_cfg_parallel",
                    "outcome": outcome,
                    "message": reason,
                }
            )
    document = {
        "sweep_id": folder.name,
        "name": folder.name,
        "started": "2026-11-22T20:00:00+00:00",
        "cells": entries,
    }
    (folder / "sweep.json").write_text(json.dumps(document))
    return folder
