"""Ulysses (arXiv 2309.14509): for the time of the attention, split by heads in place of tokens.

    v, k, q: my tokens, all heads  --an all-to-all each-->  all tokens, my heads
                                                                  | attention
    o:       my tokens, all heads  <--one all-to-all------  all tokens, my heads

"All" is all of the Ulysses group. v travels while k is being computed and k while q is, so that one waits for q and o
only. Head shares may differ by one, so any number of heads will do down to one a rank. In the send buffer the tokens of
a chunk come first, [tokens, batch, heads, head_dim]: chunks of uneven length then join up to views that kernels take as
they are. One copy packs each, one puts o together.

What carries an all-to-all is the process group or, between GPUs that reach each other's memory, copy engines. With
these each of v, k, q and o has a place in the memory of every rank, and is written there without asking: who has got
the o of all ranks knows that all have read their v, k and q, and who has got the q of all that all have read their o.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from wanexp.parallel.peer_memory import ALIGNMENT, PeerMemory
from wanexp.parallel.shares import head_shares
from wanexp.parallel.traffic import Traffic
from wanexp.wan.attention import AttentionFunction

PLACES = 4  # v, k, q and o, which take turns in this order


class Carrier(Protocol):
    """What carries the all-to-alls of a group."""

    def start(self, packed: Tensor, sizes: "Sizes") -> "Sent":
        """Begin to send each rank its chunk of `packed`, flat."""
        ...


@dataclass(frozen=True)
class Sizes:
    """Elements of one all-to-all. packed, received: of the chunk for, and from, each rank.

    starts: where this rank's chunk begins in what each rank receives. largest: the most that a rank receives in any of
    the all-to-alls of an attention, the same number on all ranks.
    """

    packed: list[int]
    received: list[int]
    starts: list[int]
    largest: int


class Exchange:
    """The all-to-alls of one model's self-attentions over `group`.

    tokens: how many each rank holds, of the forward that is under way. memory: to have copy engines carry them.
    """

    def __init__(
        self,
        group: ProcessGroup,
        tokens: Callable[[], Sequence[int]],
        traffic: Traffic,
        memory: PeerMemory | None = None,
    ) -> None:
        self.rank = dist.get_rank(group)
        self.tokens = tokens
        self.traffic = traffic
        self.carrier: Carrier = Collectives(group) if memory is None else Copies(memory)

    def send(self, x: Tensor) -> "Sent":
        """Start to give each rank its heads of `x` [batch, own tokens, heads, head_dim], and take mine of all."""
        batch, _, num_heads, head_dim = x.shape
        tokens = self.tokens()
        heads = head_shares(num_heads, len(tokens))
        sent = self._start(pack_heads(x, heads), batch * head_dim, tokens, heads)
        sent.shape = (-1, batch, heads[self.rank], head_dim)
        return sent

    def attend(self, attend: AttentionFunction, q: Tensor, k: "Sent", v: "Sent") -> Tensor:
        """Self-attention of all tokens; `q` and the result are [batch, own tokens, heads, head_dim].

        `attend` gets [batch, all tokens, own heads, head_dim].
        """
        batch, _, num_heads, head_dim = q.shape
        tokens = self.tokens()
        heads = head_shares(num_heads, len(tokens))
        sent = self.send(q)
        out = attend(sent.wait(), k.wait(), v.wait())
        # Kernels lay their result out as q, tokens first: here nothing is copied.
        packed = out.transpose(0, 1).contiguous().flatten()
        sent = self._start(packed, batch * head_dim, heads, tokens)
        return join_heads(sent.wait(), batch, heads, head_dim)

    def _start(self, packed: Tensor, row: int, mine: Sequence[int], theirs: Sequence[int]) -> "Sent":
        """From my share of `mine` (tokens, or heads back again) and all of `theirs` to all of `mine`, mine of `theirs`.

        row: elements of one head of one token.
        """
        before, own, given = sum(mine[: self.rank]), mine[self.rank], theirs[self.rank]
        sizes = Sizes(
            packed=[row * own * share for share in theirs],
            received=[row * share * given for share in mine],
            starts=[row * before * share for share in theirs],
            largest=row * max(sum(mine) * max(theirs), max(mine) * sum(theirs)),
        )
        self.traffic.num_bytes += packed.nbytes - sizes.packed[self.rank] * packed.element_size()
        return self.carrier.start(packed, sizes)


class Collectives:
    """all_to_all of the process group."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def start(self, packed: Tensor, sizes: Sizes) -> "Sent":
        received = packed.new_empty(sum(sizes.received))
        work = dist.all_to_all_single(
            received, packed, sizes.received, sizes.packed, group=self.group, async_op=True
        )
        return Sent(received, packed, work.wait)


class Copies:
    """Each chunk copied to its place in the memory of the rank that it is for."""

    def __init__(self, memory: PeerMemory) -> None:
        self.memory = memory
        self._turns = cycle(range(PLACES))

    def start(self, packed: Tensor, sizes: Sizes) -> "Sent":
        memory, turn, element = self.memory, next(self._turns), packed.element_size()
        place = -(-sizes.largest * element // ALIGNMENT) * ALIGNMENT
        memory.reserve(PLACES * place)
        begin = turn * (
            memory.num_bytes // PLACES
        )  # not of `place`: those of a smaller forward stay where they were
        chunks = packed.split(sizes.packed)
        parts = {rank: (begin + sizes.starts[rank] * element, chunks[rank]) for rank in memory.others}
        arrive = memory.exchange(parts, channel=turn)
        received = memory.place(memory.rank, begin, sum(sizes.received), packed.dtype)
        own, start = chunks[memory.rank], sizes.starts[memory.rank]
        received[start : start + len(own)].copy_(own)  # beside the copies to the others
        return Sent(received, packed, arrive)


@dataclass
class Sent:
    """An exchange under way. It holds what is being sent, which must not be given away before it has left."""

    received: Tensor
    packed: Tensor | None
    arrive: Callable[[], object]
    shape: tuple[int, ...] = (-1,)  # [all tokens, batch, own heads, head_dim]

    def wait(self) -> Tensor:
        """What arrived: flat, or as a view [batch, all tokens, own heads, head_dim]."""
        self.arrive()
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
