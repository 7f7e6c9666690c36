"""Host memory that GPUs copy from at the full speed of their link: whole pages, pinned where they lie.

Not torch's own pinned memory, whose allocator rounds each buffer up to a power of two: 1 GiB for the 670 MiB of a 14B
block, 13 GiB wasted for 36 of them.
"""

import mmap

import torch
from torch import Tensor

from wanexp.errors import UserError

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process


class _Pages(mmap.mmap):
    """Anonymous pages. Lives as long as any tensor on it, and unpins itself before the pages go back."""

    pinned_address: int | None = None

    def __del__(self) -> None:
        if self.pinned_address is not None:
            torch.cuda.cudart().cudaHostUnregister(self.pinned_address)


def host_buffer(num_bytes: int, *, pin_for: torch.device | None) -> Tensor:
    """uint8 [num_bytes] on whole pages of its own, given back with the last tensor on it; contents are zero.

    pin_for: a GPU of this process, for all of which the pages are pinned; None or a CPU leaves them pageable. Whoever
    lets go of a pinned buffer waits first for the copies from it. Raises UserError if the host has not the memory.
    """
    try:
        # Private: Python's default is a shared mapping, which counts as a file in memory and gets no huge pages.
        pages = _Pages(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise _refused(num_bytes, "allocated", str(error)) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to touch and pin: 2 MiB instead of 4 KiB each
    buffer = torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]
    if pin_for is not None and pin_for.type == "cuda":
        with torch.cuda.device(pin_for):  # else a context would be made on another GPU
            code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), num_bytes, _PORTABLE)
        if int(code):
            raise _refused(num_bytes, "pinned", f"CUDA error {int(code)}")
        pages.pinned_address = buffer.data_ptr()
    return buffer


def _refused(num_bytes: int, done: str, reason: str) -> UserError:
    return UserError(
        f"{num_bytes / 2**30:.2f} GiB of host memory cannot be {done} ({reason}); write a smaller offload.blocks"
    )
