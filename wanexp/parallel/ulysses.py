"""Ulysses (arXiv 2309.14509): for the time of the attention, split by heads in place of tokens.

    v, k, q: my tokens, all heads  --an all-to-all each-->  all tokens, my heads
                                                                  | attention
    o:       my tokens, all heads  <--one all-to-all------  all tokens, my heads

"All" is all of the Ulysses group. v travels while k is being computed and k while q is, so that one waits for q and o
only. Head shares may differ by one, so any number of heads will do down to one a rank. In the send buffer the tokens of
a chunk come first, [tokens, batch, heads, head_dim]: chunks of uneven length then join up to views that kernels take as
they are.

What carries an all-to-all is the process group or, between GPUs that reach each other's memory, copy engines. With
these each of v, k, q and o has a place in the memory of every rank, and is written there without asking: who has got
the q of all ranks knows that all have read their o, and who has got the o of all that all have read their v, k and q.

Copy engines leave the multiprocessors free, and the attention of a row of q needs no other row. So rows are attended
apart, and nobody waits for q and o either:

    own rows, first half | rows of the others  | own rows, second half
    q is on its way      | q has arrived       | o of the others' rows is on its way

Such an o is sent before the last rows are attended: that v, k and q have been read a flag behind these tells. Where
that costs more than it hides (`shares.rows_apart_pay`) all rows go together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from wanexp.parallel.peer_memory import ALIGNMENT, PLACES, PeerMemory, nothing
from wanexp.parallel.shares import head_shares, rows_apart_pay
from wanexp.parallel.traffic import Traffic
from wanexp.wan.attention import AttentionFunction

# Of the PLACES in a rank's memory, which are those of v, k, q and o.
VALUES, OUTPUT = 0, 3
READ = PLACES  # the channel after those of the places: a rank has read its v, k and q
TILE_ROWS = 128  # of q that attention kernels take at a time


@dataclass(frozen=True)
class Sizes:
    """Elements of one all-to-all. packed, received: of the chunk for, and from, each rank.

    starts: where this rank's chunk begins in what each rank receives. largest: the most that a rank receives in any of
    the all-to-alls of an attention, the same number on all ranks.
    """

    packed: tuple[int, ...]
    received: tuple[int, ...]
    starts: tuple[int, ...]
    largest: int


@lru_cache(maxsize=64)
def sizes_of(
    rank: int, row: int, mine: tuple[int, ...], theirs: tuple[int, ...], *, own_first: bool = False
) -> Sizes:
    """From its share of `mine` (tokens, or heads back again) and all of `theirs` to all of `mine`, its own of `theirs`.

    row: elements of one head of one token. own_first: as of `Exchange.send`.
    """
    own, given, size = mine[rank], theirs[rank], len(mine)
    around = [*mine, *mine]
    # At each rank, the shares between the first that it receives and this rank's.
    before = [
        sum(around[other : other + (rank - other) % size] if own_first else mine[:rank])
        for other in range(size)
    ]
    return Sizes(
        packed=tuple(row * own * share for share in theirs),
        received=tuple(row * share * given for share in mine),
        starts=tuple(row * first * share for first, share in zip(before, theirs, strict=True)),
        largest=row * max(sum(mine) * max(theirs), max(mine) * sum(theirs)),
    )


@dataclass
class Parcel:
    """What goes out: a flat chunk for each rank. flat: all of them in their order, where a collective wants them so."""

    chunks: list[Tensor]
    flat: Tensor | None = None


class Carrier(Protocol):
    """What carries the all-to-alls of a group. place: which of the four of an attention it is."""

    def parcel(self, like: Tensor, sizes: Sizes, place: int) -> Parcel:
        """An empty one to pack into, in the dtype and on the device of `like`."""
        ...

    def start(self, parcel: Parcel, sizes: Sizes, place: int) -> "Sent":
        """Begin to send each rank its chunk."""
        ...


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
        self.memory = memory
        self.carrier: Carrier = Collectives(group) if memory is None else Copies(memory)
        self._places = cycle(range(OUTPUT))

    def send(self, x: Tensor, *, own_first: bool = False) -> "Sent":
        """Start to give each rank its heads of `x` [batch, own tokens, heads, head_dim], and take mine of all.

        Three times an attention: v, k and, by `attend`, q. own_first: what a rank receives begins with its own tokens
        and goes on with those of the ranks after it, around the group; by copy engines only.
        """
        batch, _, num_heads, head_dim = x.shape
        tokens, place = tuple(self.tokens()), next(self._places)
        heads = head_shares(num_heads, len(tokens))
        sizes = sizes_of(self.rank, batch * head_dim, tokens, heads, own_first=own_first)
        parcel = self.carrier.parcel(x, sizes, place)
        pack_heads(x, heads, parcel.chunks)
        sent = self._start(parcel, sizes, place)
        sent.shape = (-1, batch, heads[self.rank], head_dim)
        return sent

    def attend(
        self,
        attend: AttentionFunction,
        q: Tensor,
        k: "Sent",
        v: "Sent",
        *,
        rows: int | None = None,
        apart: bool = False,
    ) -> Tensor:
        """Self-attention of all tokens; `q` and the result are [batch, own tokens, heads, head_dim].

        `attend` gets [batch, all tokens, own heads, head_dim]. rows: tokens that the result is to have, zeros behind
        the own ones; None for these alone. apart: some rows of q at a time, where copy engines carry and it pays.
        """
        batch, own_tokens, num_heads, head_dim = q.shape
        tokens = tuple(self.tokens())
        heads = head_shares(num_heads, len(tokens))
        sizes = sizes_of(self.rank, batch * head_dim, heads, tokens)
        if apart and rows_apart_pay(batch, tokens, heads):
            own, back = self._attend_apart(attend, self.send(q, own_first=True), k, v, own_tokens, sizes)
        else:
            packed = _flat(attend(self.send(q).wait(), k.wait(), v.wait()))
            chunks = list(packed.split(sizes.packed))
            own, back = [chunks[self.rank]], self._start(Parcel(chunks, packed), sizes, OUTPUT)
        runs = [[chunk] for chunk in back.wait().split(sizes.received)]
        runs[self.rank] = own
        return join_heads(runs, (batch, own_tokens, head_dim), heads, rows or own_tokens)

    def _attend_apart(
        self, attend: AttentionFunction, q: "Sent", k: "Sent", v: "Sent", own_tokens: int, sizes: Sizes
    ) -> tuple[list[Tensor], "Sent"]:
        """The result of this rank's rows, flat, and that of the others' on its way. sizes: of o."""
        memory = self.memory
        assert memory is not None
        rows, keys, values = q.view, k.wait(), v.wait()
        middle = own_tokens // 2 // TILE_ROWS * TILE_ROWS
        before = memory.now()
        # Ahead of `q.wait`, after which the stream of these also waits for what q was sent from.
        own = [_flat(attend(rows[:, :middle], keys, values))] if middle else []
        with memory.beside(before):
            q.wait()
            results = _flat(attend(rows[:, own_tokens:], keys, values))
            chunks = [results.new_empty(0)] * len(sizes.packed)
            parts = results.split([sizes.packed[rank] for rank in memory.others])
            for rank, part in zip(memory.others, parts, strict=True):
                chunks[rank] = part
            back = self._start(Parcel(chunks), sizes, OUTPUT)
        own.append(_flat(attend(rows[:, middle:own_tokens], keys, values)))
        # Copies leave in their order: behind this flag the rows beside have been attended, too.
        memory.until_read = memory.exchange({}, channel=READ)
        return own, back

    def _start(self, parcel: Parcel, sizes: Sizes, place: int) -> "Sent":
        element = parcel.chunks[0].element_size()
        self.traffic.num_bytes += (sum(sizes.packed) - sizes.packed[self.rank]) * element
        return self.carrier.start(parcel, sizes, place)


class Collectives:
    """all_to_all of the process group."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def parcel(self, like: Tensor, sizes: Sizes, _place: int) -> Parcel:
        flat = like.new_empty(sum(sizes.packed))
        return Parcel(list(flat.split(sizes.packed)), flat)

    def start(self, parcel: Parcel, sizes: Sizes, _place: int) -> "Sent":
        assert parcel.flat is not None
        received = parcel.flat.new_empty(sum(sizes.received))
        work = dist.all_to_all_single(
            received, parcel.flat, sizes.received, sizes.packed, group=self.group, async_op=True
        )
        return Sent(received, sizes, parcel, work.wait)


class Copies:
    """Each chunk copied to its place in the memory of the rank that it is for; this rank's own is packed there."""

    def __init__(self, memory: PeerMemory) -> None:
        self.memory = memory

    def parcel(self, like: Tensor, sizes: Sizes, place: int) -> Parcel:
        begin, rank = self._begin(like, sizes, place), self.memory.rank
        others = [0 if index == rank else size for index, size in enumerate(sizes.packed)]
        chunks = list(like.new_empty(sum(others)).split(others))
        start = begin + sizes.starts[rank] * like.element_size()
        chunks[rank] = self.memory.place(rank, start, sizes.packed[rank], like.dtype)
        return Parcel(chunks)

    def start(self, parcel: Parcel, sizes: Sizes, place: int) -> "Sent":
        memory, like = self.memory, parcel.chunks[0]
        if place == VALUES:
            memory.until_read()
            memory.until_read = nothing
        begin, element = self._begin(like, sizes, place), like.element_size()
        parts = {rank: (begin + sizes.starts[rank] * element, parcel.chunks[rank]) for rank in memory.others}
        arrive = memory.exchange(parts, channel=place)
        received = memory.place(memory.rank, begin, sum(sizes.received), like.dtype)
        return Sent(received, sizes, parcel, arrive)

    def _begin(self, like: Tensor, sizes: Sizes, place: int) -> int:
        """The byte where `place` begins, on every rank."""
        reserve_places(self.memory, sizes.largest * like.element_size())
        # A share of the whole, not a multiple of what is needed: those of a smaller forward stay where they were.
        return place * (self.memory.num_bytes // PLACES)


def reserve_places(memory: PeerMemory, num_bytes: int) -> None:
    """Have places for v, k, q and o in it, of `num_bytes` each at least. By all ranks of its group."""
    memory.reserve(PLACES * (-(-num_bytes // ALIGNMENT) * ALIGNMENT))


@dataclass
class Sent:
    """An exchange under way. It holds what is being sent, which must not be given away before it has left."""

    received: Tensor
    sizes: Sizes
    parcel: Parcel | None
    arrive: Callable[[], object]
    shape: tuple[int, ...] = (-1,)  # [all tokens, batch, own heads, head_dim]

    @property
    def view(self) -> Tensor:
        """[batch, all tokens, own heads, head_dim], or flat where it has no shape. Own tokens are there at once."""
        return self.received if len(self.shape) == 1 else self.received.view(self.shape).transpose(0, 1)

    def wait(self) -> Tensor:
        """`view`, all of which is there for what the current stream is given from now on."""
        self.arrive()
        self.parcel = None
        return self.view


def pack_heads(x: Tensor, heads: Sequence[int], chunks: Sequence[Tensor]) -> None:
    """To the chunk of each rank, flat, its heads of `x` [batch, tokens, sum(heads), head_dim], tokens first."""
    words = _words(x)
    batch, tokens, _, width = words.shape
    for part, share, chunk in zip(words.split(list(heads), dim=2), heads, chunks, strict=True):
        chunk.view(words.dtype).view(tokens, batch, share, width).copy_(part.transpose(0, 1))


def join_heads(
    runs: Sequence[Sequence[Tensor]], shape: tuple[int, int, int], heads: Sequence[int], rows: int
) -> Tensor:
    """[batch, rows, sum(heads), head_dim] of flat runs of tokens, of each rank [tokens, batch, its heads, head_dim].

    shape: (batch, tokens, head_dim). Beyond `tokens` the rows are zeros.
    """
    batch, tokens, head_dim = shape
    joined = runs[0][0].new_empty(batch, rows, sum(heads), head_dim)
    joined[:, tokens:].zero_()
    words = _words(joined)
    for part, share, of_rank in zip(words[:, :tokens].split(list(heads), dim=2), heads, runs, strict=True):
        chunks = [run.view(words.dtype).view(-1, batch, share, words.shape[-1]) for run in of_rank]
        for rows_of, chunk in zip(part.split([len(chunk) for chunk in chunks], dim=1), chunks, strict=True):
            rows_of.copy_(chunk.transpose(0, 1))
    return joined


def _flat(attended: Tensor) -> Tensor:
    """[batch, tokens, heads, head_dim], tokens first. Kernels lay their result out as q: nothing is copied."""
    return attended.transpose(0, 1).contiguous().flatten()


def _words(x: Tensor) -> Tensor:
    """The same memory with a last axis of 8-byte words, if it divides: copies move elements, and 2 bytes are few."""
    x = x.contiguous()
    return x.view(torch.int64) if x.shape[-1] * x.element_size() % 8 == 0 else x
