"""What a person, and other programs, see of a sweep while it runs.

In a terminal one table of all runs, with phase and memory of the one that runs; what that run prints itself goes to
`console.log` in its folder. Elsewhere plain lines around what the runs print. `progress.json` for other programs:

    schema_version 1; sweep_id; pid; updated (ISO 8601 UTC); state (running, finished, interrupted, stopped)
    elapsed_s, eta_s      of this invocation; eta_s null where nothing is known yet
    num_runs, counts      finished, skipped, failed (any other outcome), running, waiting
    current               null, or {index, repeat, folder, phase, done, total, seconds}
    memory_gib            in use now: {"gpu0": 12.3, ...} of the sweep's GPUs by NVML, {} on the CPU
    notes                 such as foreign processes on the GPUs before the current run

The parent stays quiet while workers are timed: it looks once in two seconds.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import rich.console
from rich import box
from rich.live import Live
from rich.table import Table
from rich.text import Text

from wanexp.events import EventTail
from wanexp.hardware.devices import Device
from wanexp.hardware.nvml import NvmlUnavailable, handle_of, open_nvml, used_bytes
from wanexp.sweep.files import PROGRESS_FILE, write_json
from wanexp.sweep.order import can_run
from wanexp.sweep.run import SweepRun
from wanexp.terminal.screen import Screen
from wanexp.tracking.describe import number

GIB = 1024**3
INTERVAL_S = 2.0
MAX_ROWS = 30  # of the table; of a larger sweep the rows around the run under way
STYLES = {"finished": "green", "running": "bold cyan", "waiting": "dim", "skipped": "yellow"}


def state_of(run: SweepRun, current: SweepRun | None) -> str:
    """`waiting`, `running`, or the outcome."""
    if run.record is not None:
        return run.record.outcome
    return "running" if run is current else "waiting"


def labels(runs: Sequence[SweepRun]) -> dict[int, str]:
    """By id: the name of each run, and those of its overrides in which the cells differ and that the name lacks."""
    common = set.intersection(*(set(run.overrides) for run in runs)) if runs else set()
    hidden = ("parallelism", "gpus")
    own = {
        id(run): [
            word for word in run.overrides if word not in common and word.partition("=")[0] not in hidden
        ]
        for run in runs
    }
    return {id(run): " ".join([run.name, *own[id(run)]]) for run in runs}


def counts(states: Sequence[str]) -> dict[str, int]:
    """How many runs are finished, skipped, failed in any other way, running, waiting."""
    found = dict.fromkeys(("finished", "skipped", "failed", "running", "waiting"), 0)
    for state in states:
        found[state if state in found else "failed"] += 1
    return found


def time_left(runs: Sequence[SweepRun], current: SweepRun | None, current_s: float) -> float | None:
    """Seconds until the last run is done; None before the first one is.

    A run takes as long as an earlier repeat of its cell; else as the mean of those that ran; no time if it cannot run.
    """
    took: dict[str, list[float]] = {}
    for run in runs:
        if run.seconds is not None and run.record and run.record.outcome != "skipped":
            took.setdefault(run.cell, []).append(run.seconds)
    if not took:
        return None
    everything = [seconds for times in took.values() for seconds in times]
    left = 0.0
    for run in runs:
        if run.record is None and can_run(run):
            known = took.get(run.cell, everything)
            expected = sum(known) / len(known)
            left += max(0.0, expected - current_s) if run is current else expected
    return left


class LiveSweep:
    """Shows a sweep on `stdout` (default: this process's) and keeps `progress.json`, inside `with`."""

    def __init__(
        self, folder: Path, runs: list[SweepRun], *, sweep_id: str, stdout: IO[str] | None = None
    ) -> None:
        """`runs` may grow."""
        self._folder, self._runs, self._sweep_id = folder, runs, sweep_id
        self._console = Screen(file=stdout or sys.stdout, highlight=False, markup=False, emoji=False)
        self.is_terminal = self._console.is_terminal
        self._current: SweepRun | None = None
        self._tail: EventTail | None = None
        self._phase: dict[str, Any] = {}
        self._state = "running"
        self._begin = self._run_begin = time.monotonic()
        self._gpus = _Gpus()
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="wanexp-sweep", daemon=True)
        self._table: Live | None = None

    def __enter__(self) -> "LiveSweep":
        if self.is_terminal:
            self._table = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=1 / INTERVAL_S
            )
            self._table.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(timeout=10)
        if self._table is not None:
            self._table.stop()
        self._gpus.close()

    def end(self, state: str) -> None:
        """The state of the sweep for the last `progress.json`."""
        self._state = state
        self._keep_progress()

    @contextlib.contextmanager
    def showing(self, run: SweepRun) -> Iterator[None]:
        """`run` is under way."""
        with self._lock:
            self._current, self._phase = run, {}
            devices = run.forecast.devices if run.forecast else ()
            self._tail = EventTail(run.folder / "ranks", range(max(1, len(devices))))
            self._gpus.watch(devices)
            self._run_begin = time.monotonic()
        self._keep_progress()
        for note in run.notes:
            self._line(f"note: {note}")
        done = sum(other.record is not None for other in self._runs)
        left = time_left(self._runs, run, 0.0)
        ending = f", about {_duration(left)} left" if left else ""
        self._line(f"\nrun {done + 1} of {len(self._runs)}: {labels(self._runs)[id(run)]}{ending}")
        try:
            with self._output_of(run):
                yield
        finally:
            with self._lock:
                self._current = self._tail = None
            self._keep_progress()
            if run.record is not None:
                reason = f": {run.record.message}" if run.record.message else ""
                self._line(f"{run.name}: {run.record.outcome} after {_duration(run.seconds or 0.0)}{reason}")

    def note(self, text: str) -> None:
        """A line for the reader, above the table in a terminal."""
        self._console.print(Text(text), soft_wrap=True)

    def snapshot(self) -> dict[str, Any]:
        """The content of `progress.json`."""
        with self._lock:
            self._read_events()
            current, now = self._current, time.monotonic()
            states = [state_of(run, current) for run in self._runs]
            spent = now - self._run_begin
            left = time_left(self._runs, current, spent)
            return {
                "schema_version": 1,
                "sweep_id": self._sweep_id,
                "pid": os.getpid(),
                "updated": datetime.now(UTC).isoformat(timespec="seconds"),
                "state": self._state,
                "elapsed_s": round(now - self._begin, 1),
                "eta_s": None if left is None else round(left, 1),
                "num_runs": len(states),
                "counts": counts(states),
                "current": None
                if current is None
                else {
                    "index": current.index,
                    "repeat": current.repeat,
                    "folder": current.name,
                    "phase": self._phase.get("phase", "start"),
                    "done": self._phase.get("done"),
                    "total": self._phase.get("total"),
                    "seconds": round(spent, 1),
                },
                "memory_gib": self._gpus.used_gib(),
                "notes": list(current.notes) if current else [],
            }

    def _read_events(self) -> None:
        if self._tail is None:
            return
        try:
            events = self._tail.poll()
        except (OSError, ValueError):  # a line cut off by a full disk; the run itself will say so
            return
        for event in events:
            if event["kind"] == "progress":
                self._phase = event

    def _watch(self) -> None:
        while not self._closing.wait(INTERVAL_S):
            self._keep_progress()

    def _keep_progress(self) -> None:
        with (
            contextlib.suppress(OSError),
            self._lock,
        ):  # a full disk ends the sweep by sweep.json, not by this
            write_json(self._folder / PROGRESS_FILE, self.snapshot())

    @contextlib.contextmanager
    def _output_of(self, run: SweepRun) -> Iterator[None]:
        if not self.is_terminal:
            yield
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / "console.log").open("a") as log, contextlib.redirect_stdout(log):
            yield

    def _line(self, text: str) -> None:
        if not self.is_terminal:
            self.note(text)

    def _render(self) -> rich.console.Group:
        return sweep_table(self._runs, self._current, self.snapshot())


def sweep_table(
    runs: Sequence[SweepRun], current: SweepRun | None, snapshot: Mapping[str, Any]
) -> rich.console.Group:
    """The runs, where they stand, and below them how the sweep goes."""
    # 80 columns hold the longest name of a mode in one piece
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("run", min_width=max((len(run.name) for run in runs), default=0))
    table.add_column("state", max_width=16)
    for name in ("step\nms", "peak\nGiB", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    first = 0
    if len(runs) > MAX_ROWS:
        position = next((n for n, run in enumerate(runs) if run is current), len(runs))
        first = max(0, min(position - MAX_ROWS // 2, len(runs) - MAX_ROWS))
    names = labels(runs)
    for run in runs[first : first + MAX_ROWS]:
        state = state_of(run, current)
        metrics = run.record.metrics if run.record else {}
        step_ms, peak_gib = metrics.get("latency/step_ms"), metrics.get("memory/peak_allocated_gib")
        shown, seconds = state, run.seconds
        if run is current and (under_way := snapshot["current"]):
            done, total = under_way["done"], under_way["total"]
            count = f" {100 * done / total:.0f} %" if done is not None and total else ""
            shown, seconds = f"{state}: {under_way['phase']}{count}", under_way["seconds"]
        elif run.is_kept:
            shown = f"{state} earlier"
        table.add_row(
            Text(names[id(run)]),
            Text(shown, style=STYLES.get(state, "red")),
            "" if step_ms is None else number(step_ms, 4),
            "" if peak_gib is None else f"{peak_gib:.2f}",
            "" if seconds is None else _duration(seconds),
        )
    parts = [f"{number} {name}" for name, number in snapshot["counts"].items() if number]
    if snapshot["eta_s"] is not None:
        parts.append(f"about {_duration(snapshot['eta_s'])} left")
    parts += [f"{label} {used:.1f} GiB in use" for label, used in snapshot["memory_gib"].items()]
    return rich.console.Group(table, Text("\n".join([", ".join(parts), *snapshot["notes"]])))


class _Gpus:
    """Memory in use of the sweep's GPUs, by NVML; nothing on the CPU or without NVML."""

    def __init__(self, nvml: Any = None) -> None:
        self._nvml, self._open = nvml, False
        self._handles: dict[str, Any] = {}  # by label

    def watch(self, devices: Sequence[Device]) -> None:
        new = [device for device in devices if device.type == "cuda" and device.label not in self._handles]
        if not new:
            return
        if not self._open:
            try:
                self._nvml = open_nvml(self._nvml)
            except NvmlUnavailable:
                return
            self._open = True
        self._handles |= {device.label: handle_of(self._nvml, device.uuid) for device in new}

    def used_gib(self) -> dict[str, float]:
        used = {
            label: used_bytes(self._nvml, handle) for label, handle in sorted(self._handles.items()) if handle
        }
        return {label: round(number / GIB, 2) for label, number in used.items() if number is not None}

    def close(self) -> None:
        if self._open:
            self._nvml.nvmlShutdown()
            self._open, self._handles = False, {}


def _duration(seconds: float) -> str:
    """Such as 8 s, 4:05 min, 2:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
