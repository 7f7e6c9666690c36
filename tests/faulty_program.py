"""`python -m tests.faulty_program FAULT ...`: the command line with a fault in each rank, for an outer torchrun."""

import os
import signal
import sys

from tests.faults import _in_step_of
from wanexp.__main__ import main


def fail() -> None:
    raise ValueError("a fault of the test")


if __name__ == "__main__":
    fault = {"raises": fail, "is_killed": lambda: os.kill(os.getpid(), signal.SIGKILL)}[sys.argv.pop(1)]
    _in_step_of(1, fault)
    sys.exit(main())
