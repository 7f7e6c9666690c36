"""`python -m tests.sweep.killed_program WHEN ...`: a sweep whose process is killed by SIGKILL.

WHEN: `logging`, while MLflow is told of the first run, which then stays RUNNING; `running`, by a rank of the second
cell.
"""

import os
import signal
import sys

from tests import faults
from wanexp import runner
from wanexp.__main__ import main
from wanexp.launch import worker
from wanexp.sweep import fingerprint


def die(*_arguments: object, **_keywords: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    when = sys.argv.pop(1)
    runner._usable_cores = lambda: 1
    fingerprint.source_digest = lambda: "of the test"
    if when == "logging":
        from mlflow.tracking import MlflowClient

        MlflowClient.log_batch = die
    else:
        worker.main = faults.InCells({"001": faults.kills_the_parent})
    sys.exit(main())
