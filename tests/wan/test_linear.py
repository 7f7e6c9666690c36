import pytest
import torch
import torch.nn.functional as F

from wanexp.wan import linear as module
from wanexp.wan.linear import Linear, linear


@pytest.fixture
def no_instructions(monkeypatch):
    """A CPU that multiplies numbers of 32 bits only."""
    monkeypatch.setattr(module, "cpu_multiplies", lambda dtype: dtype == torch.float32)


def numbers(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 48), (40, 48), (40,))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_in_fp32_and_rounded_once(no_instructions, dtype):
    x, weight, bias = numbers(dtype)
    for given in (bias, None):
        sums = F.linear(x.float(), weight.float(), None if given is None else given.float())
        assert torch.equal(linear(x, weight, given), sums.to(dtype))


def test_autocast_rounds_what_goes_in(no_instructions):
    x, weight, bias = (t.requires_grad_() for t in numbers(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weight, bias)
        assert torch.is_autocast_enabled("cpu")
    rounded = [t.detach().bfloat16() for t in (x, weight, bias)]
    assert out.dtype == torch.bfloat16 and torch.equal(out, linear(*rounded))
    out.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert torch.allclose(weight.grad[0], rounded[0].float().sum((0, 1)), rtol=1e-2, atol=1e-2)


def test_dtypes_that_differ_are_an_error_on_every_cpu(no_instructions):
    x, weight, bias = numbers(torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x, weight.bfloat16(), bias.bfloat16())


def test_the_layer_is_the_function():
    layer, (x, *_) = Linear(48, 40, dtype=torch.bfloat16), numbers(torch.bfloat16)
    assert torch.equal(layer(x), linear(x, layer.weight, layer.bias))
    assert torch.allclose(
        layer(x).float(), F.linear(x.float(), layer.weight.float(), layer.bias.float()), atol=2e-2
    )
