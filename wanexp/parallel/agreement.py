"""Do all ranks mean the same run? Asked before weights are loaded: machines may differ in code, torch or checkpoint."""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from wanexp.config import RunConfig, to_dict
from wanexp.errors import UserError
from wanexp.wan.weights import WeightSource


def identity(config: RunConfig) -> dict[str, str]:
    """What must be equal on all machines before there is a plan: the program, then every setting by its name."""
    return {
        "the code of wanexp": _code_digest(),
        "the version of torch": torch.__version__,
        **dict(_settings(to_dict(config))),
    }


def fingerprint(config: RunConfig, sources: Sequence[WeightSource]) -> dict[str, str]:
    """What must be equal on all ranks, by what it is called."""
    return {
        "the config": _digest(json.dumps(to_dict(config), sort_keys=True)),
        "the code of wanexp": _code_digest(),
        "the version of torch": torch.__version__,
        "the checkpoint": _digest(json.dumps([_content(source) for source in sources], sort_keys=True)),
    }


def check_agreement(own: Mapping[str, str]) -> None:
    """Raise UserError on every rank where one has another fingerprint than rank 0. Called by all ranks."""
    told: list[tuple[str, Mapping[str, str]]] = [("", {})] * dist.get_world_size()
    dist.all_gather_object(told, (platform.node(), dict(own)))
    if difference := first_difference(told):
        raise UserError(difference)


def first_difference(told: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """The sentence for the first rank that differs from rank 0, given (node, fingerprint) of each; empty if none."""
    first_node, first = told[0]
    for rank, (node, found) in enumerate(told):
        for what, value in found.items():
            if value != first.get(what):
                return (
                    f"{what} differs between rank 0 on {first_node} ({first.get(what)}) and rank {rank} on {node} "
                    f"({value}); give all machines the same"
                )
    return ""


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Such as ("workload.num_steps", "4")."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value)


def _content(source: WeightSource) -> dict[str, object]:
    """What tells one checkpoint from another, wherever its files lie."""
    return {key: value for key, value in source.describe().items() if key != "files"}


@cache
def _code_digest() -> str:
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
