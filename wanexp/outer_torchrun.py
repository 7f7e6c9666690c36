"""A run under an outer torchrun: each of its processes is a rank at once.

The elastic agent of torchrun is the isolating parent: it ends all ranks when one dies. Rank 0 alone owns the run's
folder and record. It hands the job to the others, and they hand it their report, or what went wrong, through the
store where the ranks meet.
"""

import dataclasses
import gc
import json
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

import wanexp.preload  # noqa: F401  # else paid for in the load time
from wanexp.config import LimitsConfig, run_config_from_dict, to_dict
from wanexp.events import Event, EventLog, EventTail
from wanexp.hardware.devices import device_from_dict
from wanexp.job import Job
from wanexp.launch import Heard, Launched, verdict
from wanexp.planning.plan import make_plan
from wanexp.worker import describe_error, run_rank

OUTER_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|TORCH_NCCL_ASYNC_.*"
)
JOB_KEY = "wanexp/job"
LAST_WORDS_S = 2.0  # for the errors of others to arrive when this rank fails


class _Stopped(BaseException):
    """SIGTERM or SIGINT, from torchrun or the terminal."""


def lead(job: Job, *, on_event: Callable[[Event], None] = lambda _event: None) -> Launched:
    """Rank 0: hand `job` to the others, compute, and tell of the whole launch as `launch` does.

    Never raises for what happens inside the ranks, nor for signals.
    """
    num_ranks, limit_s = job.plan.layout.num_ranks, job.config.limits.stall_s
    job.folder.mkdir(parents=True, exist_ok=True)
    store = _meet(limit_s)
    store.set(JOB_KEY, write_job(job))
    heard = Heard()
    with _Signals() as signals:
        _compute(job, 0, store, heard, signals, on_event)
        failed = bool(heard.errors) or bool(signals.stopped_by)
        for event in _hear_others(store, num_ranks, within_s=LAST_WORDS_S if failed else limit_s):
            heard.take(event)
        for event in EventTail(job.folder, range(num_ranks)).poll():
            if event["kind"] == "step":
                heard.take(event)
        # SIGTERM is also what torchrun ends the other ranks with when one dies.
        interrupted = "" if heard.errors and signals.stopped_by == "SIGTERM" else signals.stopped_by
        return verdict(job, heard, exit_codes={}, interrupted=interrupted)


def follow(limits: LimitsConfig) -> Launched:
    """Any other rank: compute what rank 0 hands out. What comes of it is heard by rank 0; here it is its own part."""
    rank = int(os.environ["RANK"])
    store = _meet(limits.stall_s)
    job = read_job(store.get(JOB_KEY))
    heard = Heard()
    with _Signals() as signals:
        _compute(job, rank, store, heard, signals, lambda _event: None)
    if heard.reports:
        return Launched("finished")
    return Launched("interrupted" if signals.stopped_by else "failed")


def write_job(job: Job) -> str:
    """`job` as JSON: its config and devices, of which the plan follows."""
    return json.dumps(
        {
            "config": to_dict(job.config),
            "devices": [dataclasses.asdict(device) for device in job.plan.devices],
            "folder": str(job.folder),
            "run_folder": str(job.run_folder),
            "num_threads": job.num_threads,
        }
    )


def read_job(text: bytes) -> Job:
    """The inverse of `write_job`."""
    values = json.loads(text)
    config = run_config_from_dict(values["config"])
    return Job(
        config=config,
        plan=make_plan(config, [device_from_dict(device) for device in values["devices"]]),
        folder=Path(values["folder"]),
        run_folder=Path(values["run_folder"]),
        num_threads=values["num_threads"],
    )


def _meet(timeout_s: float) -> dist.Store:
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return store


def _compute(
    job: Job,
    rank: int,
    store: dist.Store,
    heard: Heard,
    signals: "_Signals",
    on_event: Callable[[Event], None],
) -> None:
    """Run this rank and say how it ended."""
    try:
        with signals.stopping():
            events = _ShownEvents(job.folder, rank, on_event)
            report = run_rank(job, rank, events, timeout_s=job.config.limits.stall_s, store=store)
        heard.take(_say(store, rank, "report", report=report))
    except (Exception, _Stopped) as error:
        traceback.print_exc()
        # When a rank dies, torchrun's signal may come in the middle of what raised because of that.
        cause = error.__context__ if isinstance(error, _Stopped) else error
        if isinstance(cause, Exception):
            heard.take(_say(store, rank, "error", **describe_error(cause)))
    gc.collect()  # the reference needs the memory of this rank's model
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def without_outer_torchrun() -> Iterator[None]:
    """Inside, the environment is as if no torchrun had started this process."""
    taken = {name: os.environ.pop(name) for name in list(os.environ) if OUTER_VARIABLES.fullmatch(name)}
    try:
        yield
    finally:
        os.environ.update(taken)


class _ShownEvents(EventLog):
    """Shows the events of rank 0 to the progress display too, which lives in the same process."""

    def __init__(self, folder: Path, rank: int, on_event: Callable[[Event], None]) -> None:
        super().__init__(folder, rank)
        self._on_event = on_event

    def emit(self, kind: str, **fields: Any) -> None:
        super().emit(kind, **fields)
        self._on_event({"kind": kind, "rank": self._rank, "time": time.time(), **fields})


def _say(store: dist.Store, rank: int, kind: str, **fields: Any) -> Event:
    event = {"kind": kind, "rank": rank, "time": time.time(), **fields}
    store.set(f"wanexp/rank{rank}", json.dumps(event))
    return event


def _hear_others(store: dist.Store, num_ranks: int, *, within_s: float) -> list[Event]:
    """What the other ranks said, of those that do so in time."""
    deadline = time.monotonic() + within_s
    waiting, events = [f"wanexp/rank{rank}" for rank in range(1, num_ranks)], []
    while waiting and time.monotonic() < deadline:
        for key in [key for key in waiting if store.check([key])]:
            waiting.remove(key)
            events.append(json.loads(store.get(key)))
        time.sleep(0.02)
    return events


class _Signals:
    """Notes the first SIGTERM or SIGINT. It stops the computing; what comes after that is left in peace.

    The record is written after a rank has failed, which is when torchrun sends them.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.stopped_by = ""
        self._computing = self._failed = False

    def __enter__(self) -> "_Signals":
        self._before = [signal.signal(number, self._stop) for number in self.NUMBERS]
        return self

    def __exit__(self, *_exception: object) -> None:
        """Back to the handlers before, where all went well."""
        for number, handler in zip(self.NUMBERS, self._before, strict=True):
            signal.signal(number, signal.SIG_IGN if self.stopped_by or self._failed else handler)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Inside, a signal raises _Stopped."""
        self._computing = self._failed = True
        try:
            yield
            self._failed = False
        finally:
            self._computing = False

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.stopped_by = self.stopped_by or signal.Signals(number).name
        if self._computing:
            self._computing = False
            raise _Stopped(self.stopped_by)
