"""The description of a run for whoever opens its page in MLflow, in Markdown. Pure."""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from wanexp.record import Record
from wanexp.tracking.describe import (
    MAX_TAG,
    as_text,
    compared_blocks,
    cut,
    devices_of,
    gibibytes,
    group_name,
    loading,
    mapping,
    metrics_of,
    milliseconds,
    mode,
    num_devices,
    number,
    present,
    setup_of,
    weights,
)

MAX_LISTED = 32  # devices, warnings
MAX_MESSAGE = 1000
TRACEBACK_LINES = 12
FACTS = {  # row of the table -> metric, unit
    "Throughput": ("throughput/videos_per_hour", "videos/hour"),
    "Frames": ("throughput/frames_per_second", "frames/s"),
    "Energy": ("energy/wh_per_video", "Wh/video"),
    "Energy of a step": ("energy/joules_per_step", "J"),
}


def description(record: Record, *, rerun: str) -> str:
    """Verdict, key figures, memory, how to repeat it, warnings, first traceback, within MLflow's limit.

    MLflow shows the first four lines until its reader asks for more. rerun: the command that repeats the run.
    """
    lines = [f"**{_headline(record)}**", ""]
    if record.message:
        lines += [*(f"> {line}" for line in cut(record.message, MAX_MESSAGE).splitlines()), ""]
    if record.effective.get("device_type") == "cpu":
        lines += [
            "No GPU was used: the devices are logical ones of one CPU, and their times say nothing of GPUs.",
            "",
        ]
    lines += _table(("", ""), _facts(record))
    lines += _memory_table(record)
    lines += ["**Run it again**", "", *_code(rerun)]
    if record.command:
        lines += ["It was started with", "", *_code(shlex.join(map(str, record.command)))]
    if record.warnings:
        lines += ["**Warnings**", "", *(f"* {_cell(text)}" for text in record.warnings[:MAX_LISTED]), ""]
    error = mapping(record.error)
    if error.get("traceback"):
        tail = str(error["traceback"]).strip().splitlines()[-TRACEBACK_LINES:]
        lines += [
            f"**Rank {error.get('rank', '?')} failed first**; `record.json` has all of it",
            "",
            *_code(*tail),
        ]
    return cut("\n".join(lines), MAX_TAG)


def _headline(record: Record) -> str:
    """`block_distribution on 4 x NVIDIA H200: finished, 812 ms a step, 7.1 GiB on the fullest device`."""
    count, names = num_devices(record), sorted({name for _, name in devices_of(record) if name})
    where = ""
    if record.effective.get("device_type") == "cpu":
        where = f" on {count or ''} logical CPU devices (no GPU)".replace("  ", " ")
    elif count:
        where = f" on {count} x {' / '.join(names) or 'GPU'}"
    metrics = metrics_of(record)
    verdict = [record.outcome]
    if "latency/step_ms" in metrics:
        verdict.append(f"{milliseconds(metrics['latency/step_ms'])} a step")
    if "memory/peak_allocated_gib" in metrics:
        verdict.append(f"{gibibytes(metrics['memory/peak_allocated_gib'])} on the fullest device")
    return f"{mode(record) or 'run'}{where}: {', '.join(verdict)}"


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    metrics, setup = metrics_of(record), setup_of(record)
    if "latency/step_ms" in metrics:
        steps = metrics.get("latency/num_samples")
        yield (
            "Step time",
            f"**{milliseconds(metrics['latency/step_ms'])}**" + (f", median of {steps:.0f}" if steps else ""),
        )
    if "latency/forward_ms" in metrics:
        yield "Forward time", milliseconds(metrics["latency/forward_ms"])
    for name, (key, unit) in FACTS.items():
        if key in metrics:
            yield name, f"{number(metrics[key])} {unit}"
    if "mfu" in metrics:
        yield "Model FLOP utilisation", f"{metrics['mfu']:.1%} of the dense peak"
    if loaded := loading(metrics):
        yield "Loading", loaded
    if "memory/peak_allocated_gib" in metrics:
        yield "Peak memory, fullest device", f"**{gibibytes(metrics['memory/peak_allocated_gib'])}**"
    parity = metrics.get("parity/rel_l2")
    if parity is not None:
        distance = "bit-equal" if parity == 0 else f"relative L2 {parity:.2g}"
        yield "Answer against mode none", ", ".join(present(distance, compared_blocks(record)))
    elif record.outcome == "finished" and mode(record) != "none":
        yield "Answer against mode none", "not compared"
    yield "Model", f"{group_name(record, 'model')}, {weights(record)} weights"
    if video := mapping(record.requested.get("video")):
        size = f"{video.get('width')}x{video.get('height')}, {video.get('num_frames')} frames"
        tokens = setup.get("setup/tokens")
        yield "Video", f"{group_name(record, 'video')}: {size}" + (f", {tokens:.0f} tokens" if tokens else "")
    if workload := group_name(record, "workload"):
        batch = setup.get("setup/batch_size")
        yield "Workload", workload + (f", batch {batch:.0f}" if batch else "")
    precision = record.effective.get("precision") or group_name(record, "precision")
    attention = record.effective.get("attention") or record.requested.get("attention")
    yield "Precision, attention", ", ".join(map(as_text, present(precision, attention)))
    if layout := mapping(record.effective.get("layout")):
        degrees = [f"{key}={as_text(value)}" for key, value in layout.items() if value not in (1, None)]
        yield "Layout", ", ".join(degrees) or "one device"


def _memory_table(record: Record) -> list[str]:
    """A row a device, then a row a process, with every `memory/<which>/<what>` there is."""
    names = dict(devices_of(record))
    columns: dict[str, None] = {}
    rows: dict[str, dict[str, float]] = {label: {} for label in names}
    for key, value in metrics_of(record).items():
        if match := re.fullmatch(r"memory/([^/]+)/([^/]+)", key):
            rows.setdefault(match[1], {})[match[2]] = value
            columns[match[2]] = None
    if not rows:
        return []
    head = ["Memory of", "", *(column.removesuffix("_gib").replace("_", " ") for column in columns)]
    body = [
        [label, names.get(label, ""), *(_memory_cell(column, values) for column in columns)]
        for label, values in list(rows.items())[:MAX_LISTED]
    ]
    hidden = len(rows) - len(body)
    return _table(head, body) + ([f"... and {hidden} more in `record.json`", ""] if hidden else [])


def _memory_cell(column: str, values: Mapping[str, float]) -> str:
    if column not in values:
        return ""
    return gibibytes(values[column]) if column.endswith("_gib") else number(values[column], 4)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(map(_cell, row)) + " |" for row in body), ""]


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _code(*lines: str) -> list[str]:
    return ["```", *lines, "```", ""]
