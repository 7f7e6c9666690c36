"""The runs behind a report as plain data: what was asked for, what ran, every figure. Without telemetry."""

from collections.abc import Mapping
from typing import Any

from wanexp.record import Record
from wanexp.report.cells import Cell, Sweep
from wanexp.tracking import describe

KEPT = ("overrides", "outcome", "message", "started", "ended", "metrics", "samples", "warnings")
OF_DEVICES = ("label", "type", "index", "name", "total_bytes")


def runs_document(sweep: Sweep) -> dict[str, Any]:
    """For runs.json; `runs` has every repeat of every cell, and the cells of which none has run."""
    return {
        "sweep": sweep.sweep_id,
        "state": sweep.document.get("state"),
        "command": sweep.document.get("command"),
        "runs": [entry for cell in sweep.cells for entry in _of_cell(cell)],
    }


def _of_cell(cell: Cell) -> list[dict[str, Any]]:
    if not cell.runs:
        return [
            {
                "cell": cell.label,
                "overrides": cell.overrides,
                "outcome": cell.outcome,
                "message": cell.reason,
            }
        ]
    return [{"cell": cell.label, **run_entry(run.record)} for run in cell.runs]


def run_entry(record: Record) -> dict[str, Any]:
    """One run: what KEPT names, what ran, on which devices."""
    effective: Mapping[str, Any] = record.effective
    devices = [describe.mapping(device) for device in effective.get("devices") or []]
    return {
        **{name: getattr(record, name) for name in KEPT},
        "effective": {name: value for name, value in effective.items() if name != "devices"},
        "devices": [{name: device.get(name) for name in OF_DEVICES} for device in devices],
    }
