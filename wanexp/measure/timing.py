"""Timing: steps by the wall clock between synchronised barriers, forwards by CUDA events (wall clock on CPU)."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist


class Stopwatch:
    """Times steps and, inside them, forwards, on the devices of one rank.

    A step begins when all ranks and devices are idle and ends when the devices of this rank are; the step of the whole
    run is the longest over the ranks. Forwards are timed without waiting: their events are read after the step.

    lead_s: of each step, how long the devices went on after the host had launched all of it; near zero where they had
    to wait for the host. None on the CPU.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = [device for device in devices if device.type == "cuda"]
        self.step_s: list[float] = []
        self.forward_s: list[float] = []
        self.lead_s: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []

    def restart(self) -> None:
        self.step_s, self.forward_s, self.lead_s, self._events = [], [], [], []

    def synchronize(self) -> None:
        """Wait for the devices of this rank, then for the other ranks."""
        self._wait_for_devices()
        if dist.is_initialized():
            dist.barrier()
            self._wait_for_devices()

    @contextmanager
    def step(self) -> Iterator[None]:
        self.synchronize()
        begin = time.perf_counter()
        yield
        launched = time.perf_counter()
        self._wait_for_devices()
        end = time.perf_counter()
        self.step_s.append(end - begin)
        if self.devices:
            self.lead_s.append(end - launched)
        for first, second, count in self._events:
            self.forward_s += [first.elapsed_time(second) / 1000 / count] * count
        self._events = []

    @contextmanager
    def forward(self, count: int = 1) -> Iterator[None]:
        """Times `count` forwards that are carried out together; each counts with its share of the time."""
        if not self.devices:
            begin = time.perf_counter()
            yield
            self.forward_s += [(time.perf_counter() - begin) / count] * count
            return
        # Both events on the first device: a prediction always comes back to it.
        with torch.cuda.device(self.devices[0]):
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
        self._events.append((*events, count))

    def _wait_for_devices(self) -> None:
        for device in self.devices:
            torch.cuda.synchronize(device)
