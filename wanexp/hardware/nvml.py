"""The few things that everyone asks of NVML: open it, find a GPU by UUID, call without fear.

NVML's own indices ignore CUDA_VISIBLE_DEVICES and may be ordered otherwise than torch's, so a GPU is always
found by its UUID. Nothing here creates a CUDA context. Every function takes the module, so that tests can
hand in a fake one.
"""

import importlib
from collections.abc import Callable
from typing import Any


class NvmlUnavailable(Exception):
    """NVML cannot be used on this machine; the message says why."""


def open_nvml(nvml: Any = None) -> Any:
    """Initialise NVML and return its module (`nvml`, else pynvml). Close with `nvmlShutdown`, once an open.

    Raises NvmlUnavailable where there is no driver or no library.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            raise NvmlUnavailable("nvidia-ml-py is not installed") from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NvmlUnavailable(f"NVML: {error}") from None
    return nvml


def ask(nvml: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The answer of an NVML function; None where this GPU or driver cannot tell."""
    try:
        return function(*args, **kwargs)
    except nvml.NVMLError:
        return None


def handle_of(nvml: Any, uuid: str | None) -> Any:
    """NVML's handle of the GPU with this UUID; None where NVML does not know it."""
    return ask(nvml, nvml.nvmlDeviceGetHandleByUUID, uuid) if uuid else None


def used_bytes(nvml: Any, handle: Any) -> int | None:
    """Memory in use by anyone, as nvidia-smi counts: without what the driver reserves. None if unknown."""
    memory = ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, version=nvml.nvmlMemory_v2)
    memory = memory or ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    return None if memory is None else int(memory.used)
