"""What each rank holds of each tensor: all of it is somewhere, and what is split lies in one place only."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parallel.mode_cases import legal_products
from wanexp.errors import LayoutError
from wanexp.parallel.layout import Layout
from wanexp.parallel.shares import (
    check_tensor_parallel,
    ffn_columns_of_ranks,
    heads_of_ranks,
    part_of_rank,
    token_shares,
)
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.part import Part

layouts = st.sampled_from([layout for ranks in (1, 2, 4, 6, 8) for layout in legal_products(ranks)])
architectures = st.builds(
    lambda heads, head_dim, ffn, clip: WanArchitecture(
        dim=heads * head_dim,
        num_heads=heads,
        ffn_dim=ffn,
        num_layers=1,
        text_dim=6,
        freq_dim=4,
        clip_tokens=clip,
        clip_dim=6,
    ),
    heads=st.integers(8, 13),
    head_dim=st.sampled_from([2, 4]),
    ffn=st.integers(8, 200),
    clip=st.sampled_from([0, 257, 514]),
)


def holders(layout: Layout, architecture: WanArchitecture, name: str, shape: tuple[int, ...], ranks) -> list:
    """For each element of a tensor along each dimension, how many of `ranks` hold it."""
    count = torch.zeros(shape, dtype=torch.int8)
    for rank in ranks:
        part_of_rank(layout, architecture, rank, name, shape).cut(count).add_(1)
    return count.unique().tolist()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layout=layouts, architecture=architectures)
def test_every_tensor_is_whole_in_every_group_that_shares_the_weights(layout, architecture):
    axis = "shard" if layout.shard > 1 else "tp"
    for name, shape in architecture.tensor_shapes():
        is_split = False
        for ranks in layout.groups(axis):
            found = holders(layout, architecture, name, shape, ranks)
            assert found in ([1], [len(ranks)]), "once, or on each: nothing is missing, nothing there twice"
            parts = {part_of_rank(layout, architecture, rank, name, shape) for rank in ranks}
            is_split = found == [1] and len(ranks) > 1
            assert is_split or parts == {Part.whole(shape)}
        if layout.shard > 1:
            assert is_split, "FSDP shards everything"
        elif layout.tp == 1:
            assert not is_split


@settings(max_examples=40, deadline=None, derandomize=True)
@given(architecture=architectures, degree=st.integers(1, 8))
def test_shares_of_heads_and_columns(architecture, degree):
    heads, columns = heads_of_ranks(architecture, degree), ffn_columns_of_ranks(architecture, degree)
    assert (sum(heads), sum(columns)) == (architecture.num_heads, architecture.ffn_dim)
    assert len(heads) == len(columns) == degree and min(heads) >= 1 and min(columns) >= 1
    assert max(heads) - min(heads) <= 1
    layout = Layout(tp=degree)
    shapes = dict(architecture.tensor_shapes())
    for rank in range(degree):
        held = {
            name: part_of_rank(layout, architecture, rank, f"blocks.0.{name}", shape).shape_in(shape)
            for name, shape in architecture.block_shapes().items()
        }
        rows = heads[rank] * architecture.head_dim
        assert held["self_attn.q.weight"] == (rows, architecture.dim)
        assert held["cross_attn.o.weight"] == (architecture.dim, rows)
        assert held["self_attn.norm_k.weight"] == held["cross_attn.v.bias"] == (rows,)
        assert held["ffn.0.weight"] == (columns[rank], architecture.dim)
        assert held["ffn.2.weight"] == (architecture.dim, columns[rank])
        assert prod(held["ffn.2.bias"]) == prod(held["self_attn.o.bias"]) == architecture.dim * (rank == 0)
        assert held["norm3.bias"] == shapes["blocks.0.norm3.bias"], "a copy"


def test_columns_of_14b_stay_in_units_that_gpus_like():
    architecture = WanArchitecture(dim=5120, ffn_dim=13824, num_heads=40)
    for degree in (2, 3, 5, 8):
        assert all(columns % 64 == 0 for columns in ffn_columns_of_ranks(architecture, degree))


def test_more_ranks_than_heads():
    with pytest.raises(
        LayoutError, match=r"2 heads and 6 FFN columns over tp 3 ranks.*parallelism.tp=2 or less"
    ):
        check_tensor_parallel(WanArchitecture(dim=8, num_heads=2, ffn_dim=6), 3)


@settings(max_examples=60, derandomize=True)
@given(ulysses=st.integers(1, 8), ring=st.integers(1, 8), spare=st.integers(0, 99))
def test_tokens_lie_in_the_order_of_the_sequence(ulysses, ring, spare):
    """Ring outer, Ulysses inner, as ranks are numbered: neighbours hold neighbouring runs."""
    shares = token_shares(ulysses * ring + spare, ulysses=ulysses, ring=ring)
    layout = Layout(ring=ring, ulysses=ulysses)
    by_rank = [
        shares[layout.coordinate(rank, "ring")][layout.coordinate(rank, "ulysses")]
        for rank in range(layout.num_ranks)
    ]
    assert sum(by_rank) == ulysses * ring + spare and sorted(by_rank, reverse=True) == by_rank
