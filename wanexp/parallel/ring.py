"""Ring attention (arXiv 2310.01889): every rank keeps its queries; keys and values go round.

    step 0:  rank r attends to block r      while  r -> r+1 carries block r
    step 1:  rank r attends to block r-1    while  r -> r+1 carries block r-1
    ...      after as many steps as ranks, each query has met all keys

Softmax over all keys from softmax over parts of them, exactly: with the log-sum-exp of its scores each part knows its
weight in the whole. Merged in fp32.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from wanexp.parallel.traffic import Traffic
from wanexp.wan.attention import AttentionWithLse


def attend_around_ring(
    attend: AttentionWithLse,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: ProcessGroup,
    tokens: Sequence[int],
    traffic: Traffic,
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks of `group`, which hold `tokens` of them each.

    q, k, v: [batch, own tokens, heads, head_dim]. Returns the shape and dtype of q.
    """
    ranks, rank = len(tokens), dist.get_rank(group)
    block = [k.contiguous(), v.contiguous()]  # what travels; the views of a Ulysses buffer do not as they are
    merged: tuple[Tensor, Tensor] | None = None
    for step in range(ranks):
        arriving, transfers = [], []
        if step < ranks - 1:
            size = tokens[(rank - step - 1) % ranks]
            arriving = [x.new_empty(x.shape[0], size, *x.shape[2:]) for x in block]
            # Before the attention is launched, so that the transfer has a place on the GPU beside it.
            transfers = _pass_on(block, arriving, group)
            traffic.num_bytes += sum(x.nbytes for x in block)
        attended = attend(q, *block)
        merged = attended if merged is None else merge(*merged, *attended)
        for transfer in transfers:
            transfer.wait()
        block = arriving  # the one sent lived until here
    assert merged is not None
    return merged[0].to(q.dtype)


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two disjoint sets of keys -> attention to their union.

    out, block_out: [batch, tokens, heads, head_dim], each normalised over its own keys. lse, block_lse: fp32
    [batch, heads, tokens], the log of the sum over these keys of exp(score). Returns both for the union, in fp32.
    """
    difference = (block_lse - lse).transpose(1, 2).unsqueeze(-1)
    # The fp32 weights promote outputs of 16 bits.
    merged = (out * torch.sigmoid(-difference)).addcmul_(block_out, torch.sigmoid(difference))
    return merged, torch.logaddexp(lse, block_lse)


def _pass_on(block: list[Tensor], arriving: list[Tensor], group: ProcessGroup) -> list[dist.Work]:
    """Start to send `block` to the next rank of the ring and to receive `arriving` from the one before.

    One batch, so that NCCL may take sends and receives in any order: no rank waits for another to turn round.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    to, source = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
    sends = [dist.P2POp(dist.isend, x, to, group, tag=tag) for tag, x in enumerate(block)]
    receives = [dist.P2POp(dist.irecv, x, source, group, tag=tag) for tag, x in enumerate(arriving)]
    return dist.batch_isend_irecv(sends + receives)
