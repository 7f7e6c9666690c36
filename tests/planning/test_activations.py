"""The trace of a forward against the real transformer: live bytes on the CPU."""

from types import ModuleType

import pytest
import torch

from tests.planning.live_bytes import LiveBytes
from wanexp.offload import quantize
from wanexp.planning import activations, fused_activations
from wanexp.planning.activations import Sizes
from wanexp.planning.heap import Heap
from wanexp.planning.memory import training_backward_bytes
from wanexp.wan import fused, quantize_rows
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.attention import attention_function
from wanexp.wan.block import Attention
from wanexp.wan.transformer import WanTransformer

ARCHITECTURES = {
    "wan_14b_proportions": {
        "dim": 256,
        "ffn_dim": 691,
        "num_heads": 2,
    },  # ffn 2.7 x dim: the FFN is the worst moment
    "small_ffn": {"dim": 256, "ffn_dim": 512, "num_heads": 4},  # the second norm is
    "wan_1.3b_proportions": {"dim": 256, "ffn_dim": 1493, "num_heads": 2},
    "i2v": {"dim": 256, "ffn_dim": 691, "num_heads": 2, "in_channels": 36, "clip_tokens": 257},
}
GRIDS = {"long": (1, (5, 20, 16)), "two_samples": (2, (3, 8, 8))}


def architecture(name: str, **changes: int) -> WanArchitecture:
    return WanArchitecture(
        **({"num_layers": 2, "text_dim": 64, "freq_dim": 32} | ARCHITECTURES[name] | changes)
    )


def traced_peak(s: Sizes, path: ModuleType = activations) -> int:
    heap = Heap()
    hidden, _ = activations.embed(heap, s)
    for number in range(s.arch.num_layers):
        hidden = path.block(heap, s, hidden, first=number == 0)
    path.head(heap, s, hidden)
    return heap.peak


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "bfloat16, fp32 residual"])
@pytest.mark.parametrize("per_token", [False, True], ids=["per_sample", "per_token"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_peak_is_that_of_the_real_transformer(name, per_token, dtype, grid):
    batch, (frames, rows, columns) = GRIDS[grid]
    arch = architecture(name)
    compute = getattr(torch, dtype.split(",")[0])
    residual = torch.float32 if "residual" in dtype else None
    model = WanTransformer(arch, dtype=compute, residual=residual).eval()
    model.set_attention("sdpa_flash")
    latent = torch.randn(batch, 16, frames, 2 * rows, 2 * columns)
    timestep = torch.full((batch, frames, rows * columns), 500.0)
    timestep[:, 0] = 0.0
    image = torch.randn(batch, 20, *latent.shape[2:]) if arch.in_channels == 36 else None
    arguments = (latent, timestep.flatten(1) if per_token else timestep[:, 1, 0])
    context = torch.randn(batch, arch.clip_tokens + arch.text_len, arch.dim).to(compute)
    with torch.inference_mode():
        with LiveBytes():
            model(*arguments, image_latent=image, context=context)  # builds the RoPE tables
        with LiveBytes() as tracker:
            model(*arguments, image_latent=image, context=context)
    sizes = Sizes(
        arch,
        batch,
        (frames, rows, columns),
        compute=compute.itemsize,
        residual=4 if residual else compute.itemsize,
        distinct_timesteps=2 if per_token else 0,
    )
    assert traced_peak(sizes) == pytest.approx(tracker.peak, rel=0.01)


@pytest.fixture
def fused_without_numbers(monkeypatch):
    """`wan/fused.py` as it allocates: its kernels write into what they are given, so here they do nothing."""
    for kernel in ("_add_and_norm", "_rms_norm", "_gelu"):
        monkeypatch.setattr(fused, kernel, lambda *_args: None)
    monkeypatch.setattr(fused, "check_inference", lambda _x: None)
    monkeypatch.setattr(fused, "_is_interpreted", lambda: True)
    monkeypatch.setattr(quantize_rows, "_quantize_rows", lambda *_args: None)
    monkeypatch.setattr(quantize_rows, "quantize", lambda x, _dtype: quantize_rows.empty_like(x))
    monkeypatch.setattr(quantize, "quantize_input", quantize_rows.quantize_by_kernel)
    monkeypatch.setattr(
        quantize,
        "float8_product",
        lambda x, _scale, weight, *others: torch.empty(len(x), len(weight), dtype=others[-1]),
    )


def attend_in_float8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What such an attention holds, around an exact one."""
    copies = [torch.empty_like(x, dtype=quantize_rows.E4M3) for x in (q, k, v)]
    out = attention_function("sdpa_flash")(q, k, v)
    del copies
    return out


@pytest.mark.parametrize("float8", ["", "layers", "layers and attention", "weights"])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16, fp32 residual"])
@pytest.mark.parametrize("per_token", [False, True], ids=["per_sample", "per_token"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_peak_is_that_of_the_real_transformer(
    name, per_token, dtype, chunks, float8, fused_without_numbers, monkeypatch
):
    arch, grid = architecture(name), (6, 20, 16)
    residual = torch.float32 if "residual" in dtype else None
    model = WanTransformer(arch, dtype=torch.bfloat16, residual=residual).eval()
    model.set_attention("sdpa_flash")
    model.set_kernels("triton")
    if float8:
        quantize.quantize_linears(model, "fp8_weight" if float8 == "weights" else "fp8")
    for module in model.modules():
        if "attention" in float8 and isinstance(module, Attention):
            module.attend = attend_in_float8
    model.set_ffn_chunks(chunks)
    latent = torch.randn(1, 16, grid[0], 2 * grid[1], 2 * grid[2])
    timestep = torch.full((1, grid[0], grid[1] * grid[2]), 500.0)
    timestep[:, 0] = 0.0
    image = torch.randn(1, 20, *latent.shape[2:]) if arch.in_channels == 36 else None
    arguments = (latent, timestep.flatten(1) if per_token else timestep[:, 1, 0])
    context = torch.randn(1, arch.clip_tokens + arch.text_len, arch.dim).bfloat16()
    release = fused.release
    with torch.inference_mode():
        with LiveBytes():
            model(*arguments, image_latent=image, context=context)  # builds the RoPE tables
        with LiveBytes() as tracker:

            def released(x: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
                tracker.released(*(x if isinstance(x, tuple) else (x,)))
                release(x)

            monkeypatch.setattr(fused, "release", released)
            model(*arguments, image_latent=image, context=context)
    s = Sizes(
        arch,
        1,
        grid,
        residual=4 if residual else 2,
        distinct_timesteps=2 if per_token else 0,
        ffn_chunks=chunks,
        writes_float8=float8.startswith("layers"),
        widens_weights=float8 == "weights",
        float8_attention="attention" in float8,
    )
    assert traced_peak(s, fused_activations) == pytest.approx(tracker.peak, rel=0.01)


def test_the_fused_moments_are_those_of_the_docstring():
    """Of U = 335,462,400 bytes: 14B S + 4 U, 1.3B S + U + F, in four runs S + 3 U at both."""
    big = WanArchitecture(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    small = WanArchitecture(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
    for arch, chunks, in_u in ((big, 1, 5.0), (small, 1, 2 + 8960 / 1536), (big, 4, 5.0), (small, 4, 5.0)):
        s = Sizes(arch, 1, (21, 30, 52), ffn_chunks=chunks)
        heap = Heap()
        fused_activations.block(heap, s, heap.new(s.stream))
        assert heap.peak - s.modulation == pytest.approx(in_u * s.hidden)


def test_the_float8_moments_are_those_of_the_docstring():
    """14B S + 3 F / 2, with float8 attention S + 5.5 U; in four runs S + 4 U, of the attention."""
    big = WanArchitecture(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    for attention, chunks, in_u in ((False, 1, 1 + 1.5 * 2.7), (True, 1, 6.5), (False, 4, 5.0)):
        s = Sizes(big, 1, (21, 30, 52), ffn_chunks=chunks, writes_float8=True, float8_attention=attention)
        heap = Heap()
        fused_activations.block(heap, s, heap.new(s.stream))
        assert heap.peak - s.modulation == pytest.approx(in_u * s.hidden, rel=1e-3)


def test_the_worst_moments_are_those_of_the_docstring():
    s = Sizes(
        architecture("wan_14b_proportions", num_layers=1, dim=5120, ffn_dim=13824, num_heads=40),
        1,
        (21, 30, 52),
    )
    heap = Heap()
    activations.block(heap, s, heap.new(s.stream))
    # U = 32,760 x 5120 x 2 = 335,462,400, W = 2 U: 5.5 U + 1.5 W = 2,851,430,400
    assert heap.peak - s.modulation == 5.5 * s.hidden + 1.5 * s.fp32 == 2_851_430_400
    narrow = Sizes(architecture("small_ffn"), 1, (21, 30, 52))
    heap = Heap()
    activations.block(heap, narrow, heap.new(narrow.stream))
    assert heap.peak - narrow.modulation == 5.5 * narrow.hidden + 1.5 * narrow.fp32


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "all_kept"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "grid"), [("wan_14b_proportions", (5, 20, 16)), ("wan_1.3b_proportions", (4, 16, 16))]
)
def test_backward_peak_is_that_of_the_real_transformer(name, grid, dtype, checkpointing):
    arch = architecture(name, text_len=16)
    model = WanTransformer(arch, dtype=torch.float32)
    model.set_attention("sdpa_flash")
    model.gradient_checkpointing = checkpointing
    latent = torch.randn(1, 16, grid[0], 2 * grid[1], 2 * grid[2])
    text = torch.randn(1, arch.text_len, arch.text_dim)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            flow = model(latent, torch.full((1,), 500.0), text)
        return torch.nn.functional.mse_loss(flow, latent)

    with LiveBytes():
        loss().backward()  # leaves gradients, as DDP's buckets would, and the RoPE tables
    with LiveBytes() as tracker:
        result = loss()
        tracker.peak = tracker.live
        result.backward()
    s = Sizes(arch, 1, grid, compute=dtype.itemsize, residual=4)
    outer_copies = 2 * arch.num_outer_parameters() if dtype == torch.bfloat16 else 0
    expected = outer_copies + training_backward_bytes(s, arch.num_layers, checkpointing)
    assert expected == pytest.approx(tracker.peak, rel=0.05)
