"""The split of the video tokens over the ranks of a sequence, and what context parallelism sent.

Ranks of a sequence are numbered ring outer, Ulysses inner: rank_in_sequence = ring_rank * ulysses + ulysses_rank. Each
holds a run of tokens in their order; the shares differ by at most one token, so nothing is padded or masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from wanexp.errors import LayoutError
from wanexp.parallel.layout import split_evenly


@dataclass
class Traffic:
    """Bytes that this rank sent to other ranks for context parallelism since `reset`."""

    num_bytes: int = 0

    def reset(self) -> None:
        self.num_bytes = 0


def degree_of(group: ProcessGroup | None) -> int:
    """The number of ranks in a group; None stands for this rank alone."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: ProcessGroup | None) -> int:
    """The rank of this process in a group; None stands for this rank alone."""
    return 0 if group is None else dist.get_rank(group)


@lru_cache(maxsize=16)
def token_shares(num_tokens: int, *, ulysses: int, ring: int) -> tuple[tuple[int, ...], ...]:
    """How many tokens each rank holds, as [ring rank][ulysses rank].

    Raises LayoutError for fewer tokens than ranks.
    """
    if num_tokens < ulysses * ring:
        raise LayoutError(
            f"context_parallel splits {num_tokens} video tokens over ulysses {ulysses} x ring {ring} = "
            f"{ulysses * ring} ranks, which leaves some without; write smaller degrees or a larger video"
        )
    shares = split_evenly(num_tokens, ulysses * ring)
    return tuple(tuple(shares[first : first + ulysses]) for first in range(0, len(shares), ulysses))


def gather_tokens(part: Tensor, shares: Sequence[int], *, group: ProcessGroup, traffic: Traffic) -> Tensor:
    """The tokens of all ranks of `group` in their order: [batch, own share, features] -> [batch, all, features].

    Gathers of uneven sizes are not portable between backends: shorter shares travel with rows that are then cut off.
    """
    longest = max(shares)
    padded = F.pad(part, (0, 0, 0, longest - part.shape[1])).contiguous()
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded, group=group)
    traffic.num_bytes += padded.nbytes * (len(shares) - 1)
    return torch.cat([part[:, :share] for part, share in zip(parts, shares, strict=True)], dim=1)
