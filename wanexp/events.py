"""What the ranks tell the parent: one JSON line an event, appended to a file a rank.

Files, because they survive the process: what a rank measured before it died is still there. A line costs about
20 us and is written between timed steps.
"""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def event_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.jsonl"


def log_path(folder: Path, rank: int) -> Path:
    """Where the rank's stdout and stderr go."""
    return folder / f"rank{rank}.log"


class EventLog:
    """The writing end, in the worker."""

    def __init__(self, folder: Path, rank: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(event_path(folder, rank), flags, 0o644)
        self._rank = rank
        self._last_progress = 0.0

    def emit(self, kind: str, **fields: Any) -> None:
        event = {"kind": kind, "rank": self._rank, "time": time.time(), **fields}
        os.write(self._file, (json.dumps(event) + "\n").encode())

    def progress(self, phase: str, done: int, total: int, **fields: Any) -> None:
        """A progress event, at most five a second."""
        now = time.monotonic()
        if done in (0, total) or now - self._last_progress > 0.2:
            self._last_progress = now
            self.emit("progress", phase=phase, done=done, total=total, **fields)


class EventTail:
    """The reading end, in the parent: returns what was added since the last look, whole lines only."""

    def __init__(self, folder: Path, ranks: Iterable[int]) -> None:
        self._paths = [event_path(folder, rank) for rank in ranks]
        self._offsets = [0] * len(self._paths)

    def poll(self) -> list[Event]:
        events: list[Event] = []
        for index, path in enumerate(self._paths):
            try:
                with path.open("rb") as file:
                    file.seek(self._offsets[index])
                    data = file.read()
            except FileNotFoundError:
                continue
            complete = data.rfind(b"\n") + 1
            self._offsets[index] += complete
            for line in data[:complete].splitlines():
                with suppress(ValueError):  # torn by a full disk
                    events.append(json.loads(line))
        return sorted(events, key=lambda event: event["time"])
