"""`python -m tests.faulty_program FAULT ...`: the command line with a fault in one rank, for an outer torchrun."""

import os
import signal
import sys
import time

import psutil
import torch

from tests.faults import _in_step_of
from wanexp import rank_process
from wanexp.__main__ import main
from wanexp.job import Job


def fail() -> None:
    raise ValueError("a fault of the test")


def never_arrive() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(600)


def cannot_write() -> None:
    """As where rank 0's folder is none that this machine can make."""
    if os.environ["RANK"] == "1":

        def refuse(_job: Job, _rank: int) -> None:
            raise PermissionError(13, "Permission denied", "/home/a")

        rank_process.event_path = refuse  # type: ignore[assignment]


def have_another_torch() -> None:
    if os.environ["RANK"] == "1":
        torch.__version__ = "1.2.3"  # type: ignore[assignment]


def kill_the_machine() -> None:
    """All of the machine of this rank, from its torchrun on."""
    parent = psutil.Process().parent()
    agent = parent.parent() if parent else None
    assert agent is not None
    for process in (agent, *agent.children(), psutil.Process()):
        process.kill()


IN_A_STEP = {
    "raises": (1, fail),
    "is_killed": (1, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "hangs": (1, lambda: time.sleep(600)),
    "its_machine_dies": (1, kill_the_machine),
}
AT_THE_START = {
    "never_arrives": never_arrive,
    "cannot_write": cannot_write,
    "has_another_torch": have_another_torch,
}

if __name__ == "__main__":
    fault = sys.argv.pop(1)
    if fault in IN_A_STEP:
        _in_step_of(*IN_A_STEP[fault])
    else:
        AT_THE_START[fault]()
    sys.exit(main())
