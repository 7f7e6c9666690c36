"""The devices of this machine, by torch index and UUID.

The parent of a run never creates a CUDA context and, on a machine without GPUs, never imports torch: NVML
says whether there are GPUs, a short-lived child asks torch about them (see probe.py), and NVML gives their
free memory.
"""

import json
import logging
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from wanexp.config import DEVICE_TYPES, HardwareConfig
from wanexp.errors import UserError
from wanexp.hardware import nvml as nvml_tools

DEFAULT_NUM_CPU_DEVICES = 8
PROBE_TIMEOUT_S = 60.0
PROBE_COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("probe.py")))

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """One GPU, or one logical CPU device. `index` is torch's (it obeys CUDA_VISIBLE_DEVICES)."""

    type: str  # cuda, cpu
    index: int
    name: str
    total_bytes: int
    free_bytes: int
    uuid: str | None = None  # as NVML prints it, GPU-...; None on CPU
    compute_capability: tuple[int, int] | None = None
    peers: tuple[int, ...] = ()  # indices of the devices whose memory it can reach directly (P2P)
    node: str = ""  # its machine, where a run has several

    @property
    def label(self) -> str:
        """Such as gpu0, or gpu0.node-b in a run over several machines: a part of metric names."""
        number = f"gpu{self.index}" if self.type == "cuda" else f"cpu{self.index}"
        return f"{number}.{self.node}" if self.node else number


def device_from_dict(values: Mapping[str, Any]) -> Device:
    """The device that `dataclasses.asdict` made `values` of, through JSON or not; other keys are ignored."""
    known: dict[str, Any] = {
        field.name: values[field.name] for field in fields(Device) if field.name in values
    }
    known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    return Device(**known)


def find_devices(hardware: HardwareConfig, *, nvml: Any = None) -> tuple[Device, ...]:
    """All devices that a run may use, in torch's order; at most `hardware.num_devices`.

    `nvml` stands in for pynvml in tests. Raises UserError for a device type or number that cannot be had,
    and where torch fails on GPUs that are there.
    """
    if hardware.device_type not in DEVICE_TYPES:
        raise UserError(
            f"hardware.device_type '{hardware.device_type}' does not exist; "
            f"write one of {', '.join(DEVICE_TYPES)}"
        )
    if hardware.num_devices is not None and hardware.num_devices < 1:
        raise UserError(f"hardware.num_devices is {hardware.num_devices}; write 1 or more")
    if hardware.device_type == "cpu":
        return _cpu_devices(hardware.num_devices)
    gpus, reason = _gpus(nvml)
    if not gpus:
        if hardware.device_type == "cuda":
            raise UserError(
                f"hardware={hardware.name} needs a GPU, none can be used ({reason}); "
                "write hardware=cpu to run on logical CPU devices"
            )
        return _cpu_devices(hardware.num_devices)
    if hardware.num_devices is not None and hardware.num_devices > len(gpus):
        raise UserError(
            f"hardware={hardware.name} has {hardware.num_devices} GPUs, this machine has {_inventory(gpus)}; "
            "write hardware=auto to use these"
        )
    return gpus[: hardware.num_devices]


def select_devices(
    found: Sequence[Device], gpus: Sequence[int] | None, mode: str, *, in_sweep: bool = False
) -> tuple[Device, ...]:
    """The devices of one run, in the order in which `gpus` names them.

    None stands for one device for mode `none`, else for all GPUs (two logical devices on CPU). in_sweep: mode `none`
    takes the first of several, for one list of GPUs serves all cells. Raises UserError for an index that is not there
    or named twice.
    """
    if gpus is None:
        if mode == "none":
            return tuple(found[:1])
        return tuple(found if found[0].type == "cuda" else found[:2])
    written = f"gpus=[{','.join(str(index) for index in gpus)}]"
    by_index = {device.index: device for device in found}
    if not gpus:
        raise UserError(
            f"gpus is an empty list; found: {_inventory(found)}; write gpus=[0], or leave gpus out"
        )
    missing = [str(index) for index in gpus if index not in by_index]
    if missing:
        fix = f"write indices from {min(by_index)} to {max(by_index)}"
        if found[0].type == "cpu":
            fix += ", or raise hardware.num_devices"
        raise UserError(
            f"{written}: there is no device {', '.join(missing)}; found: {_inventory(found)}; {fix}"
        )
    twice = [str(index) for index, count in Counter(gpus).items() if count > 1]
    if twice:
        once = ",".join(str(index) for index in dict.fromkeys(gpus))
        raise UserError(f"{written} names device {', '.join(twice)} more than once; write gpus=[{once}]")
    selected = tuple(by_index[index] for index in gpus)
    return selected[:1] if in_sweep and mode == "none" else selected


def cpu_name() -> str:
    """The processor's model, as the operating system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


def container_memory_limit() -> int | None:
    """Bytes that the control group of this process may use; None without a limit."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(path).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return limit if limit < psutil.virtual_memory().total else None
    return None


def _inventory(devices: Sequence[Device]) -> str:
    """Such as "2 GPUs, 0 to 1 (NVIDIA H200)"."""
    noun = "GPU" if devices[0].type == "cuda" else "logical CPU device"
    if len(devices) == 1:
        text = f"1 {noun}, index {devices[0].index}"
    else:
        text = f"{len(devices)} {noun}s, {devices[0].index} to {devices[-1].index}"
    names = ", ".join(dict.fromkeys(device.name for device in devices))
    return f"{text} ({names})" if devices[0].type == "cuda" else text


def _cpu_devices(num_devices: int | None) -> tuple[Device, ...]:
    """Logical devices; all share the host's memory, so each reports the whole of it."""
    memory, limit = psutil.virtual_memory(), container_memory_limit()
    total = memory.total if limit is None else min(memory.total, limit)
    name = f"logical CPU device of {cpu_name()}"
    return tuple(
        Device("cpu", index, name, total_bytes=total, free_bytes=min(memory.available, total))
        for index in range(DEFAULT_NUM_CPU_DEVICES if num_devices is None else num_devices)
    )


def _gpus(nvml: Any) -> tuple[tuple[Device, ...], str]:
    """The GPUs that torch can use; where there are none, also the reason."""
    try:
        nvml = nvml_tools.open_nvml(nvml)
    except nvml_tools.NvmlUnavailable as error:
        return (), str(error)
    try:
        count = nvml_tools.ask(nvml, nvml.nvmlDeviceGetCount) or 0
        if not count:
            return (), "NVML finds no GPU"
        answer = _probe(PROBE_COMMAND, os.environ.get("CUDA_VISIBLE_DEVICES"))
        if not answer["devices"]:
            reason, meant = _why_no_gpu(answer)
            if not meant:  # do not be silent about it
                log.warning("the %d GPUs that NVML finds are not used: %s", count, reason)
            return (), reason
        return tuple(_gpu(nvml, index, entry) for index, entry in enumerate(answer["devices"])), ""
    finally:
        nvml.nvmlShutdown()


def _why_no_gpu(answer: dict[str, Any]) -> tuple[str, bool]:
    """Why torch sees none of the GPUs that are there, and whether somebody hid them on purpose."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is '{visible}'", True
    if answer["cuda"] is None:
        return f"torch {answer['torch']} is built without CUDA", False
    setting = f" with CUDA_VISIBLE_DEVICES='{visible}'" if visible is not None else ""
    return f"torch {answer['torch']} cannot use them{setting}", False


def _gpu(nvml: Any, index: int, entry: dict[str, Any]) -> Device:
    bare = entry["uuid"].removeprefix("GPU-")  # torch leaves the prefix out; a slice of a GPU has another
    known = (uuid for uuid in (f"GPU-{bare}", f"MIG-{bare}") if nvml_tools.handle_of(nvml, uuid) is not None)
    uuid = next(known, None)
    handle = nvml_tools.handle_of(nvml, uuid)
    memory = None if handle is None else nvml_tools.ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    return Device(
        "cuda",
        index,
        entry["name"],
        total_bytes=entry["total_bytes"],
        free_bytes=entry["total_bytes"] if memory is None else min(memory.free, entry["total_bytes"]),
        uuid=uuid or f"GPU-{bare}",
        compute_capability=tuple(entry["compute_capability"]),
        peers=tuple(entry["peers"]),
    )


@cache  # of a whole sweep: what torch says of a GPU does not change, importing torch takes seconds
def _probe(command: tuple[str, ...], visible_devices: str | None) -> dict[str, Any]:
    """What `command` (probe.py) prints. `visible_devices` is for the cache: the child reads the environment.

    A plain child rather than a multiprocessing one: no server process stays behind with the environment of
    today.
    """
    fix = "try `python -c 'import torch; torch.cuda.init()'`, or write hardware=cpu"
    try:
        child = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"torch did not answer about the GPUs within {PROBE_TIMEOUT_S:g} s; {fix}") from None
    lines = child.stdout.splitlines() or [""]
    try:
        answer = None if child.returncode else json.loads(lines[-1])
    except ValueError:
        answer = None
    if answer is None:
        ending = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise UserError(f"torch crashed when asked about the GPUs ({ending[0].strip()}); {fix}")
    return answer
