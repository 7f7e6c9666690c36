"""What carries the exchanges of Ulysses and the gathers of FSDP between GPUs. Pure: no torch, no device.

copies        copy engines write into the memory of the other GPUs, or read from it (`peer_memory.py`): nothing is taken
              from the multiprocessors, which compute meanwhile
collectives   the process group: NCCL, whose kernels take some of them; gloo on the CPU
"""

from collections.abc import Sequence

from wanexp.errors import LayoutError
from wanexp.hardware.devices import Device
from wanexp.parallel.layout import Layout


def choose_transport(requested: str, layout: Layout, devices: Sequence[Device], *, training: bool) -> str:
    """`copies` or `collectives` for the ranks of `layout`; `auto` is copies wherever they can be had and are of use.

    devices: of all ranks, in their order.

    Raises LayoutError for `copies` where they cannot be had.
    """
    obstacle = _obstacle(layout, devices, training)
    if requested == "copies" and obstacle is not None:
        raise LayoutError(f"transport=copies cannot be had: {obstacle}; write transport=auto or collectives")
    return "collectives" if requested == "collectives" or obstacle is not None else "copies"


def _obstacle(layout: Layout, devices: Sequence[Device], training: bool) -> str | None:
    axes = [axis for axis in ("ulysses", "shard") if getattr(layout, axis) > 1]
    if not axes:
        return "this layout has neither ulysses nor shard"
    if training:
        return "they serve inference, found workload=train"
    for axis in axes:
        for ranks in layout.groups(axis):
            members = [devices[rank] for rank in ranks]
            if members[0].type != "cuda":
                return f"they are between GPUs, found {members[0].label}"
            for one in members:
                for other in members:
                    if other.node != one.node:
                        return f"they stay inside one machine, {one.label} and {other.label} are apart"
                    if other.index != one.index and other.index not in one.peers:
                        return f"{one.label} cannot reach the memory of {other.label} (P2P)"
    return None
