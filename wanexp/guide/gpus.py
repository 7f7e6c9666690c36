"""The GPUs of this machine as torch numbers them: can they be used together, and what are they doing now?"""

import os
import re
from collections.abc import Sequence
from typing import Any

from wanexp.config import DTYPES, HardwareConfig
from wanexp.config_keys import unknown_choice_message
from wanexp.errors import UserError
from wanexp.hardware import nvml as nvml_tools
from wanexp.hardware.devices import Device, cpu_name, find_devices
from wanexp.hardware.telemetry import THERMAL_REASONS, foreign_processes

GIB = 1024**3
Capability = tuple[int, int]

# Tensor cores for bf16 come with Ampere, for fp8 with Ada; CUDA C++ programming guide, "arithmetic instructions"
PRECISION_NEEDS: dict[str, Capability] = {"bf16": (8, 0), "fp16": (5, 3), "fp32": (5, 0), "fp8": (8, 9)}
# PyTorch's FlashAttention and its cuDNN attention (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)
KERNEL_NEEDS: dict[str, Capability] = {
    "sdpa_flash": (8, 0),
    "sdpa_cudnn": (8, 0),
    "sdpa_efficient": (5, 0),
    "sdpa_math": (5, 0),
    "fa3": (9, 0),
    "fa3_fp8": (9, 0),
    "fa4": (8, 0),
}
HEAD_DIM = 128  # of every published Wan model


def validate_gpu_setup(
    gpu_ids: Sequence[int], *, precision: str = "bf16", attention: str = "auto"
) -> tuple[bool, str]:
    """Can these GPUs (torch's indices) run a model together in this precision with this attention kernel?

    False with every problem found: no GPU, indices that are not there, negative or named twice, a compute capability
    below what precision or kernel needs, a driver or a torch build that cannot serve the GPU. True with what was found,
    and warnings for what only costs speed: different models, no P2P, GPUs in use by others.

    precision: bf16, fp16, fp32 or fp8. attention: a kernel as of wanexp's `attention`; auto is the one it would take.
    Raises UserError for a precision or kernel that does not exist.
    """
    if precision not in PRECISION_NEEDS:
        raise UserError(unknown_choice_message("precision", precision, list(PRECISION_NEEDS)))
    if attention not in ("auto", *KERNEL_NEEDS):
        raise UserError(unknown_choice_message("attention", attention, ["auto", *KERNEL_NEEDS]))
    if problem := _bad_ids(gpu_ids):
        return False, problem
    try:
        found = find_devices(HardwareConfig(name="auto", device_type="cuda"))
    except UserError as error:
        reason = re.search(
            r"none can be used \((.*)\); write", str(error)
        )  # else torch crashed, and it says so
        return False, f"no GPU can be used: {reason[1]}" if reason else str(error)
    by_index = {device.index: device for device in found}
    missing = [str(index) for index in gpu_ids if index not in by_index]
    if missing:
        have = f"{len(found)} GPU{'s' * (len(found) > 1)}, {found[0].index} to {found[-1].index}"
        return False, f"there is no GPU {', '.join(missing)}; found {have} ({found[0].name})"
    chosen = [by_index[index] for index in gpu_ids]
    problems = [
        *_build_problems(chosen),
        *(problem for device in chosen for problem in _capability_problems(device, precision, attention)),
    ]
    if problems:
        return False, "; ".join(problems)
    listed = ", ".join(f"{d.label} {d.name}{_sm(d)}, {d.free_bytes / GIB:.1f} GiB free" for d in chosen)
    warnings = _warnings(chosen)
    return True, "; ".join([f"{listed}: {precision} runs", *(f"warning: {text}" for text in warnings)])


def _bad_ids(gpu_ids: Any) -> str:
    """What is wrong with the numbers themselves; empty where nothing is."""
    if isinstance(gpu_ids, str | bytes) or not isinstance(gpu_ids, Sequence):
        return f"gpu_ids is {gpu_ids!r}; write a list of device numbers such as [0, 1]"
    if not gpu_ids:
        return "gpu_ids is empty; write device numbers such as [0, 1]"
    for index in gpu_ids:
        if isinstance(index, bool) or not isinstance(index, int):
            return f"gpu_ids has {index!r}; write whole numbers such as [0, 1]"
        if index < 0:
            return f"gpu_ids has {index}; write numbers of 0 or more"
        if list(gpu_ids).count(index) > 1:
            return f"gpu_ids names GPU {index} {list(gpu_ids).count(index)} times; write each once"
    return ""


def _capability_problems(device: Device, precision: str, attention: str) -> list[str]:
    capability = device.compute_capability
    if capability is None:
        return []
    problems = []
    if capability < PRECISION_NEEDS[precision]:
        able = [name for name, least in PRECISION_NEEDS.items() if capability >= least]
        problems.append(
            f"{device.label} ({device.name}{_sm(device)}): {precision} needs sm_{_number(PRECISION_NEEDS[precision])}; "
            f"write one of: {', '.join(able) or 'nothing, it is too old'}"
        )
    kernel = _kernel(attention, precision, capability)
    if kernel.startswith("fa3") and capability[0] != 9:
        problems.append(
            f"{device.label} ({device.name}{_sm(device)}): {kernel} is made for sm_90 alone; write attention=auto"
        )
    elif capability < KERNEL_NEEDS[kernel]:
        chosen = f"{kernel} (attention=auto)" if attention == "auto" else kernel
        problems.append(
            f"{device.label} ({device.name}{_sm(device)}): {chosen} needs sm_{_number(KERNEL_NEEDS[kernel])}; "
            "write attention=sdpa_efficient"
        )
    return problems


def _kernel(attention: str, precision: str, capability: Capability) -> str:
    """The kernel that a run with these settings takes."""
    import torch  # slow to import

    from wanexp.wan.attention import choose_attention

    dtypes = dict(zip(("bf16", "fp16", "fp32"), DTYPES, strict=True))
    return choose_attention(
        attention,
        device_type="cuda",
        dtype=getattr(torch, dtypes.get(precision, DTYPES[0])),  # around fp8 matrix products all is bf16
        head_dim=HEAD_DIM,
        compute_capability=capability,
    )


def _build_problems(devices: Sequence[Device]) -> list[str]:
    """What this build of torch cannot do with the driver, or with one of these GPUs."""
    import torch  # slow to import

    problems = []
    driver, driver_cuda = _driver()
    if driver_cuda and torch.version.cuda and driver_cuda[0] < int(torch.version.cuda.split(".")[0]):
        problems.append(
            f"driver {driver} serves CUDA {driver_cuda[0]}.{driver_cuda[1]} and torch {torch.__version__} needs CUDA "
            f"{torch.version.cuda}; update the driver, or install torch for an older CUDA"
        )
    built_for = [int(name[3:].rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    for device in devices:
        capability = device.compute_capability
        if built_for and capability and capability[0] * 10 + capability[1] < min(built_for):
            problems.append(
                f"{device.label} ({device.name}{_sm(device)}): torch {torch.__version__} is built for "
                f"sm_{min(built_for)} and above; install a build that has it"
            )
    return problems


def _driver() -> tuple[str, tuple[int, int] | None]:
    """The driver's version, and the newest CUDA it serves."""
    try:
        nvml = nvml_tools.open_nvml()
    except nvml_tools.NvmlUnavailable:
        return "", None
    try:
        cuda = nvml_tools.ask(nvml, nvml.nvmlSystemGetCudaDriverVersion)
        version = str(nvml_tools.ask(nvml, nvml.nvmlSystemGetDriverVersion) or "")
        return version, None if cuda is None else (cuda // 1000, cuda % 1000 // 10)
    finally:
        nvml.nvmlShutdown()


def _warnings(devices: Sequence[Device]) -> list[str]:
    """What runs, but not as well as it could."""
    warnings = []
    names = {device.name for device in devices}
    if len(names) > 1:
        warnings.append(
            f"different models ({', '.join(sorted(names))}): replicas go at the pace of the slowest; for blocks write "
            "parallelism.block_placement=memory"
        )
    apart = [
        f"{first.label} and {second.label}"
        for position, first in enumerate(devices)
        for second in devices[position + 1 :]
        if second.index not in first.peers or first.index not in second.peers
    ]
    if apart:
        pairs = ", ".join(apart[:3]) + (f" and {len(apart) - 3} more pairs" if len(apart) > 3 else "")
        warnings.append(f"no P2P between {pairs}: what crosses goes through host memory")
    warnings += [str(process) for process in foreign_processes(devices, {os.getpid()})]
    return warnings


def print_gpu_status() -> None:
    """A line for each GPU: memory, utilisation, temperature and power, numbered as torch numbers them."""
    devices = find_devices(HardwareConfig(name="auto"))
    if devices[0].type == "cpu":
        device = devices[0]
        print(
            f"No GPU can be used here. CPU: {cpu_name()}, "
            f"{device.free_bytes / GIB:.1f} of {device.total_bytes / GIB:.1f} GiB of host memory free"
        )
        return
    rows = [("GPU", "name", "memory used", "busy", "temperature", "power", "UUID")]
    notes = []
    try:
        nvml = nvml_tools.open_nvml()
    except nvml_tools.NvmlUnavailable as error:
        nvml, notes = None, [f"no telemetry: {error}"]
    try:
        for device in devices:
            state, warnings = _state(nvml, device)
            rows.append((str(device.index), device.name, *state, device.uuid or "-"))
            notes += warnings
    finally:
        if nvml is not None:
            nvml.nvmlShutdown()
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for note in notes:
        print(note)


def _state(nvml: Any, device: Device) -> tuple[tuple[str, str, str, str], list[str]]:
    """Memory, utilisation, temperature and power of one GPU, "-" for what it cannot tell; and warnings."""
    handle = nvml_tools.handle_of(nvml, device.uuid) if nvml is not None else None
    total = f"{device.total_bytes / GIB:.1f} GiB"
    if handle is None:
        return (f"{(device.total_bytes - device.free_bytes) / GIB:.1f} of {total}", "-", "-", "-"), []

    def ask(function: Any, *args: Any) -> Any:
        return nvml_tools.ask(nvml, function, handle, *args)

    used, rates = nvml_tools.used_bytes(nvml, handle), ask(nvml.nvmlDeviceGetUtilizationRates)
    heat = ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU)
    power, limit = ask(nvml.nvmlDeviceGetPowerUsage), ask(nvml.nvmlDeviceGetEnforcedPowerLimit)
    reasons = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0
    of_limit = "" if limit is None else f" of {limit / 1000:.0f}"
    cells = (
        f"- of {total}" if used is None else f"{used / GIB:.1f} of {total}",
        "-" if rates is None else f"{rates.gpu} %",
        "-" if heat is None else f"{heat} C",
        "-" if power is None else f"{power / 1000:.0f}{of_limit} W",
    )
    hot = [f"GPU {device.index} is throttled by heat right now"] if reasons & THERMAL_REASONS else []
    return cells, hot


def _sm(device: Device) -> str:
    return f", sm_{_number(device.compute_capability)}" if device.compute_capability else ""


def _number(capability: Capability) -> str:
    return f"{capability[0]}{capability[1]}"
