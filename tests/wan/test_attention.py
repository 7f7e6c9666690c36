import pytest
import torch

from wanexp.errors import UserError
from wanexp.wan.attention import SDPA_BACKENDS, attention_function, choose_attention

CPU_KERNELS = ["sdpa_flash", "sdpa_math", "auto"]


def qkv(dtype=torch.float32, device="cpu", head_dim=16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 3, head_dim), (2, 7, 3, head_dim), (2, 7, 3, head_dim)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def softmax_attention(q, k, v):
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_kernels_match_the_formula_and_its_gradients(name):
    inputs, expected_inputs = qkv(), qkv()
    out, expected = attention_function(name)(*inputs), softmax_attention(*expected_inputs)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for tensor, expected_tensor in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(tensor.grad, expected_tensor.grad)


@pytest.mark.parametrize("name", ["sdpa_cudnn", "sdpa_efficient"])
def test_an_explicit_kernel_that_cannot_run_is_an_error_that_names_the_fix(name):
    with pytest.raises(UserError, match=rf"attention={name} cannot run on cpu .*write attention=auto"):
        attention_function(name)(*qkv())


def test_other_errors_of_a_kernel_pass_through():
    q, k, v = qkv()
    with pytest.raises(RuntimeError) as caught:
        attention_function("sdpa_math")(q, k[..., :8], v)
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize("make", [attention_function, lambda name: choose(name)])
def test_an_unknown_name_lists_the_valid_ones(make):
    with pytest.raises(
        UserError, match=r"unknown attention kernel 'sdpa_flsh'.*auto, sdpa_flash, sdpa_cudnn"
    ):
        make("sdpa_flsh")


def choose(name="auto", device_type="cuda", dtype=torch.bfloat16, head_dim=128, compute_capability=(9, 0)):
    return choose_attention(
        name,
        device_type=device_type,
        dtype=dtype,
        head_dim=head_dim,
        compute_capability=compute_capability,
    )


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({}, "sdpa_cudnn"),
        ({"dtype": torch.float16, "compute_capability": (10, 0)}, "sdpa_cudnn"),
        ({"head_dim": 20}, "sdpa_flash"),
        ({"compute_capability": (8, 6)}, "sdpa_flash"),
        ({"compute_capability": None}, "sdpa_flash"),
        ({"dtype": torch.float32}, "sdpa_efficient"),
        ({"dtype": torch.float64}, "sdpa_math"),
        ({"device_type": "cpu", "dtype": torch.float32, "compute_capability": None}, "sdpa_flash"),
        ({"device_type": "meta"}, "sdpa_math"),
    ],
)
def test_auto(facts, name):
    assert choose(**facts) == name


@pytest.mark.parametrize("name", SDPA_BACKENDS)
def test_a_choice_is_kept_even_where_it_cannot_run(name):
    assert choose(name, device_type="cpu") == name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [24, 64, 128])
@pytest.mark.parametrize("name", [*SDPA_BACKENDS, "auto"])
def test_kernels_on_a_gpu(name, head_dim):
    if name == "sdpa_cudnn" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("cuDNN attention needs sm 8.0")
    inputs = qkv(torch.bfloat16, "cuda", head_dim)
    out = attention_function(name)(*inputs)
    expected = softmax_attention(*qkv(torch.float64, "cuda", head_dim))
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)
    out.square().sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_cudnn"])
def test_half_precision_kernels_refuse_fp32_on_a_gpu(name):
    with pytest.raises(UserError, match=f"attention={name} cannot run on cuda with float32"):
        attention_function(name)(*qkv(torch.float32, "cuda", 64))
