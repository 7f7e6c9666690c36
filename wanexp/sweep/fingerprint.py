"""What a cell is: its resolved config, the code that runs it, the hardware it runs on. Equal print, equal cell.

The code counts by its content and not by its commit, so that a checkout, an installed wheel and an uncommitted edit
are told apart by what would run. Where a result goes, whether a run is tried and when it is given up (NOT_OF_THE_CELL)
changes no result.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wanexp
from wanexp.config import conf_dir

if TYPE_CHECKING:
    from wanexp.hardware.devices import Device  # which imports more than composing needs

LENGTH = 16  # hex digits: 64 bits
NOT_OF_THE_CELL = (
    "sweep_name",
    "resume",
    "force",
    "repeats",
    "sweep_order",
    "sweep_report",
    "tracking",
    "limits",
    "task",
    "plan_json",
)


def cell_fingerprint(config: Mapping[str, Any], source: str, hardware: Sequence[Any]) -> str:
    """Of one cell: its whole config, `source_digest` and `hardware_identity`."""
    counted = {key: value for key, value in config.items() if key not in NOT_OF_THE_CELL}
    counted["hardware"] = {  # a price changes no result
        key: value for key, value in dict(counted.get("hardware") or {}).items() if key != "usd_per_gpu_hour"
    }
    checkpoint = checkpoint_identity(counted.get("checkpoint"))
    return _digest(json.dumps([counted, checkpoint, source, hardware], sort_keys=True, default=str).encode())


def source_digest() -> str:
    """Of the content of wanexp/ and conf/, and the version of torch."""
    package = Path(wanexp.__file__).parent
    digest = hashlib.sha256(importlib.metadata.version("torch").encode())
    for root, pattern in ((package, "*.py"), (conf_dir(), "*.yaml")):
        for path in sorted(root.rglob(pattern)):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:LENGTH]


def hardware_identity(devices: "Sequence[Device]") -> list[Any]:
    """The kind of each device and its links. Not its UUID: another machine of the same kind continues a sweep."""
    return [
        [device.type, device.name, device.total_bytes, device.compute_capability, len(device.peers)]
        for device in devices
    ]


def checkpoint_identity(checkpoint: str | None) -> list[Any]:
    """Place, size and time of each file: reading tens of gigabytes to hash them would cost more than it tells.

    Of a folder all safetensors files in it and below it (experts, diffusers' folders), of an index those beside it.
    """
    if checkpoint is None:
        return []
    path = Path(checkpoint).expanduser()
    try:
        folder = path if path.is_dir() else path.parent
        if path.is_dir():
            files = sorted(path.rglob("*.safetensors*"))
        else:
            files = [path, *(sorted(folder.glob("*.safetensors")) if path.suffix == ".json" else [])]
        return [
            [file.relative_to(folder).as_posix(), file.stat().st_size, file.stat().st_mtime_ns]
            for file in files
            if file.exists()
        ]
    except OSError:  # the run itself will say so
        return []


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:LENGTH]
