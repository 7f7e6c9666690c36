"""The run of one rank, phase by phase:

check links -> load weights -> warm-up -> measure -> leave the answer for the parity check -> profile -> report
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wanexp.errors import UserError
from wanexp.events import EventLog
from wanexp.hardware.devices import Device
from wanexp.job import Job
from wanexp.measure.environment import torch_environment
from wanexp.measure.memory import (
    GIB,
    owned_bytes_by_position,
    peak_rss_gib,
    read_peaks,
    reset_peaks,
)
from wanexp.measure.parity import (
    FLOWS,
    blocks_to_verify,
    compare_answers,
    read_answer,
    write_answer,
)
from wanexp.measure.timing import Stopwatch
from wanexp.parallel.block_distribution import position_of
from wanexp.parallel.data_parallel import gather_batch, scatter_batch
from wanexp.parallel.groups import Groups, check_copies, check_links, open_layout_groups, open_memories
from wanexp.parallel.parallelize import ParallelModel
from wanexp.parallel.peer_memory import bytes_in_use
from wanexp.planning.memory import reference_bytes
from wanexp.planning.plan import DTYPE_BYTES, is_lossy_run
from wanexp.rank_load import Loaded, RankLoader
from wanexp.wan.transformer import first_blocks
from wanexp.workloads.denoise import Denoise
from wanexp.workloads.samples import Samples, draw_samples, sample_shapes
from wanexp.workloads.schedule import num_parity_forwards, warmup_steps
from wanexp.workloads.train import Train

Workload = Denoise | Train


class RankRun:
    """`run` does it all and returns the rank's report, which is plain JSON-able data."""

    def __init__(
        self, job: Job, rank: int, owned: Sequence[Device], devices: Sequence[torch.device], events: EventLog
    ) -> None:
        self.job = job
        self.config = job.config
        self.plan = job.plan
        self.rank = rank
        self.share = job.plan.ranks[rank]
        self.owned = owned
        self.devices = devices
        self.events = events
        self.stopwatch = Stopwatch(devices)
        self.training = self.config.workload.name == "train"
        is_plain = self.plan.mode == "none" and not self.plan.swapped and not is_lossy_run(self.config)
        self.verify = self.config.verify != "never" and (not is_plain or self.config.verify == "always")
        self.report: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        groups = self.check_links()
        loaded = self.load(groups)
        models = loaded.models
        if self.job.reference_of is not None:
            return self.compare(models)
        workload = self.make_workload(models, self.local_samples())
        if self.training and self.verify:
            self.leave_gradients(workload)
        self.warm_up(workload)
        self.measure(workload, loaded)
        if self.verify:
            self.leave_flows(workload, models)
        if self.config.profile:
            self.profile(workload)
        return self.report | {"environment": torch_environment()}

    def check_links(self) -> Groups:
        """The groups of the layout, once all that the ranks rely on has been seen to work."""
        self.events.progress("check links", 0, 1)
        groups, links = Groups(), check_copies(self.devices)
        if self.plan.layout.num_ranks > 1:
            groups = open_layout_groups(self.plan.layout, self.devices[0].type)
            links += check_links(groups, self.rank, self.devices[0])
        self.report["warnings"] = []
        if self.plan.transport == "copies":
            groups = replace(groups, memories=open_memories(groups, self.devices[0]))
            if not groups.memories:
                self.go_without_peer_memory()
        self.report["links"] = links
        return groups

    def go_without_peer_memory(self) -> None:
        """Raises UserError where it was asked for by name."""
        why = "the driver gives no rank the memory of another (a rank's log has its words)"
        if self.config.transport == "copies":
            raise UserError(
                f"transport=copies cannot be had: {why}; write transport=auto or transport=collectives"
            )
        self.report["warnings"].append(f"transport is collectives, where copies were planned: {why}")

    def load(self, groups: Groups) -> Loaded:
        """The experts, with this rank's part of the record."""
        loaded = RankLoader(self.job, self.rank, self.owned, self.devices, groups, self.events).load()
        self.stopwatch.synchronize()
        if self.config.hardware.enforce_memory and bytes_in_use():
            self.lower_cap()
        self.report |= {"load": loaded.report, "effective": loaded.effective}
        return loaded

    def lower_cap(self) -> None:
        """Have torch's allocator leave room, under its cap, for the peer memory that it knows nothing of."""
        device = self.devices[0]
        whole = torch.cuda.get_device_properties(device).total_memory
        before = torch.cuda.get_per_process_memory_fraction(device)
        torch.cuda.set_per_process_memory_fraction(max(0.0, before - bytes_in_use() / whole), device)

    def make_workload(self, models: Sequence[ParallelModel], samples: Samples) -> Workload:
        if not self.training:
            return Denoise(self.config, models, samples, self.stopwatch.forward)
        return Train(
            self.config,
            models[0].module,
            samples,
            self.stopwatch.forward,
            chunks=self.job.reference_of or [self.share.num_samples],
            first_sample=self.share.first_sample,
        )

    def local_samples(self) -> Samples:
        """This rank's share of the batch: scattered by rank 0 under data_parallel, else drawn where it is used."""
        first, count = self.share.first_sample, self.share.num_samples
        if self.plan.mode != "data_parallel":
            return self.draw(range(first, first + count))
        whole = self.draw(range(self.plan.batch_size)).tensors() if self.rank == 0 else {}
        self.connect_replicas()
        self.stopwatch.synchronize()
        begin = time.perf_counter()
        parts = {
            name: scatter_batch(
                whole.get(name),
                self.plan.replica_shares,
                rank=self.rank,
                like=torch.empty(shape, device=self.devices[0]),
            )
            for name, shape in sample_shapes(self.config.model, self.config.video).items()
        }
        self.stopwatch.synchronize()
        self.report["scatter_s"] = time.perf_counter() - begin
        return Samples(**{name: part.clone() for name, part in parts.items()})  # lets go of the whole batch

    def connect_replicas(self) -> None:
        """A first number each way: setting up connections takes NCCL a hundred times as long as a batch."""
        numbers = torch.zeros(self.plan.batch_size, device=self.devices[0]) if self.rank == 0 else None
        like = torch.empty((), device=self.devices[0])
        self.gather(scatter_batch(numbers, self.plan.replica_shares, rank=self.rank, like=like))

    def draw(self, indices: range) -> Samples:
        config = self.config
        return draw_samples(config.model, config.video, seed=config.seed, indices=indices).to(self.devices[0])

    def gather(self, part: Tensor) -> Tensor | None:
        """The samples of all replicas in their order on rank 0, None elsewhere."""
        shares, leaders = self.plan.replica_shares, self.plan.layout.replica_leaders
        return gather_batch(part, shares, rank=self.rank, ranks=leaders)

    def warm_up(self, workload: Workload) -> None:
        self.stopwatch.synchronize()
        begin = time.perf_counter()
        steps = warmup_steps(self.config)
        for number, index in enumerate(steps):
            self.events.progress("warm-up", number, len(steps))
            workload.step(index)
        workload.restart()
        self.stopwatch.synchronize()
        self.report["warmup_s"] = time.perf_counter() - begin

    def measure(self, workload: Workload, loaded: Loaded) -> None:
        """The timed steps, and the peaks of memory over them."""
        counters = [(axis, counter) for model in loaded.models for axis, counter in model.traffic.items()]
        rings = [shards.ring for shards in loaded.shards]
        for counter in (*(counter for _, counter in counters), *loaded.swaps, *rings):
            counter.reset()
        reset_peaks(self.devices)
        self.stopwatch.restart()
        total = self.config.workload.num_steps
        begin = time.time()
        for index in range(total):
            self.events.progress("measure", index, total)
            with self.stopwatch.step():
                workload.step(index)
            self.events.emit("step", index=index, seconds=self.stopwatch.step_s[-1])
        self.events.progress("measure", total, total)
        owned = self.owned_bytes(loaded, workload)
        sent: dict[str, float] = {}
        for axis, counter in counters:
            sent[axis] = sent.get(axis, 0) + counter.num_bytes / len(self.stopwatch.forward_s)
        self.report |= {
            "window": [begin, time.time()],
            "step_s": self.stopwatch.step_s,
            "forward_s": self.stopwatch.forward_s,
            "lead_s": self.stopwatch.lead_s,
            "forwards_per_step": len(self.stopwatch.forward_s) / total,  # an expert may run without guidance
            "bytes_per_forward": sent,
            "swap": {
                "bytes_per_forward": sum(swap.num_bytes for swap in loaded.swaps)
                / len(self.stopwatch.forward_s),
                "stall_s": sum(swap.stall_s() for swap in loaded.swaps) / total,
            },
            "gather_stall_s": sum(ring.stall_s() for ring in rings) / total if rings else None,
            "losses": workload.losses if isinstance(workload, Train) else [],
            "is_finite": workload.is_finite(),
            "memory": read_peaks(self.owned, self.devices, owned, peer_bytes=bytes_in_use()),
            "weight_gib": [number / GIB for number in self.owned_bytes(loaded)],
            "peak_rss_gib": peak_rss_gib(),
        }
        self.stopwatch.restart()
        if self.plan.mode == "data_parallel" and isinstance(workload, Denoise):
            self.stopwatch.synchronize()  # no rank waits for another's last step in here
            gather_begin = time.perf_counter()
            self.gather(workload.latent)
            self.stopwatch.synchronize()
            self.report["gather_s"] = time.perf_counter() - gather_begin

    def owned_bytes(self, loaded: Loaded, workload: Workload | None = None) -> list[int]:
        """Bytes of weights (with a workload: of gradients and optimiser state too) on each device of this rank."""
        owned = owned_bytes_by_position(
            [model.bare for model in loaded.models],
            lambda name: position_of(name, self.plan.block_owner),
            len(self.devices),
            optimizer=workload.optimizer if isinstance(workload, Train) else None,
            is_swapped=lambda name: any(swap.into(name) is not None for swap in loaded.swaps),
        )
        return [
            num_bytes + sum(swap.buffer_bytes(device) for swap in loaded.swaps)
            for num_bytes, device in zip(owned, self.devices, strict=True)
        ]

    def leave_gradients(self, workload: Workload) -> None:
        """Training's answer: gradients before any weight has changed, averaged over the ranks."""
        assert isinstance(workload, Train)
        self.events.progress("parity", 0, 1)
        gradients = workload.first_gradients()
        if self.rank == 0:
            write_answer(self.job.run_folder, gradients)
        self.report["parity_blocks"] = self.config.model.architecture.num_layers

    def leave_flows(self, workload: Workload, models: Sequence[ParallelModel]) -> None:
        """Denoising's answer: flows of the whole batch, through as many of the first blocks as the reference can."""
        if not isinstance(workload, Denoise):
            return
        self.events.progress("parity", 0, 1)
        self.report["parity_blocks"] = self.blocks_to_verify()
        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(first_blocks(model.bare, self.report["parity_blocks"]))
            flows = self.gather(workload.parity_flows())
        if flows is not None:
            write_answer(self.job.run_folder, {FLOWS: flows})

    def blocks_to_verify(self) -> int:
        """The same number on all ranks, as they all know the slowest rank's times."""
        architecture = self.config.model.architecture
        times = torch.tensor(
            [self.report["load"]["seconds"], max(self.report["forward_s"])], dtype=torch.float64
        )
        if dist.is_initialized():
            dist.all_reduce(times, op=dist.ReduceOp.MAX)
        load_s, forward_s = times.tolist()
        element = DTYPE_BYTES[self.config.precision.dtype] * self.config.model.num_experts
        return blocks_to_verify(
            self.config.verify,
            num_blocks=architecture.num_layers,
            outer_bytes=architecture.num_outer_parameters() * element,
            block_bytes=architecture.num_block_parameters() * element,
            other_bytes=reference_bytes(self.config, self.plan),
            device_bytes=self.plan.devices[0].total_bytes,
            # As if the GPUs of a replica shared its work without loss: what it took them, one takes in turn.
            reference_s=load_s + num_parity_forwards(self.config) * forward_s * self.plan.layout.num_devices,
        )

    def compare(self, models: Sequence[ParallelModel]) -> dict[str, Any]:
        """The reference launch: the distance of the run's answer to that of one device in mode none."""
        parity = compare_answers(read_answer(self.job.run_folder), self.reference_answer(models))
        return {"rel_l2": parity.rel_l2, "bit_equal": parity.bit_equal}

    def reference_answer(self, models: Sequence[ParallelModel]) -> dict[str, Tensor]:
        """What `leave_flows` or `leave_gradients` of any layout should have left, computed in the same shares."""
        assert self.job.reference_of is not None
        if self.training:
            workload = self.make_workload(models, self.local_samples())
            assert isinstance(workload, Train)
            return workload.first_gradients()
        flows, first = [], self.share.first_sample
        for size in self.job.reference_of:
            self.events.progress("parity", first, self.plan.batch_size)
            workload = self.make_workload(models, self.draw(range(first, first + size)))
            assert isinstance(workload, Denoise)
            flows.append(workload.parity_flows().cpu())
            first += size
        return {FLOWS: torch.cat(flows)}

    def profile(self, workload: Workload) -> None:
        """A torch profiler trace of one step, in a pass of its own: its overhead is in no other figure."""
        from torch.profiler import ProfilerActivity, profile

        self.events.progress("profile", 0, 1)
        folder = self.job.run_folder / "profile"
        folder.mkdir(exist_ok=True)
        on_gpu = self.devices[0].type == "cuda"
        workload.restart()
        self.stopwatch.synchronize()
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
            workload.step(0)
            self.stopwatch.synchronize()
        profiler.export_chrome_trace(str(folder / f"trace_rank{self.rank}.json.gz"))
        table = profiler.key_averages().table(
            sort_by="self_device_time_total" if on_gpu else "self_cpu_time_total",
            row_limit=40,
            max_name_column_width=80,
        )
        (folder / f"kernels_rank{self.rank}.txt").write_text(table)
        self.events.progress("profile", 1, 1)
