"""The tables of a setting: times with their verdicts, then memory, energy and exactness. Pure."""

from collections.abc import Sequence

from wanexp.measure.comparison import Comparison
from wanexp.report import answers
from wanexp.report.cells import Cell
from wanexp.report.drawing import NOT_RUN
from wanexp.report.machine import joined
from wanexp.report.modes import LATENCY, THROUGHPUT
from wanexp.report.page import Block, Heading, Table, Text
from wanexp.tracking.describe import plural

INTERVAL_NOTE = (
    "Intervals are 95 % bootstrap intervals of the median: over the medians of the runs where a cell has three or "
    "more, else over its steps, which know nothing of the drift between runs. Verdicts hold at 95 % for all of them "
    "together."
)


def cell_tables(cells: Sequence[Cell], baseline: str | None = None) -> list[Block]:
    """Times of latency modes and of throughput modes apart, then memory, energy and exactness of all."""
    verdicts = {id(cells[place]): verdict for place, verdict in answers.verdicts(cells, baseline).items()}
    bases = {base.label for cell in cells if (base := answers.baseline_of(cell, cells, baseline))}
    blocks: list[Block] = []
    if bases:
        said = f"Compared with {'; '.join(sorted(bases))}. "
        if baseline is None and not any(base.startswith("none,") for base in bases):
            said += "Mode none did not finish, so the base is the cell with the fewest devices that did. "
        blocks.append(Text(said + INTERVAL_NOTE))
    for kind, title in ((LATENCY, "Latency modes"), (THROUGHPUT, "Throughput modes")):
        own = [cell for cell in cells if cell.kind == kind and cell.runs and cell.outcome != "skipped"]
        if own:
            blocks += [Heading(title, 3), _times_table(own, cells, kind, verdicts, baseline)]
    ran = [cell for cell in cells if cell.is_finished]
    return blocks + ([Heading("Memory, energy, exactness", 3), _memory_table(ran)] if ran else [])


def _times_table(
    own: Sequence[Cell],
    cells: Sequence[Cell],
    kind: str,
    verdicts: dict[int, Comparison],
    baseline: str | None,
) -> Table:
    times = "step, ms" if kind == LATENCY else "ms a sample"
    gains = "speed-up" if kind == LATENCY else "throughput ratio"
    head = [
        "cell",
        "outcome",
        times,
        "95 % interval",
        "n",
        gains,
        "efficiency",
        "verdict",
        "difference",
        "videos/hour",
    ]
    rows = []
    for cell in own:
        row = [cell.label, NOT_RUN.get(cell.outcome, cell.outcome)] + [""] * 8
        if middle := cell.interval:
            within = f"{middle.low:,.4g} to {middle.high:,.4g}" if middle.low < middle.high else ""
            row[2:5] = f"{middle.median:,.4g}", within, _count(cell)
        base, verdict = answers.baseline_of(cell, cells, baseline), verdicts.get(id(cell))
        if base is cell:
            row[7] = "baseline"
        elif verdict and base:
            row[5] = f"{answers.gain(base, cell):.2f}x"
            row[6] = f"{answers.efficiency(base, cell):.0%}" if cell.num_devices and base.num_devices else ""
            row[7], row[8] = verdict.verdict, verdict.difference
        row[9] = _number(cell.videos_per_hour)
        rows.append(row)
    return _without_empty(head, rows, numeric=(2, 5, 6, 9))


def _memory_table(cells: Sequence[Cell]) -> Table:
    head = [
        "cell",
        "peak GiB, fullest",
        "of each device",
        "capacity",
        "load, s",
        "energy, Wh/video",
        "USD/video",
        "parity",
    ]
    rows = []
    for cell in cells:
        capacities = {cap for device in cell.devices if (cap := cell.capacity_gib(device))}
        row = [cell.label, _number(cell.peak_gib), _peaks(cell), joined(map(_number, sorted(capacities)))]
        row += [
            _number(cell.metric("load/seconds")),
            _number(answers.energy_wh(cell)),
            _number(answers.cost_usd(cell)),
        ]
        rows.append([*row, _parity(cell)])
    return _without_empty(head, rows, numeric=(1, 3, 4, 5, 6))


def _without_empty(head: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int]) -> Table:
    """A table of the columns in which something stands."""
    kept = [place for place in range(len(head)) if any(row[place] for row in rows)]
    table_rows = [[row[place] for place in kept] for row in rows]
    return Table(
        [head[place] for place in kept], table_rows, [new for new, old in enumerate(kept) if old in numeric]
    )


def _count(cell: Cell) -> str:
    steps = [len(run) for run in cell.steps_ms]
    return f"{plural(len(steps), 'run')} x {min(steps)}" + ("" if len(set(steps)) == 1 else f"-{max(steps)}")


def _peaks(cell: Cell) -> str:
    values = [cell.metric(f"memory/{device}/peak_allocated_gib") for device in cell.devices]
    texts = [_number(value) for value in values if value is not None]
    return f"{len(texts)} x {texts[0]}" if len(texts) > 2 and len(set(texts)) == 1 else " / ".join(texts)


def _parity(cell: Cell) -> str:
    value = cell.metric("parity/rel_l2")
    return "" if value is None else "bit-equal" if value == 0 else f"{value:.2g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
