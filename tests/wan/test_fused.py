"""The Triton kernels against the plain torch path: on a GPU, or where Triton is installed without one, interpreted.

The interpreter cuts bf16 off where GPUs round to nearest: there, fp16 tells whether roundings are in the right places.
Its e4m3 loses the carry of what rounds up to a power of two, so that torch's stands in for it.
"""

import dataclasses
import gc
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from tests.wan.test_transformer import VARIANTS, rel_l2
from wanexp.errors import KernelError, UserError
from wanexp.offload.quantize import QuantizedLinear, quantize_linears
from wanexp.wan import fused
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.block import Attention, Fp32LayerNorm, RMSNorm, WanBlock, gated_add, modulated_norm, set_fused
from wanexp.wan.linear import Linear
from wanexp.wan.quantize_rows import E4M3, QuantizedInput, quantize, quantize_by_kernel
from wanexp.wan.rope import apply_rope, rope_tables
from wanexp.wan.transformer import WanTransformer

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HAS_TRITON = importlib.util.find_spec("triton") is not None
runs_kernels = pytest.mark.gpu if ON_GPU else pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 1e-3 if ON_GPU else 1.5e-2}
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_SIZE = pytest.mark.parametrize(
    ("dim", "head_dim", "batch"),
    [(96, 24, 3), (100, 10, 1), (1536, 128, 1), (1664, 128, 1), (3072, 128, 1), (5120, 128, 2)],
)
TOKENS = 3
CAN_WRITE_FLOAT8 = not ON_GPU or torch.cuda.get_device_capability() >= (8, 9)
writes_float8 = pytest.mark.skipif(not CAN_WRITE_FLOAT8, reason="needs a GPU with float8 units")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        if HAS_TRITON:
            from triton.runtime import interpreter

            real = interpreter._convert_float

            def convert(x, given, wanted, rounding):
                if wanted.name != "fp8e4nv":
                    return real(x, given, wanted, rounding)
                return torch.from_numpy(x).to(E4M3).view(torch.uint8).numpy()

            monkeypatch.setattr(interpreter, "_convert_float", convert)
    with torch.inference_mode():
        yield


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2 + 0.5).to(DEVICE, dtype)


def vectors(batch: int, dim: int, tokened: bool) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Six strided modulation vectors, of each sample or of 4 timesteps with the index of each token."""
    index = torch.arange(batch * TOKENS, device=DEVICE).view(batch, TOKENS) * 7 % 4 if tokened else None
    return list(randn(4 if tokened else batch, 6, dim, seed=9).unbind(1)), index


def rms_norm(dim: int, dtype: torch.dtype, seed: int) -> RMSNorm:
    norm = RMSNorm(dim, dtype).to(DEVICE)
    norm.weight.copy_(randn(dim, dtype=dtype, seed=seed))
    return norm


def layer_norm(dim: int, dtype: torch.dtype) -> Fp32LayerNorm:
    norm = Fp32LayerNorm(dim, eps=1e-6, dtype=dtype, device=DEVICE)
    norm.weight.copy_(randn(dim, dtype=dtype, seed=5))
    norm.bias.copy_(randn(dim, dtype=dtype, seed=6))
    return norm


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert rel_l2(found, expected) < TOLERANCE[expected.dtype]


class Float8Layer(nn.Module):
    """What a kernel looks at in the layer that reads its result."""

    takes_float8 = True


def close_in_float8(found: object, expected: torch.Tensor, rounded: torch.dtype) -> None:
    """As near to `expected` as e4m3 allows, of which a value was rounded to `rounded` on one of the two ways."""
    assert isinstance(found, QuantizedInput)
    assert found.values.dtype == E4M3 and found.values.shape == expected.shape
    _, scales = quantize(expected, E4M3)
    assert found.scales.shape == scales.shape and found.scales.dtype == torch.float32
    eps = torch.finfo(rounded).eps * (1 if ON_GPU else 4)
    torch.testing.assert_close(found.scales, scales, rtol=max(2 * eps, 1e-5), atol=0)
    assert (found.values.float().abs().amax(-1) == 448).all()
    # Half a step of 3 bits of mantissa, or of the least number, 2^-9; and what was rounded before.
    x, peak = expected.float(), expected.float().abs().amax(-1, keepdim=True)
    allowed = (x.abs() * 2**-4).maximum(scales * 2**-10) * 1.001 + max(8 * eps, 1e-5) * peak
    assert ((found.values.float() * found.scales - x).abs() <= allowed).all()
    assert rel_l2(found.values.float() * found.scales, x) < 0.035


def steps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many numbers of e4m3 lie from each of `a` to that of `b`."""
    a, b = (x.float().sign().int() * (x.view(torch.uint8).int() & 127) for x in (a, b))
    return (a - b).abs()


# --- kernel by kernel ---


@runs_kernels
@pytest.mark.parametrize("tokened", [False, True], ids=["per_sample", "per_token"])
@pytest.mark.parametrize("stream", [None, torch.float32], ids=["stream_as_computed", "stream_fp32"])
@EVERY_DTYPE
@EVERY_SIZE
def test_norms_and_residuals(dim, head_dim, batch, dtype, stream, tokened):
    x = randn(batch, TOKENS, dim, dtype=stream or dtype)
    update = randn(batch, TOKENS, dim, dtype=dtype, seed=1)
    (shift1, scale1, gate1, shift2, scale2, gate2), index = vectors(batch, dim, tokened)
    norm3 = layer_norm(dim, dtype)

    close(
        fused.modulated_norm(x, shift1, scale1, index, dtype),
        modulated_norm(x, shift1, scale1, index, dtype),
    )

    expected = gated_add(x, update, gate1, index)
    before = x.clone()
    total, normed = fused.gated_add_and_norm(x, update.clone(), gate1, index, norm3, overwrite=False)
    assert torch.equal(x, before)
    close(total, expected)
    close(normed, norm3(expected).to(dtype))
    again, _ = fused.gated_add_and_norm(before, update.clone(), gate1, index, norm3, overwrite=True)
    assert again is before
    assert torch.equal(again, total)

    expected = total + update
    normed = fused.add_and_modulated_norm(total, update.clone(), shift2, scale2, index)
    close(total, expected)
    close(normed, modulated_norm(expected, shift2, scale2, index, dtype))

    expected = gated_add(total, update, gate2, index)
    fused.gated_add(total, update, gate2, index)
    close(total, expected)


@runs_kernels
@writes_float8
@pytest.mark.parametrize("tokened", [False, True], ids=["per_sample", "per_token"])
@EVERY_DTYPE
@EVERY_SIZE
def test_norms_in_float8(dim, head_dim, batch, dtype, tokened):
    x, update = randn(batch, TOKENS, dim, dtype=dtype), randn(batch, TOKENS, dim, dtype=dtype, seed=1)
    (shift1, scale1, gate1, shift2, scale2, _), index = vectors(batch, dim, tokened)
    norm3, reader = layer_norm(dim, dtype), Float8Layer()

    found = fused.modulated_norm(x, shift1, scale1, index, dtype, reader=reader)
    close_in_float8(found, modulated_norm(x, shift1, scale1, index, torch.float32), dtype)

    expected, _ = fused.gated_add_and_norm(x, update.clone(), gate1, index, norm3, overwrite=False)
    consumed = update.clone()
    total, normed = fused.gated_add_and_norm(x, consumed, gate1, index, norm3, overwrite=False, reader=reader)
    assert torch.equal(total, expected)
    close_in_float8(normed, norm3(total), dtype)
    assert consumed.untyped_storage().nbytes() == 0

    consumed, expected = update.clone(), total + update
    normed = fused.add_and_modulated_norm(total, consumed, shift2, scale2, index, reader=reader)
    close(total, expected)
    close_in_float8(normed, modulated_norm(total, shift2, scale2, index, torch.float32), dtype)
    assert consumed.untyped_storage().nbytes() == 0


@runs_kernels
@writes_float8
@EVERY_DTYPE
@pytest.mark.parametrize("width", [24, 1000, 1536, 5120, 6912, 8960, 13824, 14336])
def test_gelu_in_float8(width, dtype):
    x = randn(2, TOKENS, width, dtype=dtype) * 3
    x[0, 1] *= 1e-3
    close_in_float8(quantize_by_kernel(x, gelu=True), gelu(x.float(), approximate="tanh"), torch.float16)


@runs_kernels
@writes_float8
@EVERY_DTYPE
@pytest.mark.parametrize("width", [24, 1000, 5120, 13824])
def test_rows_in_float8(width, dtype):
    x = randn(2, 4, width, dtype=dtype)
    x[0, 0], x[0, 1], x[1, 0] = 0, x[0, 1] * 500, x[1, 0] * 1e-3
    values, scales = quantize_by_kernel(x)
    expected, expected_scales = quantize(x, E4M3)
    assert torch.equal(scales, expected_scales)
    apart = steps_apart(values, expected)
    assert apart.max() <= 1  # of halves only, which go either way
    assert (apart > 0).float().mean() < 1e-2


@runs_kernels
@writes_float8
def test_broken_numbers_stay_broken_in_float8():
    x = randn(2, TOKENS, 40)
    x[0, 1, 7], x[1, 2, 3] = torch.nan, torch.inf
    for gelu_too in (False, True):
        values, scales = quantize_by_kernel(x, gelu=gelu_too)
        broken = (values.float() * scales).isnan().any(-1).tolist()
        assert broken == [[False, True, False], [False, False, True]]


@runs_kernels
@EVERY_DTYPE
@EVERY_SIZE
def test_rms_norm_and_rope(dim, head_dim, batch, dtype):
    x, norm = randn(batch, TOKENS, dim, dtype=dtype), rms_norm(dim, dtype, 2)
    rope = rope_tables(head_dim, (1, TOKENS, 1), DEVICE)
    expected = apply_rope(norm(x).unflatten(-1, (-1, head_dim)), rope).flatten(2)
    close(fused.rms_norm(x.clone(), norm.weight, rope), expected)
    close(fused.rms_norm(x.clone(), norm.weight), norm(x))


@runs_kernels
def test_heads_of_one_rank_take_the_sums_of_all():
    dim, head_dim, own = 256, 32, 96
    x, weight = randn(2, TOKENS, dim), randn(dim, seed=2)
    sums = x.square().sum(-1, keepdim=True)
    for rope in (None, rope_tables(head_dim, (1, TOKENS, 1), DEVICE)):
        part = x[..., :own].clone()
        found = fused.rms_norm(part, weight[:own], rope, square_sums=sums, full_dim=dim)
        close(found, fused.rms_norm(x.clone(), weight, rope)[..., :own])


@runs_kernels
@EVERY_DTYPE
def test_gelu(dtype):
    x = randn(3, 7, 131, dtype=dtype) * 4
    x.view(-1)[:4] = torch.tensor([0.0, -60.0, 60.0, 250.0])
    expected = gelu(x, approximate="tanh")
    close(fused.gelu(x), expected)
    assert x.view(-1)[:4].tolist() == [0.0, 0.0, 60.0, 250.0]


@runs_kernels
@EVERY_DTYPE
def test_linear_gelu_of_a_plain_and_of_any_other_layer(dtype):
    class Doubled(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = randn(2, 16, 64, dtype=dtype)
    for kind, factor in ((Linear, 1), (Doubled, 2)):
        linear = kind(64, 96, dtype=dtype, device=DEVICE)
        expected = gelu(factor * nn.functional.linear(x, linear.weight, linear.bias), approximate="tanh")
        # A GELU in the epilogue sees what was not rounded yet.
        assert rel_l2(fused.linear_gelu(linear, x), expected) < max(TOLERANCE[dtype], 4e-3)


@runs_kernels
def test_inputs_need_not_be_contiguous():
    x, update = randn(2, 2 * TOKENS, 64)[:, ::2], randn(64, TOKENS, 2, seed=1).permute(2, 1, 0)
    (shift, scale, gate, *_), _ = vectors(2, 64, tokened=False)
    norm3 = layer_norm(64, torch.float32)
    expected = gated_add(x, update, gate, None)
    close(
        fused.modulated_norm(x, shift, scale, None, x.dtype), modulated_norm(x, shift, scale, None, x.dtype)
    )
    total, normed = fused.gated_add_and_norm(x, update, gate, None, norm3, overwrite=True)
    close(total, expected)
    close(normed, norm3(expected))


@runs_kernels
def test_the_compiler_keeps_the_kernels_whole():
    x, update = randn(1, TOKENS, 96), randn(1, TOKENS, 96, seed=1)
    (shift, scale, gate, *_), _ = vectors(1, 96, tokened=False)
    norm3 = layer_norm(96, torch.float32)

    def between(x, update):
        normed = fused.modulated_norm(x, shift, scale, None, x.dtype)
        return fused.gated_add_and_norm(x, normed + update, gate, None, norm3, overwrite=False)

    compiled = torch.compile(between, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(x, update), between(x, update), strict=True):
        assert torch.equal(found, expected)


# --- the model ---


# The variants of the tests of the model, with little text: the interpreter takes milliseconds a row.
SMALL = {
    name: dataclasses.replace(arch, num_layers=1, text_len=12, clip_tokens=min(arch.clip_tokens, 9))
    for name, arch in VARIANTS.items()
    if name != "flf2v"
}
GRID = (3, 1, 3)
every_small = pytest.mark.parametrize("variant", SMALL)


def fused_and_plain(
    variant: str, dtype: torch.dtype = torch.float32, residual: torch.dtype | None = None
) -> list[WanTransformer]:
    """Two models of the same weights, of which none is 0 or 1."""
    models = [WanTransformer(SMALL[variant], dtype=dtype, residual=residual) for _ in range(2)]
    for index, parameter in enumerate(models[0].parameters()):
        if parameter.ndim == 1:  # of norms, and biases
            parameter.add_(0.1 * randn(*parameter.shape, seed=index).cpu())
    models[1].load_state_dict(models[0].state_dict())
    for model, name in zip(models, ("triton", "torch"), strict=True):
        model.to(DEVICE).set_kernels(name)
    return models


def inputs(variant: str, batch: int = 1, tokened: bool = False) -> dict[str, torch.Tensor]:
    arch = SMALL[variant]
    frames, height, width = GRID[0], 2 * GRID[1], 2 * GRID[2]
    timestep = torch.tensor([999.0, 123.4, 500.0][:batch], device=DEVICE)
    if tokened:  # the first frame is clean
        timestep = timestep[:, None].repeat(1, GRID[0] * GRID[1] * GRID[2])
        timestep[:, : GRID[1] * GRID[2]] = 0
    given = {
        "latent": randn(batch, arch.out_channels, frames, height, width),
        "timestep": timestep,
        "text": randn(batch, 7, arch.text_dim, seed=1),
    }
    if arch.in_channels > arch.out_channels:
        given["image_latent"] = randn(batch, arch.in_channels - arch.out_channels, frames, height, width)
    if arch.clip_tokens:
        given["clip_features"] = randn(batch, arch.clip_tokens, arch.clip_dim)
    return given


@runs_kernels
@pytest.mark.parametrize("batch", [1, 3])
@every_small
def test_the_model_gives_the_same_answer(variant, batch):
    given = inputs(variant, batch)
    found, expected = (model(**given) for model in fused_and_plain(variant))
    assert rel_l2(found, expected) < 3e-6


@runs_kernels
@pytest.mark.parametrize("residual", [None, torch.float32], ids=["as_computed", "fp32"])
@pytest.mark.parametrize("tokened", [False, True], ids=["per_sample", "per_token"])
@pytest.mark.parametrize("variant", ["t2v_head_dim_24", "i2v_clip"])
def test_the_model_in_half_precision(variant, tokened, residual):
    given = inputs(variant, 3, tokened)
    found, expected = (model(**given) for model in fused_and_plain(variant, torch.float16, residual))
    assert rel_l2(found, expected) < 2e-3


def float8_models(variant: str, dtype: torch.dtype = torch.float32) -> list[WanTransformer]:
    """As `fused_and_plain`, with float8 linear layers of the same weights."""
    models = fused_and_plain(variant, dtype)
    for model in models:
        quantize_linears(model, "fp8")
    return models


@runs_kernels
@writes_float8
@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("tokened", [False, True], ids=["per_sample", "per_token"])
@pytest.mark.parametrize("variant", ["t2v", "i2v_clip"])
def test_a_float8_model_reads_what_the_kernels_wrote(variant, tokened, num_chunks, monkeypatch):
    given, read = inputs(variant, 3, tokened), []
    forward = QuantizedLinear.forward

    def counted(layer, x):
        read.append(isinstance(x, QuantizedInput))
        return forward(layer, x)

    monkeypatch.setattr(QuantizedLinear, "forward", counted)
    found, expected = (model(**given) for model in map(chunked(num_chunks), float8_models(variant)))
    # Roundings of 8 bits fall otherwise where what is rounded differs by a hair.
    assert rel_l2(found, expected) < 0.02
    # q, k and v of self-attention, of the others cross-attention's q and the FFN; in plain torch q, k and v alone
    on_kernels, in_torch = read[: len(read) // 2], read[len(read) // 2 :]
    assert sum(on_kernels) == 3 + 1 + 2 * num_chunks
    assert sum(in_torch) == 3


def chunked(num_chunks: int):
    return lambda model: model.set_ffn_chunks(num_chunks) or model


@runs_kernels
@writes_float8
def test_float8_blocks_leave_what_is_not_theirs():
    """The hidden states that a caller keeps, and all that is given beside them."""
    model = float8_models("t2v")[0]
    given = inputs("t2v")
    timestep = given.pop("timestep")
    pending = model.begin(given.pop("latent"), timestep, **given)
    arguments = [pending.hidden_states, *pending.inputs]
    before = [x.clone() for x in (*arguments[:3], *arguments[3])]
    out = model.blocks[0](*arguments)
    for x, was in zip((*arguments[:3], *arguments[3]), before, strict=True):
        assert torch.equal(x, was)
    assert torch.equal(model.blocks[0](*arguments, in_place=True), out)


@runs_kernels
def test_chunks_of_the_ffn_change_nothing():
    given = inputs("t2v", 3)
    for model in fused_and_plain("t2v"):
        expected = model(**given)
        for num_chunks in (2, 7, 100):
            model.set_ffn_chunks(num_chunks)
            assert rel_l2(model(**given), expected) < 1e-6


def test_ffn_chunks_are_one_or_more():
    with pytest.raises(UserError, match="ffn_chunks is 1"):
        WanTransformer(SMALL["t2v"]).set_ffn_chunks(0)


def block_and_arguments(variant: str = "t2v") -> tuple[WanBlock, list]:
    model = fused_and_plain(variant, torch.float16)[0]
    given = inputs(variant)
    timestep = given.pop("timestep")
    pending = model.begin(given.pop("latent"), timestep, **given)
    return model.blocks[0], [pending.hidden_states, *pending.inputs]


@runs_kernels
def test_a_block_writes_over_its_input_only_when_told():
    block, arguments = block_and_arguments()
    before = [x.clone() for x in (*arguments[:3], *arguments[3])]
    out = block(*arguments)
    for x, was in zip((*arguments[:3], *arguments[3]), before, strict=True):
        assert torch.equal(x, was)
    in_place = block(*arguments, in_place=True)
    assert in_place is arguments[0]
    assert torch.equal(in_place, out)


@runs_kernels
def test_only_q_k_v_and_the_residual_stream_live_while_attention_runs():
    block, arguments = block_and_arguments()
    size = arguments[0].nbytes
    big: list[int] = []

    def counting(attention: Attention):
        attend = attention.attend

        def counted(q, k, v):
            storages = {
                x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for x in gc.get_objects()
                if type(x) is torch.Tensor and x.dtype == q.dtype and x.shape[:2] == q.shape[:2]
            }
            big.append(sum(nbytes == size for nbytes in storages.values()))
            return attend(q, k, v)

        return counted

    for attention in (block.self_attn, block.cross_attn):
        attention.attend = counting(attention)
    block(*arguments, in_place=True)
    assert big == [4, 2]  # x, q, k, v; x, q


@runs_kernels
def test_hooks_on_attentions_and_ffn_are_called_and_may_change_what_comes_out():
    block, arguments = block_and_arguments("i2v_clip")
    called = []
    plain = block(*arguments)
    for name in ("self_attn", "cross_attn", "ffn"):
        hook = lambda _module, _args, output, name=name: called.append(name) or 2 * output  # noqa: E731
        block.get_submodule(name).register_forward_hook(hook)
    assert not torch.equal(block(*arguments), plain)
    assert called == ["self_attn", "cross_attn", "ffn"]


@runs_kernels
def test_gradients_are_refused():
    block, arguments = block_and_arguments()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        pytest.raises(UserError, match="gradients are switched on"),
    ):
        block(*arguments)


def test_a_device_without_triton_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="runs on CUDA GPUs, found cpu; write kernels=torch"):
        fused.check_inference(torch.zeros(1))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_peak_memory_of_a_block():
    """A block of 14B: x, q, k, v and what the attention gives, each [tokens, dim]; the FFN is below (4.7)."""
    arch = WanArchitecture(dim=5120, ffn_dim=13824, num_heads=40, num_layers=1)
    with DEVICE:
        block = WanBlock(arch, torch.bfloat16, None)
        set_fused(block, True)
        tokens = 4096
        arguments = [
            torch.randn(1, tokens, 5120, dtype=torch.bfloat16),
            torch.randn(1, 6, 5120),
            torch.randn(1, 512, 5120, dtype=torch.bfloat16),
            (torch.rand(tokens, 64), torch.rand(tokens, 64)),
        ]
    block(*arguments, in_place=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    block(*arguments, in_place=True)
    peak = torch.cuda.max_memory_allocated() - before + arguments[0].nbytes
    assert peak < 5.2 * arguments[0].nbytes


# --- the choice ---


@pytest.mark.parametrize(
    ("requested", "device_type", "capability", "training", "chosen"),
    [
        ("auto", "cuda", (9, 0), False, "triton"),
        ("auto", "cuda", (9, 0), True, "torch"),
        ("auto", "cuda", (7, 5), False, "torch"),
        ("auto", "cpu", None, False, "torch"),
        ("torch", "cuda", (9, 0), False, "torch"),
        ("triton", "cuda", (8, 0), False, "triton"),
    ],
)
def test_choice(monkeypatch, requested, device_type, capability, training, chosen):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    found = fused.choose_kernels(
        requested, device_type=device_type, compute_capability=capability, training=training
    )
    assert found == chosen


@pytest.mark.parametrize(
    ("requested", "device_type", "capability", "training", "message"),
    [
        ("fast", "cuda", (9, 0), False, "unknown kernels 'fast'; write one of: auto, triton, torch"),
        ("triton", "cuda", (9, 0), True, "no backward pass"),
        ("triton", "cuda", (7, 5), False, "need compute capability 8.0, found 7.5"),
        ("triton", "mps", None, False, "run on CUDA GPUs, found mps"),
    ],
)
def test_what_cannot_be_had_is_an_error(monkeypatch, requested, device_type, capability, training, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=message) as error:
        fused.choose_kernels(
            requested, device_type=device_type, compute_capability=capability, training=training
        )
    assert "\n" not in str(error.value)


def test_without_triton_auto_is_torch_and_triton_an_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = {"device_type": "cuda", "compute_capability": (9, 0), "training": False}
    assert fused.choose_kernels("auto", **arguments) == "torch"
    with pytest.raises(KernelError, match="triton is not installed; write kernels=auto or kernels=torch"):
        fused.choose_kernels("triton", **arguments)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelError, match="they run on CUDA GPUs, found cpu"):  # what to mend first
        fused.choose_kernels("triton", device_type="cpu", compute_capability=None, training=False)


def test_tiles_are_whole_where_the_sizes_are_those_of_wan():
    assert [fused.tile_of(dim, 128) for dim in (1536, 3072, 5120)] == [512, 1024, 1024]
    assert fused.tile_of(2560, 128) == 512  # half of the heads of 14B
    assert fused.tile_of(1664, 128) == 2048  # 13 of them: one masked tile
    assert fused.tile_of(96, 24) == 128
