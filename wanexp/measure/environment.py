"""Where a run took place, for its record: versions, machine, GPUs and their links, environment variables.

Two halves: `host_environment` in the parent (no torch, no CUDA context) and `torch_environment` in a worker.
Whatever cannot be had is None or left out; nothing here raises.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil

import wanexp
from wanexp.hardware.devices import Device, container_memory_limit, cpu_name
from wanexp.hardware.nvml import NvmlUnavailable, ask, handle_of, open_nvml
from wanexp.tracking.location import without_password

GIB = 1024**3
PACKAGES = (
    "torch",
    "triton",
    "mlflow",
    "hydra-core",
    "omegaconf",
    "safetensors",
    "nvidia-ml-py",
    "fa3-fwd",
    "flash-attn-3",
    "flash-attn-4",
)
VARIABLES = re.compile(r"(CUDA|NCCL|GLOO|PYTORCH|TORCH)_.*|OMP_NUM_THREADS|OMP_WAIT_POLICY|GOMP_SPINCOUNT")
SECRET_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
MAX_NVLINKS = 18
P2P_READ, P2P_NVLINK = 0, 2  # NVML_P2P_CAPS_INDEX_*; in pynvml the constant for READ is a tuple by mistake


def host_environment(devices: Sequence[Device], *, nvml: Any = None) -> dict[str, Any]:
    """Everything that the parent can tell without torch, ready for JSON. `nvml`: for pynvml, in tests."""
    return {
        "wanexp": wanexp.__version__,
        "git": git_state(Path(wanexp.__file__).parents[1]),
        "python": platform.python_version(),
        "python_executable": sys.executable,
        "packages": {name: _version(name) for name in PACKAGES},
        "host": {
            "name": platform.node(),
            "os": platform.platform(),
            "cpu": cpu_name(),
            "cores_physical": psutil.cpu_count(logical=False),
            "cores_logical": psutil.cpu_count(logical=True),
            "cores_usable": _usable_cores(),
            "memory_gib": _gib(psutil.virtual_memory().total),
            "memory_limit_gib": _gib(container_memory_limit()),
        },
        "variables": relevant_variables(os.environ),
        **_gpu_environment(devices, nvml),
    }


def torch_environment() -> dict[str, Any]:
    """`torch`: what it says of itself and its libraries. To be called in a worker: some of it needs CUDA.

    Its key is none of `host_environment`'s, so that the two can be merged.
    """
    import torch

    nccl = None
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    facts = {
        "version": torch.__version__,
        "git": torch.version.git_version,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "nccl": nccl,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "num_threads": torch.get_num_threads(),
    }
    return {"torch": facts}


def git_state(folder: Path) -> dict[str, Any] | None:
    """`commit` and `dirty` (tracked files changed) of the source tree `folder`; None without git."""
    if not (folder / ".git").exists():  # an installed package may lie in a repository that is not ours
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def relevant_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """CUDA_*, NCCL_*, GLOO_*, PYTORCH_*, TORCH_* and OMP_NUM_THREADS; secrets are replaced by "***"."""
    return {
        name: "***" if SECRET_NAMES.search(name.upper()) else without_password(value)
        for name, value in sorted(environment.items())
        if VARIABLES.fullmatch(name)
    }


def p2p_state(gpus: Sequence[Device], variables: Mapping[str, str]) -> str | None:
    """Whether the GPUs of one machine use each other's memory directly: `on`, or `off` and why; None for a single one.

    NCCL_P2P_DISABLE and NCCL_P2P_LEVEL as NCCL's manual has them; they leave copies inside one process alone.
    """
    if len(gpus) < 2:
        return None
    if variables.get("NCCL_P2P_DISABLE", "0") != "0":
        return f"off between processes: NCCL_P2P_DISABLE={variables['NCCL_P2P_DISABLE']}"
    if variables.get("NCCL_P2P_LEVEL", "") in ("LOC", "0"):
        return f"off between processes: NCCL_P2P_LEVEL={variables['NCCL_P2P_LEVEL']}"
    apart = [f"{a.label}-{b.label}" for a, b in combinations(gpus, 2) if b.index not in a.peers]
    return f"off between {', '.join(apart)}" if apart else "on"


def _gpu_environment(devices: Sequence[Device], nvml: Any) -> dict[str, Any]:
    """`driver`, `gpus` (label -> facts), `p2p` and `topology` ("gpu0-gpu1" -> facts); empty on CPU devices."""
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return {}
    facts: dict[str, Any] = {
        "gpus": {gpu.label: _basics(gpu) for gpu in gpus},
        "p2p": p2p_state(gpus, os.environ),
    }
    try:
        nvml = open_nvml(nvml)
    except NvmlUnavailable as error:
        return facts | {"nvml_error": str(error)}
    try:
        cuda = ask(nvml, nvml.nvmlSystemGetCudaDriverVersion)
        facts["driver"] = ask(nvml, nvml.nvmlSystemGetDriverVersion)
        facts["driver_cuda"] = None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}"
        handles = {gpu.label: handle for gpu in gpus if (handle := handle_of(nvml, gpu.uuid)) is not None}
        for label, handle in handles.items():
            facts["gpus"][label] |= _gpu_facts(nvml, handle)
        facts["topology"] = {
            f"{first}-{second}": _link_facts(nvml, handles[first], handles[second])
            for first, second in combinations(handles, 2)
        }
    finally:
        nvml.nvmlShutdown()
    return facts


def _basics(gpu: Device) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "uuid": gpu.uuid,
        "memory_gib": _gib(gpu.total_bytes),
        "compute_capability": ".".join(str(part) for part in gpu.compute_capability or ()) or None,
        "peers": list(gpu.peers),
    }


def _gpu_facts(nvml: Any, handle: Any) -> dict[str, Any]:
    limit = ask(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    links = [ask(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(MAX_NVLINKS)]
    return {
        "power_limit_w": None if limit is None else limit / 1000,
        "max_sm_clock_mhz": ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
        "pcie_generation": ask(nvml, nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),  # falls when idle
        "pcie_max_generation": ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        "pcie_width": ask(nvml, nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        "pcie_max_width": ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        "nvlinks_active": sum(1 for state in links if state == nvml.NVML_FEATURE_ENABLED),
    }


def _link_facts(nvml: Any, first: Any, second: Any) -> dict[str, Any]:
    """ancestor: where the paths of two GPUs meet; p2p_read, p2p_nvlink: whether the driver allows it."""
    ancestors = {
        nvml.NVML_TOPOLOGY_INTERNAL: "same board",
        nvml.NVML_TOPOLOGY_SINGLE: "one PCIe switch",
        nvml.NVML_TOPOLOGY_MULTIPLE: "several PCIe switches",
        nvml.NVML_TOPOLOGY_HOSTBRIDGE: "host bridge",
        nvml.NVML_TOPOLOGY_NODE: "same NUMA node",
        nvml.NVML_TOPOLOGY_SYSTEM: "between NUMA nodes",
    }
    facts: dict[str, Any] = {
        "ancestor": ancestors.get(ask(nvml, nvml.nvmlDeviceGetTopologyCommonAncestor, first, second))
    }
    for name, capability in (("p2p_read", P2P_READ), ("p2p_nvlink", P2P_NVLINK)):
        status = ask(nvml, nvml.nvmlDeviceGetP2PStatus, first, second, capability)
        facts[name] = None if status is None else status == nvml.NVML_P2P_STATUS_OK
    return facts


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ("git", "--no-optional-locks", "-C", str(folder), *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=5.0,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()


def _gib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else round(num_bytes / GIB, 2)
