"""The layout: degrees of parallelism, and which rank and device holds what. Pure; no torch.

    ranks            = dp x cfg x ring x ulysses x tp     (shard: weights sharded over a group of these ranks)
    devices per rank = blocks

A mode is a preset of these degrees (`conf/parallelism/<mode>.yaml`); a degree of -1 stands for all GPUs that the
others leave. Neighbours in tp are neighbours in rank, then those in ulysses, ring, cfg and dp, so that the axes that
move most stay inside a machine.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod

from wanexp.config import MODES, PLACEMENTS, ParallelismConfig
from wanexp.errors import LayoutError, UserError

REPLICA_MODES = ("data_parallel", "distributed")
RANK_AXES = ("dp", "cfg", "ring", "ulysses", "tp")  # slowest-varying first
INFERENCE_AXES = ("cfg", "ring", "ulysses", "tp")

AXES_OF_MODE: dict[str, tuple[str, ...]] = {
    "none": (),
    "data_parallel": ("dp",),
    "distributed": ("dp",),
    "block_distribution": ("blocks", "dp", "cfg"),
    "cfg_parallel": ("cfg",),
    "context_parallel": ("ring", "ulysses"),
    "tensor_parallel": ("tp",),
    "fsdp": ("dp", "shard"),
    "hybrid": (*RANK_AXES, "shard", "blocks"),
}
"""The degrees that a mode may set. A mode of one GPU's worth is `none`, but for replicas, of which there may be one."""

REFUSED_PRODUCTS: tuple[tuple[str, str, str], ...] = (
    (
        "blocks",
        "ring",
        "every rank of a ring would wait at the seams of all; for memory write shard beside ring",
    ),
    ("blocks", "ulysses", "every rank would wait at the seams of all; for memory write shard beside ulysses"),
    ("blocks", "tp", "tp cuts every block's weights already; write one of the two"),
    ("blocks", "shard", "blocks keeps a block on one GPU, shard gathers it on each; write one of the two"),
    ("shard", "tp", "both cut the same weights; write one of the two"),
)
"""Two degrees that do not go together, and why."""


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. Every rank is one process; it owns `blocks` devices."""

    dp: int = 1
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    shard: int = 1
    blocks: int = 1

    @property
    def num_ranks(self) -> int:
        return prod(getattr(self, axis) for axis in RANK_AXES)

    @property
    def num_devices(self) -> int:
        return self.num_ranks * self.blocks

    def degrees(self) -> dict[str, int]:
        return asdict(self)

    def coordinate(self, rank: int, axis: str) -> int:
        """Where `rank` stands along `axis`."""
        faster = RANK_AXES[RANK_AXES.index(axis) + 1 :]
        return rank // prod(getattr(self, name) for name in faster) % getattr(self, axis)

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """All sets of ranks that differ along `axis` only (`shard`: neighbours), each in the order of the axis."""
        if axis == "shard":
            return [tuple(range(start, start + self.shard)) for start in range(0, self.num_ranks, self.shard)]
        others = [name for name in RANK_AXES if name != axis]
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.num_ranks):
            found.setdefault(tuple(self.coordinate(rank, name) for name in others), []).append(rank)
        return [tuple(ranks) for ranks in found.values()]

    @property
    def replica_leaders(self) -> list[int]:
        """The first rank of each replica: it has the samples of the replica, and its answer."""
        return list(range(0, self.num_ranks, self.num_ranks // self.dp))

    def __str__(self) -> str:
        return (
            " x ".join(f"{name}={degree}" for name, degree in self.degrees().items() if degree > 1)
            or "one device"
        )


def resolve_layout(parallelism: ParallelismConfig, num_gpus: int) -> Layout:
    """The layout that `parallelism` asks for on `num_gpus` GPUs.

    Raises UserError for a mode or degree that does not exist, LayoutError for one that does not suit these GPUs.
    """
    mode = parallelism.mode
    if mode not in MODES:
        raise UserError(f"parallelism.mode '{mode}' does not exist; write one of {', '.join(MODES)}")
    degrees = {name: getattr(parallelism, name) for name in Layout().degrees()}
    for name, degree in degrees.items():
        if degree < 1 and degree != -1:
            raise UserError(
                f"parallelism.{name} is {degree}; write a number of 1 or more, or -1 for all GPUs"
            )
    if mode == "none" and num_gpus > 1:
        raise LayoutError(
            f"mode none uses one device, gpus names {num_gpus}; write gpus=[0] or another parallelism"
        )
    for name, degree in degrees.items():
        if degree != 1 and name not in AXES_OF_MODE[mode]:
            raise LayoutError(
                f"{mode} has no {name}, parallelism.{name} is {degree}; leave it out, or write parallelism=hybrid "
                f"with all degrees"
            )
    layout = Layout(**_fill_in(degrees, num_gpus))
    if layout.num_devices != num_gpus:
        raise LayoutError(
            f"the layout needs {_factors(layout)} = {layout.num_devices} GPUs, the run has {num_gpus}; write gpus with "
            f"{layout.num_devices} of them, or other degrees (parallelism=hybrid combines all)"
        )
    if layout.num_ranks % layout.shard:
        raise LayoutError(
            f"parallelism.shard is {layout.shard}, which does not divide the {layout.num_ranks} ranks of "
            f"{_factors(layout)}; write a divisor, or -1 for all ranks"
        )
    if layout == Layout() and mode != "none" and mode not in REPLICA_MODES and mode != "block_distribution":
        raise LayoutError(f"{mode} on one GPU splits nothing; write two GPUs or more, or parallelism=none")
    if mode == "block_distribution" and layout.blocks == 1 < layout.num_ranks:
        raise LayoutError(
            f"block_distribution with blocks 1 spreads no blocks over the {num_gpus} GPUs; write "
            "parallelism.blocks=-1, or parallelism=data_parallel"
        )
    if mode == "fsdp" and layout.shard == 1:
        raise LayoutError(
            f"fsdp with shard 1 shards nothing over the {layout.dp} ranks; write parallelism.shard=-1 for all of them, "
            "or parallelism=data_parallel"
        )
    if layout.cfg > 2:
        raise LayoutError(f"parallelism.cfg is {layout.cfg}: guidance has two forwards a step; write cfg=2")
    for first, second, reason in REFUSED_PRODUCTS:
        if getattr(layout, first) > 1 and getattr(layout, second) > 1:
            raise LayoutError(
                f"{first}={getattr(layout, first)} with {second}={getattr(layout, second)} is refused: {reason}"
            )
    return layout


def _fill_in(degrees: dict[str, int], num_gpus: int) -> dict[str, int]:
    """The degrees with -1 replaced by what the others leave; `shard` by the number of ranks.

    Raises LayoutError for two of them, or where the others do not divide the GPUs.
    """
    free = [name for name, degree in degrees.items() if degree == -1 and name != "shard"]
    if len(free) > 1:
        raise LayoutError(f"parallelism.{free[0]} and {free[1]} are both -1; write a number for one of them")
    filled = dict(degrees)
    if free:
        others = prod(degree for name, degree in degrees.items() if name not in (*free, "shard"))
        if num_gpus % others:
            written = " x ".join(
                f"{name} {degree}"
                for name, degree in degrees.items()
                if degree > 1 and name not in (*free, "shard")
            )
            product = f" = {others}" if " x " in written else ""
            raise LayoutError(
                f"{num_gpus} GPUs cannot be divided by {written}{product}, which parallelism.{free[0]}=-1 asks for; "
                f"write a multiple of {others} GPUs"
            )
        filled[free[0]] = num_gpus // others
    if filled["shard"] == -1:
        filled["shard"] = prod(filled[axis] for axis in RANK_AXES)
    return filled


def _factors(layout: Layout) -> str:
    """Every factor of the number of GPUs, those of 1 too where they are all there is to say."""
    named = [name for name in (*RANK_AXES, "blocks") if getattr(layout, name) > 1]
    return " x ".join(f"{name} {getattr(layout, name)}" for name in named or ("dp", "blocks"))


def split_evenly(total: int, parts: int) -> list[int]:
    """`total` in `parts` shares that differ by at most one, larger shares first."""
    base, extra = divmod(total, parts)
    return [base + (index < extra) for index in range(parts)]


def split_by_weight(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in shares in proportion to `weights`, at least one each (largest remainder method)."""
    if total < len(weights):
        raise ValueError(f"{total} cannot be split in {len(weights)} shares of at least one")
    spare = total - len(weights)
    scale = sum(weights)
    ideal = [spare * weight / scale for weight in weights]
    shares = [int(share) for share in ideal]
    by_remainder = sorted(range(len(weights)), key=lambda i: (shares[i] - ideal[i], i))
    for index in by_remainder[: spare - sum(shares)]:
        shares[index] += 1
    return [share + 1 for share in shares]


def place_blocks(
    num_blocks: int,
    num_devices: int,
    *,
    placement: str,
    split: Sequence[int] | None = None,
    free_bytes: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """For each transformer block the position (0..num_devices-1) of the device that holds it.

    `split` gives the number of blocks of each device and overrides `placement`: `contiguous` (sizes differ by at
    most one), `memory` (contiguous, sizes in proportion to `free_bytes`), `interleaved` (dealt round-robin).
    Raises LayoutError for more devices than blocks and for a split that does not add up, UserError for an unknown
    placement.
    """
    if placement not in PLACEMENTS:
        raise UserError(
            f"parallelism.block_placement '{placement}' does not exist; write one of {', '.join(PLACEMENTS)}"
        )
    if num_devices > num_blocks:
        raise LayoutError(
            f"{num_devices} GPUs for {num_blocks} transformer blocks; write at most {num_blocks} GPUs"
        )
    if split is not None:
        if len(split) != num_devices or sum(split) != num_blocks or min(split) < 1:
            raise LayoutError(
                f"parallelism.block_split is {list(split)}; write {num_devices} numbers of 1 or more that add up "
                f"to {num_blocks} blocks"
            )
        sizes = list(split)
    elif placement == "interleaved":
        return tuple(index % num_devices for index in range(num_blocks))
    elif placement == "memory" and free_bytes is not None:
        sizes = split_by_weight(num_blocks, free_bytes)
    else:
        sizes = split_evenly(num_blocks, num_devices)
    return tuple(position for position, size in enumerate(sizes) for _ in range(size))
