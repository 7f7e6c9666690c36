import pytest
import torch

from wanexp.errors import UserError
from wanexp.wan.attention import (
    SDPA_BACKENDS,
    attention_function,
    attention_with_lse,
    choose_attention,
    kernel_name,
)

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
        ({"compute_capability": (7, 5), "dtype": torch.float16}, "sdpa_efficient"),
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


# --- with the log-sum-exp ---


def check_with_lse(name, tolerance, tokens=5, **options):
    q, k, v = (tensor.detach() for tensor in qkv(**options))
    q = q[:, :1].expand(-1, tokens, -1, -1) * torch.linspace(-4, 4, tokens, device=q.device)[
        :, None, None
    ].to(q)
    out, lse = attention_with_lse(name)(q, k, v)
    wide = [tensor.double() for tensor in (q, k, v)]
    scores = torch.einsum("bqhd,bkhd->bhqk", wide[0], wide[1]) / q.shape[-1] ** 0.5
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (2, 3, tokens) and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), softmax_attention(*wide), rtol=tolerance, atol=tolerance)
    # The scores are accumulated in fp32 from the same inputs, whatever their dtype.
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_kernels_return_their_log_sum_exp(name, dtype, tolerance):
    check_with_lse(name, tolerance, dtype=dtype)


def check_tokens_first_views(name, batch, tolerance, **options):
    """Of what Ulysses hands on, views of one buffer [tokens, batch, 3, heads, head_dim]."""
    buffer = torch.randn(9, batch, 3, 4, 64, **options)
    views = [part.transpose(0, 1) for part in buffer.unbind(2)]
    expected = attention_with_lse(name)(*(view.contiguous() for view in views))
    found = attention_with_lse(name)(*views)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    out = attention_function(name)(*views)
    torch.testing.assert_close(out, expected[0], rtol=tolerance, atol=tolerance)
    # Laid out tokens first too, and so sent back without a copy: by all kernels made for speed.
    assert name == "sdpa_math" or batch > 1 or out.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_kernels_take_tokens_first_views(name, batch):
    check_tokens_first_views(name, batch, 1e-5)


@pytest.mark.parametrize("name", ["sdpa_cudnn", "sdpa_efficient"])
def test_a_kernel_without_its_log_sum_exp_here_is_an_error_that_names_the_fix(name):
    with pytest.raises(UserError, match=rf"attention={name} cannot run on cpu .*write attention=auto"):
        attention_with_lse(name)(*qkv())


def test_an_unknown_name_has_no_log_sum_exp_either():
    with pytest.raises(UserError, match="unknown attention kernel 'flash'"):
        attention_with_lse("flash")


@pytest.mark.parametrize("name", [*SDPA_BACKENDS, "auto"])
def test_a_kernel_keeps_its_name(name):
    assert kernel_name(attention_function(name)) == name


def test_a_function_without_a_name():
    with pytest.raises(UserError, match="as of attention_function; found <function"):
        kernel_name(softmax_attention)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [5, 33])
@pytest.mark.parametrize("head_dim", [20, 24, 64, 128])
@pytest.mark.parametrize("name", [*SDPA_BACKENDS, "auto"])
def test_kernels_return_their_log_sum_exp_on_a_gpu(name, head_dim, tokens):
    if name == "sdpa_cudnn" and (torch.cuda.get_device_capability() < (8, 0) or head_dim % 8):
        pytest.skip("cuDNN attention needs sm 8.0 and a head_dim that divides by 8")
    if name == "sdpa_efficient" and head_dim % 8:
        pytest.skip("efficient attention in 16 bits needs a head_dim that divides by 8")
    check_with_lse(name, 0.02, tokens, dtype=torch.bfloat16, device="cuda", head_dim=head_dim)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", [*SDPA_BACKENDS, "auto"])
def test_kernels_take_tokens_first_views_on_a_gpu(name, batch):
    if name == "sdpa_cudnn" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("cuDNN attention needs sm 8.0")
    check_tokens_first_views(name, batch, 0.02, dtype=torch.bfloat16, device="cuda")
