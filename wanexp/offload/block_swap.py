r"""Block swap: the weights of some blocks live on the host and come to their device in time for each use.

    host:            block 1      block 3      block 5      block 7         pinned, only ever read
                        \            \            \            \            one copy a block, on a stream of its own
    device buffers:   [ a ]        [ b ]        [ a ]        [ b ]          given on when the block has computed
    computing:      0   1      2     3      4     5      6     7      0 ..  blocks 0, 2, 4, 6 are resident

Buys memory; where a block's copy (14B: 12 ms) takes less than the computing between two uses of a buffer it costs no
time. The answer is the same bits: the same weights, on the same device. For inference.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanexp.offload.host_memory import host_buffer
from wanexp.offload.swap_plan import choose_victim, next_uses
from wanexp.wan.transformer import WanTransformer

ALIGNMENT = (
    256  # bytes, of each tensor in a flat buffer, as CUDA's allocator aligns: kernels stay the same ones
)
_HISTORY = 4  # passes that the order of blocks is remembered for: two, of two micro-batches each
_MAX_STALLS = 4096  # waits of which the times are kept until they are read


@dataclass(frozen=True)
class Piece:
    """A tensor of a block (its name there) and its place in the block's flat buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        num_bytes = torch.Size(self.shape).numel() * self.dtype.itemsize
        return flat[self.offset : self.offset + num_bytes].view(self.dtype).view(self.shape)


def pieces_of(block: nn.Module) -> tuple[tuple[Piece, ...], int]:
    """The places of all parameters and buffers of `block` in one flat buffer, and its size in bytes."""
    pieces, offset = [], 0
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        pieces.append(Piece(name, tuple(tensor.shape), tensor.dtype, offset))
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
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

    num_bytes, num_copies: from the host. num_late: blocks that were needed before anybody had thought of copying them,
    in a first pass or after another order of blocks.
    """

    def __init__(
        self, device: torch.device, homes: dict[int, Tensor], pieces: Sequence[Piece], num_buffers: int
    ) -> None:
        self.device = device
        self.homes = homes
        num_bytes = next(iter(homes.values())).numel()
        self.slots = [Slot(num_bytes, pieces, device) for _ in range(min(num_buffers, len(homes)))]
        # As if all blocks had just run in order: a good guess for the first pass.
        self.history = deque(sorted(homes), maxlen=_HISTORY * len(homes))
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
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=_MAX_STALLS)

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
        if self._stalls:
            torch.cuda.synchronize(self.device)
        return sum(before.elapsed_time(after) for before, after in self._stalls) / 1000

    def _fill(self, block: int, expected: Sequence[int]) -> Slot:
        """Copy `block` into the slot that is missed least, behind whatever still computes with it."""
        free = [slot for slot in self.slots if not slot.in_use]
        slot = free[choose_victim([slot.block for slot in free], expected)]
        home = self.homes[block]
        if self.stream:
            if slot.released is not None:
                self.stream.wait_event(slot.released)
            with torch.cuda.stream(self.stream):
                slot.flat.copy_(home, non_blocking=True)
            slot.loaded = self.stream.record_event()
        else:
            slot.flat.copy_(home)
        slot.block = block
        self.num_bytes += home.numel()
        self.num_copies += 1
        return slot


class BlockSwap:
    """The swapped blocks of a model: their homes on the host, a ring of buffers on each device, counters.

    Made by `swap_blocks`. Outside of its forward a swapped block's parameters are its home on the host.
    """

    def __init__(
        self,
        model: WanTransformer,
        block_indices: Iterable[int],
        device_of_block: Callable[[int], torch.device],
        buffers: int,
    ) -> None:
        self.blocks = tuple(sorted(set(block_indices)))
        self._homes: dict[int, Tensor] = {}
        self._home_views: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        of_device: dict[torch.device, list[int]] = defaultdict(list)
        for index in self.blocks:
            of_device[device_of_block(index)].append(index)
        self.rings: dict[torch.device, Ring] = {}
        # A buffer that is made in inference mode could not be a parameter's data outside of it.
        with torch.inference_mode(False), torch.no_grad():
            for device, indices in of_device.items():
                self._add_ring(model, device, indices, buffers)

    def _add_ring(
        self, model: WanTransformer, device: torch.device, indices: Sequence[int], buffers: int
    ) -> None:
        layouts = [pieces_of(model.blocks[index]) for index in indices]
        pieces, num_bytes = layouts[0]
        assert all(layout == layouts[0] for layout in layouts), "blocks of one model are alike"
        for index in indices:
            self._homes[index] = host_buffer(num_bytes, pin_for=device)
            views = [piece.view(self._homes[index]) for piece in pieces]
            for piece, view in zip(pieces, views, strict=True):
                tensor = _tensor(model.blocks[index], piece.name)
                assert not tensor.requires_grad, "swapped blocks are for inference"
                self._home_views[f"blocks.{index}.{piece.name}"] = view
                if not tensor.is_meta:
                    assert not tensor.is_inference(), (
                        "weights made in inference mode cannot be pointed elsewhere"
                    )
                    view.copy_(tensor)
                    tensor.data = view
        ring = Ring(device, {index: self._homes[index] for index in indices}, pieces, buffers)
        self.rings[device] = ring
        for index in indices:
            self._hook(model.blocks[index], index, ring, pieces)

    def _hook(self, block: nn.Module, index: int, ring: Ring, pieces: Sequence[Piece]) -> None:
        prefix = f"blocks.{index}."
        homes = [self._home_views[prefix + piece.name] for piece in pieces]
        # Modules and leaves, not the tensors: loading puts other parameters in their place.
        places = [_place(block, piece.name) for piece in pieces]

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
        self._hooks += [
            block.register_forward_pre_hook(partial(enter, slots)),
            block.register_forward_hook(partial(leave, slots), always_call=True),
        ]

    def into(self, name: str) -> Tensor | None:
        """Where loading puts the tensor `name` of the model if it is of a swapped block; None for all others."""
        return self._home_views.get(name)

    def reset(self) -> None:
        """Start to count anew."""
        for ring in self.rings.values():
            ring.reset()

    @property
    def num_bytes(self) -> int:
        """Bytes copied from the host since `reset`."""
        return sum(ring.num_bytes for ring in self.rings.values())

    @property
    def num_copies(self) -> int:
        return sum(ring.num_copies for ring in self.rings.values())

    @property
    def num_late(self) -> int:
        """Blocks since `reset` that were not even on their way when they were needed."""
        return sum(ring.num_late for ring in self.rings.values())

    def stall_s(self) -> float:
        """Seconds since `reset` (of the last few thousand uses) that devices waited for copies, added up."""
        return sum(ring.stall_s() for ring in self.rings.values())

    @property
    def host_bytes(self) -> int:
        """Host memory of the homes."""
        return sum(home.numel() for home in self._homes.values())

    def buffer_bytes(self, device: torch.device) -> int:
        """Memory of the buffers on `device`."""
        return sum(slot.flat.numel() for slot in self.rings[device].slots) if device in self.rings else 0

    def close(self) -> None:
        """Waits for all copies and takes the hooks off; the parameters stay what they are, on the host."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for device in self.rings:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self.rings.clear()


def swap_blocks(
    model: WanTransformer,
    block_indices: Iterable[int],
    *,
    device_of_block: Callable[[int], torch.device],
    buffers: int = 2,
) -> BlockSwap:
    """Give the blocks `block_indices` of `model` homes on the host and buffers in which they take turns.

    For a model on meta, before `load_weights`, which is given `into`: swapped weights go home tensor by tensor and are
    never on a device as a whole. Comes after what cuts or replaces the block's parameters (tensor parallel,
    quantisation). A model that has its weights is swapped too.

    Args:
        device_of_block: where each block computes.
        buffers: on each device, for as many blocks; with one, nothing is copied while a swapped block computes.
    """
    assert buffers >= 1
    return BlockSwap(model, block_indices, device_of_block, buffers)


def _place(block: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return block.get_submodule(owner), leaf


def _tensor(block: nn.Module, name: str) -> Tensor:
    module, leaf = _place(block, name)
    return getattr(module, leaf)
