"""The cells of a sweep: runs of one config, with the names and numbers that a reader compares."""

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wanexp.measure.comparison import Interval, median_interval, median_of
from wanexp.record import Record
from wanexp.report.modes import LATENCY, THROUGHPUT, style_of
from wanexp.tracking import describe


@dataclass(frozen=True)
class Run:
    """One record. folder: where it lies; None for one that came from MLflow."""

    record: Record
    folder: Path | None = None

    @property
    def steps_ms(self) -> list[float]:
        """Raw step times, else the one median that the record has."""
        samples = self.record.samples.get("step_ms") or [self.record.metrics.get("latency/step_ms")]
        return [float(value) for value in samples if value]


@dataclass
class Cell:
    """Runs of one config. outcome: the best that a run came to; `waiting` where none has run yet."""

    mode: str
    num_devices: int
    setting: str  # model, video and workload: cells of one setting are compared
    runs: list[Run] = field(default_factory=list)
    layout: str = ""  # where the mode does not say it, `cfg=2 x ulysses=2`
    options: str = ""  # what else varies in the sweep, `attention=sdpa_math`
    suffix: str = ""  # tells cells of one name apart: their GPUs, else a number
    outcome: str = "waiting"
    reason: str = ""
    overrides: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """`latency`, or `throughput` for several samples a step: which cells it may share an axis with."""
        several = bool(self.runs) and describe.batch_size(self.record) > 1
        return THROUGHPUT if several or self.degrees.get("dp", 1) > 1 else style_of(self.mode).kind

    @cached_property
    def degrees(self) -> dict[str, int]:
        """The degrees of parallelism above 1 that ran, `{"cfg": 2, "ulysses": 2}`; empty where that is not known."""
        layout = describe.mapping(self.record.effective.get("layout")) if self.runs else {}
        return {name: degree for name, degree in layout.items() if isinstance(degree, int) and degree > 1}

    @property
    def on_cpu(self) -> bool:
        return bool(self.runs) and self.record.effective.get("device_type") == "cpu"

    @property
    def label(self) -> str:
        """`context_parallel, 4 GPUs, ring=2 x ulysses=2, attention=sdpa_math`."""
        return ", ".join(
            filter(None, (self.mode, self.devices_label, self.layout, self.options, self.suffix))
        )

    @property
    def devices_label(self) -> str:
        if not self.num_devices:
            return ""
        noun = "CPU device" if self.on_cpu else "GPU"
        return f"{self.num_devices} {noun}{'s' if self.num_devices > 1 else ''}"

    @property
    def record(self) -> Record:
        """The record that stands for the cell: a finished one if there is one, else the last."""
        finished = [run.record for run in self.runs if run.record.outcome == "finished"]
        return finished[0] if finished else self.runs[-1].record

    @property
    def is_finished(self) -> bool:
        return self.outcome == "finished"

    @property
    def finished_runs(self) -> list[Run]:
        return [run for run in self.runs if run.record.outcome == "finished"]

    @cached_property
    def steps_ms(self) -> list[list[float]]:
        """Step times of each finished run, ms."""
        return [steps for run in self.finished_runs if (steps := run.steps_ms)]

    def times_ms(self, kind: str) -> list[list[float]]:
        """What cells are compared by: step times, or for throughput times a sample."""
        if kind == LATENCY:
            return self.steps_ms
        batch_size = describe.batch_size(self.record)
        return [[step / batch_size for step in steps] for steps in self.steps_ms]

    def time_ms(self, kind: str) -> float:
        """Median of `times_ms`, of which there must be some."""
        return median_of(self.times_ms(kind))

    @cached_property
    def interval(self) -> Interval | None:
        """Of the time on the axis of its kind; None where the cell has no times."""
        times = self.times_ms(self.kind) if self.is_finished else []
        return median_interval(times) if times else None

    @property
    def videos_per_hour(self) -> float | None:
        """From the median step; None for training."""
        if not self.steps_ms or (sampling_steps := describe.sampling_steps(self.record)) is None:
            return None
        return 3_600_000 * describe.batch_size(self.record) / (median_of(self.steps_ms) * sampling_steps)

    def metric(self, name: str) -> float | None:
        """Median of a metric over the finished runs, over all runs where none finished."""
        runs = self.finished_runs or self.runs
        values = [float(v) for run in runs if (v := run.record.metrics.get(name)) is not None]
        return statistics.median(values) if values else None

    @property
    def peak_gib(self) -> float | None:
        """Allocated on the fullest device."""
        return self.metric("memory/peak_allocated_gib") if self.is_finished else None

    @property
    def devices(self) -> list[str]:
        return [label for label, _ in describe.devices_of(self.record)] if self.runs else []

    def capacity_gib(self, device: str) -> float | None:
        """Memory of a GPU, or the cap that the run was held to; None for logical CPU devices."""
        if self.on_cpu:
            return None
        hardware = describe.mapping(self.record.requested.get("hardware"))
        if hardware.get("enforce_memory"):
            return describe.mapping(hardware.get("device")).get("memory_gib")
        gpu = describe.mapping(describe.mapping(self.record.environment.get("gpus")).get(device))
        if gpu.get("memory_gib"):
            return float(gpu["memory_gib"])
        for entry in self.record.effective.get("devices") or []:
            if isinstance(entry, Mapping) and entry.get("label") == device and entry.get("total_bytes"):
                return float(entry["total_bytes"]) / 1024**3
        return None


@dataclass
class Sweep:
    """All that is known of one sweep, its cells in their order."""

    sweep_id: str
    cells: list[Cell]
    folder: Path | None = None
    document: dict[str, Any] = field(default_factory=dict)  # sweep.json

    @property
    def records(self) -> list[Record]:
        return [run.record for cell in self.cells for run in cell.runs]

    @property
    def outcomes(self) -> str:
        """What became of the cells: `10 of 12 cells finished, 1 oom, 1 skipped`."""
        count = Counter(cell.outcome for cell in self.cells)
        done = count.pop("finished", 0)
        finished = f"{done} of {describe.plural(len(self.cells), 'cell')} finished"
        return ", ".join([finished, *(f"{number} {outcome}" for outcome, number in count.items())])

    @property
    def settings(self) -> list[str]:
        """In order of appearance; cells of different settings are not compared."""
        return list(dict.fromkeys(cell.setting for cell in self.cells))

    def of_setting(self, setting: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.setting == setting]
