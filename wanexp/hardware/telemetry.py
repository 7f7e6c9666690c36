"""What the GPUs were doing during a run: an NVML sampler in a thread of the parent, four times a second.

It runs beside the workers, never in them, creates no CUDA context, and sleeps between samples, so it does not
disturb what is timed. What a GPU or driver cannot tell is left out; no error of NVML ends a run.
"""

import copy
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import psutil

from wanexp.hardware.devices import Device
from wanexp.hardware.nvml import NvmlUnavailable, ask, handle_of, open_nvml, used_bytes

GIB = 1024**3
FOREIGN_BYTES = GIB  # more than this in use by nobody we know, before a run, is somebody
FOREIGN_INTERVAL_S = 5.0  # between looks at the processes on the GPUs

# Clock event ("throttle") reasons, bits as in nvml.h; HwSlowdown (0x8) only repeats the others.
THERMAL_REASONS = 0x20 | 0x40  # software, hardware
POWER_REASONS = 0x04 | 0x80  # software power cap, power brake

Series = list[tuple[float, float]]  # (wall clock s, value)


@dataclass(frozen=True)
class ForeignProcess:
    """Someone else on a GPU of the run. pid is None where NVML counts memory but names no process."""

    device: str  # label
    pid: int | None
    name: str
    used_gib: float | None

    def __str__(self) -> str:
        gpu = self.device.replace("gpu", "GPU ")
        memory = "" if self.used_gib is None else f"{self.used_gib:.1f} GiB"
        if self.pid is None:
            return f"{memory} of {gpu} are in use by processes that this container cannot see"
        return f"{gpu} is also used by process {self.pid} ({', '.join(filter(None, (self.name, memory)))})"


def foreign_processes(
    devices: Sequence[Device], own_pids: Collection[int] = (), *, nvml: Any = None
) -> list[ForeignProcess]:
    """Compute processes on these GPUs that are not in `own_pids`.

    To be asked before the workers start: in a container NVML may name no process, or name it by its number
    outside; then only memory in use tells that somebody is there. Empty on CPU devices and without NVML.
    """
    try:
        nvml = open_nvml(nvml)
    except NvmlUnavailable:
        return []
    try:
        found = []
        for device in devices:
            handle = handle_of(nvml, device.uuid)
            if handle is None:
                continue
            processes = ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
            found += [_foreign(device, entry) for entry in processes if entry.pid not in own_pids]
            used = used_bytes(nvml, handle) or 0
            if not processes and used > FOREIGN_BYTES:
                found.append(ForeignProcess(device.label, None, "", used / GIB))
        return found
    finally:
        nvml.nvmlShutdown()


class TelemetrySampler:
    """Samples the GPUs of `devices` from `start` to `stop` (or inside `with`); does nothing on CPU devices.

    Start it before the workers: whoever is on the GPUs then is foreign. `root_pid`: processes below this one
    are ours (default: this process). `nvml` stands in for pynvml in tests.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        interval_s: float = 0.25,
        *,
        root_pid: int | None = None,
        nvml: Any = None,
    ) -> None:
        self._devices = [device for device in devices if device.type == "cuda"]
        self._interval_s = interval_s
        self._root_pid = os.getpid() if root_pid is None else root_pid
        self._nvml = nvml
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._series: dict[str, Series] = {}  # "gpu0/power_w" -> samples
        self._foreign: dict[tuple[str, int | None], ForeignProcess] = {}
        self._warnings: list[str] = []

    def __enter__(self) -> "TelemetrySampler":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin sampling. Without NVML only a warning is left."""
        if not self._devices:
            return
        try:
            self._nvml = open_nvml(self._nvml)
        except NvmlUnavailable as error:
            self._warnings.append(f"no telemetry of the GPUs: {error}")
            return
        handles = {device.label: handle_of(self._nvml, device.uuid) for device in self._devices}
        self._warnings += [
            f"no telemetry of {label}: NVML does not know it" for label in handles if not handles[label]
        ]
        self._readers = {label: _readers(self._nvml, handle) for label, handle in handles.items() if handle}
        for process in foreign_processes(self._devices, self._own_pids(), nvml=self._nvml):
            self._foreign[process.device, process.pid] = process
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End sampling; what was sampled stays. May be called twice."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
            self._thread = None
            self._nvml.nvmlShutdown()

    def of(self, devices: Sequence[Device], begin: float, end: float) -> "TelemetrySampler":
        """What was sampled of some of its devices from `begin` to `end`, where runs share a sampler."""
        part, labels = copy.copy(self), {device.label for device in devices}
        part._devices = [device for device in self._devices if device.label in labels]
        part._series = {
            name: [(t, value) for t, value in samples if begin <= t <= end]
            for name, samples in self._series.items()
            if name.partition("/")[0] in labels
        }
        part._foreign = {key: process for key, process in self._foreign.items() if key[0] in labels}
        return part

    def series(self, start: float) -> dict[str, list[list[float]]]:
        """Everything sampled, for Record.telemetry: "gpu0/power_w" -> [[seconds since `start`, value], ...].

        `start` is wall-clock time. Names: utilization_percent, memory_used_gib, power_w, energy_j (since the
        first sample), sm_clock_mhz, temperature_c, thermal_throttle and power_cap (0 or 1).
        """
        return {
            name: [[round(t - start, 3), round(value, 4)] for t, value in samples]
            for name, samples in self._snapshot().items()
        }

    def summarise(self, begin: float, end: float) -> tuple[dict[str, float], list[str]]:
        """Metrics of the timed window [begin, end] in wall-clock seconds, and warnings.

        energy/joules is the sum over the GPUs, and left out where one of them cannot tell or the window is
        shorter than two sampling intervals. memory/*/nvml_used_gib is the largest value of the whole run.
        """
        series = self._snapshot()
        metrics: dict[str, float] = {}
        warnings = [
            *self._warnings,
            *(f"{process}; the timings may suffer" for process in self._foreign.values()),
        ]
        joules: list[float | None] = []
        for device in self._devices:
            label = device.label

            def window(name: str, label: str = label) -> list[float]:
                return [value for t, value in series.get(f"{label}/{name}", []) if begin <= t <= end]

            for name in ("utilization_percent", "power_w", "sm_clock_mhz"):
                if values := window(name):
                    metrics[f"telemetry/{label}/{name}"] = sum(values) / len(values)
            if values := window("temperature_c"):
                metrics[f"telemetry/{label}/temperature_max_c"] = max(values)
            for name in ("thermal_throttle", "power_cap"):
                if values := window(name):
                    metrics[f"telemetry/{label}/{name}_percent"] = 100 * sum(values) / len(values)
            if percent := metrics.get(f"telemetry/{label}/thermal_throttle_percent"):
                warnings.append(
                    f"GPU {device.index} was throttled by heat in {max(percent, 1):.0f} % of the samples"
                )
            if memory := series.get(f"{label}/memory_used_gib"):
                metrics[f"memory/{label}/nvml_used_gib"] = max(value for _, value in memory)
            joules.append(self._joules(series, label, begin, end))
        known = [value for value in joules if value is not None]
        if known and len(known) == len(joules):
            metrics["energy/joules"] = sum(known)
        return metrics, warnings

    def _joules(self, series: dict[str, Series], label: str, begin: float, end: float) -> float | None:
        """Of one GPU in the window: difference of the energy counter, else the integral of the power."""
        if end - begin < 2 * self._interval_s:
            return None
        counter, power = series.get(f"{label}/energy_j", []), series.get(f"{label}/power_w", [])
        margin = 2 * self._interval_s
        if _covers(counter, begin, end, margin):
            return interpolate(counter, end) - interpolate(counter, begin)
        return integrate(power, begin, end) if _covers(power, begin, end, margin) else None

    def _snapshot(self) -> dict[str, Series]:
        """A copy that the thread does not touch; the energy counter counts from its first sample."""
        snapshot = {name: list(samples) for name, samples in list(self._series.items())}
        for name, samples in snapshot.items():
            if name.endswith("/energy_j"):
                snapshot[name] = [(t, value - samples[0][1]) for t, value in samples]
        return snapshot

    def _run(self) -> None:
        next_look = time.monotonic() + FOREIGN_INTERVAL_S
        try:
            while not self._stopping.is_set():
                began = time.monotonic()
                self._sample()
                if began >= next_look:
                    next_look = began + FOREIGN_INTERVAL_S
                    self._look_for_foreign_processes()
                self._stopping.wait(max(0.0, self._interval_s - (time.monotonic() - began)))
        except Exception as error:  # a broken sampler must not end the run, nor go unnoticed
            self._warnings.append(f"telemetry ended early: {type(error).__name__}: {error}")

    def _sample(self) -> None:
        for label, readers in self._readers.items():
            for name, read in readers.items():
                value = read()
                if value is not None:
                    self._series.setdefault(f"{label}/{name}", []).append((time.time(), value))

    def _look_for_foreign_processes(self) -> None:
        """Newcomers that this process can see and that are not below `root_pid`."""
        for device in self._devices:
            handle = handle_of(self._nvml, device.uuid)
            for entry in ask(self._nvml, self._nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []:
                key = (device.label, entry.pid)
                if key not in self._foreign and not self._is_ours(entry.pid):
                    self._foreign[key] = _foreign(device, entry)

    def _own_pids(self) -> set[int]:
        try:
            below = psutil.Process(self._root_pid).children(recursive=True)
            return {self._root_pid, *(process.pid for process in below)}
        except psutil.Error:
            return {self._root_pid}

    def _is_ours(self, pid: int) -> bool:
        """True as well for a number that means nothing here (another PID namespace): it may be a worker."""
        try:
            return self._root_pid in (pid, *(parent.pid for parent in psutil.Process(pid).parents()))
        except psutil.Error:
            return True


def interpolate(samples: Series, t: float) -> float:
    """The value at time `t`, linear between samples, constant before the first and after the last."""
    previous = samples[0]
    for current in samples:
        if current[0] >= t:
            if current[0] == previous[0]:
                return current[1]
            part = (t - previous[0]) / (current[0] - previous[0])
            return previous[1] + max(part, 0.0) * (current[1] - previous[1])
        previous = current
    return samples[-1][1]


def integrate(samples: Series, begin: float, end: float) -> float:
    """Integral over [begin, end] by the trapezoid rule, values linear between samples."""
    inside = [(t, value) for t, value in samples if begin < t < end]
    points = [(begin, interpolate(samples, begin)), *inside, (end, interpolate(samples, end))]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))


def _covers(samples: Series, begin: float, end: float, margin: float) -> bool:
    return len(samples) > 1 and samples[0][0] <= begin + margin and samples[-1][0] >= end - margin


def _readers(nvml: Any, handle: Any) -> dict[str, Callable[[], float | None]]:
    """Functions that read one number each, None where it cannot be had."""

    def reader(function: Callable[..., Any], *args: Any, scale: float = 1.0) -> Callable[[], float | None]:
        def read() -> float | None:
            value = ask(nvml, function, handle, *args)
            return None if value is None else value * scale

        return read

    def utilization() -> float | None:
        rates = ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
        return None if rates is None else float(rates.gpu)

    def memory() -> float | None:
        used = used_bytes(nvml, handle)
        return None if used is None else used / GIB

    def reasons(mask: int) -> Callable[[], float | None]:
        def read() -> float | None:
            # The older name: drivers before 535 know only this one, newer ones both.
            bits = ask(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
            return None if bits is None else float(bool(bits & mask))

        return read

    return {
        "utilization_percent": utilization,
        "memory_used_gib": memory,
        "power_w": reader(nvml.nvmlDeviceGetPowerUsage, scale=1e-3),
        "energy_j": reader(nvml.nvmlDeviceGetTotalEnergyConsumption, scale=1e-3),
        "sm_clock_mhz": reader(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        "temperature_c": reader(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        "thermal_throttle": reasons(THERMAL_REASONS),
        "power_cap": reasons(POWER_REASONS),
    }


def _foreign(device: Device, entry: Any) -> ForeignProcess:
    try:
        name = psutil.Process(entry.pid).name()
    except psutil.Error:
        name = ""
    used = getattr(entry, "usedGpuMemory", None)
    return ForeignProcess(device.label, entry.pid, name, None if used is None else used / GIB)
