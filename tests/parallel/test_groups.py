"""Groups of a layout on real ranks, and what the checks before loading say of good and of broken links."""

import pytest
import torch
import torch.distributed as dist

from tests.parallel.ranks import on_ranks
from wanexp.parallel import groups as groups_module
from wanexp.parallel.groups import check_copies, check_links, open_layout_groups
from wanexp.parallel.layout import Layout

CPU = torch.device("cpu")
AXES = ("cfg", "ring", "ulysses", "tp")
LAYOUTS = [
    Layout(dp=4),
    Layout(cfg=2, ulysses=2),
    Layout(ring=2, tp=2),
    Layout(dp=2, cfg=2, blocks=3),
    Layout(ulysses=4, shard=2),
    Layout(dp=4, shard=4),
]


def open_and_check(rank: int) -> list[dict]:
    found = []
    for layout in LAYOUTS:
        groups = open_layout_groups(layout, "cpu")
        mesh = groups.shard_mesh
        found.append(
            {
                "ranks": {
                    axis: tuple(dist.get_process_group_ranks(group)) for axis, group in groups.all().items()
                },
                "is_world": [axis for axis, group in groups.by_axis.items() if group is dist.group.WORLD],
                "without": [axis for axis in AXES if groups.get(axis) is None],
                "mesh": None if mesh is None else (mesh.mesh_dim_names, tuple(mesh.mesh.shape)),
                "links": check_links(groups, rank, CPU),
            }
        )
    return found


def with_a_broken_link(rank: int) -> str:
    """Rank 1 gets a wrong element at the end of what it receives in its last group."""
    all_reduce = groups_module.dist.all_reduce
    groups = open_layout_groups(Layout(cfg=2, tp=2), "cpu")

    def broken(tensor, group):
        all_reduce(tensor, group=group)
        if rank == 1 and group is groups.get("tp"):
            tensor[-1] += 1

    groups_module.dist.all_reduce = broken
    try:
        check_links(groups, rank, CPU)
    except RuntimeError as error:
        return str(error)
    finally:
        groups_module.dist.all_reduce = all_reduce
    return ""


def all_checks(rank: int) -> tuple[list[dict], str]:
    return open_and_check(rank), with_a_broken_link(rank)


@pytest.fixture(scope="module")
def by_rank() -> list[tuple[list[dict], str]]:
    return on_ranks(4, all_checks)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
def test_groups(by_rank, index):
    layout = LAYOUTS[index]
    replicas = layout.num_ranks // layout.shard
    own = ("dp", *AXES) if layout.shard == 1 else AXES  # under FSDP the mesh has the replicas
    axes = {axis for axis in (*own, "shard") if getattr(layout, axis) > 1}
    axes |= {"replicate"} if layout.shard > 1 and replicas > 1 else set()
    for rank, (found, _) in enumerate(by_rank):
        opened = found[index]
        assert opened["ranks"].keys() == axes
        for axis, members in opened["ranks"].items():
            assert rank in members
            if axis != "replicate":
                assert members in layout.groups(axis)
            else:
                assert len(members) == replicas and {r % layout.shard for r in members} == {
                    rank % layout.shard
                }
        assert opened["is_world"] == [axis for axis in own if getattr(layout, axis) == 4]
        assert set(opened["without"]) == set(AXES) - axes
        assert [link["axis"] for link in opened["links"]] == sorted(axes)
        for link in opened["links"]:
            assert tuple(link["ranks"]) == opened["ranks"][link["axis"]] and link["gb_s"] > 0


def test_the_mesh_of_shards(by_rank):
    for found, _ in by_rank:
        meshes = {str(layout): opened["mesh"] for layout, opened in zip(LAYOUTS, found, strict=True)}
        assert meshes["ulysses=4 x shard=2"] == (("replicate", "shard"), (2, 2))
        assert meshes["dp=4 x shard=4"] == (("shard",), (4,))
        assert meshes["dp=4"] is None


def test_a_broken_link_is_named(by_rank):
    messages = [message for _, message in by_rank]
    assert messages[0] == messages[2] == messages[3] == ""
    assert messages[1].startswith("the link check of group tp (ranks [0, 1]) gave rank 1 a wrong sum")
    assert "try NCCL_P2P_DISABLE=1" in messages[1]


def test_copies_between_the_devices_of_a_process(monkeypatch):
    assert check_copies([CPU]) == check_copies([CPU, CPU]) == [], "nothing crosses"
    devices = [torch.device("cpu", 0), torch.device("cpu", 1)]
    checked = check_copies(devices)
    assert [link["devices"] for link in checked] == [["cpu:0", "cpu:1"], ["cpu:1", "cpu:0"]]
    assert all(link["axis"] == "blocks" and link["gb_s"] > 0 for link in checked)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, _device: tensor + 1)
    with pytest.raises(
        RuntimeError, match="copied from cpu:0 to cpu:1 arrived changed: their link is broken"
    ):
        check_copies(devices)
