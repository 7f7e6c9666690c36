"""The tables of a setting: times with their verdicts, then memory, energy and exactness. Pure."""

from collections.abc import Iterator, Mapping, Sequence

from wanexp.report import answers
from wanexp.report.cells import Cell
from wanexp.report.drawing import NOT_RUN
from wanexp.report.machine import joined
from wanexp.report.modes import KIND_IN_WORDS, LATENCY
from wanexp.report.page import Block, Heading, Table, Text
from wanexp.tracking.describe import compared_blocks, number, plural, present

INTERVAL_NOTE = (
    "Intervals are 95 % bootstrap intervals of the median: over the medians of the runs where a cell has three or "
    "more, else over its steps, which know nothing of the drift between runs. Verdicts hold at 95 % for all of them "
    "together."
)


def cell_tables(cells: Sequence[Cell], baseline: str | None = None) -> list[Block]:
    """Times of one sample a step, those of samples side by side, then memory, energy and exactness of all."""
    verdicts = answers.verdicts(cells, baseline)
    timed = [cell for cell in cells if cell.is_finished and cell.steps_ms]
    bases = [found.base for found in verdicts.values()]
    bases += [cell for cell in timed if answers.baseline_of(cell, timed, baseline) is cell]
    based = {*verdicts, *map(id, bases)}
    alone = [cell for cell in timed if id(cell) not in based]
    remarks = [*_remarks(bases, alone, baseline)]
    if not all(found.is_credible for found in verdicts.values()):
        limit = f"{answers.CREDIBLE_EFFICIENCY:.0%}"
        remarks.append(f"An efficiency above {limit} is noise, or its base did other work.")
    blocks: list[Block] = [Text(" ".join(remarks))] if timed else []
    for kind, words in KIND_IN_WORDS.items():
        own = [cell for cell in cells if cell.kind == kind and cell.runs and cell.outcome != "skipped"]
        if own:
            blocks += [Heading(words.capitalize(), 3), _times_table(own, kind, verdicts, bases)]
    ran = [cell for cell in cells if cell.is_finished]
    return blocks + ([Heading("Memory, energy, exactness", 3), _memory_table(ran)] if ran else [])


def _remarks(bases: Sequence[Cell], alone: Sequence[Cell], baseline: str | None) -> Iterator[str]:
    """What the reader of the tables must know. alone: cells that are compared with nothing."""
    if bases:
        yield f"Compared with {'; '.join(sorted({base.label for base in bases}))}."
    if bases and baseline is None and not any(base.mode == "none" for base in bases):
        yield "No run of mode none finished, so the base is the cell with the fewest devices that did."
    if any(cell.kind == LATENCY for cell in alone):
        yield f"Cells of one sample a step without a speed-up have no baseline: {answers.no_base(baseline)}."
    yield INTERVAL_NOTE


def _times_table(
    own: Sequence[Cell], kind: str, verdicts: Mapping[int, answers.Against], bases: Sequence[Cell]
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
            within = (
                f"{number(middle.low, 4)} to {number(middle.high, 4)}" if middle.low < middle.high else ""
            )
            row[2:5] = number(middle.median, 4), within, _count(cell)
        if found := verdicts.get(id(cell)):
            row[5] = f"{answers.gain(found.base, cell):.2f}x"
            row[6] = f"{found.efficiency:.0%}" + ("" if found.is_credible else " (not credible)")
            row[7], row[8] = found.comparison.verdict, found.comparison.difference
        elif any(base is cell for base in bases):
            row[7] = "baseline"
        row[9] = _number(cell.videos_per_hour)
        rows.append(row)
    return _without_empty(head, rows, numeric=(2, 3, 4, 5, 6, 8, 9))


def _memory_table(cells: Sequence[Cell]) -> Table:
    head = [
        "cell",
        "peak GiB, fullest",
        "of each device",
        "capacity",
        "weights",
        "energy, Wh/video",
        "USD/video",
        "parity",
    ]
    rows = []
    for cell in cells:
        capacities = {cap for device in cell.devices if (cap := cell.capacity_gib(device))}
        row = [cell.label, _number(cell.peak_gib), _peaks(cell), joined(map(_number, sorted(capacities)))]
        row += [
            _loading(cell),
            _number(answers.energy_wh(cell)),
            _number(answers.cost_usd(cell)),
        ]
        rows.append([*row, _parity(cell)])
    return _without_empty(head, rows, numeric=(1, 3, 5, 6))


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
    """`bit-equal`, `0.0031, 4 of 40 blocks`."""
    value = cell.metric("parity/rel_l2")
    if value is None:
        return ""
    distance = f"{value:.2g}" if value else "bit-equal"
    others = "other kernels" if value and cell.metric("parity/same_kernels") not in (None, 1) else ""
    return ", ".join(present(distance, compared_blocks(cell.record), others))


def _loading(cell: Cell) -> str:
    """`loaded in 12.3 s`, `made in 1.70 s`."""
    seconds = cell.metric("load/seconds")
    if seconds is None:
        return ""
    return f"{'made' if cell.metric('load/read_gib') == 0 else 'loaded'} in {number(seconds)} s"


def _number(value: float | None) -> str:
    return "" if value is None else number(value)
