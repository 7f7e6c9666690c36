"""FSDP for inference where GPUs reach each other's memory: a rank reads the shards of the others as it needs them.

    memory of rank 0:  shard 0 of all blocks --.
                                                +--> two buffers on each rank, a block each --> block 1, block 2, ..
    memory of rank 1:  shard 1 of all blocks --'     filled by its own copy engines, on a stream of its own

Weights that nobody changes need no meeting of the ranks: no gather that all must begin, no copying in and out of it. A
rank that is ahead of the others, or has fewer forwards than they, goes on. The answer is the same bits.

What is outside of the blocks (3 % of 14B) is whole on every rank. All ranks have loaded before the first one reads
(`complete`), and all have read before the first one ends (`worker.process_group`).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wanexp.offload.block_buffers import Ring, Slot, lay_out, pieces_of, place_of, take_turns
from wanexp.parallel.peer_memory import ALIGNMENT, PeerMemory
from wanexp.parallel.shares import SHARD_BUFFERS, shard_part
from wanexp.parallel.traffic import Traffic, fsdp_bytes
from wanexp.wan.transformer import WanTransformer


class PeerShards:
    """The shards of a model: where this rank's lie, what copies whole blocks together, and what counts the bytes.

    Made by `shard_over_peers`. Outside of its forward a block's parameters are the shards of this rank.
    """

    def __init__(self, model: WanTransformer, memory: PeerMemory) -> None:
        self.model = model
        self.memory = memory
        self.traffic = Traffic()
        self._homes: dict[str, Tensor] = {}
        # Memory that is made in inference mode could not be a parameter's data outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._shard_blocks()
            self._whole_shapes = self._shard_the_rest()

    def _shard_blocks(self) -> None:
        blocks, memory = self.model.blocks, self.memory
        layouts = [pieces_of(block) for block in blocks]
        pieces, num_bytes = layouts[0]
        assert all(layout == layouts[0] for layout in layouts), "blocks of one model are alike"
        # The first shard is the largest: the places of all ranks are its.
        places, shard_bytes = lay_out(
            (piece.name, self._shape(piece.shape, 0), piece.dtype) for piece in pieces
        )
        stride = -(-shard_bytes // ALIGNMENT) * ALIGNMENT
        memory.reserve(stride * len(blocks))
        self._rows = [
            [shard_part(piece.shape, degree=memory.size, index=rank) for piece in pieces]
            for rank in range(memory.size)
        ]
        self._sent = fsdp_bytes(
            sum(piece.num_bytes for piece in pieces), element_size=1, shards=memory.size, training=False
        )
        self._shards: list[list[list[Tensor]]] = []  # [block][rank][piece]
        for index in range(len(blocks)):
            flats = [
                memory.place(rank, index * stride, shard_bytes, torch.uint8) for rank in range(memory.size)
            ]
            self._shards.append(
                [
                    [
                        place.view(flat)[: part.stop - part.start]
                        for place, part in zip(places, parts, strict=True)
                    ]
                    for flat, parts in zip(flats, self._rows, strict=True)
                ]
            )
        self.ring = Ring(memory.device, range(len(blocks)), self._copy, pieces, num_bytes, SHARD_BUFFERS)
        for index, block in enumerate(blocks):
            own = self._shards[index][memory.rank]
            for piece, home in zip(pieces, own, strict=True):
                _cut(block, piece.name, tuple(home.shape))
                self._homes[f"blocks.{index}.{piece.name}"] = home
            take_turns(block, index, self.ring, pieces, own)

    def _shard_the_rest(self) -> dict[str, tuple[int, ...]]:
        """The whole shapes of what is outside of the blocks, by name."""
        whole = {
            name: tuple(parameter.shape)
            for name, parameter in self.model.named_parameters()
            if name not in self._homes
        }
        for name, shape in whole.items():
            _cut(self.model, name, self._shape(shape, self.memory.rank))
        return whole

    def _shape(self, whole: tuple[int, ...], rank: int) -> tuple[int, ...]:
        return shard_part(whole, degree=self.memory.size, index=rank).shape_in(whole)

    def _copy(self, index: int, slot: Slot) -> None:
        """Begin to put block `index` together, of the shards of all ranks."""
        for rank in (*self.memory.others, self.memory.rank):
            for whole, part, shard in zip(
                slot.views, self._rows[rank], self._shards[index][rank], strict=True
            ):
                if not part.is_empty:
                    whole[part.start : part.stop].copy_(shard, non_blocking=True)
        self.traffic.num_bytes += self._sent

    def into(self, name: str) -> Tensor | None:
        """Where loading puts this rank's shard of the tensor `name` if it is of a block; None for all others."""
        return self._homes.get(name)

    def complete(self) -> None:
        """After loading, by all ranks of the group: what is outside of the blocks becomes whole.

        Returns when all of them have their weights.
        """
        memory = self.memory
        with torch.inference_mode(False), torch.no_grad():
            for name, shape in self._whole_shapes.items():
                module, leaf = place_of(self.model, name)
                whole = _gather(getattr(module, leaf), shape, memory)
                setattr(module, leaf, nn.Parameter(whole, requires_grad=False))
        if memory.device.type == "cuda":
            torch.cuda.synchronize(memory.device)
        dist.barrier(memory.group)


def shard_over_peers(model: WanTransformer, memory: PeerMemory) -> PeerShards:
    """Shard `model`, on meta, over the ranks of `memory`, for inference.

    Comes before `load_weights`, which is given `into` and `shard_part`'s parts; `complete` comes after it.

    Args:
        memory: with nothing in it, and for this model alone: the shards lie there for good.
    """
    model.requires_grad_(False)
    return PeerShards(model, memory)


def _cut(module: nn.Module, name: str, shape: Sequence[int]) -> None:
    """Leave a parameter on meta, of `shape`, for loading to replace."""
    owner, leaf = place_of(module, name)
    parameter = getattr(owner, leaf)
    assert parameter.is_meta, "sharded before the weights are loaded"
    setattr(owner, leaf, nn.Parameter(parameter.new_empty(shape), requires_grad=False))


def _gather(shard: Tensor, shape: tuple[int, ...], memory: PeerMemory) -> Tensor:
    """A tensor of `shape` of its shards on all ranks, by the process group."""
    rows = -(-shape[0] // memory.size)
    padded = shard.new_zeros((rows, *shape[1:]))
    padded[: len(shard)] = shard
    whole = shard.new_empty((memory.size * rows, *shape[1:]))
    dist.all_gather_into_tensor(
        whole.view(-1).view(torch.uint8), padded.view(-1).view(torch.uint8), group=memory.group
    )
    # Only the last shards are shorter, so the padding is all at the end.
    return whole if len(whole) == shape[0] else whole[: shape[0]].clone()
