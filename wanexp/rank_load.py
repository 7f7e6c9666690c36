"""Loading the transformers of one rank: what each of them is made of, in the order in which it is put together.

empty model -> cut to this rank's share -> 8-bit layers -> homes of swapped blocks -> weights -> kernels -> layout
"""

import dataclasses
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from wanexp.events import EventLog
from wanexp.hardware.devices import Device
from wanexp.job import Job
from wanexp.measure.memory import anonymous_rss_bytes
from wanexp.offload.block_swap import BlockSwap, swap_blocks
from wanexp.offload.load_device import loading_device, move_to_owners
from wanexp.offload.quantize import QuantizedLinear, float8_kernel, quantize_linears
from wanexp.parallel.agreement import check_agreement, fingerprint
from wanexp.parallel.block_distribution import position_of
from wanexp.parallel.groups import Groups
from wanexp.parallel.loading import Loader
from wanexp.parallel.parallelize import ParallelModel, divide_weights, parallelize_wan
from wanexp.parallel.peer_shards import PeerShards
from wanexp.parallel.shares import part_of_rank
from wanexp.parallel.ulysses import reserve_places
from wanexp.planning.exchanges import place_bytes
from wanexp.planning.sizes import share_of, sizes_of
from wanexp.wan.attention_choice import Choice, attention_shapes, steady
from wanexp.wan.attention_probe import probe
from wanexp.wan.fused import choose_kernels
from wanexp.wan.transformer import WanTransformer
from wanexp.wan.weights import LoadReport, WeightSource, load_weights, local_tensor, open_weights
from wanexp.workloads.sizes import num_tokens


@dataclass
class Loaded:
    """The experts with their layout applied, what of their blocks is swapped, and what is read from other ranks.

    report, effective: for the record.
    """

    models: list[ParallelModel]
    swaps: list[BlockSwap]
    shards: list[PeerShards]
    report: dict[str, Any]
    effective: dict[str, Any]


class RankLoader:
    """Puts the experts of one rank together. All ranks load at the same time."""

    def __init__(
        self,
        job: Job,
        rank: int,
        owned: Sequence[Device],
        devices: Sequence[torch.device],
        groups: Groups,
        events: EventLog,
    ) -> None:
        self.job = job
        self.config = job.config
        self.plan = job.plan
        self.rank = rank
        self.devices = devices
        self.groups = groups
        self.events = events
        self.training = self.config.workload.name == "train"
        self.compute_dtype = getattr(torch, self.config.precision.dtype)
        self.compute_capability = min(
            (device.compute_capability for device in owned if device.compute_capability), default=None
        )

    def load(self) -> Loaded:
        """Every expert, each weight on the device that owns it."""
        config = self.config
        self.events.progress("load weights", 0, 1)
        sources = open_weights(
            config.checkpoint,
            config.model.architecture,
            num_experts=config.model.num_experts,
            seed=config.seed,
        )
        if dist.is_initialized():
            check_agreement(fingerprint(config, sources))
        attention, cross_attention = self.choose_attention()
        kernels = choose_kernels(
            config.kernels,
            device_type=self.plan.device_type,
            compute_capability=self.compute_capability,
            training=self.training,
        )
        for module in self.job.modules:  # where the server began with another job
            importlib.import_module(module)
        anonymous_before, begin = anonymous_rss_bytes(), time.perf_counter()
        self.reserve_places()
        loader = self.shared_loader()
        models, swaps, all_shards, reports = [], [], [], []
        for source in sources:
            model = self.empty_model()
            traffic, shards = divide_weights(model, self.groups, training=self.training)
            quantize_linears(model, config.precision.linear)
            swap = self.swap_blocks(model)
            reports.append(self.fill(model, source, swap or shards, loader))
            if shards:
                shards.complete()
                all_shards.append(shards)
            swaps += [swap] if swap else []
            model.set_attention(attention.kernel, cross_attention.kernel)
            model.set_kernels(kernels)
            model.set_ffn_chunks(config.ffn_chunks)
            model.gradient_checkpointing = self.training and config.workload.activation_checkpointing
            model.train(self.training)
            models.append(
                parallelize_wan(
                    model,
                    self.plan,
                    self.groups,
                    devices=self.devices,
                    training=self.training,
                    traffic=traffic,
                )
            )
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        swapped_bytes = sum(swap.host_bytes for swap in swaps)
        report = {
            "seconds": time.perf_counter() - begin,
            "num_bytes": sum(report.num_bytes for report in reports),
            "bytes_read": sum(report.bytes_read for report in reports),
            "bytes_received": sum(report.bytes_received for report in reports),
            "swapped_bytes": swapped_bytes,  # in host memory for good, so not part of the growth
            "anonymous_growth_bytes": max(0, anonymous_rss_bytes() - anonymous_before - swapped_bytes),
        }
        effective = {
            "attention": attention.kernel,
            "cross_attention": cross_attention.kernel,
            "attention_probe": {"self": asdict(attention), "cross": asdict(cross_attention)},
            "kernels": kernels,
            "transport": self.groups.transport,
            "linear": self.effective_linear(models),
            "swapped_blocks": list(self.plan.swapped),
            "weights": [source.describe() for source in sources],
        }
        return Loaded(models, swaps, all_shards, report, effective)

    def choose_attention(self) -> tuple[Choice, Choice]:
        """The kernels of self- and cross-attention: rank 0's choices, for all, as different kernels round differently.

        A reference takes those of the run that it is compared with.
        """
        if self.job.attention is not None:
            own, cross = self.job.attention
            return Choice(own), Choice(cross)
        arch, layout = self.config.model.architecture, self.plan.layout
        own_shape, cross_shape = attention_shapes(
            batch=max(self.plan.forward_batches),
            tokens=num_tokens(self.config.model, self.config.video),
            text_tokens=arch.text_len,
            heads=arch.num_heads,
            head_dim=arch.head_dim,
            ulysses=layout.ulysses,
            ring=layout.ring,
            tp=layout.tp,
        )
        measure = partial(
            probe,
            self.config.attention,
            device=self.devices[0],
            dtype=self.compute_dtype,
            training=self.training,
        )
        choices: list[Any] = [None, None]
        if self.rank == 0:
            self.events.progress("probe attention", 0, 1)
            choices = [measure(own_shape, with_lse=layout.ring > 1), steady(measure(cross_shape))]
        if dist.is_initialized():
            dist.broadcast_object_list(choices, src=0)
        return choices[0], choices[1]

    def effective_linear(self, models: Sequence[ParallelModel]) -> str:
        """How the linear layers compute: `fp8 (scaled_mm)` or `fp8 (emulated)`, or both; else as configured."""
        linear = self.config.precision.linear
        if linear != "fp8":
            return linear
        layers = [
            layer for model in models for layer in model.bare.modules() if isinstance(layer, QuantizedLinear)
        ]
        shapes = {tuple(layer.weight.shape) for layer in layers}
        kernel_of = partial(
            float8_kernel, self.plan.device_type, self.compute_dtype, capability=self.compute_capability
        )
        return f"fp8 ({', '.join(sorted({kernel_of(shape) for shape in shapes}))})"

    def reserve_places(self) -> None:
        """What Ulysses will need of peer memory: no step waits for it, and a lack of memory shows here."""
        if memory := self.groups.memories.get("ulysses"):
            whole = sizes_of(self.config, max(self.plan.forward_batches))
            reserve_places(memory, place_bytes(share_of(whole, self.plan.layout), self.plan.layout))

    def empty_model(self) -> WanTransformer:
        """A transformer on the meta device, with fewer blocks where only the first are compared."""
        architecture = self.config.model.architecture
        if self.job.num_blocks is not None:
            architecture = dataclasses.replace(architecture, num_layers=self.job.num_blocks)
        residual = torch.float32 if self.config.precision.residual_fp32 else None
        dtype = torch.float32 if self.training else self.compute_dtype
        with torch.device("meta"):
            return WanTransformer(architecture, dtype=dtype, residual=residual)

    def swap_blocks(self, model: WanTransformer) -> BlockSwap | None:
        """Homes on the host for the swapped blocks of this rank."""
        if not self.plan.swapped:
            return None
        model.requires_grad_(False)
        return swap_blocks(
            model,
            self.plan.swapped,
            device_of_block=lambda index: self.devices[self.plan.block_owner[index]],
            buffers=self.config.offload.buffers,
        )

    def shared_loader(self) -> Loader | None:
        """What loads together with the other ranks, where there are any; one for all experts, as it opens groups."""
        layout, architecture = self.plan.layout, self.empty_model().architecture
        if layout.num_ranks == 1:
            return None
        return Loader(
            architecture,
            part_of=partial(part_of_rank, layout, architecture),
            nodes=self.job.nodes or [range(layout.num_ranks)],
            rank=self.rank,
            home=self.devices[0],
            known_groups=self.groups.all().values(),
        )

    def fill(
        self,
        model: WanTransformer,
        source: WeightSource,
        homes: BlockSwap | PeerShards | None,
        loader: Loader | None,
    ) -> LoadReport:
        """Load the weights that this rank holds. homes: where those of blocks lie that have buffers to compute from."""
        load_device = self.config.offload.load_device
        settings: dict[str, Any] = {
            "device_of": lambda name: loading_device(load_device, self.owner(name)),
            "requires_grad": self.training,
            "on_tensor": self.progress(model),
            "into": homes.into if homes else None,
        }
        report = loader.load(model, source, **settings) if loader else load_weights(model, source, **settings)
        if load_device == "offload_device":
            move_to_owners(
                model, self.owner, stays=lambda name: homes is not None and homes.into(name) is not None
            )
        return report

    def owner(self, name: str) -> torch.device:
        return self.devices[position_of(name, self.plan.block_owner)]

    def progress(self, model: nn.Module) -> Callable[[str, int], None]:
        total, done = sum(local_tensor(parameter).nbytes for parameter in model.parameters()), 0

        def on_tensor(_name: str, num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self.events.progress("load weights", done, total)

        return on_tensor
