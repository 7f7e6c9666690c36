"""Which machine has which ranks and devices, and what is refused. The store is in tests/test_outer_torchrun.py."""

from dataclasses import asdict

import pytest

from tests.conftest import cpu_devices
from wanexp.errors import LayoutError, UserError
from wanexp.meeting import Machines, check_machines, gather_machines
from wanexp.parallel.layout import Layout


def arrivals(*hosts: str, ranks: int = 2, devices: int = 2) -> list[dict]:
    """One torchrun a host, as each of its processes arrives."""
    return [
        {"host": host, "group": group, "identity": {"seed": "0"}}
        | (
            {}
            if local
            else {"devices": [asdict(d) for d in cpu_devices(devices)], "environment": {"at": host}}
        )
        for group, host in enumerate(hosts)
        for local in range(ranks)
    ]


def machines(*hosts: str, ranks: int = 2, devices: int = 2) -> Machines:
    return gather_machines(arrivals(*hosts, ranks=ranks, devices=devices))


def test_devices_are_in_the_order_of_the_ranks_and_carry_their_machine():
    found = machines("node-a", "node-b")
    assert found.names == ("node-a", "node-b") and found.ranks == ((0, 1), (2, 3))
    assert [device.label for device in found.all_devices] == [
        "cpu0.node-a", "cpu1.node-a", "cpu0.node-b", "cpu1.node-b",
    ]  # fmt: skip
    assert found.environments == {"node-b": {"at": "node-b"}}


def test_labels_of_one_machine_stay_as_they_are():
    found = machines("node-a")
    assert [device.label for device in found.all_devices] == ["cpu0", "cpu1"]
    assert found.ranks == ((0, 1),) and found.environments == {}


def test_machines_with_one_name_are_told_apart():
    assert machines("box", "box", "other").names == ("box-0", "box-1", "other")


def test_what_differs_is_said_with_both_machines():
    told = arrivals("a", "b")
    told[3]["identity"] = {"seed": "1"}
    with pytest.raises(UserError, match=r"^seed differs between rank 0 on a \(0\) and rank 3 on b \(1\);"):
        gather_machines(told)


def test_a_machine_without_the_devices_says_so_with_its_name():
    told = arrivals("a", "b")
    del told[2]["devices"]
    told[2]["error"] = "gpus=[5]: there is no device 5"
    with pytest.raises(UserError, match=r"^on b: gpus=\[5\]: there is no device 5$"):
        gather_machines(told)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(ulysses=2, ring=2),
        Layout(tp=2, cfg=2),
        Layout(dp=4),
        Layout(ring=4),
        Layout(dp=2, ulysses=2),
        Layout(dp=2, shard=4, cfg=2),
    ],
)
def test_what_crosses_machines(layout):
    check_machines(layout, machines("a", "b"))


def test_several_devices_a_rank():
    check_machines(Layout(dp=2, blocks=2), machines("a", "b", ranks=1))


@pytest.mark.parametrize("layout", [Layout(tp=4), Layout(ulysses=4), Layout(ulysses=2, tp=2)])
def test_tensor_and_ulysses_groups_stay_inside_a_machine(layout):
    with pytest.raises(
        LayoutError, match=r"= 4 ranks need the links inside a machine, a has ranks 0 to 1; write"
    ):
        check_machines(layout, machines("a", "b"))


def test_a_group_that_straddles_machines_is_refused():
    """Three ranks a machine in pairs: ranks 2 and 3 are a pair."""
    with pytest.raises(LayoutError, match="need the links inside a machine"):
        check_machines(Layout(dp=3, tp=2), machines("a", "b", ranks=3, devices=3))


def test_the_number_of_processes():
    with pytest.raises(UserError, match=r"started 4 processes, the layout \(dp=2\) has 2 ranks; .*node 1,"):
        check_machines(Layout(dp=2), machines("a", "b"))
    with pytest.raises(
        UserError, match="started 2 processes on a for 3 GPUs, 1 a rank; write --nproc-per-node 3"
    ):
        check_machines(Layout(dp=4), machines("a", "b", devices=3))


def test_ranks_that_go_round_the_machines_are_refused():
    told = arrivals("a", "b")
    with pytest.raises(UserError, match=r"a has ranks \[0, 2\], with others between them"):
        check_machines(Layout(dp=4), gather_machines([told[0], told[2], told[1], told[3]]))
