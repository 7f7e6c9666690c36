"""Every mode and hybrids between GPUs, in bf16 and with the kernels of GPUs, each answer against mode none's."""

from pathlib import Path

import pytest
import torch

from tests.parallel.mode_cases import GPU_CASES
from tests.parallel.mode_runs import run_on_gpus, run_reference
from wanexp.hardware.devices import find_devices
from wanexp.job import Job
from wanexp.planning.plan import make_plan


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", GPU_CASES)
def test_the_answer_is_that_of_mode_none(ranks: int, tmp_path: Path):
    from tests.parallel.gpu_ranks import on_gpus

    cases = GPU_CASES[ranks]
    if torch.cuda.device_count() < (wanted := max(case.layout.num_devices for case in cases.values())):
        pytest.skip(f"needs {wanted} GPUs")
    jobs = {}
    for name, case in cases.items():
        devices = find_devices(case.config.hardware)[: case.layout.num_devices]
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        plan = make_plan(case.config, devices)
        jobs[name] = Job(config=case.config, plan=plan, folder=folder, run_folder=folder, num_threads=1)
    wrong = []
    for name, report in on_gpus(ranks, run_on_gpus, jobs)[0].items():
        job, effective = jobs[name], report["effective"]
        parity = run_reference(job, effective)["parity"]
        print(f"{ranks} ranks, {name}: {parity}, {effective['transport']}, {effective['attention']}")
        copies = job.plan.layout.ulysses > 1 or (job.plan.layout.shard > 1 and not cases[name].train)
        assert effective["transport"] == (
            "copies" if copies else "collectives" if cases[name].train else None
        )
        if job.plan.must_be_bit_equal(job.config):
            wrong += [] if parity["bit_equal"] else [(name, parity)]
        elif not parity["rel_l2"] <= job.config.precision.tolerance:
            wrong.append((name, parity))
    assert not wrong
