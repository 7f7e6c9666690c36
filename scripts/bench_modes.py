#!/usr/bin/env python
"""The guide's modes on two GPUs, from a real checkpoint: what each buys, measured in one go.

Writes a random checkpoint of the model (scripts/make_checkpoint.py) once, then runs the main job on it: mode none on
each GPU (the base is the mean of both), then every other mode on both. Each run compares its answer with mode none's
and leaves its record; the table puts them side by side.

    python scripts/bench_modes.py --model wan2.1_t2v_1.3b --train --out docs/results/modes_1.3b.md

The last line of the output is the table as JSON, in one line.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works without an installation, too

from wanexp.record import Record, read_record

MODES = ("data_parallel", "distributed", "block_distribution")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--video", default="480p")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--train", action="store_true", help="training steps too (none and distributed)")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("/tmp/wanexp-checkpoints"), help="folder to write it to"
    )
    parser.add_argument("--device", default="cuda:0", help="where the checkpoint's values are made")
    parser.add_argument(
        "--out", type=Path, required=True, help="the Markdown table; a .json is written beside it"
    )
    options = parser.parse_args()

    checkpoint = options.checkpoint / f"{options.model}.safetensors"
    if not checkpoint.exists():
        make = ["scripts/make_checkpoint.py", f"--model={options.model}", f"--out={checkpoint}"]
        subprocess.run([sys.executable, *make, f"--device={options.device}"], cwd=ROOT, check=True)
    common = [
        f"model={options.model}",
        f"video={options.video}",
        f"checkpoint={checkpoint}",
        f"workload.num_steps={options.steps}",
        "tracking=none",
    ]
    records = sweep("base", [*common, "parallelism=none", "gpus=[0],[1]"])
    records += sweep("modes", [*common, f"parallelism={','.join(MODES)}", "gpus=[0,1]"])
    if options.train:
        train = [*common, "workload=train"]
        records += sweep("train_base", [*train, "parallelism=none", "gpus=[0],[1]"])
        records += sweep("train", [*train, "parallelism=distributed", "gpus=[0,1]"])
    rows = [row(record, base_of(record, records)) for record in records]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(markdown(options.model, options.video, records, rows))
    options.out.with_suffix(".json").write_text(
        json.dumps([summary(record) for record in records], indent=1) + "\n"
    )
    print(options.out.read_text())
    print(json.dumps(rows))
    return 0 if all(record.outcome == "finished" for record in records) else 1


def sweep(name: str, overrides: list[str]) -> list[Record]:
    """Run one multirun and read its records, in order."""
    name = f"{name}_{time.strftime('%H%M%S')}"
    command = [sys.executable, "-m", "wanexp", "-m", f"sweep_name={name}", *overrides]
    subprocess.run(command, cwd=ROOT, check=False)
    return [read_record(path) for path in sorted((ROOT / "multirun" / name).glob("*/record.json"))]


def base_of(record: Record, records: list[Record]) -> float:
    """Step time of mode none for the same workload: the mean over the GPUs, in ms."""
    workload = record.requested["workload"]["name"]
    times = [
        other.metrics["latency/step_ms"]
        for other in records
        if other.effective["mode"] == "none" and other.requested["workload"]["name"] == workload
    ]
    return sum(times) / len(times)


def row(record: Record, base_ms: float) -> dict[str, object]:
    """One line of the table. throughput: samples a second over the base's; time: step time over the base's."""
    metrics, labels = record.metrics, [device["label"] for device in record.effective["devices"]]
    if "latency/step_ms" not in metrics:
        return {"mode": record.effective["mode"], "outcome": f"{record.outcome}: {record.message}"}
    step_ms, batch = metrics["latency/step_ms"], metrics["setup/batch_size"]
    weights = [metrics[f"memory/{label}/weights_gib"] for label in labels]
    parity = "bit-equal" if metrics.get("parity/bit_equal") else metrics.get("parity/rel_l2")
    return {
        "workload": record.requested["workload"]["name"],
        "mode": record.effective["mode"],
        "GPUs": ", ".join(label.removeprefix("gpu") for label in labels),
        "outcome": record.outcome,
        "batch": int(batch),
        "step ms": f"{step_ms:,.0f} +- {metrics['latency/step_ms_iqr']:.0f}",
        "time / none": f"{step_ms / base_ms:.3f}",
        "throughput / none": f"{batch * base_ms / step_ms:.3f}",
        "weights GiB": cells(weights),
        "share of weights": cells(
            [100 * w / sum(weights) * len(record.plan["ranks"]) for w in weights], "{:.1f} %"
        ),
        "peak GiB": cells([metrics[f"memory/{label}/peak_allocated_gib"] for label in labels]),
        "NVML GiB": cells([metrics.get(f"memory/{label}/nvml_used_gib", 0.0) for label in labels]),
        "busy %": cells(
            [metrics.get(f"telemetry/{label}/utilization_percent", 0.0) for label in labels], "{:.0f}"
        ),
        "load": f"{metrics['load/seconds']:.1f} s, {metrics['load/gib_per_second']:.1f} GiB/s",
        "parity": "-" if parity is None else parity if isinstance(parity, str) else f"{parity:.1e}",
    }


def cells(values: list[float], form: str = "{:.2f}") -> str:
    return " / ".join(form.format(value) for value in values)


def markdown(model: str, video: str, records: list[Record], rows: list[dict[str, object]]) -> str:
    """The table, and above it what it was measured on and how."""
    first = records[0]
    torch, gpu = first.environment.get("torch", {}), first.effective["devices"][0]["name"]
    headers = max((list(row) for row in rows), key=len)
    lines = [
        f"# The guide's modes: {model}, {video}",
        "",
        f"Measured {first.started[:10]} on two {gpu}; torch {torch.get('version')}, CUDA {torch.get('cuda')}, "
        f"driver {first.environment.get('driver')}; precision {first.effective['precision']}, attention "
        f"{first.effective['attention']}, weights from a checkpoint of random values.",
        "",
        f"Step time is the median +- interquartile range of {first.requested['workload']['num_steps']} steps after "
        f"{first.requested['workload']['num_warmup_steps']} for warm-up; a denoising step is two forwards (CFG). "
        "The base of the ratios is the mean of mode none on either GPU. Parity is the relative L2 distance of the "
        "predicted flow (training: of gradients) from mode none's, over the same shares of the batch.",
        "",
        "Made by `python scripts/bench_modes.py "
        + " ".join(argument for argument in sys.argv[1:] if "checkpoint" not in argument)
        + "`.",
        "",
        "| " + " | ".join(headers) + " |",
        "|" + " --- |" * len(headers),
        *("| " + " | ".join(str(entry.get(header, "")) for header in headers) + " |" for entry in rows),
        "",
    ]
    return "\n".join(lines)


def summary(record: Record) -> dict[str, object]:
    """What of the record is kept beside the table: nothing that names the machine."""
    environment = record.environment
    effective = {key: value for key, value in record.effective.items() if key != "devices"}
    effective["weights"] = [
        {key: value for key, value in source.items() if key != "files"} for source in effective["weights"]
    ]
    return {
        "overrides": [override for override in record.overrides if not override.startswith("checkpoint=")],
        "outcome": record.outcome,
        "message": record.message,
        "effective": effective,
        "metrics": record.metrics,
        "samples": record.samples,
        "environment": {
            key: environment.get(key) for key in ("wanexp", "python", "packages", "driver", "torch")
        },
        "warnings": record.warnings,
    }


if __name__ == "__main__":
    sys.exit(main())
