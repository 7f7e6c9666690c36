"""What bench_layouts.py runs: cases, layouts, their order, what each is expected to cost. Starts nothing."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from wanexp.config import RunConfig, conf_dir, register
from wanexp.config_reading import to_run_config
from wanexp.errors import UserError
from wanexp.hardware.devices import Device, find_devices, select_devices
from wanexp.hardware.profiles import profile_for
from wanexp.planning.candidates import Candidate
from wanexp.planning.layouts import PRESETS, layout_of
from wanexp.planning.planner import judge, plan_layouts
from wanexp.record import Record

START_S, CASE_S = (
    8.0,
    3.0,
)  # expected of the processes of a layout, and of a case beside its steps (load, check)


@dataclass(frozen=True)
class Case:
    """One model at one size. blocks: how many of the first are compared; None: all. own: overrides of this case alone,
    common: of all."""

    model: str
    video: str
    steps: int
    blocks: int | None
    own: tuple[str, ...] = ()
    common: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        told = (override for override in self.own if not override.startswith("workload."))
        return " ".join((self.model, self.video, *told))

    @property
    def overrides(self) -> tuple[str, ...]:
        return (*self.common, *self.own)

    def config(self, *overrides: str) -> RunConfig:
        register()
        settings = [
            f"model={self.model}",
            f"video={self.video}",
            f"workload.num_steps={self.steps}",
            "tracking=none",
            "verify=always",
            *self.overrides,
            *overrides,
        ]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return to_run_config(compose("config", overrides=settings))


@dataclass(frozen=True)
class Cell:
    """One layout on some GPUs, and the cases that it takes in turn. seconds: expected of all of it."""

    asked: str  # overrides
    devices: tuple[Device, ...]
    cases: tuple[Case, ...] = ()
    seconds: float = 0.0

    @property
    def words(self) -> str:
        return f"{self.asked.replace('parallelism.', '').removeprefix('parallelism=')} on {len(self.devices)}"


def parse_case(text: str, overrides: Sequence[str]) -> Case:
    """Raises UserError for a text that is no case."""
    model, video, steps, blocks, *more = (text + ":::::").split(":")
    if not (model and video and steps.isdecimal() and (not blocks or blocks.isdecimal())):
        raise UserError(f"--case {text} is no case; write model:video:steps, such as wan2.1_t2v_1.3b:480p:3")
    own = tuple(word for word in ":".join(more).strip(":").split(" ") if word)
    return Case(model, video, int(steps), int(blocks) if blocks else None, own, tuple(overrides))


def whole_numbers(option: str, text: str) -> list[int]:
    """Raises UserError for what is no list such as 0,1."""
    if not all(word.isdecimal() for word in text.split(",")):
        raise UserError(f"{option} {text} is no list of whole numbers; write it such as 0,1")
    return [int(word) for word in text.split(",")]


def choose_devices(case: Case, gpus: str | None, counts: str | None) -> tuple[tuple[Device, ...], list[int]]:
    """The devices of the study, and how many of them layouts are spread over, the most first. Raises UserError."""
    found = find_devices(case.config().hardware)
    asked = sorted(set(whole_numbers("--counts", counts)), reverse=True) if counts else []
    named = whole_numbers("--gpus", gpus) if gpus else None
    if named is None and asked and found[0].type == "cpu":
        named = [device.index for device in found[: asked[0]]]
    devices = select_devices(found, named, "hybrid")
    if asked and asked[0] > len(devices):
        raise UserError(f"--counts asks for {asked[0]} devices, there are {len(devices)}")
    return devices, asked or [len(devices)]


def choose_cells(
    cases: Sequence[Case],
    asked: Sequence[str],
    devices: Sequence[Device],
    counts: Sequence[int],
    max_step_s: float,
) -> tuple[list[Cell], list[tuple[Cell, Case]]]:
    """The cells in the order in which they run, and the cases that are left out of one for the length of their steps.

    `all`: every layout that the planner lists and that fits. What is predicted fastest on each count comes first, then
    each mode by name, then the products; within that the most GPUs first, and the fastest.
    """
    ordered: list[tuple[tuple[int, int], Cell]] = []
    for count in counts:
        chosen = tuple(devices[:count])
        for words in asked:
            if words != "all":
                ordered.append(((1, -count), Cell(f"parallelism={words}", chosen)))
                continue
            for place, candidate in enumerate(legal_layouts(cases[0], chosen)):
                importance = 0 if place == 0 else 2 if is_product(candidate) else 1
                ordered.append(((importance, -count), Cell(overrides_of(candidate), chosen)))
    cells, left = [], []
    for _, cell in sorted(ordered, key=lambda pair: pair[0]):
        taken = []
        for case in cases:
            if step_s(case, cell) > max_step_s:
                left.append((cell, case))
            else:
                taken.append(case)
        if taken:
            cells.append(dataclasses.replace(cell, cases=tuple(taken), seconds=expected_seconds(taken, cell)))
    return cells, left


def legal_layouts(case: Case, devices: Sequence[Device]) -> list[Candidate]:
    """Every layout on all of `devices` that fits, the fastest by prediction first."""
    config = case.config()
    profiles = [profile_for(config.hardware, device, conf_dir()) for device in devices]
    planned = plan_layouts(config, devices, profiles)
    return [c for c in planned.candidates if not c.rejection and len(c.devices) == len(devices) > 1]


def overrides_of(candidate: Candidate) -> str:
    words = (word.strip("'") for word in candidate.settings.split(" "))
    return " ".join(word for word in words if not word.startswith("gpus="))


def is_product(candidate: Candidate) -> bool:
    """Whether several axes are split, and no mode by name does that."""
    degrees = layout_of(candidate.parallelism).degrees()
    axes = {name for name, degree in degrees.items() if degree > 1}
    named = {name for name, degree in PRESETS["fsdp"].degrees().items() if degree != 1}
    return len(axes) > 1 and axes != named


def step_s(case: Case, cell: Cell) -> float:
    """Predicted seconds of a step; 0 where the rates of the device are unknown."""
    found = judged(case, cell.asked, cell.devices)
    return found.time.step_s if found.time and found.time.is_known else 0.0


@functools.cache  # composing a config takes longer than judging it
def judged(case: Case, asked: str, devices: tuple[Device, ...]) -> Candidate:
    config = case.config(*asked.split())
    profiles = [profile_for(config.hardware, device, conf_dir()) for device in devices]
    return judge(config, config.parallelism, devices, profiles)


@functools.cache
def num_warmup_steps(case: Case) -> int:
    return case.config().workload.num_warmup_steps


def expected_seconds(cases: Sequence[Case], cell: Cell) -> float:
    """Of one layout from the start of its processes to the end of its last case."""
    total = START_S
    for case in cases:
        total += CASE_S + (case.steps + num_warmup_steps(case)) * step_s(case, cell)
    return total


def batches(cells: Sequence[Cell], devices: Sequence[Device]) -> list[list[Cell]]:
    """Cells in their order, but those of few GPUs side by side, each on GPUs of its own."""
    found: list[list[Cell]] = []
    waiting: dict[int, list[Cell]] = {}  # by count: a batch that has room
    for cell in cells:
        count = len(cell.devices)
        batch = waiting.setdefault(count, [])
        if not batch:
            found.append(batch)
        own = tuple(devices[len(batch) * count : (len(batch) + 1) * count])
        batch.append(dataclasses.replace(cell, devices=own))
        if (len(batch) + 1) * count > len(devices):
            del waiting[count]
    return found


def predictions(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What the planner says of every cell, before it runs."""
    return [
        {
            "case": case.name,
            "gpus": len(cell.devices),
            "asked": cell.asked,
            "seconds": round(cell.seconds, 1),
            **judged(case, cell.asked, cell.devices).summary(),
        }
        for cell in cells
        for case in cell.cases
    ]


def write_sweep(
    folder: Path,
    command: Sequence[str],
    records: Sequence[tuple[Path, Record]],
    left: Sequence[tuple[Cell, Case, str]],
) -> None:
    """sweep.json as of a sweep (wanexp/sweep/files.py): `folder` imports into MLflow and reports as one.

    left: cells that did not run, and why.
    """
    entries: list[dict[str, Any]] = [
        {
            "index": index,
            "folder": place.name,
            "overrides": record.overrides,
            "outcome": record.outcome,
            "reason": record.message,
            "run_id": record.run_id,
            "name": record.name,
        }
        for index, (place, record) in enumerate(records)
    ]
    for cell, case, reason in left:
        gpus = ",".join(str(device.index) for device in cell.devices)
        overrides = [f"model={case.model}", f"video={case.video}", *case.overrides, *cell.asked.split()]
        entries.append(
            {"index": len(entries), "overrides": [*overrides, f"gpus=[{gpus}]"], "outcome": "skipped"}
            | {"reason": reason}
        )
    document = {
        "schema_version": 2,
        "sweep_id": folder.name,
        "name": folder.name,
        "state": "finished",
        "command": list(command),
        "cells": entries,
    }
    (folder / "sweep.json").write_text(json.dumps(document, indent=1) + "\n")
