"""Memory of the devices over a stretch of time, sampled beside whatever the program is doing."""

import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import psutil

from wanexp.errors import UserError
from wanexp.hardware import nvml as nvml_tools

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class MemorySample:
    """One look at the memory.

    time_s: seconds since the monitor started. rss_bytes: of this process in host memory. devices: by label (gpu0), of
    every GPU that torch sees, `allocated` and `reserved` by torch in this process and `nvml_used` by anyone (left out
    where NVML cannot tell); empty as long as this process has not used CUDA.
    """

    time_s: float
    rss_bytes: int
    devices: Mapping[str, Mapping[str, int]]


class MemoryMonitor(threading.Thread):
    """A running monitor. It is a thread (`is_alive`, `join`), can be ended early with `stop`, and read at any time.

    samples: what was seen so far, the first at once and the last at the end.
    block_devices: by block number where its weights live ("cuda:0"; several joined by a comma); of a model without
        `blocks` one entry, 0. Of a model that is gone: where they lived last.
    """

    def __init__(self, model: "nn.Module", interval: float, duration: float) -> None:
        super().__init__(name="wanexp-memory", daemon=True)
        if not hasattr(model, "parameters"):
            raise UserError(f"model is a {type(model).__name__}; give a torch.nn.Module")
        if not _is_number(interval) or not interval > 0:
            raise UserError(f"interval is {interval!r}; write a number of seconds above 0")
        if not _is_number(duration) or not duration >= 0:
            raise UserError(f"duration is {duration!r}; write a number of seconds of 0 or more")
        self.interval, self.duration = interval, duration
        self.samples: list[MemorySample] = []
        self._model = weakref.ref(model)  # a monitor must not keep gigabytes alive
        self._block_devices: dict[int, str] = {}
        self._uuids: list[str] = []
        self._ending = threading.Event()

    @property
    def block_devices(self) -> dict[int, str]:
        model = self._model()
        if model is not None:
            self._block_devices = block_devices(model)
        return dict(self._block_devices)

    def peaks(self) -> dict[str, dict[str, int]]:
        """The largest of every number of every device so far; of the host as {"cpu": {"rss": bytes}}."""
        samples = list(self.samples)
        highest: dict[str, dict[str, int]] = {"cpu": {"rss": max((s.rss_bytes for s in samples), default=0)}}
        for sample in samples:
            for label, numbers in sample.devices.items():
                entry = highest.setdefault(label, {})
                for name, value in numbers.items():
                    entry[name] = max(value, entry.get(name, 0))
        return highest

    def stop(self) -> None:
        """End now, after a last sample. May be called twice."""
        self._ending.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join()

    def run(self) -> None:
        try:
            nvml = nvml_tools.open_nvml()
        except nvml_tools.NvmlUnavailable:
            nvml = None
        try:
            begin = time.monotonic()
            while True:
                self._look(nvml, begin)
                left = self.duration - (time.monotonic() - begin)
                if left <= 0 or self._ending.is_set():
                    return
                self._ending.wait(min(self.interval, left))
        finally:
            if nvml is not None:
                nvml.nvmlShutdown()

    def _look(self, nvml: Any, begin: float) -> None:
        _ = self.block_devices  # note where they are, should the model go
        devices = {f"gpu{index}": self._gpu(nvml, index) for index in range(self._num_gpus())}
        rss = psutil.Process().memory_info().rss
        self.samples.append(MemorySample(time.monotonic() - begin, rss, devices))

    def _num_gpus(self) -> int:
        """Those that torch sees, once this process uses CUDA: a monitor creates no context."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return 0
        if not self._uuids:
            count = torch.cuda.device_count()
            self._uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count)]
        return len(self._uuids)

    def _gpu(self, nvml: Any, index: int) -> dict[str, int]:
        import torch

        numbers = {
            "allocated": torch.cuda.memory_allocated(index),
            "reserved": torch.cuda.memory_reserved(index),
        }
        handle = nvml_tools.handle_of(nvml, self._uuids[index]) if nvml is not None else None
        used = nvml_tools.used_bytes(nvml, handle) if handle is not None else None
        return numbers if used is None else numbers | {"nvml_used": used}


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def monitor_memory_usage(model: "nn.Module", interval: float = 5.0, duration: float = 60.0) -> MemoryMonitor:
    """Start to watch memory every `interval` seconds for `duration` seconds, and return at once.

    The handle is a daemon thread that ends by itself; `stop()` ends it early, `samples`, `peaks()` and `block_devices`
    read it, during and after. It holds no reference to the model. Raises UserError for what is no model, and
    for times that make no sense.
    """
    monitor = MemoryMonitor(model, interval, duration)
    monitor.start()
    return monitor


def block_devices(model: "nn.Module") -> dict[int, str]:
    """Block number -> device of its weights."""
    inner = getattr(model, "module", model)  # inside DistributedDataParallel and its like
    blocks = getattr(inner, "blocks", None)
    parts = list(blocks) if blocks is not None else [inner]
    return {
        number: ", ".join(sorted({str(parameter.device) for parameter in part.parameters()}))
        for number, part in enumerate(parts)
    }
