"""Ulysses (arXiv 2309.14509): for the time of the attention, split by heads in place of tokens.

    q, k, v: my tokens, all heads  --one all-to-all-->  all tokens, my heads
                                                              | attention
    o:       my tokens, all heads  <--one all-to-all--  all tokens, my heads

"All" is all of the Ulysses group. Head shares may differ by one, so any number of heads will do down to one a rank. In
the send buffer the tokens of a chunk come first, [tokens, batch, 3, heads, head_dim]: chunks of uneven length then join
up to views of q, k and v that kernels take as they are. One copy to pack q, k and v, one to put o together.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from wanexp.parallel.shares import head_shares
from wanexp.parallel.traffic import Traffic
from wanexp.wan.attention import AttentionFunction


def attend_by_heads(
    attend: AttentionFunction,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: ProcessGroup,
    tokens: Sequence[int],
    traffic: Traffic,
) -> Tensor:
    """Self-attention of the tokens of all ranks of `group`, which hold `tokens` of them each.

    q, k, v: [batch, own tokens, heads, head_dim] of this rank's tokens. Returns the result in the same shape.
    `attend` gets [batch, sum(tokens), own heads, head_dim].
    """
    batch, own_tokens, num_heads, head_dim = q.shape
    rank = dist.get_rank(group)
    heads = head_shares(num_heads, len(tokens))
    row = batch * head_dim  # elements of one head of one token

    packed = pack_heads((q, k, v), heads)
    received = packed.new_empty(3 * row * sum(tokens) * heads[rank])
    _all_to_all(
        received,
        packed,
        [3 * row * share * heads[rank] for share in tokens],
        [3 * row * own_tokens * share for share in heads],
        group=group,
        traffic=traffic,
    )
    del packed  # before the attention, whose memory is the peak
    out = attend(*unpack_tokens(received, 3, batch, heads[rank], head_dim))

    # Kernels lay their result out as q, tokens first: here too nothing is copied.
    packed = out.transpose(0, 1).contiguous().flatten()
    received = packed.new_empty(row * own_tokens * num_heads)
    _all_to_all(
        received,
        packed,
        [row * own_tokens * share for share in heads],
        [row * share * heads[rank] for share in tokens],
        group=group,
        traffic=traffic,
    )
    return join_heads(received, batch, heads, head_dim)


def _all_to_all(
    received: Tensor,
    packed: Tensor,
    received_sizes: list[int],
    packed_sizes: list[int],
    *,
    group: ProcessGroup,
    traffic: Traffic,
) -> None:
    dist.all_to_all_single(received, packed, received_sizes, packed_sizes, group=group)
    traffic.num_bytes += packed.nbytes - packed_sizes[dist.get_rank(group)] * packed.element_size()


def pack_heads(tensors: Sequence[Tensor], heads: Sequence[int]) -> Tensor:
    """One chunk for each rank, one after the other: [tokens, batch, len(tensors), its heads, head_dim], flat.

    tensors: each [batch, tokens, sum(heads), head_dim].
    """
    words = [_words(tensor) for tensor in tensors]
    batch, tokens, _, width = words[0].shape
    packed = words[0].new_empty(sum(word.numel() for word in words))
    start = 0
    for first, ranks, share in _runs(heads):
        shape = (ranks, tokens, batch, len(words), share, width)
        chunks = packed.narrow(0, start, ranks * tokens * batch * len(words) * share * width).view(shape)
        for index, word in enumerate(words):
            part = word.narrow(2, first, ranks * share).unflatten(2, (ranks, share))
            chunks[:, :, :, index].copy_(part.permute(2, 1, 0, 3, 4))
        start += chunks.numel()
    return packed.view(tensors[0].dtype)


def unpack_tokens(received: Tensor, number: int, batch: int, heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """The `number` tensors [batch, all tokens, heads, head_dim] in the chunks of all ranks: views."""
    parts = received.view(-1, batch, number, heads, head_dim).unbind(2)
    return tuple(part.transpose(0, 1) for part in parts)


def join_heads(received: Tensor, batch: int, heads: Sequence[int], head_dim: int) -> Tensor:
    """[batch, tokens, sum(heads), head_dim] from one chunk [tokens, batch, its heads, head_dim] of each rank."""
    words = _words(received.view(-1, head_dim))
    width = words.shape[-1]
    tokens = len(words) // (batch * sum(heads))
    joined = words.new_empty(batch, tokens, sum(heads), width)
    start = 0
    for first, ranks, share in _runs(heads):
        chunks = words.narrow(0, start, ranks * tokens * batch * share)
        target = joined.narrow(2, first, ranks * share).unflatten(2, (ranks, share))
        target.copy_(chunks.view(ranks, tokens, batch, share, width).permute(2, 1, 0, 3, 4))
        start += len(chunks)
    return joined.view(received.dtype)


def _runs(heads: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first head, ranks, heads of each) for each run of equal shares: one copy serves all ranks of a run."""
    first = 0
    for share, equal in groupby(heads):
        ranks = len(list(equal))
        yield first, ranks, share
        first += ranks * share


def _words(x: Tensor) -> Tensor:
    """The same memory with a last axis of 8-byte words, if it divides: copies move elements, and 2 bytes are few."""
    x = x.contiguous()
    return x.view(torch.int64) if x.shape[-1] * x.element_size() % 8 == 0 else x
