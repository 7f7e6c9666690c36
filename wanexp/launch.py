"""Starting the ranks of a job, watching them, and saying how they ended.

The processes are started and ended by torch's elastic agent. They are forked from a server that has torch loaded and
no CUDA context, so a start costs little and no state leaks from one run into the next. Beside the agent a watcher
reads the ranks' events: it feeds the progress display, and ends a launch that takes too long or shows no sign of life.
Workers end with the parent, however it ends (wanexp/worker.py).
"""

import logging
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from wanexp import worker
from wanexp.events import Event, EventTail, event_path, log_path
from wanexp.job import Job
from wanexp.stall import Begun, culprit

POLL_S = 0.1
STACKS_S = 0.5  # for the ranks to write their stacks before they are killed
START_LIMIT_S = (
    120.0  # for a rank's first sign of life, whatever the limit of a stall: importing torch can take long
)
LAST_RESORT_S = 5.0  # after which a launch that was given up is ended by a signal to this process


@dataclass
class Heard:
    """What the ranks have said of themselves, by rank where it is not a list."""

    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    steps: dict[int, list[float]] = field(default_factory=dict)
    errors: list[Event] = field(default_factory=list)

    def take(self, event: Event) -> None:
        rank, kind = event["rank"], event["kind"]
        if kind == "step":
            self.steps.setdefault(rank, []).append(event["seconds"])
        elif kind == "error":
            self.errors.append(event)
        elif kind == "report":
            self.reports[rank] = event["report"]


@dataclass
class Launched:
    """How a launch ended. reports: by rank, of the ranks that came to their end."""

    outcome: str  # finished, oom, timeout, failed, interrupted
    message: str = ""
    error: dict[str, Any] | None = None
    user_error: str = ""  # what the user asked for and a rank found that it cannot be had
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    steps: dict[int, list[float]] = field(
        default_factory=dict
    )  # seconds a step by rank, also of ranks that died


def launch(job: Job, *, on_event: Callable[[Event], None] = lambda _event: None) -> Launched:
    """Run `job` on its ranks and wait. Never raises for what happens inside the ranks, nor for Ctrl-C."""
    job.folder.mkdir(parents=True, exist_ok=True)
    job.preload()
    watcher = Watcher(job, on_event)
    num_ranks = job.plan.layout.num_ranks
    for rank in range(num_ranks):  # of an earlier launch in the same folder
        event_path(job.folder, rank).unlink(missing_ok=True)
        log_path(job.folder, rank).unlink(missing_ok=True)
    interrupted = ""
    exit_codes: dict[int, int] = {}
    with quiet_agent(), kept_signal_handlers(), watcher:
        try:
            launch_ranks(num_ranks, worker.main, job)
        except ChildFailedError as error:
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        except (SignalException, KeyboardInterrupt) as error:
            interrupted = signal.Signals(getattr(error, "sigval", signal.SIGINT)).name
    return verdict(
        job, watcher.heard, exit_codes=exit_codes, interrupted=interrupted, timeout=watcher.timeout_message
    )


def launch_ranks(num_ranks: int, entry: Callable[[Any], None], argument: Any) -> None:
    """Run `entry(argument)` in `num_ranks` processes of this machine, without restarts, and wait for them.

    The agent meets in a file of a private folder: it unpickles what it reads there, and torch's store behind a port
    listens on every interface. The ranks' own store does so, too, and holds addresses only. Raises ChildFailedError
    for a rank that failed, SignalException for a signal.
    """
    with tempfile.TemporaryDirectory(prefix="wanexp-", ignore_cleanup_errors=True) as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_configs={"store_type": "file"},
            rdzv_endpoint=str(Path(folder) / "store"),
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=POLL_S,
            start_method="forkserver",
        )
        elastic_launch(config, entry)(argument)


def verdict(
    job: Job, heard: Heard, *, exit_codes: dict[int, int], interrupted: str = "", timeout: str = ""
) -> Launched:
    """The outcome: what the user or the watcher ended, else what the rank that failed first says.

    exit_codes: of the rank whose end the agent saw first. Where that rank has no error to tell, it is the one that
    failed: the errors of the others are that they miss it.
    """
    launched = Launched("finished", reports=heard.reports, steps=heard.steps)
    first_error = min(heard.errors, key=lambda event: event["time"], default=None)
    told = {event["rank"] for event in heard.errors}
    if -signal.SIGINT in exit_codes.values():  # Ctrl-C, which reached the ranks before this process
        interrupted = interrupted or "SIGINT"
    if timeout:
        launched.outcome, launched.message = "timeout", timeout
    elif interrupted:
        launched.outcome, launched.message = "interrupted", f"interrupted by {interrupted}"
    elif first_error and told.issuperset(exit_codes):
        launched.outcome = first_error["outcome"]
        launched.message = f"rank {first_error['rank']}: {first_error['type']}: {first_error['message']}"
        launched.error = {key: first_error[key] for key in ("rank", "type", "message", "traceback")}
        launched.user_error = first_error["message"] if first_error.get("is_user_error") else ""
    elif exit_codes or len(heard.reports) < job.plan.layout.num_ranks:
        rank, code = min(exit_codes.items(), default=(0, 0))
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "; was the host out of memory?" if code == -signal.SIGKILL else ""
        launched.outcome = "failed"
        launched.message = f"rank {rank} {how}{hint} (its log: {log_path(job.folder, rank)})"
        launched.error = {"rank": rank, "type": "ProcessEnded", "message": launched.message, "traceback": ""}
    return launched


class Watcher(threading.Thread):
    """Reads the ranks' events; kills all ranks when the launch takes too long or stalls."""

    answer_s = STACKS_S

    def __init__(self, job: Job, on_event: Callable[[Event], None]) -> None:
        super().__init__(name="wanexp-watcher", daemon=True)
        self.job = job
        self.on_event = on_event
        self.heard = Heard()
        self.timeout_message = ""
        self._start_events: dict[int, Event] = {}
        self._begun: dict[int, Begun] = {}
        self._begin = time.time()
        self._last_seen = dict.fromkeys(range(job.plan.layout.num_ranks), self._begin)
        self._phase = dict.fromkeys(self._last_seen, "start")
        self._done = threading.Event()
        self._tail = EventTail(job.folder, self._last_seen)

    def name_of(self, rank: int) -> str:
        return f"rank {rank}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._done.set()
        self.join()
        self._read()
        self._signal_ranks(signal.SIGKILL)  # a second Ctrl-C keeps the agent from ending them

    def run(self) -> None:
        while not self._done.wait(POLL_S):
            self._read()
            limits, now = self.job.config.limits, time.time()
            working = [rank for rank in self._last_seen if rank not in self.heard.reports]
            if not working or self.timeout_message:
                continue
            silent = min(working, key=lambda rank: self._last_seen[rank])
            has_started = len(self._start_events) == len(self._last_seen)
            stall_s = limits.stall_s if has_started else max(limits.stall_s, START_LIMIT_S)
            if all(now - self._last_seen[rank] > stall_s for rank in working):
                self._give_up(
                    f"no sign of life for {stall_s:g} s (limits.stall_s)", silent, "fell silent first"
                )
            elif now - self._begin > limits.run_s:
                self._give_up(
                    f"not done after {limits.run_s:g} s (limits.run_s)",
                    silent,
                    "has shown no sign of life for longest",
                )

    def _read(self) -> None:
        for event in self._tail.poll():
            rank, kind = event["rank"], event["kind"]
            if kind == "answer":  # to a question; no sign of progress
                self._begun[rank] = event["begun"]
                continue
            self._last_seen[rank] = event["time"]
            if kind == "start":
                self._start_events[rank] = event
            elif kind == "progress":
                self._phase[rank] = event["phase"]
            self.heard.take(event)
            # Where it prints to may be gone (rich exits then) or full; the limits hold all the same.
            with suppress(Exception, SystemExit):
                self.on_event(event)

    def _give_up(self, what: str, silent: int, why: str) -> None:
        """Have every rank print its stacks to its log, then kill it; the agent sees that and ends the launch.

        Named is the rank that holds up the others, as their collectives tell, else `silent`.
        """
        self._signal_ranks(signal.SIGUSR1)
        self._signal_ranks(signal.SIGUSR2)
        time.sleep(self.answer_s)
        self._read()  # who has started meanwhile
        working = [rank for rank in self._start_events if rank not in self.heard.reports]
        rank, why = culprit(working, self._begun) or (silent, why)
        self.timeout_message = f"{what}; {self.name_of(rank)} {why}, in phase '{self._phase[rank]}'"
        self._signal_ranks(signal.SIGKILL)
        has_handler = callable(signal.getsignal(signal.SIGTERM))
        if (
            not self._done.wait(LAST_RESORT_S) and has_handler
        ):  # ranks that never started have no process id here
            os.kill(os.getpid(), signal.SIGTERM)  # the agent's handler

    def _signal_ranks(self, number: signal.Signals) -> None:
        for start in self._start_events.values():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if psutil.Process(start["pid"]).create_time() <= start["time"]:  # else the id has a new owner
                    os.kill(start["pid"], number)


@contextmanager
def quiet_agent() -> Iterator[None]:
    """The agent's own logging repeats, in paragraphs, what `verdict` says in a line."""
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """The agent installs handlers for these and leaves them."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in signals}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
