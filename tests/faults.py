"""Workers that go wrong. Each function stands in for `wanexp.worker.main` and is imported by the worker process."""

import os
import signal
import time
from collections.abc import Callable

import torch

from wanexp import worker
from wanexp.job import Job
from wanexp.measure import parity
from wanexp.rank_run import RankRun
from wanexp.workloads.denoise import Denoise


def _in_step_of(rank: int, fault: Callable[[], None], *, index: int = 2) -> None:
    """Have `rank` do `fault` where its timed step `index` begins (the warm-up takes step 0 only)."""
    if int(os.environ["RANK"]) != rank:
        return
    original = Denoise.step

    def step(self: Denoise, step_index: int) -> None:
        if step_index == index:
            fault()
        original(self, step_index)

    Denoise.step = step  # type: ignore[method-assign]  # of this process, which ends with its job


def _raise(error: Exception) -> None:
    raise error


def raises(job: Job) -> None:
    _in_step_of(1, lambda: _raise(ValueError("a fault of the test\nwith a second line")))
    worker.main(job)


def raises_without_peers(job: Job) -> None:
    _in_step_of(0, lambda: _raise(ValueError("a fault of the test")))
    worker.main(job)


def is_killed(job: Job) -> None:
    _in_step_of(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    worker.main(job)


def is_killed_without_peers(job: Job) -> None:
    _in_step_of(0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    worker.main(job)


def exits(job: Job) -> None:
    _in_step_of(1, lambda: os._exit(3))
    worker.main(job)


def runs_out_of_gpu_memory(job: Job) -> None:
    message = "CUDA out of memory. Tried to allocate 2.00 GiB."
    _in_step_of(1, lambda: _raise(torch.OutOfMemoryError(message)))
    worker.main(job)


def runs_out_of_host_memory(job: Job) -> None:
    _in_step_of(0, lambda: torch.empty(2**60) and None)
    worker.main(job)


def hangs(job: Job) -> None:
    """Rank 1 sleeps; the others wait for it at the next barrier."""
    _in_step_of(1, lambda: time.sleep(600))
    worker.main(job)


def hangs_while_loading(job: Job) -> None:
    if os.environ["RANK"] == "1":
        RankRun.load = lambda self: time.sleep(600)  # type: ignore[method-assign, assignment, return-value]
    worker.main(job)


def never_starts(job: Job) -> None:
    """No rank gives a sign of life, its process id included."""
    time.sleep(600)


def answers_wrongly(job: Job) -> None:
    """The run itself, not its reference, predicts a flow that is 1 % off."""
    if job.reference_of is None:
        original = Denoise.predict

        def predict(self: Denoise, *arguments: object) -> torch.Tensor:
            return 1.01 * original(self, *arguments)  # type: ignore[arg-type]

        Denoise.predict = predict  # type: ignore[method-assign, assignment]
    worker.main(job)


def answers_nan(job: Job) -> None:
    if job.reference_of is None:
        original = Denoise.predict

        def predict(self: Denoise, *arguments: object) -> torch.Tensor:
            return float("nan") * original(self, *arguments)  # type: ignore[arg-type]

        Denoise.predict = predict  # type: ignore[method-assign, assignment]
    worker.main(job)


def reference_fails(job: Job) -> None:
    if job.reference_of is not None:
        RankRun.load = lambda self: _raise(MemoryError("no room for the reference"))  # type: ignore[method-assign, assignment, return-value]
    worker.main(job)


def has_no_time_for_a_whole_reference(job: Job) -> None:
    parity.AUTO_BUDGET_S = 1e-9
    worker.main(job)
