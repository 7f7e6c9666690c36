"""Every mode and hybrids between GPUs, in bf16 and with the kernels of GPUs, each answer against mode none's."""

import dataclasses
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
        uses_copies = not case.train and max(case.layout.ulysses, case.layout.shard) > 1
        config = dataclasses.replace(case.config, transport="copies" if uses_copies else "auto")
        plan = make_plan(config, devices)
        jobs[name] = Job(config=config, plan=plan, folder=folder, run_folder=folder, num_threads=1)
    wrong = []
    for name, report in on_gpus(ranks, run_on_gpus, jobs)[0].items():
        job, effective = jobs[name], report["effective"]
        parity = run_reference(job, effective)["parity"]
        print(f"{ranks} ranks, {name}: {parity}, {effective['transport']}, {effective['attention']}")
        assert effective["transport"] == (
            "copies" if job.config.transport == "copies" else "collectives" if cases[name].train else None
        )
        if job.plan.must_be_bit_equal(job.config):
            wrong += [] if parity["bit_equal"] else [(name, parity)]
        elif not parity["rel_l2"] <= job.config.precision.tolerance:
            wrong.append((name, parity))
    assert not wrong
