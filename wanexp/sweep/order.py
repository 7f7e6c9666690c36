"""The order of a sweep's runs, which of its cells are the same, and whether each has a folder. Pure."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from wanexp.errors import UserError
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


def check_folders(runs: Sequence[SweepRun], sweep_folder: Path, owners: dict[Path, SweepRun]) -> None:
    """Raise UserError unless each run has a folder of its own right below the sweep's.

    owners: by folder the runs of earlier batches; gets these too.
    """
    advice = "leave hydra.sweep.subdir out, or make it differ, such as hydra.sweep.subdir='${hydra.job.num}'"
    for run in runs:
        if run.folder.parent != sweep_folder or run.name == "..":
            raise UserError(
                f"the folder of cell {run.index}, {run.folder}, is not right below {sweep_folder}; {advice}"
            )
        first, second = sorted((owners.setdefault(run.folder, run), run), key=lambda one: one.index)
        if first is not second:
            names = [
                " ".join([f"{one.index}", *(word for word in one.overrides if word not in other.overrides)])
                for one, other in ((first, second), (second, first))
            ]
            raise UserError(f"cells {' and '.join(names)} share the folder {run.folder}; {advice}")


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
