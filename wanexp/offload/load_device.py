"""The guide's `load_device`: straight to its owners, or to the host first and to its owners when the run begins."""

from collections.abc import Callable

import torch
from torch import nn


def loading_device(load_device: str, owner: torch.device) -> torch.device:
    """Where a tensor that `owner` will hold is loaded to."""
    return owner if load_device == "main_device" else torch.device("cpu")


def move_to_owners(
    model: nn.Module,
    device_of: Callable[[str], torch.device],
    *,
    stays: Callable[[str], bool] = lambda _: False,
) -> int:
    """Move every parameter and buffer to the device that owns it; returns the bytes moved.

    Tensor by tensor, so that the host lets go of each before the next. `stays(name)` keeps one where it is: a swapped
    block's home is the host.
    """
    num_bytes = 0
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            device = device_of(prefix + leaf)
            if tensor.device == device or stays(prefix + leaf):
                continue
            moved = tensor.detach().to(device)
            if isinstance(tensor, nn.Parameter):
                moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
            setattr(module, leaf, moved)
            num_bytes += tensor.nbytes
    return num_bytes
