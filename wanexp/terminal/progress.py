"""Progress over the phases of a run: bars in a terminal, elsewhere plain lines without control codes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

GIB = 1024**3
PLAIN_INTERVAL_S = 10.0  # between progress lines where there is no terminal
REFRESH_PER_SECOND = 2  # of the bars: the parent should not be busy while workers are timed


class ProgressReporter(Protocol):
    """What `Console.progress` hands out."""

    def update(
        self, phase: str, done: float, total: float | None = None, memory_gib: float | None = None
    ) -> None:
        """`done` of `total` of `phase`: a count, or bytes from 1 MiB on; total None: unknown."""


@contextmanager
def show_progress(console: Console) -> Iterator[ProgressReporter]:
    """Progress on `console` for as long as the context lasts."""
    if not console.is_terminal:
        yield _PlainProgress(console)
        return
    bars = Progress(
        TextColumn("{task.description:<25}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]:>16}"),
        TimeElapsedColumn(),
        _TimeLeftColumn(),
        TextColumn("{task.fields[memory]}"),
        console=console,
        refresh_per_second=REFRESH_PER_SECOND,
    )
    with bars:
        yield _BarProgress(bars)


class _PlainProgress:
    """A line at the start of a phase and at most every 10 s."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phases: dict[str, float] = {}  # when each began
        self._last = 0.0

    def update(
        self, phase: str, done: float, total: float | None = None, memory_gib: float | None = None
    ) -> None:
        now = time.monotonic()
        if phase not in self._phases:
            self._phases[phase] = self._last = now
            self._console.print(f"{phase} ...", soft_wrap=True)
        elif now - self._last >= PLAIN_INTERVAL_S:
            self._last = now
            elapsed = now - self._phases[phase]
            parts = [_count(done, total), f"{elapsed:.0f} s"]
            if total and 0 < done < total:
                parts.append(f"about {elapsed / done * (total - done):.0f} s left")
            if memory_gib is not None:
                parts.append(f"{memory_gib:.2f} GiB")
            self._console.print(f"{phase}: {', '.join(part for part in parts if part)}", soft_wrap=True)


class _BarProgress:
    """A bar a phase; a phase ends when it is complete or the next one begins."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def update(
        self, phase: str, done: float, total: float | None = None, memory_gib: float | None = None
    ) -> None:
        if phase not in self._tasks:
            self._end_phases()
            self._tasks[phase] = self._bars.add_task(phase, total=total, count="", memory="")
        memory = "" if memory_gib is None else f"{memory_gib:.2f} GiB"
        task = self._tasks[phase]
        self._bars.update(task, completed=done, total=total, count=_count(done, total), memory=memory)

    def _end_phases(self) -> None:
        """Stop the clocks of what was shown so far, and fill the bars that had nothing to count."""
        for task in self._bars.tasks:
            if task.stop_time is None:
                self._bars.stop_task(task.id)
                if task.total is None or task.total == 1:
                    self._bars.update(task.id, total=1, completed=1)


class _TimeLeftColumn(ProgressColumn):
    """Time left, in words, while there is some."""

    def render(self, task: Task) -> Text:
        if task.finished or task.stop_time is not None or task.time_remaining is None:
            return Text("")
        minutes, seconds = divmod(int(task.time_remaining), 60)
        return Text(f"{minutes}:{seconds:02d} left")


def _count(done: float, total: float | None) -> str:
    if total == 1:  # under way or done: nothing to count
        return ""
    if total is None:
        return f"{done:g}" if done else ""
    if total >= 2**20:  # bytes
        return f"{done / GIB:.2f}/{total / GIB:.2f} GiB"
    return f"{done:g}/{total:g}"
