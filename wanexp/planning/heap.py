"""What a sequence of allocations costs: live bytes, and what torch's allocator reserves for them.

A `Heap` is written like the code it stands for: `new` where a tensor appears, `free` where its last reference goes.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

MIB = 1024**2
GRANULE = 512  # kMinBlockSize of torch's allocator: every size is rounded up to a multiple
SMALL_SIZE = MIB  # kSmallSize: up to here a block comes from the pool of small ones
PAGE = {True: 2 * MIB, False: 20 * MIB}  # by "is small": what expandable segments grow by


@dataclass
class Heap:
    """Records allocations in their order. Tensors are numbers; 0 is one that takes no memory (an alias)."""

    events: list[tuple[int, int]] = field(default_factory=list)  # (tensor, bytes); 0 bytes: it goes
    live: int = 0
    peak: int = 0
    _sizes: dict[int, int] = field(default_factory=dict)
    _numbers: count = field(default_factory=lambda: count(1))

    def new(self, num_bytes: int) -> int:
        """A tensor of `num_bytes` appears."""
        if not num_bytes:
            return 0
        tensor = next(self._numbers)
        self._sizes[tensor] = num_bytes
        self.events.append((tensor, num_bytes))
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        return tensor

    def free(self, *tensors: int) -> None:
        """The last reference to each of `tensors` goes."""
        for tensor in tensors:
            if tensor:
                self.live -= self._sizes.pop(tensor)
                self.events.append((tensor, 0))


class _Block:
    """A piece of a segment; `left` and `right` are its neighbours in it."""

    __slots__ = ("is_free", "left", "right", "size")

    def __init__(self, size: int, left: "_Block | None") -> None:
        self.size, self.left, self.is_free = size, left, False
        self.right: _Block | None = None


class _Segment:
    """One expandable segment: best fit among its free blocks, else it grows at its end by whole pages."""

    def __init__(self, *, small: bool) -> None:
        self.page, self.rest = PAGE[small], GRANULE if small else SMALL_SIZE + 1
        self.size = 0
        self._last: _Block | None = None
        self._free: list[tuple[int, int]] = []  # (size, key), sorted
        self._blocks: dict[int, _Block] = {}
        self._keys = count()

    def allocate(self, num_bytes: int) -> _Block:
        size = -(-num_bytes // GRANULE) * GRANULE
        index = bisect_left(self._free, (size, -1))
        block = self._blocks.pop(self._free.pop(index)[1]) if index < len(self._free) else self._grow(size)
        block.is_free = False
        if block.size - size >= self.rest:
            remainder = _Block(block.size - size, block)
            self._join(remainder, block.right)
            self._join(block, remainder)
            block.size = size
            self._keep(remainder)
        return block

    def release(self, block: _Block) -> None:
        left, right = block.left, block.right
        if right is not None and right.is_free:
            self._forget(right)
            block.size += right.size
            self._join(block, right.right)
        if left is not None and left.is_free:
            self._forget(left)
            left.size += block.size
            self._join(left, block.right)
            block = left
        self._keep(block)

    def _grow(self, size: int) -> _Block:
        block = self._last
        if block is not None and block.is_free:
            self._forget(block)
        else:
            block = _Block(0, block)
            if block.left:
                block.left.right = block
            self._last = block
        pages = -(-(size - block.size) // self.page) * self.page
        block.size += pages
        self.size += pages
        return block

    def _join(self, left: _Block, right: _Block | None) -> None:
        left.right = right
        if right is None:
            self._last = left
        else:
            right.left = left

    def _keep(self, block: _Block) -> None:
        block.is_free = True
        key = next(self._keys)
        self._blocks[key] = block
        insort(self._free, (block.size, key))

    def _forget(self, block: _Block) -> None:
        index = bisect_left(self._free, (block.size, -1))
        while self._blocks[self._free[index][1]] is not block:
            index += 1
        del self._blocks[self._free.pop(index)[1]]


def reserved_bytes(events: Sequence[tuple[int, int]]) -> int:
    """What torch's CUDA allocator reserves for `events` when nothing limits it.

    After c10/cuda/CUDACachingAllocator.cpp with expandable_segments:True: one segment for blocks up to 1 MiB and one
    for the others, each grown by pages and never shrunk. Under a limit it first unmaps free pages, so that it needs
    little more than the live bytes (see `memory.PAGE_SLACK`).
    """
    segments = {small: _Segment(small=small) for small in (True, False)}
    held: dict[int, tuple[_Segment, _Block]] = {}
    for tensor, num_bytes in events:
        if num_bytes:
            segment = segments[num_bytes <= SMALL_SIZE]
            held[tensor] = segment, segment.allocate(num_bytes)
        else:
            segment, block = held.pop(tensor)
            segment.release(block)
    return sum(segment.size for segment in segments.values())
