"""Memory of each rank of a group that the others write to and read from by the copy engines of their GPUs.

    rank a: a tensor --copy engine--> its place in b's memory, then a flag for b
    rank b: waits for the flag on its own stream, and has the tensor

No multiprocessor moves the bytes, so that what is computed meanwhile keeps all of them. The memory is PyTorch's
symmetric memory: peer access over NVLink or PCIe between the processes of one machine.

A flag acknowledges nothing. Whoever writes to a place a second time must know, from something that it got since, that
its owner is done with what was there; how, those who use this say (`ulysses.py`). An exchange of nothing is a flag of
its own. What is only ever read (`peer_shards.py`) needs no flags.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor
from torch.distributed import ProcessGroup

ALIGNMENT = 512  # bytes, of the places in it
PLACES = 4  # of equal size that Ulysses divides it in
CHANNELS = PLACES + 1
MAX_VIEWS = 1024  # kept, of places: several for each size of forward
PATIENCE_S = 10.0  # with a first flag

# Objects of multicast, which torch makes where GPUs know it, are of no use here.
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

# Held until `release_all`, for another rank may still read what this one has no more use for.
_opened: "list[PeerMemory]" = []


def nothing() -> None:
    """Where there is nothing to wait for."""


class PeerMemory:
    """The memory of this rank and its view of the others'. Made, and reserved, by all ranks of `group` together.

    others: ranks of the group, those after this one first, so that not all write to the same. num_bytes: on each rank.
    num_begun: exchanges that this rank has begun; who lags behind the others of its group in this holds them up.
    until_read: has the current stream wait until the others have read what they got last; set where nothing that they
    send tells it.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.others = [(self.rank + step) % self.size for step in range(1, self.size)]
        self._copying = torch.cuda.Stream(device)
        self._beside = torch.cuda.Stream(device, priority=-1)
        self.until_read: Callable[[], None] = nothing
        self.num_bytes = 0
        self.num_begun = 0
        self._own: Any = None
        self._handle: Any = None
        self._of_ranks: list[Tensor] = []
        self._flags: dict[tuple[int, int], Tensor] = {}  # by rank and channel, those that this rank raises
        self._raised = torch.ones(1, dtype=torch.int32, device=device)
        # Of places: every block asks for the same.
        self._views: dict[tuple[int, int, int, torch.dtype], Tensor] = {}
        _opened.append(self)

    @torch.inference_mode(False)  # memory made within it could not be written to without
    def reserve(self, num_bytes: int) -> None:
        """Have `num_bytes` on every rank, at least; what was there is lost where that takes new memory.

        Raises what the driver raises where a rank cannot reach another one's memory.
        """
        if num_bytes <= self.num_bytes:
            return
        # Nobody may still be writing to what is given up here.
        dist.all_reduce(self._raised.clone(), group=self.group)
        torch.cuda.synchronize(self.device)
        self._of_ranks, self._flags, self._views = [], {}, {}
        self._own = self._handle = None
        self.until_read = nothing
        # It is free when all have let go of it, and old and new might not both fit; nor is free what torch keeps.
        dist.barrier(self.group)
        torch.cuda.empty_cache()
        self._own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=self.device)
        self._handle = symmetric_memory.rendezvous(self._own, self.group)
        self._of_ranks = [
            self._own if rank == self.rank else self._handle.get_buffer(rank, (num_bytes,), torch.uint8)
            for rank in range(self.size)
        ]
        for rank in self.others:
            for channel in range(CHANNELS):
                self._flags[rank, channel] = self._flag(rank, channel, of=self.rank)
        self.num_bytes = num_bytes

    def place(self, rank: int, start: int, num_elements: int, dtype: torch.dtype) -> Tensor:
        """A flat view of `num_elements` in the memory of `rank` from byte `start` on, a multiple of their size."""
        key = (rank, start, num_elements, dtype)
        if key not in self._views:
            if len(self._views) == MAX_VIEWS:
                self._views = {}
            with torch.inference_mode(False):  # one that is kept serves outside of it, too
                whole = self._of_ranks[rank]
                self._views[key] = whole.narrow(0, start, num_elements * dtype.itemsize).view(dtype)
        return self._views[key]

    def now(self) -> torch.cuda.Event:
        """What the current stream has been given until here, for `beside`."""
        return torch.cuda.current_stream(self.device).record_event()

    @contextmanager
    def beside(self, before: torch.cuda.Event) -> Iterator[None]:
        """What is given to the GPU within runs after `before`, beside what the current stream has been given since.

        It goes first where the GPU could begin with either.
        """
        self._beside.wait_event(before)
        with torch.cuda.stream(self._beside):
            yield

    def exchange(self, parts: Mapping[int, tuple[int, Tensor]], channel: int) -> Callable[[], None]:
        """Begin to copy to each other rank its part, if it has one: (the byte where it belongs, a flat tensor).

        Returns `wait`. The stream that is current when it is called waits until the parts of all others have arrived
        here; that stream, and the one that is current now, until those of this rank have left, which must live as
        long. One exchange a channel at a time.
        """
        self.num_begun += 1
        computing = torch.cuda.current_stream(self.device)
        self._copying.wait_stream(computing)
        with torch.cuda.stream(self._copying):
            for rank in self.others:
                if rank in parts:
                    start, part = parts[rank]
                    self.place(rank, start, len(part), part.dtype).copy_(part)
                self._flags[rank, channel].copy_(self._raised)  # by a copy engine too, after the part
            copied = self._copying.record_event()

        def wait() -> None:
            for rank in self.others:
                self._handle.wait_signal(rank, channel)  # and take the flag down
            for stream in {computing, torch.cuda.current_stream(self.device)}:
                stream.wait_event(copied)

        return wait

    def has_flag_of(self, rank: int, channel: int) -> bool:
        """Whether the flag of `rank` is up here. Waits for what the current stream has been given until now."""
        return bool(self._flag(self.rank, channel, of=rank).item())

    def _flag(self, at: int, channel: int, *, of: int) -> Tensor:
        """What `wait_signal` at rank `at` waits for, of rank `of`."""
        return self._handle.get_signal_pad(at, (1,), torch.int32, self.size * channel + of)


def exchanges_begun() -> dict[str, int]:
    """How many exchanges this rank has begun, for each of its groups by its ranks."""
    begun: Counter[str] = Counter()
    for memory in list(_opened):
        begun[f"copies [{','.join(map(str, dist.get_process_group_ranks(memory.group)))}]"] += (
            memory.num_begun
        )
    return dict(begun)


def bytes_in_use() -> int:
    """What all of it takes of this rank's device, which torch's allocator knows nothing of."""
    return sum(memory.num_bytes for memory in _opened)


def release_all() -> None:
    """Give all of it back. Called by all ranks of the world, when none has any more use for what is there."""
    if not _opened:
        return
    for device in {memory.device for memory in _opened}:
        torch.cuda.synchronize(device)
    dist.barrier()
    _opened.clear()


def open_peer_memory(groups: Sequence[ProcessGroup], device: torch.device) -> list[PeerMemory] | None:
    """Peer memory for each group of this rank, tried out; None, on all ranks, where the driver refuses it to one.

    Called by all ranks of the world.
    """
    memories = [PeerMemory(group, device) for group in groups]
    for memory in memories:
        for attempt in (lambda memory: memory.reserve(PLACES * ALIGNMENT * memory.size), check_peer_memory):
            refused = 0.0
            try:
                attempt(memory)
            except RuntimeError as error:
                print(f"no peer memory: {error}", flush=True)  # into the rank's log
                refused = 1.0
            # After each, as who waits for another rank would not hear that it has given up.
            anywhere = torch.tensor(refused, device=device)
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
            if anywhere.item():
                for each in memories:
                    _opened.remove(each)
                return None
    return memories


def check_peer_memory(memory: PeerMemory) -> None:
    """Every rank writes its number to every other, and must find theirs. Raises RuntimeError where it does not."""
    number = torch.full((1,), memory.rank, dtype=torch.int64, device=memory.device)
    parts = dict.fromkeys(memory.others, (ALIGNMENT * memory.rank, number))
    wait = memory.exchange(parts, channel=0)
    end = time.monotonic() + PATIENCE_S
    while missing := [rank for rank in memory.others if not memory.has_flag_of(rank, channel=0)]:
        if time.monotonic() > end:  # before `wait`, which would hold the stream for good
            raise RuntimeError(f"of ranks {missing} of the group nothing has arrived for {PATIENCE_S:g} s")
    wait()
    for rank in memory.others:
        found = int(memory.place(memory.rank, ALIGNMENT * rank, 1, torch.int64).item())
        if found != rank:
            raise RuntimeError(f"rank {rank} of the group wrote {found} where its number should be")
