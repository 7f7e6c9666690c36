"""What a person sees: the start card, progress, the end table, the table of a sweep.

With colours in a terminal; elsewhere plain text without control codes. Import it late: rich takes a while.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from wanexp.config import RunConfig
from wanexp.planning.plan import Plan
from wanexp.record import Record
from wanexp.sweep.fingerprint import NOT_OF_THE_CELL
from wanexp.terminal.end_table import device_table, parity_text, result_rows
from wanexp.terminal.progress import ProgressReporter, show_progress
from wanexp.terminal.screen import Screen
from wanexp.terminal.start_card import card_rows, placement_table
from wanexp.terminal.tables import LABEL_WIDTH, facts, plain_table
from wanexp.tracking import describe

TRACEBACK_LINES = 15
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


class Console:
    """Writes to `file` (default: stdout), `width` columns wide (default: the terminal's, else 80)."""

    def __init__(self, file: IO[str] | None = None, width: int | None = None) -> None:
        self.rich = Screen(file=file, width=width, highlight=False, markup=False, emoji=False)

    def start_card(self, config: RunConfig, plan: Plan, *, weights: str, notes: Sequence[str] = ()) -> None:
        """What is about to run, and which device holds what. weights: "random" or the checkpoint's path."""
        card = facts()
        for name, value in card_rows(config, plan, weights).items():
            card.add_row(name, value)
        for note in notes:
            card.add_row("Note", Text(note, style="yellow"))
        layout = Table.grid()
        layout.add_row(card)
        layout.add_row("")
        layout.add_row(placement_table(plan))
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
        for name, value in result_rows(record).items():
            table.add_row(name, value)
        self.rich.print()
        self.rich.print(table)
        if (devices := device_table(record.metrics)) is not None:
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
        parities = [parity_text(record.metrics) or "" for record in records]
        compared = [text and describe.compared_blocks(r) for text, r in zip(parities, records, strict=True)]
        columns["parity"] = [
            f"{text}*" if blocks else text for text, blocks in zip(parities, compared, strict=True)
        ]
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
        if any(compared):
            self.rich.print(f"* over the first {' or '.join(dict.fromkeys(filter(None, compared)))}")
        for label, count, record in zip(labels, counts, records, strict=True):
            if record.outcome != "finished" and record.message:
                where = f"{label}, {count} device{'s' * (count != 1)}" if count else label
                outcome = Text(record.outcome, style=_style(record.outcome))
                self.rich.print(Text.assemble(f"{where}: ", outcome, f": {record.message}"))

    def _failure(self, error: Mapping[str, Any]) -> None:
        lines = str(error.get("traceback") or "").rstrip().splitlines()
        if not lines:  # such as of a process that the system killed
            return
        kind = f" ({error['type']})" if error.get("type") else ""
        who = "wanexp itself failed" if error.get("rank") is None else f"Rank {error['rank']} failed first"
        self.rich.print(Text(f"{who}{kind}:", style="red"))
        if len(lines) > TRACEBACK_LINES:
            self._line("  ... (all of it is in the record)")
        for line in lines[-TRACEBACK_LINES:]:
            self._line(f"  {line}")

    def _line(self, text: str) -> None:
        self.rich.print(Text(text), soft_wrap=True)


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


def _style(outcome: str) -> str:
    return STYLES.get(outcome, "red")


def _aligned(values: Sequence[float | None], decimals: int | None = None) -> list[str]:
    """A column of numbers; "" for None. decimals None: as many as give the smallest one three digits."""
    if decimals is None:
        sizes = [abs(value) for value in values if value and math.isfinite(value)]
        decimals = min(4, max(0, 2 - math.floor(math.log10(min(sizes))))) if sizes else 0
    return ["" if value is None else f"{value:,.{decimals}f}" for value in values]
