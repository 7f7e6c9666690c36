"""Ulysses (arXiv 2309.14509): for the time of the attention, split by heads in place of tokens.

    v, k, q: my tokens, all heads  --an all-to-all each-->  all tokens, my heads
                                                                  | attention
    o:       my tokens, all heads  <--one all-to-all------  all tokens, my heads

"All" is all of the Ulysses group. v travels while k is being computed and k while q is, so that one waits for q and o
only. Head shares may differ by one, so any number of heads will do down to one a rank. In the send buffer the tokens of
a chunk come first, [tokens, batch, heads, head_dim]: chunks of uneven length then join up to views that kernels take as
they are. One copy packs each, one puts o together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from wanexp.parallel.shares import head_shares
from wanexp.parallel.traffic import Traffic
from wanexp.wan.attention import AttentionFunction


class Exchange:
    """The all-to-alls of one model's self-attentions over `group`.

    tokens: how many each rank holds, of the forward that is under way.
    """

    def __init__(self, group: ProcessGroup, tokens: Callable[[], Sequence[int]], traffic: Traffic) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.tokens = tokens
        self.traffic = traffic

    def send(self, x: Tensor) -> "Sent":
        """Start to give each rank its heads of `x` [batch, own tokens, heads, head_dim], and take mine of all."""
        batch, own_tokens, num_heads, head_dim = x.shape
        tokens = self.tokens()
        heads = head_shares(num_heads, len(tokens))
        row, own_heads = batch * head_dim, heads[self.rank]  # elements of one head of one token
        sent = self._all_to_all(
            pack_heads(x, heads),
            [row * share * own_heads for share in tokens],
            [row * own_tokens * share for share in heads],
        )
        sent.shape = (-1, batch, own_heads, head_dim)
        return sent

    def attend(self, attend: AttentionFunction, q: Tensor, k: "Sent", v: "Sent") -> Tensor:
        """Self-attention of all tokens; `q` and the result are [batch, own tokens, heads, head_dim].

        `attend` gets [batch, all tokens, own heads, head_dim].
        """
        batch, own_tokens, num_heads, head_dim = q.shape
        tokens = self.tokens()
        heads = head_shares(num_heads, len(tokens))
        sent = self.send(q)
        out = attend(sent.wait(), k.wait(), v.wait())
        # Kernels lay their result out as q, tokens first: here nothing is copied.
        packed = out.transpose(0, 1).contiguous().flatten()
        row = batch * head_dim
        sent = self._all_to_all(
            packed,
            [row * own_tokens * share for share in heads],
            [row * share * heads[self.rank] for share in tokens],
        )
        return join_heads(sent.wait(), batch, heads, head_dim)

    def _all_to_all(self, packed: Tensor, received_sizes: list[int], packed_sizes: list[int]) -> "Sent":
        received = packed.new_empty(sum(received_sizes))
        work = dist.all_to_all_single(
            received, packed, received_sizes, packed_sizes, group=self.group, async_op=True
        )
        self.traffic.num_bytes += packed.nbytes - packed_sizes[self.rank] * packed.element_size()
        return Sent(received, packed, work)


@dataclass
class Sent:
    """An exchange under way. It holds what is being sent, which must not be given away before it has left."""

    received: Tensor
    packed: Tensor | None
    work: dist.Work
    shape: tuple[int, ...] = (-1,)  # [all tokens, batch, own heads, head_dim]

    def wait(self) -> Tensor:
        """What arrived: flat, or as a view [batch, all tokens, own heads, head_dim]."""
        self.work.wait()
        self.packed = None
        return self.received if len(self.shape) == 1 else self.received.view(self.shape).transpose(0, 1)


def pack_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """One chunk for each rank, one after the other: [tokens, batch, its heads, head_dim], flat.

    x: [batch, tokens, sum(heads), head_dim].
    """
    words = _words(x)
    batch, tokens, _, width = words.shape
    packed = words.new_empty(words.numel())
    start = 0
    for first, ranks, share in _runs(heads):
        chunks = packed.narrow(0, start, ranks * tokens * batch * share * width)
        part = words.narrow(2, first, ranks * share).unflatten(2, (ranks, share))
        chunks.view(ranks, tokens, batch, share, width).copy_(part.permute(2, 1, 0, 3, 4))
        start += chunks.numel()
    return packed.view(x.dtype)


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
