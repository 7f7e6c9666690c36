"""What the processes of an outer torchrun tell each other, through the key-value store where they meet.

    every process   arrival: where it is, what it was asked to do; the first of each machine names its devices
    rank 0          job, orders (signals for the ranks), over
    every process   events of its rank, in numbered batches, which rank 0 reads

The store lives in an agent of torchrun, so it outlives any rank.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from wanexp.errors import LayoutError, UserError
from wanexp.events import Event
from wanexp.hardware.devices import Device, device_from_dict
from wanexp.parallel.agreement import first_difference
from wanexp.parallel.layout import Layout

POLL_S = 0.1


@dataclass(frozen=True)
class Machines:
    """The machines of a run, that of rank 0 first: their names, and of each the ranks and its devices of the run."""

    names: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]
    devices: tuple[tuple[Device, ...], ...]
    environments: Mapping[str, Any] = field(default_factory=dict)  # by name, of those without rank 0

    @property
    def num_ranks(self) -> int:
        return sum(len(ranks) for ranks in self.ranks)

    @property
    def all_devices(self) -> tuple[Device, ...]:
        """In the order of the ranks that own them."""
        return tuple(device for devices in self.devices for device in devices)


class Meeting:
    """A process's end of the store. Raises DistNetworkError, from any method, once the store is gone."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._store = store
        self._num_batches = 0  # of own events
        self._next_batch = [0] * world_size

    def tell(self, key: str, value: Any = None) -> None:
        self._store.set(f"wanexp/{key}", json.dumps(value))

    def hears(self, key: str) -> bool:
        return bool(self._store.check([f"wanexp/{key}"]))

    def hear(self, key: str) -> Any:
        """What was told; blocks until it is."""
        return json.loads(self._store.get(f"wanexp/{key}"))

    def wait_for(self, keys: Iterable[str], within_s: float, *, until: Callable[[], bool]) -> list[str]:
        """Wait for all `keys`, `until` something else is true, or the time is up; returns the keys still missing.

        Looks again and again: a wait inside the store would keep signals from being handled.
        """
        deadline, missing = time.monotonic() + within_s, list(keys)
        while True:
            missing = [key for key in missing if not self.hears(key)]
            if not missing or until() or time.monotonic() > deadline:
                return missing
            time.sleep(POLL_S)

    def post(self, events: Sequence[Event]) -> None:
        """Send events of this rank to rank 0."""
        if events:
            self.tell(f"events/{self.rank}/{self._num_batches}", events)
            self._num_batches += 1

    def collect(self) -> list[Event]:
        """The events that came in since the last call."""
        events: list[Event] = []
        for rank in range(self.world_size):
            while self.hears(key := f"events/{rank}/{self._next_batch[rank]}"):
                events += self.hear(key)
                self._store.delete_key(f"wanexp/{key}")
                self._next_batch[rank] += 1
        return events


@cache  # a second one would start a second store where no agent of torchrun has one
def meet(timeout_s: float) -> Meeting:
    """The end of this process. timeout_s: of a single answer of the store."""
    store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return Meeting(store, rank, world_size)


def parent_event(rank: int, kind: str, **fields: Any) -> Event:
    """An event of the parent of `rank`: `exit` with its code, `present` with the orders carried out, or an `error`."""
    return {"kind": kind, "rank": rank, "time": time.time(), **fields}


def own_place() -> dict[str, Any]:
    """Where this process is. group: torchrun's number of its agent, which may not be alone on a host."""
    return {"host": platform.node(), "group": int(os.environ.get("GROUP_RANK", "0"))}


def gather_machines(arrivals: Sequence[Mapping[str, Any]]) -> Machines:
    """The machines, given the arrival of each rank in order. Pure.

    An agent of torchrun counts as a machine; machines whose host names are equal get their number appended. Devices
    carry the machine's name where there are several. Raises UserError where ranks were asked for different things, or
    a machine has not got the devices.
    """
    places = list(dict.fromkeys((arrival["host"], arrival["group"]) for arrival in arrivals))
    hosts = [host for host, _ in places]
    names = [host if hosts.count(host) == 1 else f"{host}-{group}" for host, group in places]
    name_of = [names[places.index((arrival["host"], arrival["group"]))] for arrival in arrivals]
    if difference := first_difference(
        [(name, arrival["identity"]) for name, arrival in zip(name_of, arrivals, strict=True)]
    ):
        raise UserError(difference)
    ranks, devices, environments = [], [], {}
    for position, name in enumerate(names):
        here = [rank for rank, other in enumerate(name_of) if other == name]
        first = arrivals[here[0]]
        if "error" in first:
            raise UserError(f"on {name}: {first['error']}")
        label = {"node": name} if len(names) > 1 else {}
        ranks.append(tuple(here))
        devices.append(tuple(device_from_dict(device | label) for device in first["devices"]))
        if position:
            environments[name] = first["environment"]
    return Machines(tuple(names), tuple(ranks), tuple(devices), environments)


def check_machines(layout: Layout, machines: Machines) -> None:
    """Raise UserError where torchrun started other processes than the layout has ranks, LayoutError where a group
    that needs a machine's own links (tp, ulysses) would cross machines.
    """
    if layout.num_ranks != machines.num_ranks:
        per_machine = max(1, layout.num_ranks // len(machines.names))
        raise UserError(
            f"torchrun started {machines.num_ranks} processes, the layout ({layout}) has {layout.num_ranks} ranks; "
            f"write --nproc-per-node {per_machine}, or other gpus"
        )
    if len(machines.names) == 1:
        return
    for name, ranks, devices in zip(machines.names, machines.ranks, machines.devices, strict=True):
        if len(ranks) * layout.blocks != len(devices):
            raise UserError(
                f"torchrun started {len(ranks)} processes on {name} for {len(devices)} GPUs, {layout.blocks} a rank; "
                f"write --nproc-per-node {len(devices) // layout.blocks} there, or other gpus"
            )
        if ranks != tuple(range(ranks[0], ranks[-1] + 1)):
            raise UserError(
                f"{name} has ranks {list(ranks)}, with others between them; number the ranks machine by machine"
            )
        together = layout.tp * layout.ulysses  # neighbours in rank
        if together > 1 and (ranks[0] % together or len(ranks) % together):
            raise LayoutError(
                f"tp {layout.tp} x ulysses {layout.ulysses} = {together} ranks need the links inside a machine, {name} "
                f"has ranks {ranks[0]} to {ranks[-1]}; write degrees whose product divides {len(ranks)}, and ring, cfg "
                "or dp for the machines"
            )
