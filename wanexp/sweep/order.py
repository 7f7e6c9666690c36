"""The order of a sweep's runs, and which of its cells are the same. Pure."""

import dataclasses
from collections.abc import Sequence

from wanexp.sweep.run import SweepRun


def schedule(cells: Sequence[SweepRun], *, order: str, repeats: int) -> list[SweepRun]:
    """All runs: the cells in order, then all of them again for each repeat (A B C A B C ...).

    Interleaved, because what drifts (heat, clocks, neighbours) then hits every cell alike. order: `given`, or `cheap`:
    by predicted GPU seconds, then by the number of devices and the peak, so that there is much to see early. A cell
    that is not run says so once.
    """
    ordered = sorted(cells, key=cheapness) if order == "cheap" else list(cells)
    skip_twins(ordered)
    return [
        _repeat(cell, number)
        for number in range(1, repeats + 1)
        for cell in ordered
        if number == 1 or can_run(cell)
    ]


def skip_twins(cells: Sequence[SweepRun]) -> None:
    """Have each cell skipped that comes to the layout and settings of an earlier one, such as hybrid on two GPUs."""
    first: dict[str, SweepRun] = {}
    for cell in cells:
        if cell.work and first.setdefault(cell.work, cell) is not cell:
            cell.skip = f"same layout as {first[cell.work].name}"


def can_run(cell: SweepRun) -> bool:
    """Whether the plan knows of something to run, and nothing speaks against it."""
    return not (cell.error or cell.skip) and cell.forecast is not None and bool(cell.forecast.needed)


def cheapness(cell: SweepRun) -> tuple[float, int, int, int]:
    forecast = cell.forecast
    if forecast is None:
        return 0.0, 0, 0, cell.index
    return float(f"{forecast.cost:.2g}"), len(forecast.devices), forecast.fullest, cell.index


def _repeat(cell: SweepRun, number: int) -> SweepRun:
    folder = cell.folder if number == 1 else cell.folder.with_name(f"{cell.folder.name}_repeat{number}")
    return dataclasses.replace(cell, repeat=number, folder=folder, notes=[])
