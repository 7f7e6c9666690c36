"""Degrees and shares: properties of the splits, and the sentence of every layout that makes no sense."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanexp.config import ParallelismConfig
from wanexp.errors import LayoutError, UserError
from wanexp.parallel.layout import Layout, place_blocks, resolve_layout, split_by_weight, split_evenly

counts = st.integers(min_value=1, max_value=200)
weights = st.lists(st.integers(min_value=1, max_value=10**12), min_size=1, max_size=16)


@given(total=st.integers(min_value=0, max_value=500), parts=st.integers(min_value=1, max_value=16))
def test_even_shares(total, parts):
    shares = split_evenly(total, parts)
    assert len(shares) == parts and sum(shares) == total
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


@given(weights=weights, extra=st.integers(min_value=0, max_value=100))
def test_shares_by_weight(weights, extra):
    total = len(weights) + extra
    shares = split_by_weight(total, weights)
    assert sum(shares) == total and min(shares) >= 1
    for share, weight in zip(shares, weights, strict=True):  # the largest remainder method keeps the quota
        assert abs(share - 1 - extra * weight / sum(weights)) < 1
    for (share, weight), (next_share, next_weight) in pairwise(
        sorted(zip(shares, weights, strict=True), key=lambda pair: pair[1])
    ):
        assert share <= next_share or weight == next_weight, "a larger weight never gets a smaller share"


def test_shares_by_weight_by_hand():
    assert split_by_weight(40, [24, 8]) == [30, 10]
    assert split_by_weight(40, [1, 1, 1]) == [14, 13, 13]
    assert split_by_weight(3, [10**9, 1, 1]) == [1, 1, 1]
    with pytest.raises(ValueError, match="2 cannot be split in 3 shares"):
        split_by_weight(2, [1, 1, 1])


@given(num_blocks=counts, num_devices=st.integers(min_value=1, max_value=16), data=st.data())
def test_placements(num_blocks, num_devices, data):
    if num_devices > num_blocks:
        with pytest.raises(LayoutError, match=f"{num_devices} GPUs for {num_blocks} transformer blocks"):
            place_blocks(num_blocks, num_devices, placement="contiguous")
        return
    free = data.draw(st.lists(st.integers(1, 10**12), min_size=num_devices, max_size=num_devices))
    for placement in ("contiguous", "memory", "interleaved"):
        owner = place_blocks(num_blocks, num_devices, placement=placement, free_bytes=free)
        sizes = [owner.count(position) for position in range(num_devices)]
        assert len(owner) == num_blocks and min(sizes) >= 1
        if placement == "interleaved":
            assert all(owner[block] == block % num_devices for block in range(num_blocks))
        else:
            assert list(owner) == sorted(owner), "contiguous"
        if placement == "memory":
            assert sizes == split_by_weight(num_blocks, free)
        else:
            assert max(sizes) - min(sizes) <= 1


def test_placements_by_hand():
    assert place_blocks(5, 2, placement="contiguous") == (0, 0, 0, 1, 1)
    assert place_blocks(5, 2, placement="interleaved") == (0, 1, 0, 1, 0)
    assert place_blocks(5, 2, placement="memory", free_bytes=[10, 40]) == (0, 0, 1, 1, 1)
    assert place_blocks(5, 2, placement="interleaved", split=[1, 4]) == (0, 1, 1, 1, 1), "a split wins"


@pytest.mark.parametrize("split", [[4], [5, 0], [2, 2], [6, -1], [1, 2, 2]])
def test_a_split_that_does_not_add_up(split):
    with pytest.raises(LayoutError) as caught:
        place_blocks(5, 2, placement="contiguous", split=split)
    assert str(caught.value) == (
        f"parallelism.block_split is {split}; write 2 numbers of 1 or more that add up to 5 blocks"
    )


def test_an_unknown_placement():
    with pytest.raises(UserError, match="'snake' does not exist; write one of contiguous, memory, interleav"):
        place_blocks(5, 2, placement="snake")


@pytest.mark.parametrize(
    ("mode", "degrees", "gpus", "layout"),
    [
        ("none", {}, 1, Layout()),
        ("data_parallel", {"dp": -1}, 3, Layout(dp=3)),
        ("data_parallel", {"dp": 2}, 2, Layout(dp=2)),
        ("distributed", {"dp": -1}, 1, Layout(dp=1)),
        ("block_distribution", {"blocks": -1}, 4, Layout(blocks=4)),
        ("block_distribution", {"blocks": -1, "dp": 2, "cfg": 2}, 8, Layout(dp=2, cfg=2, blocks=2)),
        ("cfg_parallel", {"cfg": 2}, 2, Layout(cfg=2)),
        ("context_parallel", {"ulysses": -1, "ring": 2}, 6, Layout(ring=2, ulysses=3)),
        ("tensor_parallel", {"tp": -1}, 3, Layout(tp=3)),
        ("fsdp", {"dp": -1, "shard": -1}, 4, Layout(dp=4, shard=4)),
        ("fsdp", {"dp": -1, "shard": 2}, 4, Layout(dp=4, shard=2)),
        ("hybrid", {"cfg": 2, "ulysses": -1, "ring": 2}, 8, Layout(cfg=2, ring=2, ulysses=2)),
        ("hybrid", {"cfg": 2, "ulysses": -1, "shard": -1}, 8, Layout(cfg=2, ulysses=4, shard=8)),
    ],
)
def test_layouts(mode, degrees, gpus, layout):
    found = resolve_layout(ParallelismConfig(mode=mode, **degrees), gpus)
    assert found == layout and found.num_devices == gpus


def test_a_layout_in_words():
    assert str(Layout()) == "one device"
    assert str(Layout(dp=2)) == "dp=2"
    assert str(Layout(dp=2, blocks=3)) == "dp=2 x blocks=3"
    assert Layout(dp=2, blocks=3).num_ranks == 2 and Layout(dp=2, blocks=3).num_devices == 6


@pytest.mark.parametrize(
    ("mode", "degrees", "gpus", "kind", "words"),
    [
        (
            "ring",
            {},
            1,
            UserError,
            "parallelism.mode 'ring' does not exist; write one of none, data_parallel",
        ),
        ("none", {}, 2, LayoutError, "mode none uses one device, gpus names 2; write gpus=[0] or another"),
        ("data_parallel", {"dp": 0}, 2, UserError, "parallelism.dp is 0; write a number of 1 or more, or -1"),
        ("block_distribution", {"blocks": -2}, 2, UserError, "parallelism.blocks is -2; write a number of 1"),
        (
            "data_parallel",
            {"blocks": 2, "dp": 2},
            4,
            LayoutError,
            "data_parallel has no blocks, parallelism.block",
        ),
        (
            "none",
            {"dp": 2},
            1,
            LayoutError,
            "none has no dp, parallelism.dp is 2; leave it out, or write paralle",
        ),
        ("data_parallel", {"dp": 3}, 2, LayoutError, "needs dp 3 = 3 GPUs, the run has 2; write gpus"),
        (
            "hybrid",
            {"cfg": 2, "tp": 2, "ring": 2},
            4,
            LayoutError,
            "cfg 2 x ring 2 x tp 2 = 8 GPUs, the run has 4",
        ),
        (
            "hybrid",
            {"cfg": 2, "ulysses": -1},
            3,
            LayoutError,
            "3 GPUs cannot be divided by cfg 2, which para",
        ),
        ("hybrid", {"ring": -1, "ulysses": -1}, 4, LayoutError, "parallelism.ring and ulysses are both -1"),
        (
            "hybrid",
            {"cfg": 3},
            3,
            LayoutError,
            "parallelism.cfg is 3: guidance has two forwards a step; write cfg",
        ),
        (
            "fsdp",
            {"dp": 4, "shard": 3},
            4,
            LayoutError,
            "shard is 3, which does not divide the 4 ranks of dp 4",
        ),
        ("fsdp", {"dp": 2, "shard": 1}, 2, LayoutError, "fsdp with shard 1 shards nothing over the 2 ranks"),
        ("cfg_parallel", {"cfg": 2}, 1, LayoutError, "needs cfg 2 = 2 GPUs, the run has 1"),
        ("context_parallel", {"ulysses": -1}, 1, LayoutError, "context_parallel on one GPU splits nothing"),
        ("hybrid", {"blocks": 2, "ring": 2}, 4, LayoutError, "ring=2 is refused: every rank of a ring"),
        (
            "hybrid",
            {"blocks": 2, "ulysses": 2},
            4,
            LayoutError,
            "ulysses=2 is refused: every rank would wait",
        ),
        ("hybrid", {"blocks": 2, "tp": 2}, 4, LayoutError, "tp=2 is refused: tp cuts every block's weights"),
        ("hybrid", {"blocks": 2, "dp": 2, "shard": 2}, 4, LayoutError, "shard=2 is refused: blocks keeps a"),
        (
            "hybrid",
            {"tp": 2, "shard": 2},
            2,
            LayoutError,
            "shard=2 with tp=2 is refused: both cut the same weig",
        ),
    ],
)
def test_layouts_that_make_no_sense(mode, degrees, gpus, kind, words):
    with pytest.raises(UserError) as caught:
        resolve_layout(ParallelismConfig(mode=mode, **degrees), gpus)
    assert type(caught.value) is kind
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_neighbours_of_every_axis():
    layout = Layout(dp=2, cfg=2, ring=2, ulysses=3, tp=2, shard=8)
    assert layout.num_ranks == 48 and layout.replica_leaders == [0, 24]
    assert layout.groups("tp")[:2] == [(0, 1), (2, 3)], "fastest"
    assert layout.groups("ulysses")[:2] == [(0, 2, 4), (1, 3, 5)]
    assert layout.groups("ring")[0] == (0, 6) and layout.groups("cfg")[0] == (0, 12)
    assert layout.groups("dp")[5] == (5, 29) and layout.groups("shard")[1] == tuple(range(8, 16))
    for axis in ("dp", "cfg", "ring", "ulysses", "tp", "shard"):
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(48)), axis
        assert {len(group) for group in groups} == {getattr(layout, axis)}
    assert [layout.coordinate(29, axis) for axis in ("dp", "cfg", "ring", "ulysses", "tp")] == [1, 0, 0, 2, 1]
