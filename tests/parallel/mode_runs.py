"""A run and its reference as the worker processes carry them out; imports nothing that ranks would wait for."""

import dataclasses
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from tests.parallel.shared_memory import SharedMemory
from wanexp.events import EventLog
from wanexp.job import Job
from wanexp.parallel import cfg_parallel, parallelize, shares, ulysses
from wanexp.parallel.groups import Groups
from wanexp.parallel.peer_memory import release_all
from wanexp.planning.plan import reference_plan
from wanexp.rank_run import RankRun, Workload
from wanexp.runner import exact_kernels
from wanexp.worker import torch_device
from wanexp.workloads.denoise import Denoise
from wanexp.workloads.train import Train


class WatchedRun(RankRun):
    """A run that keeps its workloads, and the latents that its timed steps end with."""

    def make_workload(self, *arguments) -> Workload:
        workload = super().make_workload(*arguments)
        self.workloads = [*getattr(self, "workloads", []), workload]
        return workload

    def leave_flows(self, workload: Workload, *arguments) -> None:
        if isinstance(workload, Denoise):
            self.latents = workload.latent.clone()
        super().leave_flows(workload, *arguments)


def start(job: Job, rank: int, kind: type[WatchedRun] = WatchedRun) -> WatchedRun:
    owned = [job.plan.devices[position] for position in job.plan.ranks[rank].devices]
    return kind(job, rank, owned, [torch_device(device) for device in owned], EventLog(job.folder, rank))


def run_all(rank: int, jobs: dict[str, Job]) -> dict[str, dict]:
    """Of each job this rank's report, and the latents of its samples after all steps (training: the weights)."""
    results = {}
    for name, job in jobs.items():
        run = start(job, rank)
        report = run.run()
        answer = weights_of(run.workloads[0]) if run.training else run.latents
        results[name] = {"answer": answer, "report": report}
    return results


def run_on_gpus(_device: torch.device, rank: int, jobs: dict[str, Job]) -> dict[str, dict]:
    """Of each job this rank's report."""
    reports = {}
    for name, job in jobs.items():
        reports[name] = start(job, rank).run()
        release_all()
    return reports


class RunOverPeers(WatchedRun):
    """With memory that other ranks read from and write to, which files stand for (`SharedMemory`)."""

    memories: dict[str, SharedMemory]

    def check_links(self) -> Groups:
        groups = super().check_links()
        folders = (str(self.job.folder / f"memory{number}") for number in count())

        def memory(group: ProcessGroup, _device: torch.device) -> SharedMemory:
            Path(folder := next(folders)).mkdir(exist_ok=True)
            return SharedMemory(group, folder)

        parallelize.PeerMemory = memory
        ulysses.TILE_ROWS, shares.MIN_HEADS_SENT = 2, 0  # so that few rows are attended in two runs, too
        used = {axis: group for axis, group in groups.all().items() if axis in ("ulysses", "shard")}
        self.memories = {axis: memory(group, self.devices[0]) for axis, group in used.items()}
        return dataclasses.replace(groups, memories=self.memories)


def run_over_peers(rank: int, job: Job) -> dict:
    """As `run_all` has it for one job, and how often the places of Ulysses were taken anew."""
    run = start(job, rank, RunOverPeers)
    report = run.run()
    places = run.memories.get("ulysses")
    return {"answer": run.latents, "report": report, "grown": places.num_reserved if places else None}


def run_reference(job: Job, effective: dict) -> dict:
    """Mode none on one device, and its distance to the answer in the job's folder."""
    run = start(
        dataclasses.replace(
            job,
            plan=reference_plan(job.plan, job.config.model.architecture.num_layers),
            reference_of=job.plan.forward_batches,
            attention=exact_kernels(effective),
        ),
        0,
    )
    parity = run.run()
    if not run.training:
        return {"parity": parity, "answer": denoised(run)}
    (workload,) = run.workloads
    before = weights_of(workload)
    for step in range(job.config.workload.num_steps):
        workload.step(step)
    return {"parity": parity, "answer": weights_of(workload), "before": before}


def denoised(run: WatchedRun) -> Tensor:
    """The latents of all its workloads after all steps from noise."""
    for workload in run.workloads:
        workload.restart()
        for step in range(run.config.workload.num_steps):
            workload.step(step)
    return torch.cat([workload.latent for workload in run.workloads])


def weights_of(workload: Workload) -> Tensor:
    """All weights, whole, one after the other."""
    assert isinstance(workload, Train)
    model = getattr(workload.model, "module", workload.model)
    whole = [
        parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for _, parameter in sorted(model.named_parameters())
    ]
    return torch.cat([parameter.detach().flatten() for parameter in whole])


def run_with_swapped_guidance(rank: int, job: Job) -> dict:
    """A run with the predictions with and without the prompt in each other's place."""
    gather = cfg_parallel.dist.all_gather
    cfg_parallel.dist.all_gather = lambda flows, own, group: gather(flows[::-1], own, group=group)
    return run_all(rank, {"": job})[""]["report"]["effective"]
