"""Ranks that go wrong inside the parallel modes. They stand in for `wanexp.worker.main`, as in tests/faults.py."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from wanexp import worker
from wanexp.job import Job
from wanexp.parallel.groups import CHECK_BYTES
from wanexp.workloads.denoise import Denoise


def _before(collective: str, fault: Callable[[], None], *, rank: int = 1, index: int = 2) -> None:
    """Have `rank` do `fault` where it first calls `collective` in its timed step `index`."""
    if int(os.environ["RANK"]) != rank:
        return
    step, communicate, steps = Denoise.step, getattr(dist, collective), []

    def noting_step(self: Denoise, step_index: int) -> None:
        steps.append(step_index)
        step(self, step_index)

    def faulty(*arguments: Any, **settings: Any) -> Any:
        if index in steps:
            fault()
        return communicate(*arguments, **settings)

    Denoise.step = noting_step  # type: ignore[method-assign]  # of this process, which ends with its job
    setattr(dist, collective, faulty)


def hangs_in_context_parallel(job: Job) -> None:
    """Rank 1 sleeps before an all-to-all in which the others already wait."""
    _before("all_to_all_single", lambda: time.sleep(600))
    worker.main(job)


def is_killed_in_cfg_parallel(job: Job) -> None:
    """Rank 1 is killed before it hands over its prediction."""
    _before("all_gather", lambda: os.kill(os.getpid(), signal.SIGKILL))
    worker.main(job)


def has_a_broken_link(job: Job) -> None:
    """What an all-reduce gives rank 1 is wrong in one element of many."""
    original = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        work = original(tensor, *arguments, **settings)
        if os.environ["RANK"] == "1" and tensor.nbytes == CHECK_BYTES["cpu"]:
            tensor[12345] += 2**-10
        return work

    dist.all_reduce = all_reduce
    worker.main(job)
