"""Memory peaks of the devices of one rank.

On GPUs torch's allocator counts. Logical CPU devices share one address space: there, what a device holds is counted
by ownership (weights, gradients, optimiser state, in bytes), and what the process holds by its peak RSS.
"""

import resource
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanexp.hardware.devices import Device
from wanexp.wan.weights import local_tensor

GIB = 1024**3


def reset_peaks(devices: Sequence[torch.device]) -> None:
    """Forget the peaks so far, and give cached blocks back so that `reserved` starts from what is in use."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def read_peaks(
    devices: Sequence[Device],
    torch_devices: Sequence[torch.device],
    owned_bytes: Sequence[int],
    *,
    peer_bytes: int = 0,
) -> dict[str, dict[str, float]]:
    """Peaks in GiB by device label.

    owned_bytes: what each device owns, used for logical CPU devices only. peer_bytes: on each device, in use throughout
    and unknown to torch's allocator.
    """
    if devices[0].type == "cpu":
        return {
            device.label: {"peak_allocated_gib": owned_bytes[i] / GIB} for i, device in enumerate(devices)
        }
    return {
        device.label: {
            "peak_allocated_gib": (torch.cuda.max_memory_allocated(torch_device) + peer_bytes) / GIB,
            "peak_reserved_gib": (torch.cuda.max_memory_reserved(torch_device) + peer_bytes) / GIB,
        }
        for device, torch_device in zip(devices, torch_devices, strict=True)
    }


def peak_rss_gib() -> float:
    """Largest resident set of this process so far (mapped checkpoint pages included)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def anonymous_rss_bytes() -> int:
    """Host memory of this process that no file backs; 0 where /proc does not tell."""
    try:
        with Path("/proc/self/status").open() as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 0


def owned_bytes_by_position(
    models: Iterable[nn.Module],
    position_of: Callable[[str], int],
    num_positions: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    is_swapped: Callable[[str], bool] = lambda _: False,
) -> list[int]:
    """Bytes of weights, gradients and optimiser state at each position; names as in the bare transformer.

    Weights that `is_swapped` live on the host and count nowhere.
    """
    owned = [0] * num_positions
    for model in models:
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if is_swapped(name):
                continue
            tensors: list[Any] = [parameter, parameter.grad]
            if optimizer is not None:
                tensors += optimizer.state.get(parameter, {}).values()
            owned[position_of(name)] += sum(
                local_tensor(tensor).nbytes for tensor in tensors if isinstance(tensor, Tensor)
            )
    return owned
