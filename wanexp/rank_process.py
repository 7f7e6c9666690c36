"""One rank in a process of its own, as its parent sees it under an outer torchrun."""

import multiprocessing
import os
from typing import Any, Self

from wanexp import worker
from wanexp.events import Event, EventTail, event_path, log_path
from wanexp.job import Job
from wanexp.meeting import parent_event


class RankProcess:
    """A rank, started by `with` and killed where it ends. Its log and events stay in the job's folder.

    Where that folder cannot be made here the rank never starts, and its one event is that error.
    """

    def __init__(self, job: Job, rank: int, *, start_method: str) -> None:
        self.is_done = False  # the rank has handed in its report
        self._job, self._rank = job, rank
        self._tail = EventTail(job.folder, [rank])
        self._unheard: list[Event] = []
        job.preload()
        context: Any = multiprocessing.get_context(start_method)
        self._process = context.Process(target=worker.main, args=(job,), name=f"wanexp-rank{rank}")

    def __enter__(self) -> Self:
        try:
            self._job.folder.mkdir(parents=True, exist_ok=True)
            for path in (event_path(self._job.folder, self._rank), log_path(self._job.folder, self._rank)):
                path.unlink(missing_ok=True)  # of an earlier run in the same folder
            self._process.start()
        except OSError as error:
            self._unheard.append(parent_event(self._rank, "error", **worker.describe_error(error)))
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative is the signal that ended it."""
        return self._process.exitcode

    def new_events(self) -> list[Event]:
        events, self._unheard = [*self._unheard, *self._tail.poll()], []
        self.is_done = self.is_done or any(event["kind"] == "report" for event in events)
        return events

    def signal(self, number: int) -> None:
        """0: none, but the call is answered."""
        if number and self._process.is_alive():
            os.kill(self._process.pid, number)
