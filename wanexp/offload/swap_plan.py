"""Block swap, the half that decides: how many blocks, which ones, in what order they come next. Pure; no torch."""

from collections.abc import Sequence

from wanexp.errors import LayoutError


def swapped_blocks(block_owner: Sequence[int], num_swapped: Sequence[int]) -> tuple[int, ...]:
    """Which blocks are swapped, ascending, spread evenly over those of each device.

    block_owner: position of the device of each block. num_swapped: how many of its blocks each position swaps. Even
    gaps give each copy the computing time of as many blocks, also where the last block of a forward leads to the first
    of the next. Raises LayoutError for more than a device owns.
    """
    chosen: list[int] = []
    for position, number in enumerate(num_swapped):
        owned = [index for index, owner in enumerate(block_owner) if owner == position]
        if not 0 <= number <= len(owned):
            raise LayoutError(
                f"offload.blocks asks for {number} swapped blocks of the {len(owned)} of device {position}; "
                f"write 0 to {len(block_owner)} for all devices together"
            )
        chosen += [
            block
            for rank, block in enumerate(owned)
            if (rank + 1) * number // len(owned) > rank * number // len(owned)
        ]
    return tuple(sorted(chosen))


def swapped_per_device(block_owner: Sequence[int], total: int) -> list[int]:
    """`total` swapped blocks over the devices, in proportion to the blocks that each owns.

    Raises LayoutError for more than there are.
    """
    num_blocks = len(block_owner)
    if not 0 <= total <= num_blocks:
        raise LayoutError(f"offload.blocks is {total}; write 0 to {num_blocks}, the model's blocks, or auto")
    # Dealt evenly over the blocks in the order of their devices: shares are exact up to rounding and add up.
    counts, done = [], 0
    for position in range(max(block_owner) + 1):
        before, done = done, done + sum(owner == position for owner in block_owner)
        counts.append(done * total // num_blocks - before * total // num_blocks)
    return counts


def swapped_forward_s(
    forward_s: float, *, num_swapped: int, block_bytes: int, host_bytes_per_s: float, buffers: int = 2
) -> float:
    """Seconds of a forward in a steady row of them: computing and copying hide each other, with one buffer not.

    forward_s: with all blocks resident. Up to `buffers` blocks are copied once for ever.
    """
    copies_s = num_swapped * block_bytes / host_bytes_per_s if num_swapped > buffers else 0.0
    return forward_s + copies_s if buffers == 1 else max(forward_s, copies_s)


def next_uses(history: Sequence[int]) -> list[int]:
    """The distinct blocks of `history` in the order in which they are expected next.

    What followed the last time that the recent past looked like this follows again: of all earlier places the one
    whose past agrees with the present for longest. That covers a plain cycle, fewer blocks than usual, and the stages
    of a pipeline, which run the same blocks for several micro-batches in turn.
    """
    now = len(history)
    longest, since = 0, 0
    for end in range(now - 1, 0, -1):
        length = 0
        while length < end and history[end - 1 - length] == history[now - 1 - length]:
            length += 1
        if length > longest:
            longest, since = length, end
    return list(dict.fromkeys(history[since:])) if longest else []


def choose_victim(held: Sequence[int | None], expected: Sequence[int]) -> int:
    """The position in `held` (the block in each buffer, None if empty) of the buffer to fill next.

    An empty one, else one whose block is not expected, else the one expected last.
    """

    def urgency(position: int) -> int:
        block = held[position]
        if block is None:
            return len(expected) + 1
        return expected.index(block) if block in expected else len(expected)

    return max(range(len(held)), key=urgency)
