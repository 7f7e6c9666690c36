"""The table that bench_layouts.py writes: a row a run, beside the mean of mode none on each GPU. Reads records only."""

import json
import sys
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanexp.record import Record
from wanexp.report.runs import run_entry

Runs = Sequence[tuple[str, Path, Record]]
"""The name of its case, its folder, and the record, of each run."""


@dataclass(frozen=True)
class Goal:
    """Speed-up of the best layout for one sample on so many GPUs, or of `mode` for however many samples.

    Under guidance one sample is two forwards, which keep two GPUs of a block distribution busy and no more.
    """

    model: str
    video: str
    gpus: int
    speedup: float
    mode: str = ""


GOALS = (
    Goal("wan2.1_t2v_14b", "720p", 4, 3.75),
    Goal("wan2.1_t2v_14b", "720p", 8, 7.2),
    Goal("wan2.1_t2v_14b", "480p", 4, 3.6),
    Goal("wan2.1_t2v_14b", "480p", 8, 6.6),
    Goal("wan2.1_t2v_14b", "480p", 4, 3.0, "block_distribution, interleaved"),
    Goal("wan2.1_t2v_14b", "720p", 4, 3.0, "block_distribution, interleaved"),
    Goal("wan2.1_t2v_1.3b", "480p", 8, 5.0),
)


def best_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The best layout for one sample of each case and number of GPUs, and every goal, with what came of it."""
    timed = [row for row in rows if row["outcome"] == "finished" and "speed-up" in row]
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        for gpus in sorted({row["GPUs"] for row in rows if row["GPUs"] > 1}):
            goals = [g for g in GOALS if case == f"{g.model} {g.video}" and g.gpus == gpus]
            for goal in [None, *(g for g in goals if g.mode)]:
                general = next((g for g in goals if not g.mode), None)
                asked = goal or general
                own = [
                    row
                    for row in timed
                    if row["case"] == case
                    and row["GPUs"] == gpus
                    and (row["samples"] == 1 if goal is None else row["mode"] == goal.mode)
                    and (goal is None or row["layout"] == f"blocks={gpus}")
                ]
                best = max(own, key=lambda row: row["speed-up"], default=None)
                missing = f"{goal.mode}: not measured" if goal else "not measured"
                words = f"{best['mode']}, {best['layout']}" if best else missing
                words += f", {best['samples']} samples" if best and best["samples"] > 1 else ""
                text = f"{best['speed-up']:.2f}x" if best else ""
                want = f"{asked.speedup:g}x" if asked else ""
                said = ""
                if asked and best:
                    said = (
                        "reached"
                        if best["speed-up"] >= asked.speedup
                        else f"short by {1 - best['speed-up'] / asked.speedup:.1%}"
                    )
                found.append([case, str(gpus), words, text, want, said])
    return found


def table_rows(runs: Runs) -> list[dict[str, Any]]:
    """One row a run: step time, ratio to the mean of mode none, memory, use of each GPU, bytes sent, parity."""
    return [
        row
        for case in dict.fromkeys(name for name, *_ in runs)
        for row in _case_rows([record for name, _, record in runs if name == case], case)
    ]


def _case_rows(mine: Sequence[Record], case: str) -> Iterator[dict[str, Any]]:
    common = set.intersection(*(set(record.overrides) for record in mine))
    base = [
        r.metrics["latency/step_ms"] / r.metrics["setup/batch_size"]
        for r in mine
        if r.effective["mode"] == "none" and "latency/step_ms" in r.metrics and not own_settings(r, common)
    ]
    for record in mine:
        metrics, labels = record.metrics, [device["label"] for device in record.effective["devices"]]
        degrees = {name: degree for name, degree in record.plan["layout"].items() if degree > 1}
        spread = " x ".join(f"{name}={degree}" for name, degree in degrees.items()) or "one GPU"
        transport = record.effective.get("transport")
        asked = record.requested["parallelism"]
        placement = f", {asked['block_placement']}" if degrees.get("blocks") else ""
        row: dict[str, Any] = {
            "case": case,
            "mode": record.effective["mode"] + placement,
            "GPUs": len(labels),
            "layout": ", ".join([spread, *filter(None, [transport]), *own_settings(record, common)]),
            "outcome": record.outcome,
        }
        if "latency/step_ms" not in metrics or not base:
            yield row | {"note": record.message}
            continue
        step, batch, mean = metrics["latency/step_ms"], metrics["setup/batch_size"], sum(base) / len(base)

        def each(
            name: str, digits: int, metrics: dict[str, float] = metrics, labels: list[str] = labels
        ) -> str:
            values = [metrics.get(name.format(label)) for label in labels]
            return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in values)

        sent = sum(value for name, value in metrics.items() if name.endswith("_gib_per_forward"))
        yield row | {
            "step ms": round(step, 1),
            "speed-up": round(batch * mean / step, 3),
            "samples": int(batch),
            "peak GiB": each("memory/{}/peak_allocated_gib", 2),
            "weights GiB": each("memory/{}/weights_gib", 2),
            "busy %": each("telemetry/{}/utilization_percent", 0),
            "sent GiB a forward": round(sent, 3),
            "parity": parity_words(metrics),
            "predicted ms": round(metrics.get("plan/predicted_step_ms", 0), 1),
            "predicted peak GiB": round(metrics.get("plan/predicted_peak_gib", 0), 2),
        }


def own_settings(record: Record, common: Set[str]) -> list[str]:
    """What a layout sets beside its spread, such as precision=fp8."""
    told = ("parallelism", "gpus=", "workload.")  # other columns have these
    return [word for word in record.overrides if word not in common and not word.startswith(told)]


def parity_words(metrics: dict[str, float]) -> str:
    if "parity/bf16_to_fp32" in metrics:
        return f"bf16 to fp32: {metrics['parity/bf16_to_fp32']:.1e}"
    if metrics.get("parity/bit_equal"):
        return "bit-equal"
    if "parity/rel_l2" not in metrics:
        return ""
    others = "" if metrics.get("parity/same_kernels", 1.0) else ", other kernels"
    return f"{metrics['parity/rel_l2']:.1e}{others}"


def write_table(runs: Runs, out: Path) -> None:
    rows = table_rows(runs)
    records = [record for *_, record in runs]
    headers = list(dict.fromkeys(name for row in rows for name in row))
    first = next((record for record in records if record.environment.get("torch")), records[0])
    torch, devices = first.environment.get("torch", {}), first.effective["devices"]
    num_devices = len({device["index"] for record in records for device in record.effective["devices"]})
    lines = [
        f"# Every layout on {num_devices} x {devices[0]['name']}",
        "",
        f"Measured {first.started[:10]}; torch {torch.get('version')}, CUDA {torch.get('cuda')}, driver "
        f"{first.environment.get('driver')}; precision {first.effective['precision']}, attention "
        f"{first.effective['attention']}; random weights. Made by `python scripts/bench_layouts.py "
        + " ".join(repr(word) if " " in word else word for word in sys.argv[1:])
        + "`.",
        "",
        "Step: median of the timed steps; two forwards (guidance). Speed-up: samples a second over the mean of mode "
        "none on each GPU. Parity: relative L2 of the predicted flow against mode none's, of the worst forward "
        "and, where nothing else is said, by the same attention kernels, over as many of the first blocks as the "
        "fourth part of a --case says; for none, of bf16 against fp32 over its first blocks.",
        "",
        "## The best layout of each case",
        "",
        "Of those that spread one sample over all GPUs, and of modes that have a goal of their own for however many "
        "samples; beside the goal where there is one.",
        "",
        "| case | GPUs | layout | speed-up | goal | |",
        "| --- | ---: | --- | ---: | ---: | --- |",
        *("| " + " | ".join(row) + " |" for row in best_rows(rows)),
        "",
        "## All runs",
        "",
        "| " + " | ".join(headers) + " |",
        "|" + " --- |" * len(headers),
        *("| " + " | ".join(str(row.get(header, "")) for header in headers) + " |" for row in rows),
        "",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines))
    kept = [{"layout": record.plan["layout"], **run_entry(record)} for record in records]
    out.with_suffix(".json").write_text(json.dumps({"rows": rows, "runs": kept}, indent=1) + "\n")
