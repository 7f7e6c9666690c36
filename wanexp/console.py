"""What a person sees: the start card, progress, the end table, the table of a sweep.

With colours in a terminal; elsewhere plain text without control codes. Import it late: rich takes a while.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import rich.console
from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from wanexp.config import RunConfig
from wanexp.planning.plan import Plan, is_lossy_run
from wanexp.progress import ProgressReporter, show_progress
from wanexp.record import Record
from wanexp.sweep.fingerprint import NOT_OF_THE_CELL
from wanexp.tracking import describe
from wanexp.workloads.sizes import forwards_per_step, guidance_of, num_tokens

GIB = 1024**3
TRACEBACK_LINES = 15
LABEL_WIDTH = 12  # of the left column of the card and the end table
# Any other outcome is red.
STYLES = {"finished": "green", "skipped": "yellow", "infeasible": "yellow", "interrupted": "yellow"}
TOO_LARGE = (
    "spread the weights (parallelism=block_distribution with more gpus), or take a smaller video or batch"
)
TOO_LARGE_ON_CPU = "take a smaller video, batch or model: more logical CPU devices have no more memory"
LOGS = "logs of the ranks are beside the record"
HINTS = {
    "oom": TOO_LARGE,
    "infeasible": TOO_LARGE,
    "timeout": f"if it was only slow, raise limits.run_s or limits.stall_s; {LOGS}",
    "inexact": "do not trust its speed; repeat it with precision=fp32 to tell rounding from a fault",
    "interrupted": "what was measured until then is in the record",
    "failed": LOGS,
}
DEVICE_COLUMNS = {  # of the end table: header -> metric of one device, decimals
    "weights\nGiB": ("memory/{}/weights_gib", 2),
    "peak\nGiB": ("memory/{}/peak_allocated_gib", 2),
    "reserved\nGiB": ("memory/{}/peak_reserved_gib", 2),
    "NVML\nGiB": ("memory/{}/nvml_used_gib", 2),
    "busy\n%": ("telemetry/{}/utilization_percent", 0),
    "power\nW": ("telemetry/{}/power_w", 0),
    "SM\nMHz": ("telemetry/{}/sm_clock_mhz", 0),
    "max\nC": ("telemetry/{}/temperature_max_c", 0),
}


class Console:
    """Writes to `file` (default: stdout), `width` columns wide (default: the terminal's, else 80)."""

    def __init__(self, file: IO[str] | None = None, width: int | None = None) -> None:
        self.rich = rich.console.Console(file=file, width=width, highlight=False, markup=False, emoji=False)

    def start_card(self, config: RunConfig, plan: Plan, *, weights: str, notes: Sequence[str] = ()) -> None:
        """What is about to run, and which device holds what. weights: "random" or the checkpoint's path."""
        card = facts()
        for name, value in _card_rows(config, plan, weights).items():
            card.add_row(name, value)
        for note in notes:
            card.add_row("Note", Text(note, style="yellow"))
        layout = Table.grid()
        layout.add_row(card)
        layout.add_row("")
        layout.add_row(_placement_table(plan))
        self.rich.print(Panel(layout, title="wanexp", title_align="left", expand=False, padding=(0, 1)))

    def progress(self) -> AbstractContextManager[ProgressReporter]:
        """Progress over the phases of a run: one bar a phase in a terminal, else a line now and then."""
        return show_progress(self.rich)

    def end_table(self, record: Record, path: Path | None = None) -> None:
        """How the run ended and what it measured; only what the record has. path: of the record."""
        table = facts()
        head = Text(record.outcome, style=f"bold {_style(record.outcome)}")
        table.add_row(
            "Outcome", head.append(f": {record.message}" if record.message else "", style="default")
        )
        for name, value in _result_rows(record).items():
            table.add_row(name, value)
        self.rich.print()
        self.rich.print(table)
        if (devices := _device_table(record.metrics)) is not None:
            self.rich.print()
            self.rich.print(devices)
            self.rich.print()
        if record.error and record.outcome not in ("finished", "skipped", "interrupted"):
            self._failure(record.error)
        advice = facts()
        for warning in record.warnings:
            advice.add_row("Warning", Text(warning, style="yellow"))
        if hint := HINTS.get(record.outcome):
            on_cpu = record.effective.get("device_type") == "cpu"
            advice.add_row("Hint", TOO_LARGE_ON_CPU if hint is TOO_LARGE and on_cpu else hint)
        if advice.rows:
            self.rich.print(advice)
        if path is not None:
            self._line(f"{'Record':<{LABEL_WIDTH}}  {path}")

    def tracking_lines(self, lines: Sequence[str]) -> None:
        """Where to look at the run: never wrapped, so that links and commands can be copied."""
        for line in lines:
            self._line(line)

    def sweep_table(self, records: Sequence[Record]) -> None:
        """One row a cell; below it the sentences of those that were skipped or failed."""
        if not records:
            return
        labels = _cell_labels(records)
        counts = [_num_devices(record) for record in records]
        columns = {
            name: _aligned([record.metrics.get(metric) for record in records], decimals)
            for name, metric, decimals in (
                ("step\nms", "latency/step_ms", None),
                ("videos\n/h", "throughput/videos_per_hour", None),
                ("peak\nGiB", "memory/peak_allocated_gib", 2),
            )
        }
        columns["parity"] = [_parity(record.metrics) or "" for record in records]
        on_gpus = any(record.effective.get("device_type") == "cuda" for record in records)
        table = plain_table()
        table.padding = 0  # 80 columns hold the longest name of a mode in one piece
        table.add_column("run", overflow="fold", min_width=18)
        table.add_column("GPUs" if on_gpus else "devices", justify="right")
        table.add_column("outcome", no_wrap=True)
        shown = {name: cells for name, cells in columns.items() if any(cells)}
        for name in shown:
            table.add_column(name, justify="right", no_wrap=True)
        for index, record in enumerate(records):
            outcome = Text(record.outcome, style=_style(record.outcome))
            cells = (cells[index] for cells in shown.values())
            table.add_row(labels[index], str(counts[index] or ""), outcome, *cells)
        self.rich.print()
        self.rich.print(table)
        if "peak\nGiB" in shown:
            self.rich.print("peak GiB: allocated on the fullest device")
        for label, count, record in zip(labels, counts, records, strict=True):
            if record.outcome != "finished" and record.message:
                where = f"{label}, {count} device{'s' * (count != 1)}" if count else label
                outcome = Text(record.outcome, style=_style(record.outcome))
                self.rich.print(Text.assemble(f"{where}: ", outcome, f": {record.message}"))

    def _failure(self, error: Mapping[str, Any]) -> None:
        kind = f" ({error['type']})" if error.get("type") else ""
        who = "wanexp itself failed" if error.get("rank") is None else f"Rank {error['rank']} failed first"
        self.rich.print(Text(f"{who}{kind}:", style="red"))
        lines = str(error.get("traceback") or "").rstrip().splitlines()
        if len(lines) > TRACEBACK_LINES:
            self._line("  ... (all of it is in the record)")
        for line in lines[-TRACEBACK_LINES:]:
            self._line(f"  {line}")

    def _line(self, text: str) -> None:
        self.rich.print(Text(text), soft_wrap=True)


def block_ranges(blocks: Sequence[int]) -> str:
    """Such as "0-9", "0-3, 8" or, dealt out with a constant stride, "0, 4, ..., 36"."""
    blocks = sorted(blocks)
    if not blocks:
        return "none"
    strides = {second - first for first, second in pairwise(blocks)}
    if len(blocks) > 2 and len(strides) == 1 and strides != {1}:
        shown = [str(block) for block in blocks]
        return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]])
    ranges: list[list[int]] = []
    for block in blocks:
        if ranges and block == ranges[-1][1] + 1:
            ranges[-1][1] = block
        else:
            ranges.append([block, block])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


def _card_rows(config: RunConfig, plan: Plan, weights: str) -> dict[str, str]:
    model, video, workload = config.model, config.video, config.workload
    experts = f"{model.num_experts} experts of " if model.num_experts > 1 else ""
    seconds = video.num_frames / video.fps
    timed, warmup = (
        _plural(workload.num_steps, "timed step"),
        _plural(workload.num_warmup_steps, "warm-up step"),
    )
    how = f"learning rate {workload.learning_rate:g}" if workload.name == "train" else _guidance(config)
    residual = ", fp32 residuals" if config.precision.residual_fp32 else ""
    return {
        "Model": f"{model.name}, {experts}{_parameters(model.architecture.num_parameters())}",
        "Weights": f"random (seed {config.seed})" if weights == "random" else weights,
        "Video": f"{video.width} x {video.height}, {video.num_frames} frames "
        f"({seconds:.1f} s at {video.fps} fps), {num_tokens(model, video):,} tokens",
        "Workload": f"{workload.name}, {timed} after {warmup}",
        "Batch": f"{_plural(plan.batch_size, 'sample')}, {how}",
        "Mode": f"{plan.mode}: {plan.layout}, {_plural(len(plan.ranks), 'process', 'es')}",
        "Precision": f"{config.precision.dtype}{residual}{_lossy_text(config)}; attention {config.attention}",
        **_offload_text(config, plan),
        "Devices": _devices_text(config, plan),
    }


def _offload_text(config: RunConfig, plan: Plan) -> dict[str, str]:
    """The row of the card that says what lives on the host; none where nothing does."""
    if not plan.swapped:
        return {}
    away, total = len(plan.swapped), len(plan.block_owner)
    return {"Offload": f"{away} of {total} blocks on the host, {config.offload.buffers} buffers a device"}


def _kernels(effective: Mapping[str, Any]) -> str | None:
    """Such as `attention fa3, sdpa_cudnn to the text; triton between the products`, as far as it is known."""
    own, cross = effective.get("attention"), effective.get("cross_attention")
    if own is None:
        return None
    text = f"attention {own}" + (f", {cross} to the text" if cross not in (None, own) else "")
    return f"{text}; {effective['kernels']} between the products" if effective.get("kernels") else text


def _lossy_text(config: RunConfig) -> str:
    if not is_lossy_run(config):
        return ""
    linear = config.precision.linear
    return ", lossy" if linear == "dtype" else f", {linear} linear layers: lossy"


def _devices_text(config: RunConfig, plan: Plan) -> str:
    names = list(dict.fromkeys(device.name for device in plan.devices))
    if plan.device_type == "cpu":
        why = "hardware=cpu" if config.hardware.device_type == "cpu" else "no GPU found"
        cpu = names[0].removeprefix("logical CPU device of ")
        memory = plan.devices[0].total_bytes / GIB
        return f"{why}: these are logical CPU devices, which share the {memory:.0f} GiB of this host ({cpu})"
    counts = (f"{sum(device.name == name for device in plan.devices)} x {name}" for name in names)
    text = ", ".join(counts)
    if len(plan.devices) > 1:
        indices = {device.index for device in plan.devices}
        missing = any(indices - {device.index} - set(device.peers) for device in plan.devices)
        text += "; no P2P between some of them" if missing else "; P2P between all"
    return text


def _placement_table(plan: Plan) -> Table:
    """Device -> what it holds."""
    table = plain_table()
    for name in ("device", "rank", "blocks", "samples", "weights GiB", "free GiB"):
        table.add_column(name, justify="left" if name in ("device", "blocks") else "right")
    for rank in plan.ranks:
        samples = block_ranges(range(rank.first_sample, rank.first_sample + rank.num_samples))
        for position, device_position in enumerate(rank.devices):
            device = plan.devices[device_position]
            blocks = [block for block, owner in enumerate(plan.block_owner) if owner == position]
            table.add_row(
                device.label,
                str(rank.rank),
                block_ranges(blocks),
                samples,
                f"{plan.weight_bytes[device_position] / GIB:.2f}",
                f"{device.free_bytes / GIB:.2f}",
            )
    return table


def _result_rows(record: Record) -> dict[str, str]:
    metrics = record.metrics
    rows: dict[str, str | None] = {}
    for row, name in (("Step time", "step_ms"), ("Forward time", "forward_ms")):
        if (median := metrics.get(f"latency/{name}")) is not None:
            iqr, samples = metrics.get(f"latency/{name}_iqr"), len(record.samples.get(name) or ())
            decimals = max(0, 3 - math.floor(math.log10(median))) if median > 0 else 0
            spread = f" +- {iqr:,.{decimals}f}" if iqr is not None else ""
            details = ["median" if iqr is None else "median +- IQR", f"n = {samples}"][: 1 + bool(samples)]
            rows[row] = f"{median:,.{decimals}f}{spread} ms ({', '.join(details)})"
    rows["Throughput"] = _joined(
        metrics,
        ("throughput/videos_per_hour", "videos/hour"),
        ("throughput/frames_per_second", "frames/s"),
        ("throughput/tokens_per_second", "tokens/s"),
    )
    rows["Kernels"] = _kernels(record.effective) if rows["Throughput"] else None
    rows["Loading"] = describe.loading(metrics)
    rows["Energy"] = _joined(metrics, ("energy/joules_per_step", "J/step"))
    if (mfu := metrics.get("mfu")) is not None:
        rows["MFU"] = f"{100 * mfu:.1f} % of the dense peak"
    rows["Loss"] = _joined(metrics, ("train/loss", "(last step)"))
    if (parity := _parity(metrics)) is not None:
        error = parity if parity == "bit-equal" else f"relative L2 error {parity}"
        tolerance = record.effective.get("tolerance")
        known = "; ".join(
            filter(
                None,
                (
                    "lossy" if record.effective.get("is_lossy") else None,
                    record.effective.get("verified"),
                    f"tolerance {tolerance:g}" if tolerance else None,
                ),
            )
        )
        rows["Parity"] = f"{error} against mode none" + (f" ({known})" if known else "")
    sent = {
        name.removeprefix("communication/").removesuffix("_gib_per_forward"): value
        for name, value in metrics.items()
        if name.startswith("communication/") and name.endswith("_gib_per_forward") and value
    }
    if sent:
        amounts = ", ".join(f"{axis} {describe.number(value * 1024)} MiB" for axis, value in sent.items())
        by = ", by copy engines" if record.effective.get("transport") == "copies" else ""
        rows["Exchanged"] = f"{amounts} between devices a forward{by}"
    rows["Swapped"] = _joined(
        metrics,
        ("swap/gib_per_forward", "GiB from the host a forward"),
        ("swap/stall_ms_per_step", "ms waited for it a step"),
    )
    rss = {
        name.split("/")[1]: value
        for name, value in metrics.items()
        if name.startswith("memory/rank") and name.endswith("/peak_rss_gib")
    }
    if rss:
        values = ", ".join(f"{rank} {value:.2f}" for rank, value in rss.items())
        rows["Host memory"] = f"{values} GiB (peak RSS)"
    return {name: value for name, value in rows.items() if value is not None}


def _device_table(metrics: Mapping[str, float]) -> Table | None:
    """One row a device: memory and what it was doing; columns that no device has are left out."""
    labels = dict.fromkeys(
        name.split("/")[1]
        for name in metrics
        if name.startswith(("memory/", "telemetry/")) and name.split("/")[1].startswith(("gpu", "cpu"))
    )
    columns = {
        header: [metrics.get(metric.format(label)) for label in labels]
        for header, (metric, _) in DEVICE_COLUMNS.items()
    }
    columns = {header: values for header, values in columns.items() if set(values) - {None}}
    if not columns:
        return None
    table = plain_table()
    table.add_column("device")
    for header in columns:
        table.add_column(header, justify="right")
    for index, label in enumerate(labels):
        cells = (
            "-" if (value := values[index]) is None else f"{value:.{DEVICE_COLUMNS[header][1]}f}"
            for header, values in columns.items()
        )
        table.add_row(label, *cells)
    return table


def _cell_labels(records: Sequence[Record]) -> list[str]:
    """The mode of each run, those of its overrides in which the cells differ, and which repeat it is."""
    common = set.intersection(*(set(record.overrides) for record in records))
    hidden = ("parallelism", "gpus")
    labels = []
    for record in records:
        own = [override for override in record.overrides if override not in common]
        own = [override for override in own if override.partition("=")[0] not in hidden]
        own = [
            override for override in own if re.split("[.=]", override.lstrip("+"))[0] not in NOT_OF_THE_CELL
        ]
        repeat = [f"repeat {record.repeat}"] if (record.repeat or 1) > 1 else []
        labels.append(" ".join([describe.variant(record) or record.name, *own, *repeat]))
    return labels


def _num_devices(record: Record) -> int:
    """0 where a cell that did not run leaves it open."""
    return len(record.effective.get("devices") or record.requested.get("gpus") or ())


def _parity(metrics: Mapping[str, float]) -> str | None:
    if metrics.get("parity/bit_equal"):
        return "bit-equal"
    error = metrics.get("parity/rel_l2")
    return None if error is None else f"{error:.1e}"


def _guidance(config: RunConfig) -> str:
    scales = guidance_of(config)
    if forwards_per_step(config) == 1:
        return "no CFG (1 forward a step)"
    return f"CFG {' / '.join(f'{scale:g}' for scale in scales)} (2 forwards a step)"


def _joined(metrics: Mapping[str, float], *parts: tuple[str, str]) -> str | None:
    """Those of the metrics that exist, each with its unit."""
    return (
        ", ".join(f"{describe.number(metrics[name])} {unit}" for name, unit in parts if name in metrics)
        or None
    )


def facts() -> Table:
    """Two columns: what, and its value."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True, min_width=LABEL_WIDTH)
    table.add_column(overflow="fold")
    return table


def plain_table() -> Table:
    """Columns under a line, as narrow as can be."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def _style(outcome: str) -> str:
    return STYLES.get(outcome, "red")


def _aligned(values: Sequence[float | None], decimals: int | None = None) -> list[str]:
    """A column of numbers; "" for None. decimals None: as many as give the smallest one three digits."""
    if decimals is None:
        sizes = [abs(value) for value in values if value and math.isfinite(value)]
        decimals = min(4, max(0, 2 - math.floor(math.log10(min(sizes))))) if sizes else 0
    return ["" if value is None else f"{value:,.{decimals}f}" for value in values]


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} B parameters" if count >= 1e9 else f"{count / 1e6:.1f} M parameters"


def _plural(count: int, noun: str, ending: str = "s") -> str:
    return f"{count} {noun}{ending if count != 1 else ''}"
