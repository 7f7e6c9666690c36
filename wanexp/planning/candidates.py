"""Layouts as the planner judged them, and what ranks them. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from wanexp.config import ParallelismConfig, RunConfig
from wanexp.hardware.devices import Device
from wanexp.planning.layouts import BUYS, layout_name, layout_settings
from wanexp.planning.memory import GIB, DeviceMemory
from wanexp.planning.plan import Plan
from wanexp.planning.time import TimePrediction

SHOWN_HYBRIDS = 4
EQUAL = 0.01  # of what is predicted
UNKNOWN_RATES = (
    "no rates are known for these devices with this attention: layouts are ranked by generic ones, and no times "
    "predicted; scripts/calibrate.py measures those of attention=auto"
)


@dataclass(frozen=True)
class Candidate:
    """One layout on some of the devices. `rejection` is empty where it can run.

    host_bytes: what swapped blocks take of the host's memory.
    """

    parallelism: ParallelismConfig
    devices: tuple[Device, ...]
    rejection: str = ""
    plan: Plan | None = None
    memory: tuple[DeviceMemory, ...] = ()
    time: TimePrediction | None = None
    host_bytes: int = 0

    @property
    def name(self) -> str:
        """Such as `block_distribution x 4, interleaved`."""
        return layout_name(self.parallelism, len(self.devices))

    @property
    def settings(self) -> str:
        """The overrides that ask for it."""
        return layout_settings(self.parallelism, self.devices)

    @property
    def is_hybrid(self) -> bool:
        """Whether it is a product of degrees and not a mode by name: `hybrid`, and replicas of block distribution."""
        is_product = self.parallelism.dp > 1 or self.parallelism.cfg > 1
        mode = self.parallelism.mode
        return mode == "hybrid" or (mode == "block_distribution" and is_product)

    @property
    def needed_bytes(self) -> int:
        """Of the fullest GPU; of logical devices all together, as they share the host's memory."""
        needed = [entry.needed for entry in self.memory]
        return sum(needed) + self.host_bytes if self.devices[0].type == "cpu" else max(needed)

    @property
    def excess_bytes(self) -> float:
        """What the device that is furthest from fitting lacks; below 0 where it fits, without end without a plan."""
        if self.devices[0].type == "cpu" and self.memory:
            return self.needed_bytes - self.devices[0].free_bytes
        pairs = zip(self.devices, self.memory, strict=False)
        return max((entry.needed - device.free_bytes for device, entry in pairs), default=math.inf)

    @property
    def samples_per_s(self) -> float:
        assert self.plan and self.time
        return self.plan.batch_size / self.time.step_s

    def summary(self) -> dict[str, Any]:
        """Ready for JSON; GiB and milliseconds."""
        time = self.time if self.time and self.time.is_known else None
        return {
            "layout": self.name,
            "buys": BUYS[self.parallelism.mode],
            "settings": self.settings,
            "feasible": not self.rejection,
            "rejection": self.rejection or None,
            "batch_size": self.plan.batch_size if self.plan else None,
            "needed_gib": self.needed_bytes / GIB if self.memory else None,
            "swapped_blocks": len(self.plan.swapped) if self.plan else None,
            "host_gib": self.host_bytes / GIB if self.plan else None,
            "devices": [
                {"device": device.label, "free_gib": device.free_bytes / GIB, **memory.summary()}
                for device, memory in zip(self.devices, self.memory, strict=False)
            ],
            "forward_ms": time.forward_s * 1000 if time else None,
            "step_ms": time.step_s * 1000 if time else None,
        }


@dataclass(frozen=True)
class Planned:
    """All layouts, the best for `objective` first, the rejected last."""

    objective: str
    candidates: tuple[Candidate, ...]
    asked: Candidate | None = None  # which of them the config asks for

    @property
    def winner(self) -> Candidate | None:
        first = self.candidates[0] if self.candidates else None
        return first if first and not first.rejection else None

    @property
    def baseline(self) -> Candidate | None:
        """Mode none, whether it fits or not: what speed-ups are over."""
        return next((c for c in self.candidates if c.parallelism.mode == "none" and c.time), None)

    @property
    def note(self) -> str:
        """What to know of the order where it is not by the rates of these devices; else empty."""
        is_timed = all(c.time is None or c.time.is_known for c in self.candidates if not c.rejection)
        return "" if is_timed or self.objective == "memory" else UNKNOWN_RATES

    def speedup(self, candidate: Candidate) -> float | None:
        """Steps a second over mode none; for replicas samples a second."""
        base = self.baseline
        if not (base and base.time and candidate.time and candidate.time.is_known and candidate.plan):
            return None
        return candidate.samples_per_s / base.samples_per_s

    def digest(self) -> tuple[Candidate, ...]:
        """In their order the best layout of each mode by name, or the one nearest to fitting, and the best hybrids.

        And the layout asked for.
        """
        by_mode: dict[str, list[Candidate]] = {}
        for candidate in self.candidates:
            if not candidate.is_hybrid:
                by_mode.setdefault(candidate.parallelism.mode, []).append(candidate)
        shown = [
            found[0] if not found[0].rejection else min(found, key=lambda candidate: candidate.excess_bytes)
            for found in by_mode.values()
        ]
        feasible = [candidate for candidate in self.candidates if not candidate.rejection]
        shown += [candidate for candidate in feasible if candidate.is_hybrid][:SHOWN_HYBRIDS]
        shown += [self.asked] if self.asked else []
        return tuple(candidate for candidate in self.candidates if any(candidate is one for one in shown))

    def summary(self) -> dict[str, Any]:
        rows = [
            candidate.summary()
            | {"speedup": self.speedup(candidate), "is_asked_for": candidate is self.asked}
            for candidate in self.candidates
        ]
        winner = self.winner
        return {
            "objective": self.objective,
            "winner": winner.settings if winner else None,
            "note": self.note or None,
            "layouts": rows,
        }


def objective_of(config: RunConfig) -> str:
    """What layouts are ranked by: `objective`, but throughput for latency where the workload is training.

    There nobody waits for one sample: by the seconds of a step two GPUs that split the blocks of one sample would come
    before four that train on four.
    """
    is_training = config.workload.name == "train"
    return "throughput" if is_training and config.objective == "latency" else config.objective


def in_order(candidates: Sequence[Candidate], objective: str) -> tuple[Candidate, ...]:
    """Those that can run as `ranked`, then the others."""
    feasible = [candidate for candidate in candidates if not candidate.rejection]
    rejected = [candidate for candidate in candidates if candidate.rejection]
    return (*ranked(feasible, objective), *rejected)


def ranked(candidates: Sequence[Candidate], objective: str) -> list[Candidate]:
    """The best first. Of those that are worse than a better one by less than EQUAL, predictions being no better than
    that, the one on fewer GPUs, then the one with less to exchange, then the simpler mode (in the order given). Under
    `memory`, of equals the faster.
    """
    cost = COSTS[objective]
    rest = sorted(candidates, key=cost)
    found: list[Candidate] = []
    while rest:
        limit = cost(rest[0]) * (1 + EQUAL)
        equals = [candidate for candidate in candidates if cost(rest[0]) <= cost(candidate) <= limit]
        equals.sort(key=_simplicity if objective != "memory" else COSTS["latency"])
        found += equals
        rest = rest[len(equals) :]
    return found


def _seconds(candidate: Candidate) -> float:
    """Seconds a step."""
    assert candidate.time
    return candidate.time.step_s


def _seconds_a_sample(candidate: Candidate) -> float:
    return 1 / candidate.samples_per_s


def _needed(candidate: Candidate) -> float:
    return candidate.needed_bytes


def _simplicity(candidate: Candidate) -> tuple[int, int]:
    """The number of GPUs, and the product of the degrees that exchange more than a latent a step."""
    assert candidate.plan
    layout = candidate.plan.layout
    return len(candidate.devices), layout.ring * layout.ulysses * layout.tp * layout.shard * layout.blocks


COSTS: dict[str, Callable[[Candidate], float]] = {
    "latency": _seconds,
    "throughput": _seconds_a_sample,
    "memory": _needed,
}
