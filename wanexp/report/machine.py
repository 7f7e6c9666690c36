"""Hardware and environment of a sweep, from all its records. Pure."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from wanexp.report.cells import Sweep
from wanexp.report.page import Block, Heading, Table
from wanexp.tracking import describe
from wanexp.tracking.describe import gibibytes, mapping, plural


def environment_facts(sweep: Sweep) -> list[tuple[str, str]]:
    """Machine and versions of all records; several values of one are counted."""
    found: dict[str, Counter[str]] = {}
    for record in sweep.records:
        environment = record.environment
        host, torch, git = (mapping(environment.get(key)) for key in ("host", "torch", "git"))
        gpus = [mapping(gpu) for gpu in mapping(environment.get("gpus")).values()]
        commit = f"{str(git.get('commit'))[:12]}{' (changed)' if git.get('dirty') else ''}" if git else None
        facts: dict[str, Any] = {
            "devices": ", ".join(sorted({name for _, name in describe.devices_of(record) if name})),
            "memory of a GPU": joined(gibibytes(float(g["memory_gib"])) for g in gpus if g.get("memory_gib")),
            "power limit": joined(f"{g['power_limit_w']:.0f} W" for g in gpus if g.get("power_limit_w")),
            "links": joined(
                "NVLink"
                if link.get("p2p_nvlink")
                else f"{link.get('ancestor')}, P2P {_yes(link.get('p2p_read'))}"
                for link in map(mapping, mapping(environment.get("topology")).values())
            ),
            "host": host.get("name"),
            "processor": host.get("cpu"),
            "host memory": gibibytes(float(host["memory_gib"])) if host.get("memory_gib") else None,
            "driver": environment.get("driver"),
            "torch": torch.get("version"),
            "CUDA": torch.get("cuda"),
            "cuDNN": torch.get("cudnn"),
            "NCCL": torch.get("nccl"),
            "python": environment.get("python"),
            "wanexp": environment.get("wanexp"),
            "commit": commit,
            "precision": record.effective.get("precision"),
            "attention": record.effective.get("attention"),
            "weights": describe.weights(record),
        }
        for key, value in facts.items():
            if value not in (None, ""):
                found.setdefault(key, Counter())[str(value)] += 1
    return [(key, _counted(values)) for key, values in found.items()]


def machine(sweep: Sweep) -> list[Block]:
    """Hardware and environment."""
    rows = [list(pair) for pair in environment_facts(sweep)]
    return [Heading("Hardware and environment"), Table(["", ""], rows)] if rows else []


def joined(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def _yes(value: Any) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _counted(values: "Counter[str]") -> str:
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} ({plural(number, 'run')})" for value, number in values.most_common(6))
