"""Linear layers of 8 bits for the matrices of the blocks: float8 products, or 8 bits in memory only. Lossy.

    fp8           weights and activations float8 (e4m3), one scale a row of each; products on float8 units
    fp8_weight    weights float8, a scale an output row; dequantised at each use, products in the compute dtype
    int8_weight   weights int8, likewise

Scales are fp32 and symmetric: the largest value of a row becomes the largest number of the format. A weight that a
checkpoint stores as e4m3 keeps its bits, with the checkpoint's scale (or 1) for all of its rows. Weights are quantised
as they are loaded, one by one (`read_weight`), on the device that they are loaded to.

Our own and not torchao's, which quantises modules that are loaded already: here a weight is never whole in 16 bits on
any device, may be a rank's part of one, and lies in the flat buffer of a swapped block.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wanexp.errors import UserError
from wanexp.offload.sizes import LINEARS
from wanexp.wan import fused
from wanexp.wan import quantize_rows as rows
from wanexp.wan.block import SelfAttention
from wanexp.wan.linear import linear
from wanexp.wan.part import Part
from wanexp.wan.quantize_rows import E4M3, FLOAT8_CAPABILITY, QuantizedInput
from wanexp.wan.transformer import WanTransformer

STORAGE = {"fp8": E4M3, "fp8_weight": E4M3, "int8_weight": torch.int8}
_FLOAT8_MULTIPLE = 16  # of both sides of a weight that they take
_AT_ONCE = 2**24  # elements of a weight quantised at once: 64 MiB of fp32


class WeightReader(Protocol):
    """What a quantised layer asks of a source of weights."""

    def read(
        self, name: str, *, device: torch.device | str, dtype: torch.dtype, part: Part | None = None
    ) -> Tensor: ...

    def fp8_scale(self, name: str) -> float | None:
        """The factor of the e4m3 numbers that `name` is stored as; None where it is stored otherwise."""
        ...


class QuantizedLinear(nn.Module):
    """A linear layer with a weight of 8 bits and an fp32 scale for each of its rows.

    weight: e4m3 or int8 [out, in], a parameter under the name of the weight it stands for. weight_scale: fp32 [out], a
    buffer. bias: that of the layer replaced.
    """

    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.takes_float8 = kind == "fp8"  # fused kernels then quantise what they write for this layer
        self.dtype = linear.weight.dtype
        # Not in_features and out_features, which tensor parallel leaves as they were.
        weight = torch.empty(linear.weight.shape, dtype=STORAGE[kind], device=linear.weight.device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        scale = torch.empty(linear.weight.shape[0], dtype=torch.float32, device=linear.weight.device)
        self.register_buffer("weight_scale", scale)
        self.bias = linear.bias
        if not linear.weight.is_meta:
            self._set(*quantize_weight(linear.weight, STORAGE[kind]))

    def read_weight(
        self, source: WeightReader, name: str, *, device: torch.device | str, part: Part | None = None
    ) -> dict[str, Tensor]:
        """What loading puts in this module for the tensor `name` (or a part of it), by attribute."""
        scale = source.fp8_scale(name) if self.weight.dtype == E4M3 else None
        if scale is not None:
            weight = source.read(name, device=device, dtype=E4M3, part=part)
            scales = torch.full((weight.shape[0],), scale, dtype=torch.float32, device=device)
        else:
            whole = source.read(name, device=device, dtype=self.dtype, part=part)
            weight, scales = quantize_weight(whole, self.weight.dtype)
        return {"weight": weight, "weight_scale": scales}

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        """[..., in] -> [..., out] in the compute dtype. `fp8` takes activations that are quantised already, too."""
        if self.kind != "fp8":
            assert isinstance(x, Tensor)
            return linear(x, self.dequantized(), self.bias)
        values, scales = x if isinstance(x, QuantizedInput) else quantize_input(x)
        out = float8_product(
            values.flatten(0, -2),
            scales.flatten(0, -2),
            self.weight,
            self.weight_scale,
            self.bias,
            self.dtype,
        )
        return out.unflatten(0, values.shape[:-1])

    def dequantized(self) -> Tensor:
        """The weight in the compute dtype."""
        # 8-bit numbers are exact in 16 bits, so there is one rounding, of the product, and no fp32 copy.
        return self.weight.to(self.dtype).mul_(self.weight_scale.unsqueeze(1))

    def extra_repr(self) -> str:
        return f"{self.kind}, {list(self.weight.shape)}"

    def _set(self, weight: Tensor, scale: Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = scale


def quantize_linears(model: WanTransformer, linear: str) -> list[str]:
    """Replace the linear layers of all blocks by quantised ones, as `precision.linear` says; returns their names.

    For a model on meta, before it is loaded: after what cuts weights (tensor parallel), before block swap. A model
    that has its weights is quantised too. With `fp8` self-attention quantises its input once, for q, k and v, unless a
    fused kernel has already.

    Raises UserError for an unknown kind of linear layers.
    """
    if linear not in LINEARS:
        raise UserError(f"precision.linear '{linear}' does not exist; write one of: {', '.join(LINEARS)}")
    if linear == "dtype":
        return []
    names = []
    for index, block in enumerate(model.blocks):
        for path, module in list(_linears(block)):
            owner, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(owner), leaf, QuantizedLinear(module, linear))
            names.append(f"blocks.{index}.{path}")
        if linear == "fp8":
            assert isinstance(block.self_attn, SelfAttention)
            block.self_attn.register_forward_pre_hook(_share_input)
    return names


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear):
            yield path, module


def _share_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Quantise the input of self-attention, which q, k and v all read.

    Not so for cross-attention: its k and v read 512 tokens, and another kernel costs what it would save.
    """
    x, *others = args
    if isinstance(x, QuantizedInput):  # by the kernel before, while it had it in registers
        return args
    shared = quantize_input(x)
    if module.is_fused:  # a fused attention consumes its input
        fused.release(x)
    return (shared, *others)


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(8-bit [out, in], fp32 scales [out]) of a weight, a few rows at a time."""
    quantized = torch.empty_like(weight, dtype=dtype)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    step = max(1, _AT_ONCE // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        values, scale = rows.quantize(weight[start : start + step].detach(), dtype)
        quantized[start : start + step] = values
        scales[start : start + step] = scale.squeeze(1)
    return quantized, scales


def quantize_input(x: Tensor) -> QuantizedInput:
    """[..., channels] in float8, a scale a row. On GPUs one Triton kernel; compiled, what Inductor fuses it into."""
    if not torch.compiler.is_compiling() and rows.triton_can_run(x.device):
        return rows.quantize_by_kernel(x)
    return QuantizedInput(*rows.quantize(x, E4M3))


def float8_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(x * x_scale) @ (weight * weight_scale).T + bias, [tokens, out] in `dtype`.

    x: e4m3 [tokens, in], x_scale fp32 [tokens, 1], weight e4m3 [out, in], weight_scale fp32 [out]. Where
    `float8_kernel` says so, emulated: products of the same numbers, which 16 bits hold exactly, then the scales. That
    is exact on a CPU; a GPU rounds the products to `dtype` on the way.
    """
    kernel = float8_kernel(x.device.type, dtype, tuple(weight.shape), rows.capability(x.device))
    if kernel == "scaled_mm":
        return torch._scaled_mm(
            x,
            weight.t(),
            scale_a=x_scale,
            scale_b=weight_scale.unsqueeze(0),
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=True,
        )
    wide = dtype if x.is_cuda else torch.promote_types(dtype, torch.float32)
    products = (x.to(wide) @ weight.to(wide).t()).to(torch.float32)
    products = products.mul_(x_scale).mul_(weight_scale)
    if bias is not None:
        products.add_(bias)
    return products.to(dtype)


def float8_kernel(
    device_type: str, dtype: torch.dtype, shape: tuple[int, ...], capability: tuple[int, int] | None
) -> str:
    """`scaled_mm` where a GPU has float8 units that take this weight ([out, in]), else `emulated`."""
    fits = dtype == torch.bfloat16 and all(size % _FLOAT8_MULTIPLE == 0 for size in shape)
    has_units = device_type == "cuda" and capability is not None and capability >= FLOAT8_CAPABILITY
    return "scaled_mm" if fits and has_units else "emulated"
