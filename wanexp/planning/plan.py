"""The plan of one run: which rank owns which devices, samples and blocks. Pure: no torch, no file, no device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from wanexp.config import OffloadConfig, RunConfig
from wanexp.errors import LayoutError, UserError
from wanexp.hardware.devices import Device
from wanexp.offload.sizes import tensor_bytes
from wanexp.offload.swap_plan import swapped_blocks, swapped_per_device
from wanexp.parallel.layout import (
    AXES_OF_MODE,
    INFERENCE_AXES,
    Layout,
    place_blocks,
    resolve_layout,
    split_evenly,
)
from wanexp.parallel.pipeline import place_chunks
from wanexp.parallel.shares import (
    check_context_parallel,
    check_tensor_parallel,
    heads_of_ranks,
    part_of_rank,
)
from wanexp.parallel.transport import choose_transport
from wanexp.planning.block_work import FP8_CAPABILITY
from wanexp.workloads.sizes import guidance_of, num_tokens

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
LOSSY_ATTENTIONS = {"fa3_fp8": 0.3}
"""Kernels of 8 bits, each with how far a run may be from an exact one (relative L2 of a forward).

fa3_fp8: 0.05 a call (docs/results/floor.json), 0.18 over the 40 blocks of 14B, random weights, float8 products
(docs/results/float8.json).
"""


@dataclass(frozen=True)
class RankPlan:
    """What one process owns: its devices (positions in `Plan.devices`) and its share of the batch."""

    rank: int
    devices: tuple[int, ...]
    first_sample: int
    num_samples: int


@dataclass(frozen=True)
class Plan:
    """A resolved layout on real devices.

    block_owner: for each transformer block the position of its device within the rank's own devices.
    weight_bytes: weights on each device of `devices`, in their storage precision.
    is_pipelined: the devices of a rank work at the same time, on forwards of one sample each.
    swapped: the blocks whose home is the host, on every rank.
    transport: what carries the exchanges of ulysses and shard, as of `choose_transport`.
    """

    mode: str
    layout: Layout
    devices: tuple[Device, ...]
    ranks: tuple[RankPlan, ...]
    batch_size: int
    block_owner: tuple[int, ...]
    weight_bytes: tuple[int, ...]
    is_pipelined: bool = False
    swapped: tuple[int, ...] = ()
    transport: str = "collectives"

    @property
    def device_type(self) -> str:
        return self.devices[0].type

    @property
    def num_gpus(self) -> int:
        """GPUs of the run; 0 on logical CPU devices."""
        return len(self.devices) if self.device_type == "cuda" else 0

    @property
    def replica_shares(self) -> tuple[int, ...]:
        """The number of samples of each replica."""
        return tuple(self.ranks[leader].num_samples for leader in self.layout.replica_leaders)

    @property
    def forward_batches(self) -> tuple[int, ...]:
        """The batches that the samples go through the model in, which a reference must use too."""
        return (1,) * self.batch_size if self.is_pipelined else self.replica_shares

    def must_be_bit_equal(self, config: RunConfig) -> bool:
        """Whether the answer must equal mode none's to the bit: the same kernels on the same local batch."""
        layout = self.layout
        is_exact = config.workload.name == "denoise" and not is_lossy_run(config)
        return is_exact and layout.ring == layout.ulysses == layout.tp == 1


def is_lossy_run(config: RunConfig) -> bool:
    """Whether numbers of 8 bits stand in for wider ones: a class of its own beside the exact runs."""
    return config.precision.linear != "dtype" or config.attention in LOSSY_ATTENTIONS


def parity_tolerance(config: RunConfig) -> float:
    """How far the answer may be from an exact mode none's: the larger of what precision and attention ask for."""
    return max(config.precision.tolerance, LOSSY_ATTENTIONS.get(config.attention, 0.0))


def make_plan(config: RunConfig, devices: Sequence[Device]) -> Plan:
    """Lay `config` out on `devices` (those the run uses, in order).

    Raises UserError, or LayoutError where the mode does not suit these devices, this model or this batch.
    """
    layout = resolve_layout(config.parallelism, len(devices))
    batch_size = config.workload.batch_size if config.workload.batch_size is not None else layout.dp
    if batch_size < 1:
        raise UserError(f"workload.batch_size is {batch_size}; write 1 or more")
    if batch_size < layout.dp:
        raise LayoutError(
            f"workload.batch_size {batch_size} is smaller than the {layout.dp} replicas; "
            f"write workload.batch_size={layout.dp} or more, or fewer GPUs"
        )
    _check_workload(config, layout, batch_size)
    _check_offload(config, layout, devices[0])
    architecture = config.model.architecture
    check_tensor_parallel(architecture, layout.tp)
    check_context_parallel(
        num_heads=min(heads_of_ranks(architecture, layout.tp)),
        num_tokens=num_tokens(config.model, config.video),
        ulysses=layout.ulysses,
        ring=layout.ring,
    )
    transport = choose_transport(config.transport, layout, devices, training=config.workload.name == "train")
    block_owner = _place_blocks(config, layout, devices)
    swapped = _swapped_blocks(config, block_owner)
    ranks = []
    shares = split_evenly(batch_size, layout.dp)
    for rank in range(layout.num_ranks):
        replica = layout.coordinate(rank, "dp")
        positions = tuple(range(rank * layout.blocks, (rank + 1) * layout.blocks))
        ranks.append(RankPlan(rank, positions, sum(shares[:replica]), shares[replica]))
    return Plan(
        mode=config.parallelism.mode,
        layout=layout,
        devices=tuple(devices),
        ranks=tuple(ranks),
        batch_size=batch_size,
        block_owner=block_owner,
        weight_bytes=_weight_bytes(
            config, layout, ranks, block_owner, swapped, len(devices), outer_is_whole=transport == "copies"
        ),
        is_pipelined=layout.blocks > 1 and config.parallelism.pipeline and config.workload.name == "denoise",
        swapped=swapped,
        transport=transport,
    )


def _check_workload(config: RunConfig, layout: Layout, batch_size: int) -> None:
    """Raise for a workload that the layout cannot carry out."""
    if config.workload.name == "denoise":
        if layout.cfg > 1 and min(guidance_of(config)) <= 1:
            raise LayoutError(
                f"cfg={layout.cfg} needs two forwards a step, guidance above 1, found {min(guidance_of(config)):g}; "
                "write workload.guidance_scale=[5], or another parallelism"
            )
        return
    if config.precision.dtype == "float16":
        raise UserError(
            "workload=train in float16 needs scaled losses, which are not here: small gradients would be lost; write "
            "precision=bf16 or precision=fp32"
        )
    if config.model.num_experts > 1:
        raise UserError(
            f"workload=train trains one transformer, {config.model.name} has {config.model.num_experts} experts; "
            "write a model with one, such as model=wan2.1_t2v_14b"
        )
    if config.parallelism.mode == "data_parallel":
        raise LayoutError(
            "workload=train needs synchronised gradients, data_parallel has none; write parallelism=distributed"
        )
    for axis in INFERENCE_AXES:
        if getattr(layout, axis) > 1:
            raise LayoutError(
                f"{axis}={getattr(layout, axis)} is for inference, workload is train; write parallelism=distributed or "
                "parallelism=fsdp"
            )
    if layout.dp > 1 and layout.shard == 1 and config.parallelism.mode != "distributed":
        raise LayoutError(
            f"workload=train with dp={layout.dp} needs synchronised gradients, which {config.parallelism.mode} "
            "has not; write parallelism=distributed or parallelism=fsdp"
        )
    if batch_size % layout.dp:
        raise LayoutError(
            f"workload.batch_size {batch_size} is not a multiple of the {layout.dp} training replicas, whose "
            f"gradients are averaged with equal weight; write a multiple of {layout.dp}"
        )


def _check_offload(config: RunConfig, layout: Layout, device: Device) -> None:
    """Raise LayoutError for weights on the host or in 8 bits where they cannot be had."""
    swaps, quantizes = config.offload.blocks != "0", config.precision.linear != "dtype"
    in_float8 = config.precision.linear == "fp8"
    refusals = (
        (
            config.offload.buffers != OffloadConfig.buffers and not swaps,
            f"offload.buffers is {config.offload.buffers} and no block is swapped; write offload=block_swap too",
        ),
        (
            in_float8 and device.type == "cuda" and config.precision.dtype != "bfloat16",
            f"precision.linear=fp8 computes in bfloat16, precision.dtype is {config.precision.dtype}; write "
            "precision=fp8, or precision.linear=fp8_weight",
        ),
        (
            in_float8
            and device.compute_capability is not None
            and device.compute_capability < FP8_CAPABILITY,
            f"precision.linear=fp8 needs float8 units, from compute capability 8.9 on, {device.name} has "
            f"{'.'.join(map(str, device.compute_capability or ()))}; write precision=fp8_weight",
        ),
        (
            swaps and layout.shard > 1,
            f"block swap with shard={layout.shard} is refused: both decide where a block's weights are; write one of "
            "the two",
        ),
        (
            swaps and config.workload.name == "train",
            "block swap is for inference, as swapped weights are only read; write offload=none, or parallelism=fsdp",
        ),
        (
            quantizes and config.workload.name == "train",
            f"precision.linear={config.precision.linear} is for inference, as 8-bit weights have no gradients; write "
            "precision=bf16",
        ),
        (
            quantizes and layout.shard > 1,
            f"precision.linear={config.precision.linear} with shard={layout.shard} is refused: shards are gathered in "
            "one dtype; write precision=bf16, or another parallelism",
        ),
    )
    for refused, reason in refusals:
        if refused:
            raise LayoutError(reason)


def _swapped_blocks(config: RunConfig, block_owner: Sequence[int]) -> tuple[int, ...]:
    """The blocks that `offload.blocks` swaps; `auto`, which the planner settles, swaps none yet."""
    if config.offload.blocks in ("0", "auto"):
        return ()
    return swapped_blocks(block_owner, swapped_per_device(block_owner, int(config.offload.blocks)))


def _place_blocks(config: RunConfig, layout: Layout, devices: Sequence[Device]) -> tuple[int, ...]:
    parallelism, num_layers = config.parallelism, config.model.architecture.num_layers
    placed = (
        parallelism.block_chunks or parallelism.block_split or parallelism.block_placement != "contiguous"
    )
    if placed and "blocks" not in AXES_OF_MODE[parallelism.mode]:
        raise LayoutError(
            f"{parallelism.mode} has no blocks to place; leave parallelism.block_placement, block_split and "
            "block_chunks out, or write parallelism=block_distribution"
        )
    if parallelism.block_chunks is not None and layout.blocks > 1:
        if parallelism.block_placement != "interleaved" or parallelism.block_split is not None:
            raise LayoutError(
                f"parallelism.block_chunks is {parallelism.block_chunks}, which is for interleaved blocks; write "
                "parallelism.block_placement=interleaved and no block_split"
            )
        return place_chunks(num_layers, layout.blocks, parallelism.block_chunks)
    return place_blocks(
        num_layers,
        layout.blocks,
        placement=parallelism.block_placement,
        split=parallelism.block_split,
        free_bytes=[device.free_bytes for device in devices[: layout.blocks]] if layout.blocks > 1 else None,
    )


def _weight_bytes(
    config: RunConfig,
    layout: Layout,
    ranks: Sequence[RankPlan],
    block_owner: Sequence[int],
    swapped: Sequence[int],
    num_devices: int,
    *,
    outer_is_whole: bool,
) -> tuple[int, ...]:
    """Bytes of weights on each device: its blocks; embeddings with the first block, the head with the last.

    Of swapped blocks only the buffers count that they take turns in. outer_is_whole: what is outside of the blocks is
    whole on every rank, also where blocks are sharded (`peer_shards.py`).
    """
    architecture = config.model.architecture
    training = config.workload.name == "train"  # fp32 master weights
    element, num_experts = (
        DTYPE_BYTES["float32" if training else config.precision.dtype],
        config.model.num_experts,
    )

    def held(rank: int, shapes: dict[str, tuple[int, ...]], prefix: str = "") -> int:
        """Bytes that `rank` has of these tensors, of all experts."""
        own = replace(layout, shard=1) if outer_is_whole and not prefix else layout
        parts = {
            prefix + name: part_of_rank(own, architecture, rank, prefix + name, shape).shape_in(shape)
            for name, shape in shapes.items()
        }
        return num_experts * sum(
            tensor_bytes(name, shape, linear=config.precision.linear, element_bytes=element)
            for name, shape in parts.items()
        )

    outer = architecture.outer_shapes()
    head = {name: shape for name, shape in outer.items() if name.startswith("head.")}
    embeddings = {name: shape for name, shape in outer.items() if name not in head}
    weights = [0] * num_devices
    for rank in ranks:
        block_bytes = held(rank.rank, architecture.block_shapes(), "blocks.0.")
        for position, device in enumerate(rank.devices):
            own = [index for index, owner in enumerate(block_owner) if owner == position]
            away = sum(index in swapped for index in own)
            weights[device] += (len(own) - away + min(away, config.offload.buffers)) * block_bytes
        weights[rank.devices[block_owner[0]]] += held(rank.rank, embeddings)
        weights[rank.devices[block_owner[-1]]] += held(rank.rank, head)
    return tuple(weights)


def reference_plan(plan: Plan, num_blocks: int) -> Plan:
    """Mode none on the first device of `plan`, for the whole batch and the first `num_blocks` blocks."""
    return Plan(
        mode="none",
        layout=Layout(),
        devices=plan.devices[:1],
        ranks=(RankPlan(0, (0,), 0, plan.batch_size),),
        batch_size=plan.batch_size,
        block_owner=(0,) * num_blocks,
        weight_bytes=(),  # not judged: it is not planned, only run
    )
