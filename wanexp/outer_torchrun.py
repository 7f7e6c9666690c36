"""A run under an outer torchrun, on one machine or several: each of its processes is the parent of one rank.

    torchrun --+-- process 0, which leads: plan, record ---- rank 0
               +-- process 1, which follows ---------------- rank 1      each forked by its parent
    torchrun --+-- process 2 ...

So nothing that happens to a rank can hurt whoever tells of it. Processes talk through the store where they meet
(`meeting.py`): a rank writes its events to a file on its own machine, its parent passes them on, and process 0 watches
them as `launch` does. Followers stay until process 0 is done, so that torchrun sees one end and not the echoes of it.
"""

import atexit
import dataclasses
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from wanexp.config import AUTO_MODE, RunConfig, to_dict
from wanexp.config_reading import run_config_from_dict
from wanexp.errors import UserError
from wanexp.events import Event
from wanexp.hardware.devices import Device, device_from_dict, find_devices, select_devices
from wanexp.job import Job
from wanexp.launch import Launched, verdict
from wanexp.measure.environment import host_environment
from wanexp.meeting import POLL_S, Machines, Meeting, gather_machines, meet, own_place, parent_event
from wanexp.outer_watcher import OuterWatcher
from wanexp.parallel.agreement import identity
from wanexp.planning.plan import make_plan
from wanexp.planning.planner import cap_memory
from wanexp.rank_process import RankProcess

OUTER_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|TORCH_NCCL_ASYNC_.*"
)
ROLL_CALL_S = 5.0  # for the parents of all ranks to answer


def arrive(config: RunConfig, devices: Sequence[Device]) -> Machines:
    """Rank 0: wait for all processes; the machines and what each has for this run. devices: of this machine.

    Raises UserError for processes that do not come, and for machines that do not agree.
    """
    limit_s = config.limits.stall_s
    meeting = meet(limit_s)
    atexit.register(_say_that_it_is_over, meeting)
    meeting.tell("arrival/0", _arrival(config, devices))
    ranks = range(meeting.world_size)
    keys = {f"arrival/{rank}": rank for rank in ranks}
    if missing := meeting.wait_for(keys, limit_s, until=lambda: False):
        here = [meeting.hear(key) | {"rank": rank} for key, rank in keys.items() if key not in missing]
        places = ", ".join(f"{one['rank']} on {one['host']}" for one in here)
        raise UserError(
            f"rank {', '.join(str(keys[key]) for key in missing)} did not arrive within {limit_s:g} s "
            f"(limits.stall_s); here: rank {places}; look at the torchrun of the machine that is missing"
        )
    machines = gather_machines([meeting.hear(key) for key in keys])
    if len(machines.names) > 1 and config.parallelism.mode == AUTO_MODE:
        raise UserError(
            f"parallelism=auto chooses among the GPUs of one machine, torchrun started {len(machines.names)}; write "
            "parallelism=hybrid with its degrees"
        )
    return machines


def lead(job: Job, *, on_event: Callable[[Event], None] = lambda _event: None) -> Launched:
    """Rank 0: hand `job` to the others, run rank 0, and tell of the whole launch as `launch` does.

    Never raises for what happens to the ranks, nor for signals.
    """
    meeting = meet(job.config.limits.stall_s)
    meeting.tell("job", write_job(job))
    # This process shows progress and samples telemetry in threads, which a plain fork would copy halfway.
    own = RankProcess(job, 0, start_method="forkserver")
    with _Signals() as signals, own, OuterWatcher(job, meeting, own, on_event) as watcher:
        while not (signals.stopped_by or watcher.is_over()):
            time.sleep(POLL_S)
        if (
            signals.stopped_by
        ):  # perhaps by a torchrun that has lost the store of another one: see whether it is there
            time.sleep(3 * POLL_S)
        elif watcher.heard.errors or watcher.exit_codes or watcher.lost:
            watcher.call_the_roll(ROLL_CALL_S)
        launched = verdict(
            job,
            watcher.heard,
            exit_codes=watcher.exit_codes,
            interrupted=signals.stopped_by,
            timeout=watcher.timeout_message,
        )
        signals.failed = launched.outcome != "finished"
    if launched.outcome in ("failed", "interrupted") and watcher.lost:
        launched.outcome, launched.message, launched.error = "failed", watcher.lost, None
    elif launched.error and len(watcher.nodes) > 1:
        launched.message = f"on {watcher.node_of(launched.error['rank'])}: {launched.message}"
    return launched


def follow(config: RunConfig) -> Launched:
    """Any other rank: do what rank 0 hands out. Rank 0 hears what comes of it; here it is this rank's part."""
    import wanexp.preload  # noqa: F401  # else paid for in the load time of the rank, which is forked from this

    rank, parent = int(os.environ["RANK"]), os.getppid()

    def is_alone() -> bool:
        return os.getppid() != parent  # torchrun was killed, and could not end this process

    try:
        meeting = meet(config.limits.stall_s)
        meeting.tell(f"arrival/{rank}", _arrival_of_follower(config))
        # Rank 0 ends without a job where the plan fails; it may wait for others as long as this waits for it.
        meeting.wait_for(
            ["job"], 2 * config.limits.stall_s, until=lambda: meeting.hears("over") or is_alone()
        )
        if not meeting.hears("job"):
            if "LOCAL_RANK" in os.environ and not int(
                os.environ["LOCAL_RANK"]
            ):  # one of a machine without rank 0
                print(f"rank {rank}: rank 0 handed out no run; its output says why", file=sys.stderr)
            return Launched("failed", "rank 0 handed out no run")
        return _run_own_rank(read_job(meeting.hear("job")), rank, meeting, is_alone)
    except dist.DistNetworkError:
        print(f"rank {rank}: torchrun's store is gone, and with it the run", file=sys.stderr)
        return Launched("failed", "torchrun's store is gone")


def _run_own_rank(job: Job, rank: int, meeting: Meeting, is_alone: Callable[[], bool]) -> Launched:
    """Run `rank` in a process of its own, pass on what it says and how it ends, carry out rank 0's orders."""
    with _Signals() as signals, RankProcess(job, rank, start_method="fork") as own:
        num_orders, has_ended = 0, False
        while not (signals.stopped_by or is_alone() or meeting.hears("over")):
            while meeting.hears(f"order/{num_orders}"):
                number = meeting.hear(f"order/{num_orders}")
                num_orders += 1
                own.signal(number)
                meeting.post([parent_event(rank, "present", order=num_orders)])
            code = own.exit_code
            meeting.post(own.new_events())
            if code is not None and not has_ended:
                has_ended = True
                meeting.post([parent_event(rank, "exit", code=code)])
            time.sleep(POLL_S)
        signals.failed = not own.is_done
        if signals.stopped_by:
            meeting.post([parent_event(rank, "exit", code=-signal.Signals[signals.stopped_by])])
    return Launched("finished" if own.is_done else "interrupted" if signals.stopped_by else "failed")


def write_job(job: Job) -> dict[str, Any]:
    """`job` for JSON: its config and devices, of which the plan follows."""
    return {
        "config": to_dict(job.config),
        "devices": [dataclasses.asdict(device) for device in job.plan.devices],
        "folder": str(job.folder),
        "run_folder": str(job.run_folder),
        "num_threads": job.num_threads,
        "nodes": job.nodes,
    }


def read_job(values: Mapping[str, Any]) -> Job:
    """The inverse of `write_job`, through JSON or not."""
    config = run_config_from_dict(values["config"])
    nodes = values["nodes"]
    return Job(
        config=config,
        plan=make_plan(config, [device_from_dict(device) for device in values["devices"]]),
        folder=Path(values["folder"]),
        run_folder=Path(values["run_folder"]),
        num_threads=values["num_threads"],
        nodes=None if nodes is None else tuple(tuple(ranks) for ranks in nodes),
    )


@contextmanager
def without_outer_torchrun() -> Iterator[None]:
    """Inside, the environment is as if no torchrun had started this process."""
    taken = {name: os.environ.pop(name) for name in list(os.environ) if OUTER_VARIABLES.fullmatch(name)}
    try:
        yield
    finally:
        os.environ.update(taken)


def _arrival(config: RunConfig, devices: Sequence[Device]) -> dict[str, Any]:
    return own_place() | {
        "identity": identity(config),
        "devices": [dataclasses.asdict(device) for device in devices],
        "environment": host_environment(devices),
    }


def _arrival_of_follower(config: RunConfig) -> dict[str, Any]:
    """Of one process of each machine with its devices, or with what is wrong with them."""
    if int(os.environ.get("LOCAL_RANK", "0")):
        return own_place() | {"identity": identity(config)}
    try:
        found = cap_memory(find_devices(config.hardware), config.hardware)
        return _arrival(config, select_devices(found, config.gpus, config.parallelism.mode))
    except UserError as error:
        return own_place() | {"identity": identity(config), "error": str(error)}


def _say_that_it_is_over(meeting: Meeting) -> None:
    """At the very end of process 0: torchrun ends all processes of a machine once one of them has failed."""
    with suppress(dist.DistNetworkError):  # who cannot be told sees that the store is gone
        meeting.tell("over")


class _Signals:
    """Notes the first SIGTERM or SIGINT. After something has failed the next ones are ignored: torchrun sends them
    while the record is written.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.stopped_by = ""
        self.failed = False

    def __enter__(self) -> "_Signals":
        self._before = [signal.signal(number, self._note) for number in self.NUMBERS]
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in zip(self.NUMBERS, self._before, strict=True):
            signal.signal(number, signal.SIG_IGN if self.stopped_by or self.failed else handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.stopped_by = self.stopped_by or signal.Signals(number).name
