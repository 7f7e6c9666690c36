"""Peer memory between processes without GPUs: what copy engines write to are files that all ranks have mapped.

It keeps the promises of `PeerMemory` and none beyond: a part is there once its flag is up, nobody is asked whether a
place is free, and a flag that is raised twice before it was taken down is a fault.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from wanexp.parallel.peer_memory import nothing

CHANNELS = 5
PATIENCE_S = 30.0


class SharedMemory:
    def __init__(self, group: dist.ProcessGroup, folder: str) -> None:
        self.group, self.device = group, torch.device("cpu")
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.folder = Path(folder) / "_".join(map(str, dist.get_process_group_ranks(group)))
        self.num_bytes = self.num_begun = self.num_reserved = 0
        self.until_read: Callable[[], None] = nothing
        self.others = [(self.rank + step) % self.size for step in range(1, self.size)]

    @torch.inference_mode(False)  # what is made within it could not be written to without
    def reserve(self, num_bytes: int) -> None:
        if num_bytes <= self.num_bytes:
            return
        self.num_bytes, self.num_reserved = num_bytes, self.num_reserved + 1
        self.until_read = nothing
        self.folder.mkdir(exist_ok=True)
        dist.barrier(self.group)
        self._bytes = [self._map(f"bytes{rank}", num_bytes, torch.uint8) for rank in range(self.size)]
        self._flags = [
            self._map(f"flags{rank}", self.size * CHANNELS, torch.int32) for rank in range(self.size)
        ]
        dist.barrier(self.group)

    def _map(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        path = self.folder / f"{name}_{self.num_reserved}"
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype)

    def place(self, rank: int, start: int, num_elements: int, dtype: torch.dtype) -> Tensor:
        return self._bytes[rank].narrow(0, start, num_elements * dtype.itemsize).view(dtype)

    def now(self) -> None:
        return None

    def beside(self, _before: None) -> nullcontext[None]:
        return nullcontext()

    def exchange(self, parts: Mapping[int, tuple[int, Tensor]], channel: int) -> Callable[[], None]:
        self.num_begun += 1
        assert sorted(parts) in ([], sorted(self.others))
        for rank in self.others:
            if rank in parts:
                start, part = parts[rank]
                self.place(rank, start, len(part), part.dtype).copy_(part)
            flag = self._flags[rank][self.size * channel + self.rank :]
            assert flag[0] == 0, f"rank {rank} has not seen what rank {self.rank} sent last"
            flag[0] = 1

        def wait() -> None:
            end = time.monotonic() + PATIENCE_S
            for rank in self.others:
                flag = self._flags[self.rank][self.size * channel + rank :]
                while flag[0] == 0:
                    assert time.monotonic() < end, f"rank {self.rank} heard nothing of rank {rank}"
                    time.sleep(0)
                flag[0] = 0

        return wait
