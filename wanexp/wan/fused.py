"""Fused forms of what a block computes between its matrix products: one read and one write of memory each.

For inference on GPUs. Where the plain torch path of `block.py` makes three to ten passes, each of these makes one:

    modulated_norm          LayerNorm(x) (1 + scale) + shift
    gated_add_and_norm      x + gate update, and the affine LayerNorm of it
    add_and_modulated_norm  x + update, and the modulated LayerNorm of it
    gated_add               x + gate update
    rms_norm                RMSNorm of q or k, with RoPE where it is self-attention's
    linear_gelu             GELU(tanh) in the epilogue of the first FFN product

They round where the plain path does, or less often, and write over their operands where the block owns these. What a
float8 layer reads (`reader`) they write in float8 with a scale a row, from fp32 that was never rounded to 16 bits, and
give the memory of the operand back that they would have written over. To torch.compile they are operators of
torch.library, which it keeps whole. Triton itself is imported at the first call only.
"""

import importlib.util
import os
from typing import TypeGuard

import torch
from torch import Tensor, nn

from wanexp.errors import KernelError, UserError
from wanexp.wan import quantize_rows as rows
from wanexp.wan.architecture import NORM_EPS
from wanexp.wan.linear import Linear
from wanexp.wan.operators import operator
from wanexp.wan.quantize_rows import QuantizedInput
from wanexp.wan.rope import Rope

KERNELS = ("auto", "triton", "torch")
MIN_COMPUTE_CAPABILITY = (8, 0)  # of Triton's code for bf16
GELU_BLOCK = 2048


def choose_kernels(
    requested: str,
    *,
    device_type: str,
    compute_capability: tuple[int, int] | None,
    training: bool,
) -> str:
    """`triton` or `torch`, as asked; `auto` is triton for inference on GPUs where Triton is installed, else torch.

    Pure but for the look at what is installed. Raises UserError for an unknown name, KernelError for `triton` where
    it cannot run.
    """
    if requested not in KERNELS:
        raise UserError(f"unknown kernels {requested!r}; write one of: {', '.join(KERNELS)}")
    if requested == "torch" or (requested == "auto" and device_type != "cuda"):
        return "torch"
    obstacle = _obstacle(device_type, compute_capability, training)
    if obstacle is None:
        return "triton"
    if requested == "triton":
        raise KernelError(f"kernels=triton cannot be had: {obstacle}; write kernels=auto or kernels=torch")
    return "torch"


def _obstacle(device_type: str, compute_capability: tuple[int, int] | None, training: bool) -> str | None:
    if training:
        return "these kernels have no backward pass, found a training workload"
    if device_type != "cuda" and not (device_type == "cpu" and _is_interpreted()):
        return f"they run on CUDA GPUs, found {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if compute_capability is not None and compute_capability < MIN_COMPUTE_CAPABILITY:
        found, wanted = (".".join(map(str, pair)) for pair in (compute_capability, MIN_COMPUTE_CAPABILITY))
        return f"they need compute capability {wanted}, found {found}"
    return None


def _is_interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU, as its debugging aid does."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_inference(x: Tensor) -> None:
    """Raises UserError where these kernels would give no gradients, or cannot run on the device of `x`."""
    if torch.is_grad_enabled():
        raise UserError(
            "kernels=triton is for inference, gradients are switched on; call the model under "
            "torch.inference_mode(), or write kernels=torch"
        )
    if not x.is_cuda and not _is_interpreted():
        raise UserError(f"kernels=triton runs on CUDA GPUs, found {x.device.type}; write kernels=torch")


def takes_float8(reader: nn.Module | None, x: Tensor) -> bool:
    """Whether the layer `reader` takes a QuantizedInput, and kernels can write one on the device of `x`."""
    if not getattr(reader, "takes_float8", False):
        return False
    return rows.triton_can_run(x.device) if x.is_cuda else _is_interpreted()


def release(x: Tensor | tuple[Tensor, ...]) -> None:
    """Give the memory of `x` back at once. For a tensor that is dead but that callers still refer to, or for several.

    What a module is called with is held by every frame of the call until it returns: a `del` in it frees nothing.
    """
    for tensor in x if isinstance(x, tuple) else (x,):
        tensor.untyped_storage().resize_(0)


# --- the operations of a block ---
#
# x, update and results are [batch, tokens, dim]; gate, scale and shift fp32 [batch, dim], with a timestep_index
# [batch, tokens] a table [distinct timesteps, dim]. They may be strided views, as unbind gives them. reader: a layer
# that reads the result, which is a QuantizedInput if `takes_float8` says so.


def modulated_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    timestep_index: Tensor | None,
    dtype: torch.dtype,
    *,
    reader: nn.Module | None = None,
) -> Tensor | QuantizedInput:
    """LayerNorm(x) * (1 + scale) + shift, rounded once to `dtype` or to float8."""
    x = x.contiguous()
    normed = rows.empty_like(x) if takes_float8(reader, x) else torch.empty_like(x, dtype=dtype)
    _add_and_norm(x, None, None, scale, shift, _dense(timestep_index), True, None, *_into(normed))
    return normed


def gated_add_and_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    timestep_index: Tensor | None,
    norm: nn.LayerNorm,
    *,
    overwrite: bool,
    reader: nn.Module | None = None,
) -> tuple[Tensor, Tensor | QuantizedInput]:
    """(x + gate * update, norm of that). The norm takes the place of `update`, the sum that of `x` if `overwrite`."""
    x, addend = x.contiguous(), update.contiguous()
    total = x if overwrite else torch.empty_like(x)
    normed = rows.empty_like(addend) if takes_float8(reader, x) else addend
    index = _dense(timestep_index)
    _add_and_norm(x, addend, gate, norm.weight, norm.bias, index, False, total, *_into(normed))
    if normed is not addend:
        release(update)
    return total, normed


def add_and_modulated_norm(
    x: Tensor,
    update: Tensor,
    shift: Tensor,
    scale: Tensor,
    timestep_index: Tensor | None,
    *,
    reader: nn.Module | None = None,
) -> Tensor | QuantizedInput:
    """x += update; the modulated norm of that, which takes the place of `update`."""
    addend = update.contiguous()
    normed = rows.empty_like(addend) if takes_float8(reader, x) else addend
    _add_and_norm(x, addend, None, scale, shift, _dense(timestep_index), True, x, *_into(normed))
    if normed is not addend:
        release(update)
    return normed


def gated_add(x: Tensor, update: Tensor, gate: Tensor, timestep_index: Tensor | None) -> None:
    """x += gate * update."""
    _add_and_norm(x, update.contiguous(), gate, None, None, _dense(timestep_index), False, x, None, None)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    rope: Rope | None = None,
    *,
    square_sums: Tensor | None = None,
    full_dim: int = 0,
) -> Tensor:
    """The RMSNorm of `x` [batch, tokens, dim] and then, with its tables, RoPE; in place where `x` is contiguous.

    square_sums: fp32 [batch, tokens, 1], where `x` is a part of rows of `full_dim` channels: their sums of squares.
    """
    x = x.contiguous()
    cos, sin = (None, None) if rope is None else (table.contiguous() for table in rope)
    _rms_norm(x, weight, cos, sin, _dense(square_sums), full_dim or x.shape[-1])
    return x


def linear_gelu(
    linear: nn.Module,
    x: Tensor | QuantizedInput,
    *,
    reader: nn.Module | None = None,
    consume: bool = False,
) -> Tensor | QuantizedInput:
    """GELU(tanh) of linear(x). consume: the memory of `x` is given back as soon as the product has read it.

    In the epilogue of the product where the layer is a plain one on a GPU in 16 bits: there, and not on CPUs,
    `_addmm_activation` means the tanh form (aten/src/ATen/native/cuda/Blas.cpp), approximated to about the precision
    of 16 bits, and rounded once. Else after the product: in place, or on the way to float8.
    """
    if type(linear) is Linear and linear.bias is not None and _is_16_bits_on_gpu(x):
        flat = x.reshape(-1, x.shape[-1])
        inner = torch._addmm_activation(linear.bias, flat, linear.weight.t(), use_gelu=True)
        inner = inner.view(*x.shape[:-1], -1)
        if consume:
            release(x)
        return inner
    inner = linear(x)
    if consume:
        release(x)
    if not takes_float8(reader, inner):
        return gelu(inner)
    quantized = rows.quantize_by_kernel(inner, gelu=True)
    release(inner)
    return quantized


def _is_16_bits_on_gpu(x: Tensor | QuantizedInput) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.is_cuda and x.element_size() == 2


def gelu(x: Tensor) -> Tensor:
    """GELU(tanh), in place where `x` is contiguous."""
    x = x.contiguous()
    _gelu(x)
    return x


# --- how the kernels are launched ---


def tile_of(dim: int, head_dim: int = 1) -> int:
    """Elements of a row that the kernels take at a time: a power of two.

    1024 or 512 where that divides a row into whole tiles (of whole heads), so that no lane idles: all Wan sizes.
    Otherwise one masked tile for the row.
    """
    for tile in (1024, 512):
        if dim % tile == 0 and tile % head_dim == 0:
            return tile
    return 1 << (dim - 1).bit_length()


def warps_of(tile: int) -> int:
    """Enough threads for 8 elements each, the 16 bytes that one instruction loads; 8 warps at most."""
    return max(1, min(8, tile // 256))


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _into(normed: Tensor | QuantizedInput) -> tuple[Tensor, Tensor | None]:
    """What a kernel writes a norm into, and the scales of its rows if it is of float8."""
    return normed if isinstance(normed, QuantizedInput) else (normed, None)


def _rows(vectors: Tensor) -> int:
    """The distance between the rows of [rows, dim]; 0 for [dim], which serves all."""
    assert vectors.stride(-1) == 1
    return vectors.stride(0) if vectors.ndim == 2 else 0


# Triton launches on the current device, whatever its tensors say: hence device_of in each.


@operator("wanexp::add_and_norm", mutates=("x_out", "normed", "scales"))
def _add_and_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    factor: Tensor | None,
    offset: Tensor | None,
    index: Tensor | None,
    is_modulated: bool,
    x_out: Tensor | None,
    normed: Tensor | None,
    scales: Tensor | None,
) -> None:
    from wanexp.wan.triton_kernels import add_and_norm

    batch, tokens, dim = x.shape
    tile = tile_of(dim)
    with torch.cuda.device_of(x):
        add_and_norm[(batch * tokens,)](
            x,
            update,
            gate,
            factor,
            offset,
            index,
            x_out,
            normed,
            scales,
            tokens,
            0 if gate is None else _rows(gate),
            0 if factor is None else _rows(factor),
            NORM_EPS,
            DIM=dim,
            TILE=tile,
            HAS_UPDATE=update is not None,
            HAS_GATE=gate is not None,
            HAS_INDEX=index is not None,
            HAS_NORM=normed is not None,
            IS_MODULATED=is_modulated,
            HAS_SCALES=scales is not None,
            num_warps=warps_of(tile),
        )


@operator("wanexp::rms_norm", mutates=("x",))
def _rms_norm(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    square_sums: Tensor | None,
    full_dim: int,
) -> None:
    from wanexp.wan.triton_kernels import rms_norm_and_rope

    batch, tokens, dim = x.shape
    pairs = 1 if cos is None else cos.shape[-1]
    tile = tile_of(dim, 1 if cos is None else 2 * pairs)
    with torch.cuda.device_of(x):
        rms_norm_and_rope[(batch * tokens,)](
            x,
            weight,
            cos,
            sin,
            square_sums,
            tokens,
            full_dim,
            NORM_EPS,
            DIM=dim,
            TILE=tile,
            PAIRS=pairs,
            HAS_ROPE=cos is not None,
            HAS_SUMS=square_sums is not None,
            num_warps=warps_of(tile),
        )


@operator("wanexp::gelu_tanh", mutates=("x",))
def _gelu(x: Tensor) -> None:
    from wanexp.wan.triton_kernels import gelu_tanh

    with torch.cuda.device_of(x):
        gelu_tanh[(-(-x.numel() // GELU_BLOCK),)](
            x, x.numel(), BLOCK=GELU_BLOCK, num_warps=warps_of(GELU_BLOCK)
        )
