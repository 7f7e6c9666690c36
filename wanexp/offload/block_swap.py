r"""Block swap: the weights of some blocks live on the host and come to their device in time for each use.

    host:            block 1      block 3      block 5      block 7         pinned, only ever read
                        \            \            \            \            one copy a block, on a stream of its own
    device buffers:   [ a ]        [ b ]        [ a ]        [ b ]          given on when the block has computed
    computing:      0   1      2     3      4     5      6     7      0 ..  blocks 0, 2, 4, 6 are resident

Buys memory; where a block's copy (14B: 12 ms) takes less than the computing between two uses of a buffer it costs no
time. The answer is the same bits: the same weights, on the same device. For inference.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wanexp.offload.block_buffers import Ring, Slot, pieces_of, place_of, take_turns
from wanexp.offload.host_memory import host_buffer
from wanexp.wan.transformer import WanTransformer


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
        homes: dict[int, list[Tensor]] = {}
        for index in indices:
            self._homes[index] = host_buffer(num_bytes, pin_for=device)
            homes[index] = views = [piece.view(self._homes[index]) for piece in pieces]
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
        ring = self.rings[device] = Ring(device, indices, self._copy, pieces, num_bytes, buffers)
        for index in indices:
            self._hooks += take_turns(model.blocks[index], index, ring, pieces, homes[index])

    def _copy(self, index: int, slot: Slot) -> None:
        slot.flat.copy_(self._homes[index], non_blocking=True)

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
        """Seconds since `reset` that devices waited for copies, added up."""
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


def _tensor(block: nn.Module, name: str) -> Tensor:
    module, leaf = place_of(block, name)
    return getattr(module, leaf)
