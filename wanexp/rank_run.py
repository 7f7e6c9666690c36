"""The run of one rank, phase by phase:

load weights -> warm-up -> measure -> leave the answer for the parity check -> profile -> report
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from wanexp.events import EventLog
from wanexp.hardware.devices import Device
from wanexp.job import Job
from wanexp.measure.environment import torch_environment
from wanexp.measure.memory import (
    GIB,
    anonymous_rss_bytes,
    owned_bytes_by_position,
    peak_rss_gib,
    read_peaks,
    reset_peaks,
)
from wanexp.measure.parity import (
    NUM_PARITY_FORWARDS,
    blocks_to_verify,
    compare_answers,
    read_answer,
    write_answer,
)
from wanexp.measure.timing import Stopwatch
from wanexp.parallel.block_distribution import position_of
from wanexp.parallel.data_parallel import gather_batch, scatter_batch
from wanexp.parallel.parallelize import ParallelModel, parallelize_wan
from wanexp.planning.plan import DTYPE_BYTES
from wanexp.wan.attention import choose_attention
from wanexp.wan.transformer import WanTransformer, first_blocks
from wanexp.wan.weights import load_weights, open_weights
from wanexp.workloads.denoise import Denoise
from wanexp.workloads.samples import Samples, draw_samples, sample_shapes
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
        self.verify = self.config.verify != "never" and (
            self.plan.mode != "none" or self.config.verify == "always"
        )
        self.report: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        models = self.load()
        if self.job.reference_of is not None:
            return self.compare(models)
        workload = self.make_workload(models, self.local_samples())
        if self.training and self.verify:
            self.leave_gradients(workload)
        self.warm_up(workload)
        self.measure(workload, models)
        if self.verify:
            self.leave_flows(workload, models)
        if self.config.profile:
            self.profile(workload)
        return self.report | {"environment": torch_environment()}

    def load(self) -> list[ParallelModel]:
        """The experts, each weight on the device that owns it, the layout applied."""
        config = self.config
        compute_dtype = getattr(torch, config.precision.dtype)
        kernel = choose_attention(
            config.attention,
            device_type=self.plan.device_type,
            dtype=compute_dtype,
            head_dim=config.model.architecture.head_dim,
            compute_capability=min(
                (d.compute_capability for d in self.owned if d.compute_capability), default=None
            ),
        )
        anonymous_before, begin = anonymous_rss_bytes(), time.perf_counter()
        sources = open_weights(
            config.checkpoint,
            config.model.architecture,
            num_experts=config.model.num_experts,
            seed=config.seed,
        )
        models, num_bytes = [], 0
        for source in sources:
            model = self.empty_model(torch.float32 if self.training else compute_dtype)
            report = load_weights(
                model,
                source,
                device_of=lambda name: self.devices[self.position_of(name)],
                requires_grad=self.training,
                on_tensor=self.load_progress(model),
            )
            num_bytes += report.num_bytes
            model.set_attention(kernel)
            model.gradient_checkpointing = self.training and config.workload.activation_checkpointing
            model.train(self.training)
            models.append(parallelize_wan(model, self.plan, devices=self.devices, training=self.training))
        self.stopwatch.synchronize()
        self.report["load"] = {
            "seconds": time.perf_counter() - begin,
            "num_bytes": num_bytes,
            "anonymous_growth_bytes": max(0, anonymous_rss_bytes() - anonymous_before),
        }
        self.report["effective"] = {"attention": kernel, "weights": [source.describe() for source in sources]}
        return models

    def empty_model(self, dtype: torch.dtype) -> WanTransformer:
        """A transformer on the meta device, with fewer blocks where only the first are compared."""
        architecture = self.config.model.architecture
        if self.job.num_blocks is not None:
            architecture = dataclasses.replace(architecture, num_layers=self.job.num_blocks)
        residual = torch.float32 if self.config.precision.residual_fp32 else None
        with torch.device("meta"):
            return WanTransformer(architecture, dtype=dtype, residual=residual)

    def position_of(self, name: str) -> int:
        return position_of(name, self.plan.block_owner)

    def load_progress(self, model: nn.Module) -> Callable[[str, int], None]:
        total, done = sum(parameter.nbytes for parameter in model.parameters()), 0

        def on_tensor(_name: str, num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self.events.progress("load weights", done, total)

        return on_tensor

    def make_workload(self, models: Sequence[ParallelModel], samples: Samples) -> Workload:
        modules = [model.module for model in models]
        if not self.training:
            return Denoise(self.config, modules, samples, self.stopwatch.forward)
        return Train(
            self.config,
            modules[0],
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
        self.stopwatch.synchronize()
        begin = time.perf_counter()
        parts = {
            name: scatter_batch(
                whole.get(name),
                self.shares,
                rank=self.rank,
                like=torch.empty(shape, device=self.devices[0]),
            )
            for name, shape in sample_shapes(self.config.model, self.config.video).items()
        }
        self.stopwatch.synchronize()
        self.report["scatter_s"] = time.perf_counter() - begin
        return Samples(**{name: part.clone() for name, part in parts.items()})  # lets go of the whole batch

    def draw(self, indices: range) -> Samples:
        config = self.config
        return draw_samples(config.model, config.video, seed=config.seed, indices=indices).to(self.devices[0])

    @property
    def shares(self) -> list[int]:
        return [rank.num_samples for rank in self.plan.ranks]

    def warm_up(self, workload: Workload) -> None:
        self.stopwatch.synchronize()
        begin = time.perf_counter()
        total = self.config.workload.num_warmup_steps
        for index in range(total):
            self.events.progress("warm-up", index, total)
            workload.step(index % self.config.workload.num_steps)
        workload.restart()
        self.stopwatch.synchronize()
        self.report["warmup_s"] = time.perf_counter() - begin

    def measure(self, workload: Workload, models: Sequence[ParallelModel]) -> None:
        """The timed steps, and the peaks of memory over them."""
        seams = [model.seams for model in models if model.seams]
        for seam in seams:
            seam.reset()
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
        owned = self.owned_bytes(models, workload)
        self.report |= {
            "window": [begin, time.time()],
            "step_s": self.stopwatch.step_s,
            "forward_s": self.stopwatch.forward_s,
            "forwards_per_step": len(self.stopwatch.forward_s) / total,  # an expert may run without guidance
            "seam_bytes_per_forward": sum(s.num_bytes for s in seams) / len(self.stopwatch.forward_s),
            "losses": workload.losses if isinstance(workload, Train) else [],
            "memory": read_peaks(self.owned, self.devices, owned),
            "weight_gib": [number / GIB for number in self.owned_bytes(models)],
            "peak_rss_gib": peak_rss_gib(),
        }
        self.stopwatch.restart()
        if self.plan.mode == "data_parallel" and isinstance(workload, Denoise):
            gather_begin = time.perf_counter()
            gather_batch(workload.latent, self.shares, rank=self.rank)
            self.stopwatch.synchronize()
            self.report["gather_s"] = time.perf_counter() - gather_begin

    def owned_bytes(self, models: Sequence[ParallelModel], workload: Workload | None = None) -> list[int]:
        """Bytes of weights (with a workload: of gradients and optimiser state too) on each device of this rank."""
        return owned_bytes_by_position(
            [model.bare for model in models],
            self.position_of,
            len(self.devices),
            optimizer=workload.optimizer if isinstance(workload, Train) else None,
        )

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
            flows = gather_batch(workload.parity_flows(), self.shares, rank=self.rank)
        if flows is not None:
            write_answer(self.job.run_folder, {"flow": flows})

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
            device_bytes=self.plan.devices[0].total_bytes,
            reference_s=load_s + NUM_PARITY_FORWARDS * len(self.shares) * forward_s,
        )

    def compare(self, models: Sequence[ParallelModel]) -> dict[str, Any]:
        """The reference launch: the same answer from one device in mode none, and the distance to the run's."""
        assert self.job.reference_of is not None
        if self.training:
            workload = self.make_workload(models, self.local_samples())
            assert isinstance(workload, Train)
            reference = workload.first_gradients()
        else:
            flows, first = [], 0
            for size in self.job.reference_of:
                self.events.progress("parity", first, self.plan.batch_size)
                workload = self.make_workload(models, self.draw(range(first, first + size)))
                assert isinstance(workload, Denoise)
                flows.append(workload.parity_flows().cpu())
                first += size
            reference = {"flow": torch.cat(flows)}
        parity = compare_answers(read_answer(self.job.run_folder), reference)
        return {"rel_l2": parity.rel_l2, "bit_equal": parity.bit_equal}

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
