"""What a launch hands to every rank: plain data that travels to the worker processes."""

import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

from wanexp.config import RunConfig
from wanexp.planning.plan import Plan


@dataclass(frozen=True)
class Job:
    """One launch of the ranks of `plan`.

    folder: of events and logs. run_folder: of the answer that parity compares, and of artifacts.
    num_threads: CPU threads of a rank; the reference uses as many as the run, so that the sums run alike.
    reference_of: None for the run itself; for its reference (mode none) the sizes of the shares that the run computed
    its batch in, which the reference repeats so that the kernels see the same shapes.
    num_blocks: how many of the first blocks the reference compares; None for all.
    nodes: the ranks of each machine; None for one machine.
    attention: the kernels of self- and cross-attention, of the run that a reference is compared with.
    """

    config: RunConfig
    plan: Plan
    folder: Path
    run_folder: Path
    num_threads: int
    reference_of: tuple[int, ...] | None = None
    num_blocks: int | None = None
    nodes: tuple[tuple[int, ...], ...] | None = None
    attention: tuple[str, str] | None = None

    @property
    def modules(self) -> list[str]:
        """What every rank imports: loaded by the server that they are forked from, so that none waits for it.

        DDP, FSDP and optimisers load torch's compiler, if only to keep it out. That takes one to two seconds.
        """
        uses_compiler = (
            self.config.workload.name == "train"
            or self.plan.mode == "distributed"
            or self.plan.layout.shard > 1
        )
        return ["wanexp.preload", *(["torch._dynamo"] if uses_compiler else [])]

    def preload(self) -> None:
        """Have the server that ranks are forked from load `modules`, once it begins, with threads that wait briefly.

        Threads of GNU OpenMP otherwise spin for so long that on CPUs a step takes many times as long beside other work.
        """
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        multiprocessing.set_forkserver_preload(self.modules)
