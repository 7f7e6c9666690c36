"""A run of a sweep on its way, from its overrides to its record."""

import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from wanexp.config import RunConfig
from wanexp.record import Record

if TYPE_CHECKING:
    from wanexp.sweep.forecast import Forecast


def new_sweep_id(name: str) -> str:
    """`modes_tiny-3f9a1c`: the name of a sweep's folder, and what tells it from others of that name."""
    return f"{name}-{secrets.token_hex(3)}"


def sweep_name_of(sweep_id: str) -> str:
    """The name in a `sweep_id`; those of older sweeps are names."""
    return re.sub(r"-[0-9a-f]{6}$", "", sweep_id)


@dataclass(frozen=True)
class SweepCell:
    """What a run is told of its sweep. sweep_id: see `new_sweep_id`. cell: fingerprint of the cell."""

    sweep_id: str
    index: int
    count: int
    cell: str = ""
    repeat: int = 1


@dataclass
class SweepRun:
    """One repeat of one cell.

    index: of the cell in the grid. config: as Hydra composed it; settings: the same, checked, None where its values
    are wrong. error: the mistake in it. cell: fingerprint of its config; work: of what it comes to, equal for cells of
    one layout and the same settings, "" where it comes to nothing. skip: why it is not run though it could be. is_kept:
    an earlier invocation ran it. seconds: that it took, preparations included.
    """

    index: int
    repeat: int
    overrides: list[str]
    config: DictConfig
    settings: RunConfig | None
    error: str | None
    folder: Path
    cell: str = ""
    forecast: "Forecast | None" = None
    record: Record | None = None
    is_kept: bool = False
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)  # of the launcher, for this run
    work: str = ""
    skip: str = ""

    @property
    def name(self) -> str:
        return self.folder.name


def outer_rank() -> int | None:
    """This process's rank where a torchrun started it, else None."""
    if "RANK" in os.environ and ("WORLD_SIZE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ):
        return int(os.environ["RANK"])
    return None
