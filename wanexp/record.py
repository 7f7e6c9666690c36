"""The record: everything known of a run as one JSON document with a schema version.

It is written to the run's folder before MLflow is asked for anything, and MLflow is a view of it: a record can be
imported again at any time.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wanexp.errors import UserError
from wanexp.tracking.location import without_password

SCHEMA_VERSION = 1
FILE_NAME = "record.json"
OUTCOMES = (
    "finished",
    "skipped",  # illegal or not needed
    "infeasible",  # the plan says that it cannot fit
    "oom",
    "inexact",
    "timeout",
    "failed",
    "interrupted",
)


@dataclass
class Record:
    """One run.

    requested: the composed config; its addresses lose their passwords, like those of command and overrides. effective:
    what really ran (mode, layout, attention, precision, device_type, devices). metrics: name -> number, names grouped
    for MLflow's charts. samples: raw timings, one entry a step. telemetry: series of the NVML sampler, `gpu0/power_w`
    -> [[seconds since the start, value], ...]. artifacts: files of the run's folder worth keeping, relative to it.
    """

    run_id: str
    name: str
    started: str  # ISO 8601, UTC
    requested: dict[str, Any]
    command: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    sweep_id: str | None = None
    cell: str | None = None  # fingerprint of what a sweep compares; repeats of one cell share it
    repeat: int | None = None  # 1, 2, ... of that cell
    ended: str | None = None
    outcome: str = "failed"
    message: str = ""
    error: dict[str, Any] | None = (
        None  # {"rank": ..., "type": ..., "traceback": ...} of the rank that failed first
    )
    effective: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    telemetry: dict[str, list[list[float]]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name in ("requested", "command", "overrides"):
            setattr(self, name, _changed(getattr(self, name), _without_password))

    def exit_code(self) -> int:
        """0 finished or skipped, 130 interrupted, 1 any other."""
        return {"finished": 0, "skipped": 0, "interrupted": 130}.get(self.outcome, 1)

    def write(self, folder: Path) -> Path:
        """Write `record.json` into `folder`, whole or not at all; NaN and infinity, which JSON lacks, as null."""
        path = folder / FILE_NAME
        draft = path.with_suffix(".json.partial")
        draft.write_text(json.dumps(_changed(asdict(self), _finite), indent=1, allow_nan=False) + "\n")
        draft.replace(path)
        return path


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` of every leaf of its tables and lists."""
    if isinstance(value, dict):
        return {key: _changed(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(item, change) for item in value]
    return change(value)


def _without_password(leaf: Any) -> Any:
    return without_password(leaf) if isinstance(leaf, str) else leaf


def _finite(leaf: Any) -> Any:
    return None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf


def read_record(path: Path) -> Record:
    """Read a record of this or an older schema; `path` is the file or its folder. Raises UserError."""
    path = path / FILE_NAME if path.is_dir() else path
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"there is no record at {path}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a readable record: {error}") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise UserError(f"{path} has record schema {version}; this wanexp reads 1 to {SCHEMA_VERSION}")
    known = Record.__dataclass_fields__
    try:
        return Record(**{key: value for key, value in document.items() if key in known})
    except TypeError as error:  # a required key is missing
        raise UserError(f"{path} is not a whole record: {error}") from None
