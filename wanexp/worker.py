"""A worker process: one rank, from its start to its last event. Knows nothing of Hydra and MLflow."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from wanexp.events import EventLog, log_path
from wanexp.hardware.devices import Device
from wanexp.job import Job
from wanexp.planning.plan import Plan
from wanexp.rank_run import RankRun

LAST_WORDS_S = 1.0  # between a rank's error and its end


def main(job: Job) -> None:
    """Entry of a worker process: run, and turn whatever goes wrong into an event that the parent reads."""
    rank = int(os.environ["RANK"])
    job.folder.mkdir(parents=True, exist_ok=True)
    _write_output_to(log_path(job.folder, rank))
    _end_at_once_on_signals()
    _end_with_the_parent()
    events = EventLog(job.folder, rank)
    events.emit("start", pid=os.getpid(), host=os.uname().nodename)
    try:
        events.emit("report", report=run_rank(job, rank, events))
    except Exception as error:
        traceback.print_exc()
        sys.stdout.flush()
        events.emit("error", **describe_error(error))
        if dist.is_initialized():  # this may be the echo of a rank that was killed: let the agent see that one first
            time.sleep(LAST_WORDS_S)
        os._exit(1)  # no clean-up: a collective of the others may never end, and the parent already knows


def run_rank(job: Job, rank: int, events: EventLog) -> dict[str, Any]:
    """Everything one rank does, as a JSON-able report. Raises what goes wrong."""
    owned = [job.plan.devices[position] for position in job.plan.ranks[rank].devices]
    devices = [torch_device(device) for device in owned]
    torch.set_num_threads(job.num_threads)
    events.progress("set-up", 0, 1)
    with process_group(job.plan, devices[0], timeout_s=job.config.limits.run_s):
        return RankRun(job, rank, owned, devices, events).run()


def torch_device(device: Device) -> torch.device:
    return torch.device("cuda", device.index) if device.type == "cuda" else torch.device("cpu")


@contextmanager
def process_group(plan: Plan, device: torch.device, *, timeout_s: float) -> Iterator[None]:
    """The default process group, where the layout has several ranks or the mode is torch's own.

    timeout_s: of a collective; long, as the parent's watcher ends ranks that stall and knows which one it was.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if plan.layout.num_ranks == 1 and plan.mode != "distributed":
        yield
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    yield  # not destroyed when something goes wrong: that could wait for ranks that are gone
    dist.destroy_process_group()


def describe_error(error: BaseException) -> dict[str, Any]:
    """Type, message, traceback and outcome of an exception."""
    is_oom = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
    return {
        "outcome": "oom" if is_oom else "failed",
        "type": type(error).__name__,
        "message": str(error).strip().split("\n")[0],
        "traceback": "".join(traceback.format_exception(error)),
    }


def _write_output_to(path: Path) -> None:
    """stdout and stderr, of native libraries too, and the stacks that SIGUSR1 and crashes print."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(file=log)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)


def _end_at_once_on_signals() -> None:
    """The agent passes on the signal that it got, and Ctrl-C reaches the whole process group: no traceback for that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with_the_parent() -> None:
    """Kill this process once the parent is gone, SIGKILL included.

    Not by prctl's death signal: the parent of that is the fork server, which lives as long as its children do.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="wanexp-parent", daemon=True).start()
