"""Data parallel: whole replicas, one process a GPU, that live as long as the run.

    rank 0:  batch --scatter--> samples 0..a   -> replica 0 --gather--> outputs 0..n, in order
    rank 1:             `-----> samples a+1..b -> replica 1 --'

Buys throughput, not latency. Rank 0 holds the batch; every rank gets its own samples and nothing else, computes
them, and rank 0 gathers the outputs in order. Shares may differ by one sample.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def scatter_batch(batch: Tensor | None, shares: Sequence[int], *, rank: int, like: Tensor) -> Tensor:
    """Send each rank its samples.

    batch: [sum(shares), ...] on rank 0, None elsewhere. like: a tensor that has the shape of one sample, the dtype
    and the device of the result. Returns [shares[rank], ...].
    """
    if len(shares) == 1:
        assert batch is not None
        return batch
    if rank == 0:
        assert batch is not None and len(batch) == sum(shares)
        parts = [part.contiguous() for part in batch.split(list(shares))]
        _wait([dist.P2POp(dist.isend, part, peer) for peer, part in enumerate(parts) if peer and len(part)])
        return parts[0]
    part = torch.empty((shares[rank], *like.shape), dtype=like.dtype, device=like.device)
    if len(part):
        _wait([dist.P2POp(dist.irecv, part, 0)])
    return part


def gather_batch(
    part: Tensor, shares: Sequence[int], *, rank: int, ranks: Sequence[int] | None = None
) -> Tensor | None:
    """The inverse of `scatter_batch`: [sum(shares), ...] in the order of the batch on the first rank, None elsewhere.

    ranks: who has the shares, in their order; None: ranks 0, 1, ... A rank that is not among them has nothing to give.
    """
    ranks = range(len(shares)) if ranks is None else ranks
    if len(shares) == 1:
        return part if rank == ranks[0] else None
    if rank not in ranks:
        return None
    if rank != ranks[0]:
        if len(part):
            _wait([dist.P2POp(dist.isend, part.contiguous(), ranks[0])])
        return None
    batch = part.new_empty((sum(shares), *part.shape[1:]))
    parts = batch.split(list(shares))
    parts[0].copy_(part)
    _wait(
        [
            dist.P2POp(dist.irecv, target, peer)
            for peer, target in list(zip(ranks, parts, strict=True))[1:]
            if len(target)
        ]
    )
    return batch


def _wait(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
