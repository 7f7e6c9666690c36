"""The process groups of a layout, one for each axis of more than one rank, and a check of their links."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from wanexp.parallel.layout import RANK_AXES, Layout
from wanexp.parallel.peer_memory import PeerMemory, open_peer_memory
from wanexp.parallel.traffic import ring_factor

CHECK_BYTES = {"cuda": 64 * 2**20, "cpu": 2**20}  # of one collective: enough for a link to show its speed
CHECK_ROUNDS = 3


@dataclass(frozen=True)
class Groups:
    """The groups that this rank is in, by axis, and the mesh that weights are sharded over.

    memories: of the groups whose exchanges copy engines carry (`transport.py`), by axis.
    """

    by_axis: dict[str, ProcessGroup] = field(default_factory=dict)
    shard_mesh: DeviceMesh | None = None
    memories: dict[str, PeerMemory] = field(default_factory=dict)

    @property
    def transport(self) -> str | None:
        """What carries the exchanges of `ulysses` and `shard`; None where there are none."""
        if "ulysses" not in self.by_axis and self.shard_mesh is None:
            return None
        return "copies" if self.memories else "collectives"

    def get(self, axis: str) -> ProcessGroup | None:
        """The group along `axis`; None where its degree is 1."""
        return self.by_axis.get(axis)

    def all(self) -> dict[str, ProcessGroup]:
        """With those of the mesh, by name."""
        if self.shard_mesh is None:
            return dict(self.by_axis)
        groups = self.by_axis | {"shard": self.shard_mesh.get_group(self.shard_mesh.ndim - 1)}
        return groups if self.shard_mesh.ndim == 1 else groups | {"replicate": self.shard_mesh.get_group(0)}


def open_layout_groups(layout: Layout, device_type: str) -> Groups:
    """Make the groups of `layout`; called by all ranks. Groups of all ranks are the world's own."""
    groups = {}
    for axis in ("cfg", "ring", "ulysses", "tp") if layout.shard > 1 else RANK_AXES:
        degree = getattr(layout, axis)
        if degree == layout.num_ranks > 1:
            assert dist.group.WORLD is not None
            groups[axis] = dist.group.WORLD
        elif degree > 1:
            groups[axis], _ = dist.new_subgroups_by_enumeration(
                [list(ranks) for ranks in layout.groups(axis)]
            )
    mesh = None
    if layout.shard > 1:
        ranks = torch.arange(layout.num_ranks)
        if layout.shard == layout.num_ranks:
            mesh = DeviceMesh(device_type, ranks, mesh_dim_names=("shard",))
        else:
            mesh = DeviceMesh(
                device_type, ranks.view(-1, layout.shard), mesh_dim_names=("replicate", "shard")
            )
    return Groups(groups, mesh)


def open_memories(groups: Groups, device: torch.device) -> dict[str, PeerMemory]:
    """The peer memory of the groups that use it; none, on all ranks, where one rank cannot have it."""
    of_axis = {axis: group for axis, group in groups.all().items() if axis in ("ulysses", "shard")}
    opened = open_peer_memory(list(of_axis.values()), device)
    return {} if opened is None else dict(zip(of_axis, opened, strict=True))


def check_links(groups: Groups, rank: int, device: torch.device) -> list[dict[str, Any]]:
    """An all-reduce on every group of this rank, its sum checked and its speed taken, before weights are loaded.

    Returns for each group its axis, its ranks and GB/s: bytes that a rank sends by a ring over the fastest round.
    Raises RuntimeError for a wrong sum, which says that a link is broken.
    """
    checked = []
    for axis, group in sorted(groups.all().items()):
        ranks = dist.get_process_group_ranks(group)
        tensor = torch.empty(CHECK_BYTES[device.type] // 4, device=device)
        seconds = []
        for _ in range(CHECK_ROUNDS):
            tensor.fill_(rank + 1)
            _wait(device)
            begin = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            _wait(device)
            seconds.append(time.perf_counter() - begin)
        expected = float(sum(other + 1 for other in ranks))
        if not bool((tensor == expected).all()):
            raise RuntimeError(
                f"the link check of group {axis} (ranks {ranks}) gave rank {rank} a wrong sum; a link between their "
                "GPUs is broken: try NCCL_P2P_DISABLE=1, or other gpus"
            )
        sent = tensor.nbytes * ring_factor(len(ranks))
        checked.append({"axis": axis, "ranks": ranks, "gb_s": sent / min(seconds) / 1e9})
    return checked


def check_copies(devices: Sequence[torch.device]) -> list[dict[str, Any]]:
    """Copies between neighbours among the devices of one process, as `check_links` checks groups.

    Raises RuntimeError for a copy that does not arrive as it was sent.
    """
    checked = []
    for index, device in enumerate(devices):
        source, target = device, devices[(index + 1) % len(devices)]
        if source == target:  # one GPU, or logical CPU devices
            continue
        sent = torch.arange(CHECK_BYTES[source.type] // 4, dtype=torch.int32, device=source)
        seconds = []
        for _ in range(CHECK_ROUNDS):
            _wait(source)
            begin = time.perf_counter()
            arrived = sent.to(target)
            _wait(target)
            seconds.append(time.perf_counter() - begin)
        if not torch.equal(arrived.cpu(), sent.cpu()):
            raise RuntimeError(
                f"what was copied from {source} to {target} arrived changed: their link is broken; write other gpus"
            )
        checked.append(
            {
                "axis": "blocks",
                "devices": [str(source), str(target)],
                "gb_s": sent.nbytes / min(seconds) / 1e9,
            }
        )
    return checked


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
