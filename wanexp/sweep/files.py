"""The files of a sweep's folder, each written whole or not at all.

`sweep.json`: the sweep and its runs, kept up to date while it runs. A view: everything in it but `superseded` can be
had from the runs' own folders.

    schema_version  2
    sweep_id        name of the folder and six hex digits, kept on resume=true; `sweep_id` of the records
    name            sweep_name, or null
    state           running, finished, interrupted, stopped (it could not go on; `reason` says why)
    reason          "" or one line
    command         of the last invocation
    started, ended  of the last invocation, ISO 8601 UTC; ended null while it runs
    source          digest of wanexp/, conf/ and torch's version
    order, repeats  as configured
    superseded      run ids of records that were replaced and are not yet known to be gone from MLflow
    cells           one entry a run, in the order in which they run; at the end those of earlier invocations that this
                    one did not ask for:
        index       of the cell in the grid; equal for all repeats of a cell
        cell        fingerprint of the cell: 16 hex digits; groups its repeats
        repeat      1, 2, ...
        overrides   of this run
        folder      relative to the sweep's
        outcome     as in the record; null: not run yet
        reason      the record's message; "" where all went well
        name        of the record, or null
        run_id      of the record, or null
        kept        true: an earlier invocation ran it
        seconds     wall clock of the whole run, or null
        predicted_s seconds of its steps by the plan (generic rates where the device is unknown), or null
        warnings    of the record: foreign processes on the GPUs, throttling by heat, noise
        metrics     those of TABLE_METRICS that the record has

`cell.json` in a run's folder, written before it begins: index, cell, repeat, overrides. `progress.json`: see live.py.
"""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanexp.errors import UserError
from wanexp.record import Record
from wanexp.sweep.run import SweepRun

SWEEP_FILE, CELL_FILE, PROGRESS_FILE, LOCK_FILE = "sweep.json", "cell.json", "progress.json", ".lock"
SCHEMA_VERSION = 2
TABLE_METRICS = (
    "latency/step_ms",
    "latency/forward_ms",
    "throughput/videos_per_hour",
    "memory/peak_allocated_gib",
    "load/seconds",
    "parity/rel_l2",
)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write `path`, whole or not at all. Raises OSError."""
    draft = path.with_name(f"{path.name}.partial")
    draft.write_text(json.dumps(document, indent=1) + "\n")
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The document; None where there is none, or none that can be read."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def cell_document(run: SweepRun) -> dict[str, Any]:
    return {"index": run.index, "cell": run.cell, "repeat": run.repeat, "overrides": run.overrides}


def run_entry(
    cell: Mapping[str, Any],
    folder: str,
    record: Record | None,
    *,
    kept: bool,
    seconds: float | None = None,
    predicted_s: float | None = None,
) -> dict[str, Any]:
    """A run in `sweep.json`. cell: as of `cell_document`. folder: relative to the sweep's."""
    return {
        **cell,
        "folder": folder,
        "outcome": record.outcome if record else None,
        "reason": record.message if record else "",
        "name": record.name if record else None,
        "run_id": record.run_id if record else None,
        "kept": kept,
        "seconds": seconds,
        "predicted_s": predicted_s,
        "warnings": record.warnings if record else [],
        "metrics": {key: record.metrics[key] for key in TABLE_METRICS if record and key in record.metrics},
    }


def holds_a_sweep(folder: Path) -> bool:
    return (folder / SWEEP_FILE).exists() or any(folder.glob(f"*/{CELL_FILE}"))


class FolderLock:
    """Held for as long as a sweep runs in a folder; the kernel gives it back when its process dies."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where another process holds it, OSError where it cannot be written."""
        self._file = (folder / LOCK_FILE).open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"a sweep is running in {folder}; wait for it, or write another sweep_name"
            ) from None

    def release(self) -> None:
        self._file.close()
