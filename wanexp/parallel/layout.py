"""The layout: degrees of parallelism, and which rank and device holds what. Pure; no torch.

    ranks            = dp
    devices per rank = blocks

A mode is a preset of these degrees (`conf/parallelism/<mode>.yaml`); a degree of -1 stands for all GPUs of the run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from wanexp.config import MODES, PLACEMENTS, ParallelismConfig
from wanexp.errors import LayoutError, UserError

REPLICA_MODES = ("data_parallel", "distributed")


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. Every rank is one process; it owns `blocks` devices."""

    dp: int = 1
    blocks: int = 1

    @property
    def num_ranks(self) -> int:
        return self.dp

    @property
    def num_devices(self) -> int:
        return self.num_ranks * self.blocks

    def degrees(self) -> dict[str, int]:
        return asdict(self)

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
    degrees = {}
    for name in ("dp", "blocks"):
        degree = getattr(parallelism, name)
        if degree < 1 and degree != -1:
            raise UserError(
                f"parallelism.{name} is {degree}; write a number of 1 or more, or -1 for all GPUs"
            )
        degrees[name] = num_gpus if degree == -1 else degree
    layout = Layout(**degrees)
    if mode == "none" and num_gpus > 1:
        raise LayoutError(
            f"mode none uses one device, gpus names {num_gpus}; write gpus=[0] or another parallelism"
        )
    if mode == "block_distribution" and layout.dp > 1:
        raise LayoutError(
            "block_distribution spreads one replica (dp=1); for replicas write parallelism=data_parallel"
        )
    if mode in REPLICA_MODES and layout.blocks > 1:
        raise LayoutError(
            f"{mode} holds whole replicas (blocks=1); to split one write parallelism=block_distribution"
        )
    if layout.num_devices != num_gpus:
        raise LayoutError(
            f"the layout needs dp {layout.dp} x blocks {layout.blocks} = {layout.num_devices} GPUs, "
            f"gpus names {num_gpus}"
        )
    return layout


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
