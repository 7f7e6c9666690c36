"""Buffers on a device in which blocks take turns: a block is copied there ahead of its use, and computes from there.

    copying:      block 2 into a    block 3 into b    block 4 into a    on a stream of its own
    computing:    block 1 in b      block 2 in a      block 3 in b      a buffer is given on when its block has computed

Where the copies come from others say: the host (`block_swap.py`), or the shards of several ranks
(`parallel/peer_shards.py`).
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanexp.offload.swap_plan import choose_victim, next_uses

ALIGNMENT = (
    256  # bytes, of each tensor in a flat buffer, as CUDA's allocator aligns: kernels stay the same ones
)
_HISTORY = 4  # passes that the order of blocks is remembered for: two, of two micro-batches each
_MAX_STALLS = 4096  # waits that are added up later, when they are over


@dataclass(frozen=True)
class Piece:
    """A tensor of a block (its name there) and its place in the block's flat buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


def pieces_of(block: nn.Module) -> tuple[tuple[Piece, ...], int]:
    """The places of all parameters and buffers of `block` in one flat buffer, and its size in bytes."""
    return lay_out(
        (name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
    )


def lay_out(tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> tuple[tuple[Piece, ...], int]:
    """The places of tensors (name, shape, dtype) one after the other in a flat buffer, and its size in bytes."""
    pieces, offset = [], 0
    for name, shape, dtype in tensors:
        pieces.append(Piece(name, shape, dtype, offset))
        offset += -(-pieces[-1].num_bytes // ALIGNMENT) * ALIGNMENT
    return tuple(pieces), offset


class Slot:
    """A buffer on a device, the block it holds or is being filled with, and the events around its use."""

    def __init__(self, num_bytes: int, pieces: Sequence[Piece], device: torch.device) -> None:
        self.flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.views = [piece.view(self.flat) for piece in pieces]
        self.block: int | None = None
        self.in_use = False
        self.loaded: torch.cuda.Event | None = None
        self.released: torch.cuda.Event | None = None


class Ring:
    """The buffers of one device and what is copied into them when. Counts since `reset`.

    num_bytes, num_copies: of blocks copied. num_late: blocks that were needed before anybody had thought of copying
    them, in a first pass or after another order of blocks.

    Args:
        blocks: that take turns, by their indices.
        copy: begins to copy a block into a slot, on the current stream.
        pieces: the places of a block's tensors in a buffer of `num_bytes`.
        num_buffers: at most; never more than blocks.
    """

    def __init__(
        self,
        device: torch.device,
        blocks: Sequence[int],
        copy: Callable[[int, Slot], None],
        pieces: Sequence[Piece],
        num_bytes: int,
        num_buffers: int,
    ) -> None:
        self.device = device
        self.copy = copy
        self.slots = [Slot(num_bytes, pieces, device) for _ in range(min(num_buffers, len(blocks)))]
        # As if all blocks had just run in order: a good guess for the first pass.
        self.history = deque(sorted(blocks), maxlen=_HISTORY * len(blocks))
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream:
            for slot in self.slots:
                slot.flat.record_stream(
                    self.stream
                )  # its memory goes back only when the copies into it have ended
                slot.released = torch.cuda.current_stream(device).record_event()  # who had it before is done
        self.reset()

    def reset(self) -> None:
        self.num_bytes = self.num_copies = self.num_late = 0
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._stalled_s = 0.0  # in the waits before those

    def enter(self, block: int) -> Slot:
        """The slot that holds `block` for what the computing stream does from now on."""
        slot = next((slot for slot in self.slots if slot.block == block), None)
        if slot is None:
            self.num_late += 1
            slot = self._fill(block, next_uses(list(self.history)))
        self.history.append(block)
        slot.in_use = True
        if slot.loaded is not None:
            computing = torch.cuda.current_stream(self.device)
            before = computing.record_event(torch.cuda.Event(enable_timing=True))
            computing.wait_event(slot.loaded)
            self._stalls.append((before, computing.record_event(torch.cuda.Event(enable_timing=True))))
            if len(self._stalls) > _MAX_STALLS:
                self._add_up(self._stalls.popleft())
        return slot

    def leave(self, slot: Slot) -> None:
        """`slot` has been computed with; fill it, and others, with what comes next."""
        slot.in_use = False
        if self.stream:
            slot.released = torch.cuda.current_stream(self.device).record_event()
        expected = next_uses(list(self.history))[: len(self.slots)]
        held = {slot.block for slot in self.slots}
        for block in expected:
            if block not in held:
                self._fill(block, expected)

    def stall_s(self) -> float:
        """Seconds that the computing stream has waited for copies since `reset`. Waits for the device."""
        while self._stalls:
            self._add_up(self._stalls.popleft())
        return self._stalled_s

    def _add_up(self, stall: tuple[torch.cuda.Event, torch.cuda.Event]) -> None:
        before, after = stall
        after.synchronize()
        self._stalled_s += before.elapsed_time(after) / 1000

    def _fill(self, block: int, expected: Sequence[int]) -> Slot:
        """Copy `block` into the slot that is missed least, behind whatever still computes with it."""
        free = [slot for slot in self.slots if not slot.in_use]
        slot = free[choose_victim([slot.block for slot in free], expected)]
        if self.stream:
            if slot.released is not None:
                self.stream.wait_event(slot.released)
            with torch.cuda.stream(self.stream):
                self.copy(block, slot)
            slot.loaded = self.stream.record_event()
        else:
            self.copy(block, slot)
        slot.block = block
        self.num_bytes += slot.flat.numel()
        self.num_copies += 1
        return slot


def take_turns(
    block: nn.Module, index: int, ring: Ring, pieces: Sequence[Piece], homes: Sequence[Tensor]
) -> list[Any]:
    """Have `block`, number `index`, compute from the slot of `ring` that holds it; returns the handles of its hooks.

    homes: of each piece, what its tensor is outside of the block's forward.
    """
    # Modules and leaves, not the tensors: loading puts other parameters in their place.
    places = [place_of(block, piece.name) for piece in pieces]

    def point_to(views: Sequence[Tensor]) -> None:
        for (module, leaf), view in zip(places, views, strict=True):
            getattr(module, leaf).data = view

    def enter(slots: list[Slot], _module: nn.Module, _args: Any) -> None:
        slots.append(ring.enter(index))
        point_to(slots[-1].views)

    def leave(slots: list[Slot], _module: nn.Module, _args: Any, _output: Any) -> None:
        if slots:  # empty when a hook before ours has raised
            point_to(homes)
            ring.leave(slots.pop())

    slots: list[Slot] = []
    return [
        block.register_forward_pre_hook(partial(enter, slots)),
        block.register_forward_hook(partial(leave, slots), always_call=True),
    ]


def place_of(block: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module within `block` that has the tensor `name`, and its attribute there."""
    owner, _, leaf = name.rpartition(".")
    return block.get_submodule(owner), leaf
