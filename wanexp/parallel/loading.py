"""Loading under every layout: each byte of a checkpoint is read once on each node, whatever the number of ranks.

    file -- part a --> rank 0 --.                      file -- shard 0 --> rank 0
         -- part b --> rank 1 --+-- broadcast --> all       -- shard 1 --> rank 1
         (copied tensors: by turns, one rank each)           (cut tensors: straight to where they belong)

`plan_loading` says, of each tensor, what part each rank holds, which ranks of its node hold the same, and which of
them reads it. `SharedWeights` is a source of weights that follows this plan, and `Loader` puts both to use.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.checkpoint import Announced
from wanexp.wan.part import Part
from wanexp.wan.transformer import WanTransformer
from wanexp.wan.weights import LoadReport, WeightSource, load_weights

PartOfRank = Callable[[int, str, tuple[int, ...]], Part]
"""(rank, name, whole shape) -> what the rank holds of the tensor, such as `tensor_part` or `shard_part` say."""

# Broadcasts not yet waited for. More would let fast ranks run far ahead of a slow one, into NCCL's time-out.
_WINDOW_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Holding:
    """What a rank holds of one tensor: the part, the ranks of its node that hold the same, the one that reads it."""

    part: Part
    ranks: tuple[int, ...]
    reader: int


def plan_loading(
    shapes: Mapping[str, tuple[int, ...]], part_of: PartOfRank, nodes: Sequence[Sequence[int]]
) -> dict[int, dict[str, Holding]]:
    """For every rank of every node, what it holds of each tensor. Tensors a rank holds nothing of have no entry.

    Of the ranks that hold the same, the one with the fewest elements to read so far reads. Pure, so all ranks agree.
    """
    plan: dict[int, dict[str, Holding]] = {rank: {} for node in nodes for rank in node}
    for node in nodes:
        to_read = dict.fromkeys(sorted(node), 0)
        for name, shape in shapes.items():
            holders: dict[Part, list[int]] = {}
            for rank in to_read:
                part = part_of(rank, name, shape)
                if not part.is_empty:
                    holders.setdefault(part, []).append(rank)
            for part, ranks in holders.items():
                reader = min(ranks, key=lambda rank: to_read[rank])
                to_read[reader] += prod(part.shape_in(shape))
                for rank in ranks:
                    plan[rank][name] = Holding(part, tuple(ranks), reader)
    return plan


def sharing_groups(plan: Mapping[int, Mapping[str, Holding]]) -> list[tuple[int, ...]]:
    """The sets of ranks that have some tensor in common, in an order that all ranks agree on."""
    sets = {holding.ranks for holdings in plan.values() for holding in holdings.values()}
    return sorted(ranks for ranks in sets if len(ranks) > 1)


def open_groups(
    wanted: Iterable[tuple[int, ...]], known: Iterable[ProcessGroup] = ()
) -> dict[tuple[int, ...], ProcessGroup]:
    """A process group for each set of ranks: the world's, one of `known`, or a new one. Called by all ranks.

    known: groups that this rank is in; every NCCL communicator more costs time and GPU memory.
    """
    wanted = list(wanted)
    if not wanted:
        return {}
    groups = {tuple(dist.get_process_group_ranks(group)): group for group in known}
    if dist.group.WORLD is not None:
        groups[tuple(range(dist.get_world_size()))] = dist.group.WORLD
    # new_group needs every rank of the world, so all must agree on which sets have a group already.
    known_by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(known_by_rank, list(groups))
    for ranks in wanted:
        if not all(ranks in known_by_rank[rank] for rank in ranks):
            groups[ranks] = dist.new_group(ranks)
    return groups


class SharedWeights:
    """A source of which this rank reads its share and gets from the other ranks of the node what they read for it.

    All ranks must read their tensors in the same order, and call `finish` before they use what they read, but for what
    is `needed_at_once`: the names of tensors that loading goes on to quantise or to copy.
    """

    def __init__(
        self,
        source: WeightSource,
        holdings: Mapping[str, Holding],
        groups: Mapping[tuple[int, ...], ProcessGroup],
        *,
        rank: int,
        home: torch.device,
        needed_at_once: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.source = source
        self.needed_at_once = needed_at_once
        self.holdings = holdings
        self.groups = groups
        self.rank = rank
        self.home = home
        self.bytes_received = 0
        self._shapes = dict(source.architecture.tensor_shapes())
        self._under_way: list[Work] = []
        self._bytes_under_way = 0

    @property
    def architecture(self) -> WanArchitecture:
        return self.source.architecture

    def describe(self) -> dict[str, Any]:
        return self.source.describe()

    def part_of(self, name: str, shape: tuple[int, ...]) -> Part:
        """What this rank holds of a tensor."""
        return self.holdings[name].part if name in self.holdings else Part(0, 0, 0)

    @contextmanager
    def reading_ahead(self, wanted: Iterable[Announced]) -> Iterator["SharedWeights"]:
        """This source, with what this rank reads of `wanted` on its way."""
        whole = self.source
        with whole.reading_ahead([own for one in wanted for own in self._own(one)]) as self.source:
            try:
                yield self
            finally:
                self.source = whole

    def _own(self, wanted: Announced) -> list[Announced]:
        """What this rank reads from the source for one tensor: all that it holds alone, its share of the others."""
        name, device, part = wanted
        holding = self.holdings.get(name)
        if holding is None or len(holding.ranks) == 1:
            return [(name, device, part)]
        return [(name, self.home, part)] if holding.reader == self.rank else []

    def fp8_scale(self, name: str) -> float | None:
        return self.source.fp8_scale(name)

    def stored_bytes(self, name: str, part: Part | None = None) -> int:
        """Bytes that this rank reads from files for it."""
        holding = self.holdings.get(name)
        return self.source.stored_bytes(name, part) if holding and holding.reader == self.rank else 0

    def read(
        self, name: str, *, device: torch.device | str, dtype: torch.dtype, part: Part | None = None
    ) -> Tensor:
        holding = self.holdings.get(name)
        if holding is None or len(holding.ranks) == 1:
            return self.source.read(name, device=device, dtype=dtype, part=part)
        assert part == holding.part, (name, part, holding)
        # Between the ranks it travels from home device to home device, the ones that the groups are made for.
        if holding.reader == self.rank:
            tensor = self.source.read(name, device=self.home, dtype=dtype, part=part)
        else:
            tensor = torch.empty(part.shape_in(self._shapes[name]), dtype=dtype, device=self.home)
            self.bytes_received += tensor.nbytes
        payload = tensor.view(-1).view(torch.uint8)  # gloo knows no 8-bit floats
        work = dist.broadcast(payload, holding.reader, self.groups[holding.ranks], async_op=True)
        self._under_way.append(work)
        self._bytes_under_way += tensor.nbytes
        if torch.device(device) != self.home:
            self._wait()
            return tensor.to(device)
        if self.needed_at_once(name):
            self._wait()  # on GPUs the stream waits, not the host
        if self._bytes_under_way > _WINDOW_BYTES:
            self.finish()
        return tensor

    def finish(self) -> None:
        """Returns when all that was read has arrived."""
        self._wait()
        if self.home.type == "cuda":
            torch.cuda.synchronize(self.home)  # a CUDA Work makes its stream wait, not the host

    def _wait(self) -> None:
        for work in self._under_way:
            work.wait()
        self._under_way, self._bytes_under_way = [], 0


class Loader:
    """Fills the models of one rank together with the other ranks. Made and used by all ranks at the same time.

    Args:
        architecture: of the models, with as many blocks as are loaded.
        part_of: what any rank of the run holds of a tensor.
        nodes: all ranks of the run, those that read the same disk and page cache together.
        rank: this one.
        home: the device of this rank's process groups.
        known_groups: process groups to use again where they have the ranks that share something.
    """

    def __init__(
        self,
        architecture: WanArchitecture,
        *,
        part_of: PartOfRank,
        nodes: Sequence[Sequence[int]],
        rank: int,
        home: torch.device,
        known_groups: Iterable[ProcessGroup] = (),
    ) -> None:
        plan = plan_loading(dict(architecture.tensor_shapes()), part_of, nodes)
        self.holdings = plan[rank]
        self.rank = rank
        self.home = home
        self.groups = open_groups(sharing_groups(plan), known_groups)

    def load(
        self,
        model: WanTransformer,
        source: WeightSource,
        *,
        device_of: Callable[[str], torch.device | str],
        dtype: torch.dtype | None = None,
        requires_grad: bool = False,
        on_tensor: Callable[[str, int], None] | None = None,
        into: Callable[[str], Tensor | None] | None = None,
    ) -> LoadReport:
        """As `load_weights`, of a model that has been cut to what `part_of` says."""
        begin = time.perf_counter()
        own_readers = {
            f"{path}.weight" for path, module in model.named_modules() if hasattr(module, "read_weight")
        }
        shared = SharedWeights(
            source,
            self.holdings,
            self.groups,
            rank=self.rank,
            home=self.home,
            needed_at_once=lambda name: name in own_readers or (into is not None and into(name) is not None),
        )
        report = load_weights(
            model,
            shared,
            device_of=device_of,
            dtype=dtype,
            requires_grad=requires_grad,
            on_tensor=on_tensor,
            part_of=shared.part_of,
            into=into,
        )
        shared.finish()
        return replace(report, seconds=time.perf_counter() - begin, bytes_received=shared.bytes_received)
