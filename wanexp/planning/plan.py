"""The plan of one run: which rank owns which devices, samples and blocks. Pure: no torch, no file, no device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from wanexp.config import RunConfig
from wanexp.errors import LayoutError, UserError
from wanexp.hardware.devices import Device
from wanexp.parallel.layout import Layout, place_blocks, resolve_layout, split_evenly

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


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
    """

    mode: str
    layout: Layout
    devices: tuple[Device, ...]
    ranks: tuple[RankPlan, ...]
    batch_size: int
    block_owner: tuple[int, ...]
    weight_bytes: tuple[int, ...]

    @property
    def device_type(self) -> str:
        return self.devices[0].type

    @property
    def num_gpus(self) -> int:
        """GPUs of the run; 0 on logical CPU devices."""
        return len(self.devices) if self.device_type == "cuda" else 0

    def must_be_bit_equal(self, workload: str) -> bool:
        """Whether the answer must equal mode none's to the bit: the same kernels on the same local batch."""
        return workload == "denoise"


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
    if config.workload.name == "train" and config.model.num_experts > 1:
        raise UserError(
            f"workload=train trains one transformer, {config.model.name} has {config.model.num_experts} experts; "
            "write a model with one, such as model=wan2.1_t2v_14b"
        )
    if config.workload.name == "train" and config.parallelism.mode == "data_parallel":
        raise LayoutError(
            "workload=train needs synchronised gradients, data_parallel has none; write parallelism=distributed"
        )
    if config.workload.name == "train" and batch_size % layout.dp:
        raise LayoutError(
            f"workload.batch_size {batch_size} is not a multiple of the {layout.dp} training replicas, whose "
            f"gradients are averaged with equal weight; write a multiple of {layout.dp}"
        )
    architecture = config.model.architecture
    block_owner = place_blocks(
        architecture.num_layers,
        layout.blocks,
        placement=config.parallelism.block_placement,
        split=config.parallelism.block_split,
        free_bytes=[device.free_bytes for device in devices] if layout.blocks > 1 else None,
    )
    ranks, first_sample = [], 0
    for rank, num_samples in enumerate(split_evenly(batch_size, layout.dp)):
        positions = tuple(range(rank * layout.blocks, (rank + 1) * layout.blocks))
        ranks.append(RankPlan(rank, positions, first_sample, num_samples))
        first_sample += num_samples
    return Plan(
        mode=config.parallelism.mode,
        layout=layout,
        devices=tuple(devices),
        ranks=tuple(ranks),
        batch_size=batch_size,
        block_owner=block_owner,
        weight_bytes=_weight_bytes(config, ranks, block_owner, len(devices)),
    )


def _weight_bytes(
    config: RunConfig, ranks: Sequence[RankPlan], block_owner: Sequence[int], num_devices: int
) -> tuple[int, ...]:
    """Bytes of weights on each device: its blocks; embeddings with the first block, the head with the last."""
    architecture = config.model.architecture
    head = sum(
        math.prod(shape) for name, shape in architecture.outer_shapes().items() if name.startswith("head.")
    )
    embeddings = architecture.num_outer_parameters() - head
    training = config.workload.name == "train"  # fp32 master weights
    element = DTYPE_BYTES["float32" if training else config.precision.dtype] * config.model.num_experts
    weights = [0] * num_devices
    for rank in ranks:
        for owner in block_owner:
            weights[rank.devices[owner]] += architecture.num_block_parameters() * element
        weights[rank.devices[block_owner[0]]] += embeddings * element
        weights[rank.devices[block_owner[-1]]] += head * element
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
        weight_bytes=(sum(plan.weight_bytes[position] for position in plan.ranks[0].devices),),
    )
