"""Records as the runner leaves them, for the tests of tracking."""

from pathlib import Path
from typing import Any

from wanexp.record import Record


def make_record(run_id: str = "20261122-192700-abc123", **changes: Any) -> Record:
    """A finished block distribution run on two GPUs."""
    fields: dict[str, Any] = {
        "run_id": run_id,
        "name": "tiny block_distribution",
        "started": "2026-11-22T19:27:00+00:00",
        "ended": "2026-11-22T19:28:30.500000+00:00",
        "requested": {
            "model": {"name": "tiny", "vae_stride": [4, 8, 8], "architecture": {"dim": 512}},
            "hardware": {"name": "auto", "num_devices": None},
            "parallelism": {"mode": "block_distribution", "blocks": -1, "block_split": [4, 4]},
            "workload": {"name": "denoise", "num_steps": 4, "batch_size": None},
            "video": {"name": "tiny", "width": 128, "height": 64, "num_frames": 9},
            "precision": {"name": "bf16", "dtype": "bfloat16"},
            "tracking": {"uri": "http://ada:secret@server:5000", "experiment": "wanexp"},
            "checkpoint": None,
            "gpus": [0, 1],
            "attention": "auto",
        },
        "command": ["python", "-m", "wanexp", "parallelism=block_distribution", "gpus=[0,1]"],
        "overrides": ["parallelism=block_distribution", "gpus=[0,1]"],
        "outcome": "finished",
        "effective": {
            "mode": "block_distribution",
            "layout": {"dp": 1, "blocks": 2},
            "attention": "sdpa_flash",
            "precision": "bf16",
            "device_type": "cuda",
            "batch_size": 1,
            "devices": [
                {
                    "type": "cuda",
                    "index": index,
                    "label": f"gpu{index}",
                    "name": "NVIDIA H200",
                    "uuid": f"GPU-{index}",
                }
                for index in (0, 1)
            ],
        },
        "metrics": {
            "latency/step_ms": 812.4,
            "latency/forward_ms": 405.9,
            "throughput/videos_per_hour": 88.6,
            "memory/peak_allocated_gib": 7.12,
            "memory/gpu0/peak_allocated_gib": 7.12,
            "memory/gpu0/weights_gib": 3.5,
            "memory/gpu1/peak_allocated_gib": 6.9,
            "memory/gpu1/weights_gib": 3.4,
            "memory/rank0/peak_rss_gib": 2.1,
            "parity/rel_l2": 0.0,
        },
        "samples": {"step_ms": [810.0, 812.4, 815.1, 811.0], "ranks": {"0": {"forward_ms": [405.0, 406.0]}}},
        "telemetry": {"gpu0/power_w": [[0.25 * i, 400.0 + i] for i in range(20)]},
        "environment": {"git": {"commit": "c1e0063", "dirty": False}},
        "warnings": ["the clocks | were throttled"],
        "artifacts": ["trace/kernels.txt"],
    }
    return Record(**(fields | changes))


def write_run(folder: Path, record: Record | None = None) -> Record:
    """A run's folder as the runner leaves it."""
    record = record or make_record()
    for name, text in {
        ".hydra/config.yaml": "model:\n  name: tiny\n",
        "ranks/rank0.log": "rank 0 says hello\n",
        "trace/kernels.txt": "gemm 12 ms\n",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    record.write(folder)
    return record
