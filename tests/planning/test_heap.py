"""The model of torch's allocator, step by step."""

from hypothesis import given
from hypothesis import strategies as st

from wanexp.planning.heap import GRANULE, MIB, Heap, reserved_bytes


def test_live_and_peak():
    heap = Heap()
    first, second = heap.new(100), heap.new(50)
    heap.free(first)
    third = heap.new(10)
    assert (heap.live, heap.peak) == (60, 150)
    heap.free(second, third, heap.new(0))  # an alias takes nothing
    assert heap.live == 0


def test_a_segment_grows_by_pages_and_what_is_freed_is_used_again():
    heap = Heap()
    heap.free(heap.new(30 * MIB))
    assert reserved_bytes(heap.events) == 40 * MIB  # two pages of 20
    heap.new(25 * MIB)  # fits into what was freed
    assert reserved_bytes(heap.events) == 40 * MIB
    heap.new(16 * MIB)  # 15 are left at the end: one page more
    assert reserved_bytes(heap.events) == 60 * MIB


def test_a_hole_between_live_tensors_is_lost_for_a_larger_one():
    heap = Heap()
    hole, _ = heap.new(40 * MIB), heap.new(20 * MIB)
    heap.free(hole)
    heap.new(60 * MIB)
    assert reserved_bytes(heap.events) == 120 * MIB


def test_small_tensors_have_pages_of_their_own():
    heap = Heap()
    heap.new(1)
    heap.new(40 * MIB)
    assert reserved_bytes(heap.events) == 42 * MIB


@given(st.lists(st.tuples(st.integers(1, 50 * MIB), st.integers(0, 4)), max_size=40))
def test_reserved_is_never_below_live(steps):
    heap, alive = Heap(), []
    for size, kept in steps:
        alive.append(heap.new(size))
        while len(alive) > kept:
            heap.free(alive.pop(0))
    assert reserved_bytes(heap.events) >= heap.peak - GRANULE
