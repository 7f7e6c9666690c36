"""Quantised layers compute what their numbers say, come straight from files, and stay close to the model in bf16."""

import dataclasses
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.offload.models import SMALL, inputs, load, meta_model
from tests.parallel.ranks import on_ranks
from wanexp.errors import UserError
from wanexp.offload.block_swap import swap_blocks
from wanexp.offload.quantize import (
    E4M3,
    QuantizedInput,
    QuantizedLinear,
    float8_kernel,
    float8_product,
    quantize_input,
    quantize_linears,
    quantize_weight,
)
from wanexp.offload.sizes import LINEARS, block_bytes, is_quantized, tensor_bytes
from wanexp.parallel.tensor_parallel import tensor_parallel, tensor_part
from wanexp.wan import quantize_rows
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.block import SelfAttention
from wanexp.wan.checkpoint import open_checkpoint
from wanexp.wan.transformer import WanTransformer
from wanexp.wan.weights import RandomWeights
from wanexp.wan.write_checkpoint import write_checkpoint

CPU = torch.device("cpu")
I2V = dataclasses.replace(SMALL, clip_tokens=257, clip_dim=20, in_channels=24)
LOSSY = ("fp8", "fp8_weight", "int8_weight")
# Relative L2 error of the flow of a few blocks with random weights, as measured (0.032, 0.024, 0.004), with a margin.
EXPECTED_ERROR = {"fp8": 0.06, "fp8_weight": 0.045, "int8_weight": 0.012}


def quantized(
    linear: str, source, architecture: WanArchitecture = SMALL, dtype=torch.float32
) -> WanTransformer:
    model = meta_model(architecture, dtype)
    quantize_linears(model, linear)
    return load(model, source)


def random_source(architecture: WanArchitecture = SMALL) -> RandomWeights:
    return RandomWeights(architecture)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- rows ---


@pytest.mark.parametrize("dtype, step", [(torch.int8, 1 / 127 / 2), (E4M3, 2**-4)])
def test_error_is_half_a_step(dtype, step):
    x = randn(7, 33) * torch.logspace(-6, 6, 7)[:, None]
    values, scales = quantize_rows.quantize(x, dtype)
    assert values.dtype == dtype and scales.shape == (7, 1) and scales.dtype == torch.float32
    error = (values.float() * scales - x).abs()
    largest = x.abs().amax(1, keepdim=True)
    # int8: half of the common step; e4m3: half a step of 3 mantissa bits, or of its least number 2^-9.
    allowed = largest * step if dtype == torch.int8 else (x.abs() * step).maximum(largest * 2**-10 / 448)
    assert (error <= allowed * 1.0001).all()
    assert torch.equal(values.float().abs().amax(1), torch.full((7,), quantize_rows.LIMITS[dtype]))


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_rows_of_zeros_and_of_extremes(dtype, given):
    largest = torch.finfo(given).max
    x = torch.tensor([[0.0, 0.0], [largest, -largest], [1.0, 2**-30]], dtype=given)
    values, scales = quantize_rows.quantize(x, dtype)
    assert torch.isfinite(values.float()).all() and torch.isfinite(scales).all()
    limit = quantize_rows.LIMITS[dtype]
    assert values.float().tolist() == [[0, 0], [limit, -limit], [limit, 0]]


def test_broken_numbers_stay_broken():
    values, scales = quantize_rows.quantize(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]), E4M3)
    assert (values.float() * scales).isnan().any(1).tolist() == [True, False]


def test_weights_are_quantised_in_pieces(monkeypatch):
    weight = randn(37, 20).bfloat16()
    whole = quantize_weight(weight, E4M3)
    monkeypatch.setattr("wanexp.offload.quantize._AT_ONCE", 60)
    pieces = quantize_weight(weight, E4M3)
    assert torch.equal(whole[0].view(torch.uint8), pieces[0].view(torch.uint8)) and torch.equal(
        whole[1], pieces[1]
    )


# --- layers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_float8_product_is_that_of_its_numbers(dtype, has_bias):
    x, x_scale = quantize_rows.quantize(randn(10, 48), E4M3)
    weight, weight_scale = quantize_weight(randn(32, 48, seed=1), E4M3)
    bias = randn(32, seed=2).to(dtype) if has_bias else None
    found = float8_product(x, x_scale, weight, weight_scale, bias, dtype)
    numbers = (x.double() * x_scale.double()) @ (weight.double() * weight_scale.double()[:, None]).T
    exact = numbers + (bias.double() if has_bias else 0)
    assert found.dtype == dtype
    assert distance(found.double(), exact) < (1e-6 if dtype == torch.float32 else 3e-3)


def test_emulation_agrees_with_torch():
    """Where this build of torch multiplies float8 with a scale a row on a CPU."""
    x, x_scale = quantize_rows.quantize(randn(32, 64), E4M3)
    weight, weight_scale = quantize_weight(randn(48, 64, seed=1), E4M3)
    try:
        expected = torch._scaled_mm(
            x, weight.t(), scale_a=x_scale, scale_b=weight_scale[None], out_dtype=torch.bfloat16
        )
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(str(error))
    found = float8_product(x, x_scale, weight, weight_scale, None, torch.bfloat16)
    assert distance(found.float(), expected.float()) < 3e-3


@pytest.mark.parametrize("kind", LOSSY)
def test_layer_stands_for_the_linear_it_replaces(kind):
    plain = nn.Linear(96, 64).requires_grad_(False)
    layer = QuantizedLinear(plain, kind)
    x = randn(2, 5, 96)
    assert layer(x).shape == (2, 5, 64)
    assert 0 < distance(layer(x), plain(x)) < {"fp8": 0.05, "fp8_weight": 0.035, "int8_weight": 0.008}[kind]
    weight = layer.weight.float() * layer.weight_scale[:, None]
    if kind == "fp8":
        values, scales = quantize_input(x)
        x = values.float() * scales
    torch.testing.assert_close(layer(randn(2, 5, 96)), F.linear(x, weight, plain.bias), rtol=1e-5, atol=1e-5)


def test_quantised_input_is_taken_as_it_is():
    layer = QuantizedLinear(nn.Linear(96, 64).requires_grad_(False), "fp8")
    x = randn(2, 5, 96)
    assert torch.equal(layer(quantize_input(x)), layer(x))


@pytest.mark.parametrize(
    "found, expected",
    [
        (("cuda", torch.bfloat16, (64, 32), (9, 0)), "scaled_mm"),
        (("cuda", torch.bfloat16, (64, 32), (8, 9)), "scaled_mm"),
        (("cuda", torch.bfloat16, (64, 32), (8, 6)), "emulated"),
        (("cuda", torch.bfloat16, (64, 40), (9, 0)), "emulated"),
        (("cuda", torch.float16, (64, 32), (9, 0)), "emulated"),
        (("cpu", torch.bfloat16, (64, 32), None), "emulated"),
    ],
)
def test_where_float8_units_are_used(found, expected):
    assert float8_kernel(*found) == expected


# --- models ---


@pytest.mark.parametrize("architecture", [SMALL, I2V], ids=["t2v", "i2v"])
@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_error_of_a_model(kind, architecture, dtype):
    reference = load(meta_model(architecture), RandomWeights(architecture))
    model = quantized(kind, random_source(architecture), architecture, dtype)
    given = inputs(architecture)
    rounding = 0.01 if dtype == torch.bfloat16 else 0.0
    error = distance(model(**given), reference(**given))
    assert EXPECTED_ERROR[kind] / 5 < error < EXPECTED_ERROR[kind] + rounding


@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize("architecture", [SMALL, I2V], ids=["t2v", "i2v"])
def test_all_matrices_of_the_blocks_and_nothing_else(architecture, kind):
    model = meta_model(architecture, torch.bfloat16)
    names = quantize_linears(model, kind)
    shapes = dict(architecture.tensor_shapes())
    assert {f"{name}.weight" for name in names} == {
        n for n, shape in shapes.items() if is_quantized(n, shape)
    }
    block = model.blocks[0]
    held = sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))
    assert held == block_bytes(architecture, linear=kind, element_bytes=2)
    assert {name for name, _ in model.named_parameters()} == set(shapes)  # as load_weights expects
    outer = [name for name in shapes if not name.startswith("blocks.")]
    assert all(tensor_bytes(n, shapes[n], linear=kind, element_bytes=2) == 2 * prod(shapes[n]) for n in outer)


def test_nothing_to_quantise():
    model = meta_model()
    assert quantize_linears(model, "dtype") == []
    assert block_bytes(SMALL, linear="dtype", element_bytes=4) == 4 * SMALL.num_block_parameters()
    with pytest.raises(UserError, match=r"precision\.linear 'fp4' does not exist; write one of: dtype, fp8"):
        quantize_linears(model, "fp4")
    assert LINEARS[0] == "dtype"


@torch.inference_mode()
def test_self_attention_quantises_its_input_once(monkeypatch):
    model = quantized("fp8", random_source())
    apart = quantized("fp8", random_source())
    for block in apart.blocks:
        block.self_attn._forward_pre_hooks.clear()
    shapes = []
    real = quantize_rows.quantize
    monkeypatch.setattr(
        "wanexp.wan.quantize_rows.quantize", lambda x, dtype: (shapes.append(x.shape), real(x, dtype))[1]
    )
    shared = model(**inputs())
    # self: q k v at once, o; cross: q, k, v, o; FFN: two
    assert len(shapes) == 8 * SMALL.num_layers
    assert torch.equal(shared, apart(**inputs()))


@torch.inference_mode()
def test_input_quantised_by_an_earlier_kernel_passes():
    model = quantized("fp8", random_source())
    attention = model.blocks[0].self_attn
    assert isinstance(attention, SelfAttention)
    x, rope = randn(1, 45, SMALL.dim), model._rope((3, 3, 5), CPU)
    given = quantize_input(x)
    assert isinstance(given, QuantizedInput)
    assert torch.equal(attention(given, rope), attention(x, rope))


@torch.no_grad()
def test_compiles_whole():
    model = quantized("fp8", random_source())
    expected = model(**inputs())
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    assert torch.equal(model(**inputs()), expected)
    torch.compiler.reset()


# --- from files ---


@pytest.mark.parametrize("layout", ["fp8", "fp8_scaled"])
@pytest.mark.parametrize("kind", ["fp8", "fp8_weight"])
@torch.inference_mode()
def test_fp8_checkpoint_keeps_its_bits(tmp_path, layout, kind):
    file = write_checkpoint(RandomWeights(SMALL), tmp_path / "model.safetensors", layout=layout)[0]
    checkpoint = open_checkpoint(file)
    model = quantized(kind, checkpoint)
    inflated = load(meta_model(), checkpoint)
    for name in ("blocks.0.self_attn.q", "blocks.5.ffn.2", "blocks.3.cross_attn.o"):
        layer = model.get_submodule(name)
        weight = layer.weight.float() * layer.weight_scale[:, None]
        assert torch.equal(weight, inflated.get_submodule(name).weight)  # no second rounding
        assert layer.weight_scale.unique().numel() == 1
    error = distance(model(**inputs()), inflated(**inputs()))
    assert error < (1e-5 if kind == "fp8_weight" else EXPECTED_ERROR["fp8"])


@torch.inference_mode()
def test_int8_of_an_fp8_checkpoint(tmp_path):
    file = write_checkpoint(RandomWeights(SMALL), tmp_path / "model.safetensors", layout="fp8_scaled")[0]
    model = quantized("int8_weight", open_checkpoint(file))
    inflated = load(meta_model(), open_checkpoint(file))
    assert distance(model(**inputs()), inflated(**inputs())) < EXPECTED_ERROR["int8_weight"]


@torch.inference_mode()
@pytest.mark.parametrize("kind", LOSSY)
def test_bf16_checkpoint_is_quantised_as_random_weights_are(tmp_path, kind):
    file = write_checkpoint(RandomWeights(SMALL), tmp_path / "model.safetensors")[0]
    from_file = quantized(kind, open_checkpoint(file))
    assert torch.equal(from_file(**inputs()), quantized(kind, random_source())(**inputs()))


# --- with the layouts and block swap ---


@pytest.mark.parametrize("kind", LOSSY)
@torch.inference_mode()
def test_swapped_blocks_of_8_bits(kind):
    model = meta_model()
    quantize_linears(model, kind)
    swap = swap_blocks(model, (0, 2, 3, 5), device_of_block=lambda _: CPU)
    load(model, random_source(), into=swap.into)
    reference = quantized(kind, random_source())
    for seed in range(3):
        assert torch.equal(model(**inputs(seed=seed)), reference(**inputs(seed=seed)))
    layer = model.blocks[2].ffn[0]
    assert swap.into("blocks.2.ffn.0.weight_scale").data_ptr() == layer.weight_scale.data_ptr()
    assert swap.host_bytes < 4 * 1.1 * block_bytes(SMALL, linear=kind, element_bytes=4) + 4 * 40 * 256


def tensor_parallel_rank(rank: int, kind: str) -> torch.Tensor:
    flows = []
    for swaps in (False, True):
        model = meta_model()
        tensor_parallel(model, torch.distributed.group.WORLD)
        quantize_linears(model, kind)
        swap = swap_blocks(model, (1, 2, 4) if swaps else (), device_of_block=lambda _: CPU)
        load(
            model,
            random_source(),
            into=swap.into,
            part_of=lambda name, shape: tensor_part(name, shape, SMALL, degree=2, rank=rank),
        )
        with torch.inference_mode():
            flows.append(model(**inputs()))
    return torch.stack(flows)


@pytest.mark.parametrize("kind", ["fp8", "int8_weight"])
@torch.inference_mode()
def test_tensor_parallel(kind):
    reference = load(meta_model(), RandomWeights(SMALL))(**inputs())
    for flows in on_ranks(2, tensor_parallel_rank, kind):
        assert torch.equal(flows[0], flows[1])
        assert distance(flows[0], reference) < EXPECTED_ERROR[kind]


# --- on GPUs ---

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def has_float8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


float8 = pytest.mark.skipif(not has_float8(), reason="needs a GPU with float8 units")


@pytest.mark.gpu
@float8
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 17, 512, 4099])
def test_gpu_scaled_mm_is_what_is_emulated(tokens, has_bias):
    x, x_scale = quantize_rows.quantize(randn(tokens, 1024).cuda(), E4M3)
    weight, weight_scale = quantize_weight(randn(1536, 1024, seed=1).cuda(), E4M3)
    bias = randn(1536, seed=2).bfloat16().cuda() if has_bias else None
    found = float8_product(x, x_scale, weight, weight_scale, bias, torch.bfloat16)
    arguments = [t.cpu() if t is not None else None for t in (x, x_scale, weight, weight_scale, bias)]
    assert distance(found.cpu().float(), float8_product(*arguments, torch.bfloat16).float()) < 5e-3


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("kind", LOSSY)
@torch.inference_mode()
def test_gpu_model_agrees_with_the_cpu(kind, kernels):
    if kernels == "triton":
        pytest.importorskip("triton")
    wide = dataclasses.replace(SMALL, dim=256, ffn_dim=512)
    on_cpu = quantized(kind, random_source(wide), wide, torch.bfloat16)
    model = meta_model(wide, torch.bfloat16)
    quantize_linears(model, kind)
    swap = swap_blocks(model, (1, 3, 4), device_of_block=lambda _: torch.device("cuda:0"))
    load(model, random_source(wide), device="cuda:0", into=swap.into)
    model.set_kernels(kernels)
    found = model(**inputs(wide, device="cuda:0")).cpu()
    assert distance(found, on_cpu(**inputs(wide))) < 0.03
