"""How many blocks are swapped, which, and what is expected next."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanexp.errors import LayoutError
from wanexp.offload.swap_plan import (
    choose_victim,
    next_uses,
    swapped_blocks,
    swapped_forward_s,
    swapped_per_device,
)


@given(st.integers(1, 60), st.data())
def test_swaps_are_spread_evenly_around_the_cycle(num_blocks, data):
    number = data.draw(st.integers(1, num_blocks))
    chosen = swapped_blocks([0] * num_blocks, [number])
    assert len(set(chosen)) == number
    gaps = [b - a for a, b in pairwise([*chosen, chosen[0] + num_blocks])]
    assert max(gaps) - min(gaps) <= 1


def test_each_device_swaps_its_own():
    assert swapped_blocks((0, 0, 0, 0, 1, 1, 1, 1), [2, 1]) == (1, 3, 7)
    assert swapped_blocks((0, 1) * 4, [2, 4]) == (1, 2, 3, 5, 6, 7)
    with pytest.raises(LayoutError, match="5 swapped blocks of the 4 of device 1"):
        swapped_blocks((0, 1) * 4, [0, 5])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
def test_shares_of_the_devices_add_up(owner, data):
    owner = sorted(owner)
    owner = [sorted(set(owner)).index(position) for position in owner]
    total = data.draw(st.integers(0, len(owner)))
    shares = swapped_per_device(owner, total)
    assert sum(shares) == total
    for position, share in enumerate(shares):
        assert abs(share - total * owner.count(position) / len(owner)) < 1
    assert len(swapped_blocks(owner, shares)) == total


def test_more_than_there_are_is_refused():
    with pytest.raises(LayoutError, match=r"offload\.blocks is 9; write 0 to 8"):
        swapped_per_device([0] * 8, 9)


def test_copies_hide_behind_computing_until_they_take_longer():
    sizes = {"block_bytes": 700, "host_bytes_per_s": 70_000}
    assert swapped_forward_s(2.0, num_swapped=36, **sizes) == 2.0
    assert swapped_forward_s(0.2, num_swapped=36, **sizes) == pytest.approx(0.36)
    assert swapped_forward_s(2.0, num_swapped=36, **sizes, buffers=1) == pytest.approx(2.36)
    assert swapped_forward_s(2.0, num_swapped=2, **sizes) == 2.0


# --- what comes next ---


def test_a_cycle_goes_on():
    assert next_uses([0, 2, 4, 0]) == [2, 4, 0]
    assert next_uses([0, 2, 4, 0, 2, 4]) == [0, 2, 4]


def test_nothing_is_known_of_a_first_use():
    assert next_uses([]) == [] == next_uses([3])


def late_uses(history: list[int], held: list[int | None], order: list[int]) -> int:
    """Plays a ring of buffers over `order`, as block_swap.Ring does, and counts blocks that were not expected."""
    late = 0
    for block in order:
        if block not in held:
            late += 1
            held[choose_victim(held, next_uses(history))] = block
        history.append(block)
        expected = next_uses(history)[: len(held)]
        for wanted in expected:
            if wanted not in held:
                held[choose_victim(held, expected)] = wanted
    return late


PASSES = {
    "cycle": list(range(6)),
    "two micro-batches, contiguous": [*range(6), *range(6)],
    "two micro-batches, single blocks dealt": [0, 0, 2, 2, 4, 4],
    "two micro-batches, pairs dealt": [0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9],
    "three micro-batches of three": [0, 1, 2] * 3 + [6, 7, 8] * 3,
}


@pytest.mark.parametrize("order", PASSES.values(), ids=PASSES.keys())
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_after_two_passes_nothing_is_late(order, num_slots):
    history, held = sorted(set(order)), [None] * num_slots
    late_uses(history, held, order * 2)
    assert late_uses(history, held, order * 3) == 0


def test_a_shorter_forward_is_learned():
    history, held = list(range(8)), [None, None]
    assert late_uses(history, held, list(range(8)) * 2) == 1  # the first pass begins with empty buffers
    assert late_uses(history, held, [0, 1, 2] * 2) > 0
    assert late_uses(history, held, [0, 1, 2] * 4) == 0


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 3))
def test_any_order_is_served(order, num_slots):
    """However wrong a guess was, a slot is found for what is needed."""
    late_uses(list(range(6)), [None] * num_slots, order)


def test_the_victim_is_the_one_needed_last():
    assert choose_victim([3, None, 4], [3, 4]) == 1
    assert choose_victim([3, 7, 4], [3, 4]) == 1
    assert choose_victim([3, 5, 4], [3, 5, 4]) == 2
