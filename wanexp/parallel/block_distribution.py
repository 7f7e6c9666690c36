"""Block distribution: the transformer blocks of one replica spread over the devices of one process.

    embeddings + blocks 0..k   ->   blocks k+1..m   ->   ...   ->   blocks n.. + head   ->   prediction
           device 0                    device 1                        device N-1             back to device 0

Buys memory. The weights go straight to the device that owns them (`device_of`), and pre-hooks move a block's inputs
where its owner differs from that of the block before: the hidden states at the seams, and what is the same for all
blocks (modulation, context, RoPE tables) once a device. The model's code stays unaware, and the answer is bit-equal
to one device's, because the kernels and their inputs are the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary


def position_of(name: str, block_owner: Sequence[int]) -> int:
    """The position of the device that holds tensor `name`: embeddings with the first block, the head with the last."""
    if name.startswith("blocks."):
        return block_owner[int(name.split(".")[1])]
    return block_owner[-1] if name.startswith("head.") else block_owner[0]


@dataclass
class Seams:
    """Counts what crossed between devices, in bytes and copies, since `reset`."""

    num_bytes: int = 0
    num_copies: int = 0
    _constants: dict[int, WeakTensorKeyDictionary] = field(default_factory=dict)

    def reset(self) -> None:
        self.num_bytes = self.num_copies = 0

    def move(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A copy of `tensor` on `device`. Logical CPU devices copy too, so that they behave as GPUs do."""
        self.num_bytes += tensor.nbytes
        self.num_copies += 1
        return tensor.clone() if tensor.device == device else tensor.to(device, non_blocking=True)

    def move_constant(self, tensor: Tensor, position: int, device: torch.device) -> Tensor:
        """As `move`, but one copy serves all blocks of the position for as long as `tensor` lives."""
        copies = self._constants.setdefault(position, WeakTensorKeyDictionary())
        if tensor not in copies:
            copies[tensor] = self.move(tensor, device)
        return copies[tensor]


def distribute_blocks(model: nn.Module, *, block_owner: Sequence[int], devices: Sequence[torch.device]) -> Seams:
    """Hook `model` (blocks in `model.blocks`, head in `model.head`) so that it runs over `devices`.

    block_owner: position in `devices` of each block, as `parallel.layout.place_blocks` gives it. The weights must
    be, or be loaded, where `position_of` says.
    """
    seams = Seams()
    home = block_owner[0]

    def enter(position: int, crosses: bool) -> Callable[..., Any]:
        device = devices[position]

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            hidden_states, *constants = args
            if crosses or hidden_states.device != device:  # the latter when fewer blocks run (`first_blocks`)
                hidden_states = seams.move(hidden_states, device)
            if position != home:
                constants, kwargs = tree_map_only(
                    Tensor, lambda tensor: seams.move_constant(tensor, position, device), (constants, kwargs)
                )
            return (hidden_states, *constants), kwargs

        return hook

    def leave(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return seams.move(output, devices[home]) if previous != home else output

    previous = home
    for block, position in zip(model.blocks, block_owner, strict=True):  # type: ignore[arg-type]
        if position != home or position != previous:
            block.register_forward_pre_hook(enter(position, crosses=position != previous), with_kwargs=True)
        previous = position
    model.head.register_forward_pre_hook(enter(previous, crosses=False), with_kwargs=True)  # type: ignore[union-attr]
    model.head.register_forward_hook(leave)  # type: ignore[union-attr]
    return seams
