"""Choices of attention kernels that earlier runs made: one JSON object in one file, key -> choice.

A cache that cannot be read or written costs a probe and a warning, nothing else.
"""

import importlib.metadata
import json
import logging
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from wanexp.wan.attention_choice import AttentionShape, Choice, choice_from_dict
from wanexp.wan.flash_attention import DISTRIBUTIONS

log = logging.getLogger(__name__)


def default_cache_file() -> Path:
    """attention.json in $XDG_CACHE_HOME/wanexp, or ~/.cache/wanexp."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wanexp" / "attention.json"


def cache_key(
    requested: str,
    shape: AttentionShape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    with_lse: bool,
) -> str:
    """All that a choice depends on. A package that comes, goes or changes makes another key."""
    packages = [
        f"{name} {_version(name)}" for distributions in DISTRIBUTIONS.values() for name in distributions
    ]
    facts = (
        torch.cuda.get_device_name(device),
        f"torch {torch.__version__}",
        f"cudnn {torch.backends.cudnn.version()}",
        *packages,
        str(dtype).removeprefix("torch."),
        str(shape),
        "training" if training else "inference",
        *(["lse"] if with_lse else []),
        requested,
    )
    return " | ".join(facts)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def read_choices(path: Path) -> dict[str, Choice]:
    """Empty where there is none, or none that can be read."""
    try:
        document = json.loads(path.read_text())
        return {key: choice_from_dict(values) for key, values in document.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s cannot be read (%s): attention kernels are probed again", path, error)
        return {}


def add_choice(path: Path, key: str, choice: Choice) -> None:
    """Add `choice`. In one step, for runs beside this one read it; of two that write at once one entry is lost."""
    choices = read_choices(path) | {key: choice}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump({name: asdict(value) for name, value in choices.items()}, file, indent=1)
        Path(file.name).replace(path)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next run probes attention kernels again", path, error)
