"""What goes wrong inside a parallel mode ends in a clear outcome with the rank's name, between real gloo ranks."""

import time
from pathlib import Path

from tests.conftest import Composer, cpu_devices
from tests.parallel import faults
from tests.test_launch import launch_as  # noqa: F401  # a fixture
from wanexp.job import Job
from wanexp.planning.plan import make_plan

TWO_RANKS = ("gpus=[0,1]", "workload.num_steps=4")


def make_job(run_config: Composer, folder: Path, *overrides: str, num_devices: int = 2) -> Job:
    config = run_config(*TWO_RANKS, *overrides)
    plan = make_plan(config, cpu_devices(num_devices))
    return Job(config=config, plan=plan, folder=folder / "ranks", run_folder=folder, num_threads=1)


def test_a_rank_that_hangs_before_a_collective_is_named_within_the_stall_limit(
    run_config,
    tmp_path,
    launch_as,  # noqa: F811
):
    job = make_job(run_config, tmp_path, "parallelism=context_parallel", "limits.stall_s=2")
    begin = time.time()
    launched = launch_as(faults.hangs_in_context_parallel, job)
    assert launched.outcome == "timeout"
    assert (
        "no sign of life for 2 s (limits.stall_s); rank 1 holds up the others: it has begun"
        in launched.message
    )
    assert "of group [0,1]" in launched.message and "phase 'measure'" in launched.message
    assert {rank: len(steps) for rank, steps in launched.steps.items()} == {0: 2, 1: 2}
    assert time.time() - begin < 30
    assert "ulysses.py" in (job.folder / "rank0.log").read_text(), "the stacks of both are in their logs"
    assert "faults.py" in (job.folder / "rank1.log").read_text()


def test_a_rank_that_is_killed_in_the_middle_of_cfg_parallel_is_named(
    run_config,
    tmp_path,
    launch_as,  # noqa: F811
):
    job = make_job(run_config, tmp_path, "parallelism=cfg_parallel")
    launched = launch_as(faults.is_killed_in_cfg_parallel, job)
    assert launched.outcome == "failed"
    assert launched.message.startswith("rank 1 was killed by SIGKILL; was the host out of memory?")
    assert launched.error is not None and launched.error["rank"] == 1
    assert len(launched.steps[1]) == 2


def test_a_link_that_changes_what_it_carries_ends_the_run_before_weights_are_loaded(
    run_config,
    tmp_path,
    launch_as,  # noqa: F811
):
    job = make_job(run_config, tmp_path, "parallelism=tensor_parallel")
    launched = launch_as(faults.has_a_broken_link, job)
    assert launched.outcome == "failed"
    assert launched.message == (
        "rank 1: RuntimeError: the link check of group tp (ranks [0, 1]) gave rank 1 a wrong sum; a link between "
        "their GPUs is broken: try NCCL_P2P_DISABLE=1, or other gpus"
    )
    assert "load weights" not in (job.folder / "rank1.jsonl").read_text()
