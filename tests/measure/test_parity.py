"""The distance of two answers, and how many blocks are compared."""

import math

import pytest
import torch

from wanexp.measure import parity
from wanexp.measure.parity import blocks_to_verify, compare_answers, read_answer, write_answer


def test_the_worst_relative_error_counts():
    reference = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[10.0]])}
    assert compare_answers(reference, reference) == parity.Parity(0.0, True)
    answer = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([[10.1]])}
    found = compare_answers(answer, reference)
    assert found.rel_l2 == pytest.approx(0.1) and not found.bit_equal


def test_the_worst_forward_of_any_sample_counts():
    reference = torch.ones(2, 3, 1, 1, 2, 2)
    answer = reference.clone()
    answer[1, 2] += 0.06
    found = compare_answers({parity.FLOWS: answer}, {parity.FLOWS: reference})
    assert found.rel_l2 == pytest.approx(0.06, rel=1e-3) and not found.bit_equal


def test_one_bit_is_seen():
    reference = {"a": torch.tensor([1.0, 2.0])}
    answer = {"a": torch.nextafter(reference["a"], torch.tensor(9.0))}
    found = compare_answers(answer, reference)
    assert 0 < found.rel_l2 < 1e-6 and not found.bit_equal


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_far(bad):
    good, spoilt = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([1.0, bad])}
    for answer, reference in ((spoilt, good), (good, spoilt), (spoilt, spoilt)):
        found = compare_answers(answer, reference)
        assert math.isinf(found.rel_l2)
    assert not compare_answers(spoilt, good).bit_equal


def test_zeros_equal_zeros_only():
    zeros = {"a": torch.zeros(2)}
    assert compare_answers(zeros, zeros).rel_l2 == 0.0
    assert compare_answers({"a": torch.full((2,), 1e-3)}, zeros).rel_l2 > 1.0


def test_answers_of_other_tensors_cannot_be_compared():
    with pytest.raises(ValueError, match=r"\['b'\]"):
        compare_answers({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})


def test_an_answer_survives_its_file(tmp_path):
    answer = {"flow": torch.randn(2, 3, requires_grad=True).T, "half": torch.randn(2).bfloat16()}
    write_answer(tmp_path, answer)
    found = read_answer(tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert compare_answers(found, answer).bit_equal


def blocks(verify: str = "auto", **changes: float) -> int:
    """40 blocks of 1 GB, 2 GB of weights and 1 of other bytes beside them, on 100 GB, in 30 s."""
    numbers = {
        "num_blocks": 40,
        "outer_bytes": 2 * 10**9,
        "block_bytes": 10**9,
        "other_bytes": 10**9,
        "device_bytes": 100 * 10**9,
        "reference_s": 30.0,
    }
    return blocks_to_verify(verify, **(numbers | changes))


def test_all_blocks_where_they_fit_and_are_quick():
    assert blocks() == 40
    assert blocks(reference_s=60.0) == 40


def test_as_many_as_fit():
    assert blocks(device_bytes=30 * 10**9) == 24  # 0.9 x 30 - 2 - 1
    assert blocks(device_bytes=10**9) == 1, "at least one"


def test_as_many_as_a_minute_allows():
    assert blocks(reference_s=240.0) == 10
    assert blocks(reference_s=240.0, device_bytes=10 * 10**9) == 6, "the smaller of both"
    assert blocks(reference_s=1e9) == 1


def test_always_means_all():
    assert blocks("always", device_bytes=10**9, reference_s=1e9) == 40
