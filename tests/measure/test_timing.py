"""The stopwatch on the CPU, and how the ranks' times become the run's."""

import time

import pytest
import torch

from wanexp.measure.results import step_seconds
from wanexp.measure.timing import Stopwatch


def test_steps_and_the_forwards_in_them():
    watch = Stopwatch([torch.device("cpu")])
    with watch.step():
        with watch.forward():
            time.sleep(0.02)
        with watch.forward():
            time.sleep(0.04)
    assert len(watch.step_s) == 1 and len(watch.forward_s) == 2
    assert 0.02 <= watch.forward_s[0] < watch.forward_s[1] <= watch.step_s[0]
    assert watch.step_s[0] >= sum(watch.forward_s)
    earlier = watch.step_s
    watch.restart()
    assert watch.step_s == [] and watch.forward_s == [] and len(earlier) == 1


def test_a_step_that_raises_is_not_counted():
    watch = Stopwatch([])
    with pytest.raises(ValueError, match="x"), watch.step():
        raise ValueError("x")
    assert watch.step_s == []


def test_a_step_of_the_run_is_its_slowest_ranks():
    assert step_seconds({0: [1.0, 5.0, 1.0], 1: [2.0, 3.0]}) == [2.0, 5.0], "and counts once all have done it"
    assert step_seconds({0: [1.0]}) == [1.0]
    assert step_seconds({}) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_lead_of_the_host():
    """Of a step that the host has launched long before the GPU is done, and of one that it ends with."""
    watch = Stopwatch([torch.device("cuda", 0)])
    with watch.step():
        torch.cuda._sleep(200_000_000)
    with watch.step():
        torch.cuda._sleep(1000)
        time.sleep(0.02)
    assert 0.02 < watch.lead_s[0] <= watch.step_s[0] and watch.lead_s[1] < 0.005 < watch.step_s[1]
