"""What an earlier invocation left in the sweep's folder, and what of it counts.

A run counts where its record says `finished` and its cell still has the same fingerprint. Anything else is run again:
what was interrupted or failed, what ran out of memory, what was skipped because of another. The folder of a run that
is run again goes to `replaced/`, where nobody takes it for a result, and its MLflow run is deleted.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanexp.errors import UserError
from wanexp.record import FILE_NAME, Record, read_record
from wanexp.sweep.files import CELL_FILE, SWEEP_FILE, read_json, run_entry
from wanexp.sweep.fingerprint import NOT_OF_THE_CELL
from wanexp.sweep.run import SweepRun

REPLACED = "replaced"


@dataclass
class Earlier:
    """A run's folder as it was found. cell "" and record None: unknown, or not readable."""

    folder: Path
    cell: str
    repeat: int
    overrides: list[str]
    record: Record | None
    entry: dict[str, Any]  # of sweep.json

    @property
    def is_finished(self) -> bool:
        return self.record is not None and self.record.outcome == "finished"

    @property
    def run_id(self) -> str | None:
        return self.record.run_id if self.record else self.entry.get("run_id")


def find_earlier(folder: Path) -> tuple[list[Earlier], dict[str, Any], list[str]]:
    """The runs in a sweep's folder, its `sweep.json` ({} where it cannot be read), and notes on what is damaged."""
    notes = []
    document = read_json(folder / SWEEP_FILE)
    if document is None:
        if (folder / SWEEP_FILE).exists():
            notes.append(f"{SWEEP_FILE} cannot be read; it is made again from the runs' own records")
        document = {}
    entries = {entry.get("folder"): entry for entry in _entries(document)}
    found = []
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name == REPLACED:
            continue
        cell = read_json(path / CELL_FILE) or entries.get(path.name, {})
        if not cell and not (path / FILE_NAME).exists():
            continue
        record = None
        try:
            record = read_record(path)
        except UserError as error:
            if (path / FILE_NAME).exists():
                notes.append(f"{error}; that cell is run again")
        overrides = cell.get("overrides") or (record.overrides if record else [])
        found.append(
            Earlier(
                folder=path,
                cell=str(cell.get("cell") or ""),
                repeat=int(cell.get("repeat") or 1),
                overrides=list(overrides),
                record=record,
                entry=entries.get(path.name, {}),
            )
        )
    return found, document, notes


def earlier_id(document: dict[str, Any], earlier: Sequence[Earlier]) -> str | None:
    """The `sweep_id` of a sweep's folder, by its `sweep.json`, else by a record; None where neither tells."""
    of_records = [old.record.sweep_id for old in earlier if old.record]
    return next(filter(None, [document.get("sweep_id"), *of_records]), None)


def take_over(
    runs: Sequence[SweepRun], earlier: Sequence[Earlier], taken: Set[Path] = frozenset()
) -> tuple[list[Earlier], list[Earlier]]:
    """Give each run the record of an earlier one that counts. Of the others returns (replaced, not asked for).

    taken: folders that no run may have.

    Replaced: another attempt at a run that is asked for now, known by its overrides, or a failure that is in the way of
    one. Two cells may have equal fingerprints, so each earlier run is taken once.
    """
    left = list(earlier)
    for run in runs:
        match = next(
            (
                old
                for old in left
                if old.is_finished and run.cell and (old.cell, old.repeat) == (run.cell, run.repeat)
            ),
            None,
        )
        if match is not None:
            left.remove(match)
            run.record, run.folder, run.is_kept = match.record, match.folder, True
            run.seconds = match.entry.get("seconds")
    asked = {(_key(run.overrides), run.repeat) for run in runs}
    replaced = [old for old in left if (_key(old.overrides), old.repeat) in asked]
    others = [old for old in left if old not in replaced]
    taken = (
        taken
        | {run.folder for run in runs if run.is_kept}
        | {old.folder for old in others if old.is_finished}
    )
    for run in runs:
        while not run.is_kept and run.folder in taken:  # the grid has changed, and with it the numbers
            run.folder = run.folder.with_name(f"{run.folder.name}_again")
    in_the_way = [old for old in others if old.folder in {run.folder for run in runs}]
    return replaced + in_the_way, [old for old in others if old not in in_the_way]


def set_aside(old: Earlier) -> None:
    """Move the folder out of the way, with its record under a name that no import looks for. Raises OSError."""
    place = old.folder.parent / REPLACED
    place.mkdir(exist_ok=True)
    target, number = place / old.folder.name, 2
    while target.exists():
        target, number = place / f"{old.folder.name}_{number}", number + 1
    old.folder.rename(target)
    if (target / FILE_NAME).exists():
        (target / FILE_NAME).rename(target / f"replaced_{FILE_NAME}")


def earlier_entry(old: Earlier) -> dict[str, Any]:
    """In `sweep.json`, of a run that is not asked for this time."""
    cell = {"index": None, "cell": old.cell, "repeat": old.repeat, "overrides": old.overrides}
    seconds, predicted_s = old.entry.get("seconds"), old.entry.get("predicted_s")
    return run_entry(cell, old.folder.name, old.record, kept=True, seconds=seconds, predicted_s=predicted_s)


def _entries(document: dict[str, Any]) -> list[dict[str, Any]]:
    cells = document.get("cells")
    return [entry for entry in cells if isinstance(entry, dict)] if isinstance(cells, list) else []


def _key(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that make the cell."""
    own = (
        word for word in overrides if word.partition("=")[0].lstrip("+").split(".")[0] not in NOT_OF_THE_CELL
    )
    return tuple(sorted(own))
