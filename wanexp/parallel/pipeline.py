"""Pipelined block distribution, the half that decides: which stages, in which order, how long it takes. Pure; no torch.

A stage is a run of consecutive blocks on one device. Micro-batches (cond, uncond, samples) follow each other through
the stages, so that devices work at the same time; `block_distribution.Pipeline` does what is decided here.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from wanexp.errors import LayoutError


class Stage(NamedTuple):
    """The blocks `start` to `stop` - 1 on the device at `position`."""

    position: int
    start: int
    stop: int


def stages_of(block_owner: Sequence[int], num_blocks: int) -> list[Stage]:
    """The stages of a forward through the first `num_blocks` blocks, and the head after the last of them.

    The head lies where the last block of the whole model does: where fewer blocks run and end elsewhere, a stage
    without blocks leads to it.
    """
    stages = []
    for position, run in groupby(range(num_blocks), key=block_owner.__getitem__):
        blocks = list(run)
        stages.append(Stage(position, blocks[0], blocks[-1] + 1))
    if stages[-1].position != block_owner[-1]:
        stages.append(Stage(block_owner[-1], num_blocks, num_blocks))
    return stages


def wavefront(num_stages: int, num_microbatches: int) -> Iterator[tuple[int, int]]:
    """(stage, micro-batch) in the order of enqueuing: in wave w, micro-batch m runs stage w - m.

    A device runs what it is given in order. In this order nothing stands before work that could run earlier: both
    (stage - 1, m) and (stage, m - 1) belong to the wave before. Earlier micro-batches come first within a wave.
    """
    for wave in range(num_stages + num_microbatches - 1):
        for microbatch in range(num_microbatches):
            if 0 <= wave - microbatch < num_stages:
                yield wave - microbatch, microbatch


def place_chunks(num_blocks: int, num_devices: int, num_chunks: int) -> tuple[int, ...]:
    """The position of the owner of each block, for chunks of consecutive blocks dealt round-robin.

    Chunk sizes differ by at most one, larger first, so that the devices' shares do too where `num_chunks` is a
    multiple of `num_devices`. As many chunks as devices are the contiguous placement, as many as blocks deal single
    blocks. Raises LayoutError for fewer chunks than devices and for more than blocks.
    """
    if num_devices > num_blocks:
        raise LayoutError(
            f"{num_devices} GPUs for {num_blocks} transformer blocks; write at most {num_blocks} GPUs"
        )
    if not num_devices <= num_chunks <= num_blocks:
        raise LayoutError(
            f"parallelism.block_chunks is {num_chunks} for {num_devices} GPUs and {num_blocks} transformer blocks; "
            f"write {num_devices} to {num_blocks}"
        )
    base, extra = divmod(num_blocks, num_chunks)
    return tuple(chunk % num_devices for chunk in range(num_chunks) for _ in range(base + (chunk < extra)))


def pipeline_time(
    stage_s: Sequence[float], owners: Sequence[int], num_microbatches: int, seam_s: float
) -> float:
    """Seconds until the last of `num_microbatches` micro-batches has left the last stage, all starting at 0.

    Plays the schedule as `block_distribution.Pipeline` enqueues it. stage_s: seconds of each stage for one
    micro-batch. owners: the device of each stage. seam_s: seconds to copy the hidden states of one micro-batch
    between two devices; a link carries one copy at a time in each direction, beside the computing.
    """
    device_free: defaultdict[int, float] = defaultdict(float)
    link_free: defaultdict[tuple[int, int], float] = defaultdict(float)
    ready = [0.0] * num_microbatches
    visited = set()
    for stage, microbatch in wavefront(len(stage_s), num_microbatches):
        device = owners[stage]
        end = max(device_free[device], ready[microbatch]) + stage_s[stage]
        device_free[device] = ready[microbatch] = end
        visited.add((microbatch, device))
        following = owners[min(stage + 1, len(owners) - 1)]
        if following != device:
            link = device, following
            begin = max(end, link_free[link])
            if (
                microbatch,
                following,
            ) not in visited:  # the memory to copy to is free once that device gets there
                begin = max(begin, device_free[following])
            ready[microbatch] = link_free[link] = begin + seam_s
    return max(device_free.values())


def best_chunks(
    num_blocks: int, num_devices: int, forward_s: float, seam_s: float, num_microbatches: int
) -> int:
    """The number of chunks that `pipeline_time` finds fastest; the smallest of equals (fewer seams).

    Many chunks shorten the start and the end, in which some devices have nothing to do; each costs a seam. Only
    multiples of `num_devices` are tried, and single blocks: others give some devices a whole chunk more to hold.
    forward_s: seconds of one micro-batch through all blocks, which count as equal; seam_s as of `pipeline_time`.
    Raises LayoutError for more devices than blocks.
    """

    def seconds(num_chunks: int) -> float:
        stages = stages_of(place_chunks(num_blocks, num_devices, num_chunks), num_blocks)
        stage_s = [forward_s * (stage.stop - stage.start) / num_blocks for stage in stages]
        time_s = pipeline_time(stage_s, [stage.position for stage in stages], num_microbatches, seam_s)
        return round(time_s, 9)  # sums in another order are no reason for more seams

    candidates = {num_blocks, *range(num_devices, num_blocks + 1, num_devices)}
    return min(sorted(candidates), key=seconds)
