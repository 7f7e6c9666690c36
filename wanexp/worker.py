"""A worker process: one rank, from its start to its last event. Knows nothing of Hydra and MLflow."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from wanexp.errors import UserError
from wanexp.events import EventLog, log_path
from wanexp.hardware.devices import Device
from wanexp.job import Job
from wanexp.parallel.peer_memory import exchanges_begun, release_all
from wanexp.planning.memory import context_bytes_of
from wanexp.planning.plan import Plan
from wanexp.planning.planner import context_bytes
from wanexp.rank_run import RankRun

LAST_WORDS_S = 1.0  # between a rank's error and its end


def main(job: Job) -> None:
    """Entry of a worker process: run, and turn whatever goes wrong into an event that the parent reads."""
    rank = int(os.environ["RANK"])
    job.folder.mkdir(parents=True, exist_ok=True)
    _write_output_to(log_path(job.folder, rank))
    _end_at_once_on_signals()
    events = EventLog(job.folder, rank)
    _answer_when_asked(events, job.plan)  # before there is another thread
    _end_with_the_parent()
    events.emit("start", pid=os.getpid(), host=os.uname().nodename)
    try:
        # A long time-out of collectives: the parent's watcher ends ranks that stall, and knows which one it was.
        events.emit("report", report=run_rank(job, rank, events, timeout_s=job.config.limits.run_s))
    except Exception as error:
        traceback.print_exc()
        sys.stdout.flush()
        events.emit("error", **describe_error(error))
        if (
            dist.is_initialized()
        ):  # this may be the echo of a rank that was killed: let the agent see that one first
            time.sleep(LAST_WORDS_S)
        os._exit(1)  # no clean-up: a collective of the others may never end, and the parent already knows


def run_rank(job: Job, rank: int, events: EventLog, *, timeout_s: float) -> dict[str, Any]:
    """Everything one rank does, as a JSON-able report. Raises what goes wrong. timeout_s: of a collective."""
    owned = [job.plan.devices[position] for position in job.plan.ranks[rank].devices]
    devices = [torch_device(device) for device in owned]
    torch.set_num_threads(job.num_threads)
    prepare_allocator(job, owned, devices)
    events.progress("set-up", 0, 1)
    with process_group(job.plan, rank, devices[0], timeout_s=timeout_s):
        return RankRun(job, rank, owned, devices, events).run()


def prepare_allocator(job: Job, owned: Sequence[Device], devices: Sequence[torch.device]) -> None:
    """Have torch reserve little more than what is live, as the plan assumes; under enforce_memory cap it.

    Expandable segments: without them the differently sized tensors of a block leave gigabytes cached that nothing else
    fits in. Left alone where the user has settings of their own.
    """
    if devices[0].type != "cuda":
        return
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    hardware = job.config.hardware
    if not hardware.enforce_memory:
        return
    for device, torch_device in zip(owned, devices, strict=True):
        outside = context_bytes_of(job.plan, context_bytes(hardware, [hardware.device]))
        whole = torch.cuda.get_device_properties(torch_device).total_memory
        torch.cuda.set_per_process_memory_fraction((device.total_bytes - outside) / whole, torch_device)


def torch_device(device: Device) -> torch.device:
    return torch.device("cuda", device.index) if device.type == "cuda" else torch.device("cpu")


@contextmanager
def process_group(plan: Plan, rank: int, device: torch.device, *, timeout_s: float) -> Iterator[None]:
    """The default process group, where the layout has several ranks or the mode is torch's own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if plan.layout.num_ranks == 1 and plan.mode != "distributed":
        yield
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
        rank=rank,
        world_size=plan.layout.num_ranks,
    )
    yield  # not destroyed when something goes wrong: that could wait for ranks that are gone
    release_all()
    dist.destroy_process_group()


def describe_error(error: BaseException) -> dict[str, Any]:
    """Type, message, traceback and outcome of an exception."""
    is_oom = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error)
        for words in ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
    return {
        "outcome": "oom" if is_oom else "failed",
        "is_user_error": isinstance(error, UserError),
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


def _answer_when_asked(events: EventLog, plan: Plan) -> None:
    """On SIGUSR2 say how many collectives this rank has begun, from a thread: the main one may be stuck in one."""
    # Else it would end the process. Threads have the mask of the one that starts them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})

    def wait() -> None:
        while True:
            signal.sigwait({signal.SIGUSR2})
            # gloo counts sends too, and rank 0 of data_parallel has more of them than the others.
            events.emit("answer", begun={} if plan.mode == "data_parallel" else collectives_begun())

    threading.Thread(target=wait, name="wanexp-answer", daemon=True).start()


def collectives_begun() -> dict[str, int]:
    """For each process group of this rank, named by its ranks, how many collectives this rank has begun in it."""
    begun = exchanges_begun()
    groups: dict[Any, Any] = dist.distributed_c10d._world.pg_map if dist.is_initialized() else {}
    for group in list(groups):  # in the order of their making, which is the same on all ranks
        name = f"[{','.join(map(str, dist.get_process_group_ranks(group)))}]"
        while name in begun:
            name += "'"
        begun[name] = group._get_sequence_number_for_group()  # of NCCL where the group has gloo as well
    return begun


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
