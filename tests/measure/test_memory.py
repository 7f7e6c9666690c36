"""Memory of logical CPU devices: by ownership."""

import pytest
import torch
from torch import nn

from tests.conftest import cpu_devices
from wanexp.measure.memory import (
    GIB,
    anonymous_rss_bytes,
    owned_bytes_by_position,
    peak_rss_gib,
    read_peaks,
    reset_peaks,
)


def model() -> nn.Module:
    """10 + 20 fp32 numbers."""
    module = nn.Module()
    module.first = nn.Parameter(torch.zeros(10))
    module.second = nn.Parameter(torch.zeros(20))
    return module


def test_weights_gradients_and_optimiser_state_count_where_they_are():
    one = model()
    position_of = {"first": 0, "second": 2}.__getitem__
    assert owned_bytes_by_position([one, model()], position_of, 3) == [80, 0, 160]
    one.second.grad = torch.zeros(20)
    assert owned_bytes_by_position([one], position_of, 3) == [40, 0, 160]
    one.first.grad = torch.zeros(10)
    optimizer = torch.optim.AdamW(one.parameters())
    assert owned_bytes_by_position([one], position_of, 3, optimizer=optimizer) == [80, 0, 160]
    optimizer.step()
    # weight, gradient and two moments, and a counter of 4 bytes for each parameter
    assert owned_bytes_by_position([one], position_of, 3, optimizer=optimizer) == [164, 0, 324]
    optimizer.zero_grad(set_to_none=True)
    assert owned_bytes_by_position([one], position_of, 3, optimizer=optimizer) == [124, 0, 244]


def test_what_is_swapped_counts_nowhere_and_buffers_count():
    one = model()
    one.register_buffer("scale", torch.zeros(5))
    position_of = {"first": 0, "second": 1, "scale": 1}.__getitem__
    assert owned_bytes_by_position([one], position_of, 2) == [40, 100]
    assert owned_bytes_by_position([one], position_of, 2, is_swapped="second".__eq__) == [40, 20]


def test_peaks_by_label():
    peaks = read_peaks(cpu_devices(2), [torch.device("cpu")] * 2, [GIB, GIB // 2])
    assert peaks == {"cpu0": {"peak_allocated_gib": 1.0}, "cpu1": {"peak_allocated_gib": 0.5}}
    reset_peaks([torch.device("cpu")])


def test_resident_memory_of_this_process():
    before = anonymous_rss_bytes()
    block = torch.ones(2**26, dtype=torch.uint8)
    assert anonymous_rss_bytes() - before == pytest.approx(2**26, rel=0.1)
    assert peak_rss_gib() * GIB > before
    assert block[0] == 1
