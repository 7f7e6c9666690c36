"""Workers that go wrong. Each function stands in for `wanexp.worker.main` and is imported by the worker process."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import torch

from wanexp import worker
from wanexp.job import Job
from wanexp.measure import parity
from wanexp.rank_load import RankLoader
from wanexp.rank_run import RankRun
from wanexp.wan.flash_attention import CannotRun
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
        RankRun.load = lambda self, groups: time.sleep(600)  # type: ignore[method-assign, assignment, return-value]
    worker.main(job)


def never_starts(job: Job) -> None:
    """No rank gives a sign of life, its process id included."""
    time.sleep(600)


def answers_wrongly(job: Job) -> None:
    """The run itself, not its reference, predicts a flow that is 1 % off."""
    if job.reference_of is None:
        original = Denoise.predict

        def predict(self: Denoise, *arguments: object) -> list[torch.Tensor]:
            return [1.01 * flow for flow in original(self, *arguments)]  # type: ignore[arg-type]

        Denoise.predict = predict  # type: ignore[method-assign, assignment]
    worker.main(job)


def answers_nan(job: Job) -> None:
    if job.reference_of is None:
        original = Denoise.parity_flows
        Denoise.parity_flows = lambda self: float("nan") * original(self)  # type: ignore[method-assign]
    worker.main(job)


def reference_fails(job: Job) -> None:
    if job.reference_of is not None:
        RankRun.load = lambda self, groups: _raise(MemoryError("no room for the reference"))  # type: ignore[method-assign, assignment, return-value]
    worker.main(job)


def lacks_a_kernel(job: Job) -> None:
    RankLoader.choose_attention = lambda self: _raise(CannotRun("fa3", "here: fa3-fwd is not installed"))  # type: ignore[method-assign, assignment, return-value]
    worker.main(job)


def has_no_time_for_a_whole_reference(job: Job) -> None:
    parity.AUTO_BUDGET_S = 1e-9
    worker.main(job)


def is_stopped(job: Job) -> None:
    """Rank 1 gets no more processor time, as under a frozen control group."""
    _in_step_of(1, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    worker.main(job)


def signals_the_parent(job: Job, *numbers: signal.Signals) -> None:
    """Rank 0 sends the parent these signals in its last step, then waits for what comes."""
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    pid = parent.pid

    def send() -> None:
        for number in numbers:
            os.kill(pid, number)
            time.sleep(0.05)
        time.sleep(600)

    _in_step_of(0, send)
    worker.main(job)


def terminates_the_parent(job: Job) -> None:
    signals_the_parent(job, signal.SIGTERM)


def presses_ctrl_c_twice(job: Job) -> None:
    signals_the_parent(job, signal.SIGINT, signal.SIGINT)


def kills_the_parent(job: Job) -> None:
    signals_the_parent(job, signal.SIGKILL)


class InCells:
    """Faults by the number of the cell of a sweep; other cells are sound."""

    def __init__(self, faults: dict[str, Callable[[Job], None]]) -> None:
        self.faults = faults
        self.__name__ = self.__qualname__ = "InCells"  # torch's elastic agent asks its entry point for both

    def __call__(self, job: Job) -> None:
        self.faults.get(job.run_folder.name[:3], worker.main)(job)
