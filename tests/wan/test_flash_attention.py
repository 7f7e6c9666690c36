import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from wanexp.errors import UserError
from wanexp.wan import flash_attention as flash
from wanexp.wan.attention import KERNELS, attention_function, attention_with_lse, is_lossy, kernel_name
from wanexp.wan.flash_attention import FLASH_KERNELS, CannotRun, flash_attention, quantise_per_head, refusal


def in_fp32(q, k, v):
    """Result and log-sum-exp by the formula."""
    q, k, v = (x.float() for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


def qkv(queries=5, keys=7, batch=2, heads=3, head_dim=16, device="cpu", dtype=torch.bfloat16):
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(batch, tokens, heads, head_dim, generator=generator, device=device).to(dtype)
        for tokens in (queries, keys, keys)
    ]


def rel_l2(found, expected):
    return float((found.float() - expected).norm() / expected.norm())


# --- stand-ins for the packages: their calling conventions around the formula ---


def descaled(x, descale):
    if x.dtype != torch.float8_e4m3fn:
        assert descale is None
        return x
    assert descale.shape == (x.shape[0], x.shape[2]) and descale.dtype == torch.float32
    return x.float() * descale[:, None, :, None]


def fa3_func(
    q, k, v, softmax_scale=None, q_descale=None, k_descale=None, v_descale=None, return_attn_probs=False
):
    out, lse = in_fp32(descaled(q, q_descale), descaled(k, k_descale), descaled(v, v_descale))
    return (out.bfloat16(), lse) if return_attn_probs else out.bfloat16()


def old_fa3_func(q, k, v, softmax_scale=None, q_descale=None, k_descale=None, v_descale=None):
    return fa3_func(q, k, v, None, q_descale, k_descale, v_descale, return_attn_probs=True)


def fa4_func(q, k, v, softmax_scale=None, return_lse=False):
    out, lse = in_fp32(q, k, v)
    return out.to(q.dtype), lse if return_lse else None


def longer_fa4_func(q, k, v, softmax_scale=None, return_lse=False):
    return (*fa4_func(q, k, v, softmax_scale, return_lse), None, None)


@pytest.fixture
def install(monkeypatch):
    """Puts a package in place; all others are not installed. Kernels then run wherever their inputs are."""
    flash.package_function.cache_clear()
    for modules in flash.MODULES.values():
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)  # as if it could not be found
    monkeypatch.setattr(flash, "refusal", on_any_device)

    def put(module, function):
        package = ModuleType(module)
        package.flash_attn_func = function
        monkeypatch.setitem(sys.modules, module, package)

    yield put
    flash.package_function.cache_clear()


def on_any_device(kernel, **facts):
    facts |= {"device_type": "cuda", "compute_capability": None}
    return refusal(kernel, **facts)


PACKAGES = [
    ("fa3", "fa3_fwd_interface", fa3_func),
    ("fa3", "flash_attn_interface", fa3_func),
    ("fa3", "flash_attn_interface", old_fa3_func),
    ("fa3_fp8", "fa3_fwd_interface", fa3_func),
    ("fa3_fp8", "flash_attn_interface", old_fa3_func),
    ("fa4", "flash_attn.cute", fa4_func),
    ("fa4", "flash_attn.cute", longer_fa4_func),
]


@pytest.mark.parametrize(("kernel", "module", "function"), PACKAGES)
def test_every_known_interface(install, kernel, module, function):
    install(module, function)
    q, k, v = qkv(queries=130, keys=70)
    expected, expected_lse = in_fp32(q, k, v)
    out, lse = attention_with_lse(kernel)(q, k, v)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert out.shape == q.shape and lse.shape == (2, 3, 130)
    assert rel_l2(out, expected) < (0.1 if is_lossy(kernel) else 0.004)
    assert (lse - expected_lse).abs().max() < (0.1 if is_lossy(kernel) else 1e-4)
    assert torch.equal(attention_function(kernel)(q, k, v), out)
    assert kernel_name(attention_function(kernel)) == kernel


@pytest.mark.parametrize(("kernel", "module", "function"), [PACKAGES[0], PACKAGES[3], PACKAGES[6]])
def test_the_compiler_does_not_break_on_it(install, kernel, module, function):
    install(module, function)
    attend = attention_function(kernel)

    def block(q, k, v):
        return (attend(q * 2, k, v).flatten(2) + 1).relu()

    with torch.inference_mode():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*qkv()), block(*qkv()))


@pytest.mark.parametrize(("kernel", "module", "function"), [PACKAGES[0], PACKAGES[6]])
def test_the_operator_keeps_its_promises(install, kernel, module, function):
    install(module, function)
    operator = getattr(torch.ops.wanexp, kernel).default
    torch.library.opcheck(operator, tuple(qkv()), test_utils=("test_schema", "test_faketensor"))


def test_the_operator_in_8_bits_keeps_its_promises(install):
    install("fa3_fwd_interface", fa3_func)
    tensors, descales = zip(*map(quantise_per_head, qkv()), strict=True)
    torch.library.opcheck(
        torch.ops.wanexp.fa3_fp8.default, (*tensors, *descales), test_utils="test_faketensor"
    )


def test_a_kernel_without_its_package_says_what_to_install(install):
    with pytest.raises(CannotRun, match=r"fa3 cannot run here: fa3-fwd or flash-attn-3 is not installed"):
        attention_function("fa3")(*qkv())
    with pytest.raises(UserError, match=r"fa4 cannot run here: flash-attn-4 is not installed; write"):
        attention_with_lse("fa4")(*qkv())


def test_a_package_that_lacks_what_it_needs_is_not_taken_for_missing(install, monkeypatch, tmp_path):
    (tmp_path / "fa3_fwd_interface.py").write_text("import no_such_module_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fa3_fwd_interface")
    install("flash_attn_interface", fa3_func)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        attention_function("fa3")(*qkv())


def test_an_interface_without_a_log_sum_exp_is_an_error(install):
    install("flash_attn.cute", lambda q, k, v: in_fp32(q, k, v)[0])
    with pytest.raises(RuntimeError, match="gave no log-sum-exp"):
        attention_function("fa4")(*qkv())


@pytest.mark.parametrize("kernel", FLASH_KERNELS)
def test_no_kernel_here_is_for_training(install, kernel):
    q, k, v = qkv()
    with pytest.raises(CannotRun, match=f"attention={kernel} cannot run in training"):
        flash_attention(kernel, q, k.requires_grad_(), v)


@pytest.mark.parametrize("kernel", FLASH_KERNELS)
def test_no_kernel_here_runs_on_the_cpu(kernel):
    with pytest.raises(CannotRun, match=f"attention={kernel} cannot run on cpu: it needs a CUDA device"):
        flash_attention(kernel, *qkv())


@pytest.mark.parametrize(
    ("kernel", "facts", "reason"),
    [
        ("fa3", {}, None),
        ("fa3", {"compute_capability": (9, 0)}, None),
        ("fa3", {"compute_capability": (8, 0)}, "on sm_80: it is made for Hopper (sm_90)"),
        ("fa3_fp8", {"compute_capability": (10, 0)}, "on sm_100: it is made for Hopper (sm_90)"),
        ("fa4", {"compute_capability": (10, 0)}, None),
        ("fa4", {"compute_capability": (7, 5)}, "on sm_75: it needs sm_80 or newer"),
        ("fa3", {"dtype": torch.float16}, "in float16: it takes bfloat16"),
        ("fa4", {"dtype": torch.float16}, None),
        ("fa4", {"dtype": torch.float32}, "in float32: it takes bfloat16 and float16"),
        ("fa3", {"head_dim": 24}, None),
        ("fa3_fp8", {"head_dim": 24}, "with head_dim 24: it takes up to 256, divisible by 16"),
        ("fa4", {"training": True}, "in training: it has no backward pass"),
        ("fa4", {"device_type": "cpu"}, "on cpu: it needs a CUDA device"),
    ],
)
def test_refusal(kernel, facts, reason):
    assert refusal(kernel, **facts) == reason


@pytest.mark.parametrize("peak", [1e-4, 1.0, 3e4])
def test_quantisation_is_by_head_and_as_fine_as_8_bits_allow(peak):
    x, _, _ = qkv(queries=50)
    x[0, :, 1] *= peak
    found, descale = quantise_per_head(x)
    assert found.dtype == torch.float8_e4m3fn and descale.shape == (2, 3)
    back = found.float() * descale[:, None, :, None]
    for batch, head in ((0, 0), (0, 1), (1, 2)):
        # Round to nearest with 3 bits of mantissa: half of 2^-3 at most, 0.026 on average.
        assert rel_l2(back[batch, :, head], x[batch, :, head].float()) < 0.03
        assert found[batch, :, head].float().abs().max() == flash.FP8_MAX


def test_a_head_of_zeros_stays_one():
    found, descale = quantise_per_head(torch.zeros(1, 4, 2, 16, dtype=torch.bfloat16))
    assert not found.float().any() and torch.isfinite(descale).all()


ON_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
runs_kernels = pytest.mark.gpu if ON_GPU else pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


@pytest.mark.skipif(ON_GPU and torch.cuda.get_device_capability() < (8, 9), reason="needs float8 units")
@runs_kernels
@pytest.mark.parametrize("layout", ["packed", "tokens_first", "heads_first", "strided"])
@pytest.mark.parametrize(("tokens", "head_dim"), [(5, 16), (64, 128), (131, 128), (257, 48), (1000, 80)])
def test_the_kernels_quantise_as_plain_torch(tokens, head_dim, layout, monkeypatch):
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    shapes = {
        "packed": (2, tokens, 3, head_dim),
        "tokens_first": (tokens, 2, 3, head_dim),
        "heads_first": (2, 3, tokens, head_dim),
        "strided": (2, tokens, 3, 2 * head_dim),
    }
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shapes[layout], generator=generator).to(torch.bfloat16)
    x = x.cuda() if ON_GPU else x
    x = {"tokens_first": x.transpose(0, 1), "heads_first": x.transpose(1, 2)}.get(layout, x)[..., -head_dim:]
    x[0, :, 1] *= 1e-3
    x[1, :, 2] = 0
    values, descale = flash.quantise_by_kernels(x)
    expected, expected_descale = (tensor.to(x.device) for tensor in quantise_per_head(x.cpu()))
    assert values.shape == x.shape and values.is_contiguous() and values.dtype == flash.FP8
    torch.testing.assert_close(descale, expected_descale, rtol=1e-6, atol=0)
    given, wanted = (y.float() * expected_descale[:, None, :, None] for y in (values, expected))
    # The interpreter's e4m3 loses the carry of what rounds up to a power of two.
    assert (given != wanted).float().mean() < (1e-2 if ON_GPU else 0.08)
    assert rel_l2(given, wanted) < (1e-2 if ON_GPU else 0.1)


# --- on a GPU, with whatever is installed ---

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def skip_unless_it_runs(kernel):
    try:
        if kernel in FLASH_KERNELS:
            flash.package_function("fa4" if kernel == "fa4" else "fa3")
            reason = refusal(kernel, compute_capability=torch.cuda.get_device_capability())
        else:
            reason = "before sm_80" if torch.cuda.get_device_capability() < (8, 0) else None
    except CannotRun as error:
        reason = str(error)
    if reason:
        pytest.skip(reason)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("keys", [None, 512], ids=["self", "cross"])
@pytest.mark.parametrize("queries", [130, 257, 1000])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_and_their_log_sum_exp_on_a_gpu(kernel, queries, keys):
    skip_unless_it_runs(kernel)
    q, k, v = qkv(queries, keys or queries, head_dim=128, device="cuda")
    expected, expected_lse = in_fp32(q, k, v)
    with torch.inference_mode():
        out, lse = attention_with_lse(kernel)(q, k, v)
        alone = attention_function(kernel)(q, k, v)
    assert out.shape == q.shape and lse.shape == (2, 3, queries) and lse.dtype == torch.float32
    for found in (out, alone):
        assert rel_l2(found, expected) < (0.12 if is_lossy(kernel) else 0.005)
    assert (lse - expected_lse).abs().max() < (0.2 if is_lossy(kernel) else 2e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel", FLASH_KERNELS)
def test_kernels_take_tokens_first_views_on_a_gpu(kernel, batch):
    """Of what Ulysses hands on, views of one buffer [tokens, batch, 3, heads, head_dim]."""
    skip_unless_it_runs(kernel)
    buffer = torch.randn(257, batch, 3, 4, 128, device="cuda", dtype=torch.bfloat16)
    views = [part.transpose(0, 1) for part in buffer.unbind(2)]
    found = attention_with_lse(kernel)(*views)
    torch.testing.assert_close(found, attention_with_lse(kernel)(*(view.contiguous() for view in views)))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "sdpa_math"])
def test_the_compiler_does_not_break_on_it_on_a_gpu(kernel):
    skip_unless_it_runs(kernel)
    attend = attention_function(kernel)

    def block(q, k, v):
        return (attend(q * 2, k, v).flatten(2) + 1).relu()

    inputs = qkv(257, 512, head_dim=128, device="cuda")
    with torch.inference_mode():
        torch.testing.assert_close(
            torch.compile(block, fullgraph=True)(*inputs), block(*inputs), rtol=0.02, atol=0.02
        )


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kernel", FLASH_KERNELS)
def test_a_kernel_runs_where_its_inputs_are(kernel):
    skip_unless_it_runs(kernel)
    with torch.cuda.device(0):
        q, k, v = qkv(257, 512, head_dim=128, device="cuda:1")
        out, lse = flash_attention(kernel, q, k, v)
    assert out.device == lse.device == q.device
    assert rel_l2(out, in_fp32(q, k, v)[0]) < (0.12 if is_lossy(kernel) else 0.005)
