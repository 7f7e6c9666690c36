import copy
import math

import pytest
import torch

from wanexp.wan.rope import MAX_CACHED_GRIDS, RopeCache, apply_rope, axis_dims, rope_tables


@pytest.mark.parametrize(
    ("head_dim", "dims"), [(128, (44, 42, 42)), (64, (24, 20, 20)), (24, (8, 8, 8)), (10, (6, 2, 2))]
)
def test_axis_dims(head_dim, dims):
    assert axis_dims(head_dim) == dims


def test_tables_hold_the_angle_of_each_token():
    frames, rows, columns = 3, 5, 4
    cos, sin = rope_tables(128, (frames, rows, columns), "cpu")
    assert cos.shape == sin.shape == (60, 64)
    assert cos.dtype == sin.dtype == torch.float32
    frame, row, column = 2, 3, 1
    token = (frame * rows + row) * columns + column
    expected = [frame * 10000 ** (-2 * i / 44) for i in range(22)]
    expected += [row * 10000 ** (-2 * i / 42) for i in range(21)]
    expected += [column * 10000 ** (-2 * i / 42) for i in range(21)]
    torch.testing.assert_close(cos[token], torch.tensor([math.cos(angle) for angle in expected]))
    torch.testing.assert_close(sin[token], torch.tensor([math.sin(angle) for angle in expected]))


def test_apply_is_a_complex_product_of_interleaved_pairs():
    rope = rope_tables(24, (2, 3, 2), "cpu")
    x = torch.randn(2, 12, 3, 24)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(*rope).unsqueeze(1)
    torch.testing.assert_close(apply_rope(x, rope), torch.view_as_real(turned).flatten(-2))


def test_apply_rounds_once_from_fp32():
    rope = rope_tables(24, (2, 3, 2), "cpu")
    x = torch.randn(1, 12, 3, 24).bfloat16()
    assert torch.equal(apply_rope(x, rope), apply_rope(x.float(), rope).bfloat16())


def test_cache_is_bounded_and_gives_the_same_tensors_again():
    cache, device = RopeCache(24), torch.device("cpu")
    first = cache((1, 2, 3), device)
    assert cache((1, 2, 3), device)[0] is first[0]
    for size in range(MAX_CACHED_GRIDS):
        cache((2, 2, 2 + size), device)
    assert len(cache._tables) == MAX_CACHED_GRIDS
    assert cache((1, 2, 3), device)[0] is not first[0]


def test_a_copied_cache_starts_empty():
    cache = RopeCache(24)
    cache((1, 2, 3), torch.device("cpu"))
    assert copy.deepcopy(cache)._tables == {}
    assert copy.deepcopy(cache).head_dim == 24


def test_tables_made_in_inference_mode_serve_training():
    cache = RopeCache(24)
    with torch.inference_mode():
        rope = cache((1, 2, 3), torch.device("cpu"))
    x = torch.randn(1, 6, 1, 24, requires_grad=True)
    apply_rope(x, rope).sum().backward()
    assert x.grad is not None
