"""The video tokens of a sequence, split over ranks and put together again.

Ranks of a sequence are numbered ring outer, Ulysses inner: rank_in_sequence = ring_rank * ulysses + ulysses_rank. Each
holds a run of tokens in their order; the shares differ by at most one token, so nothing is masked.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from wanexp.parallel.traffic import Traffic


def degree_of(group: ProcessGroup | None) -> int:
    """The number of ranks in a group; None stands for this rank alone."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: ProcessGroup | None) -> int:
    """The rank of this process in a group; None stands for this rank alone."""
    return 0 if group is None else dist.get_rank(group)


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
