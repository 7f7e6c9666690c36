"""Symmetric quantisation with a scale a row: in plain torch, and for activations on GPUs in one pass with Triton."""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from wanexp.wan.operators import operator

E4M3 = torch.float8_e4m3fn
LIMITS = {E4M3: 448.0, torch.int8: 127.0}
FLOAT8_CAPABILITY = (8, 9)  # of the first GPUs with float8 units
HAS_TRITON = importlib.util.find_spec("triton") is not None
TINY = 1e-12  # the least largest value of a row: a row of zeros stays one


class QuantizedInput(NamedTuple):
    """Activations in float8 with a scale a row, as float8 layers read them: values * scales are the activations."""

    values: Tensor  # e4m3 [..., channels]
    scales: Tensor  # fp32 [..., 1]

    def chunk(self, chunks: int, dim: int) -> list["QuantizedInput"]:
        """As of a tensor, along an axis before the channels."""
        values, scales = (tensor.chunk(chunks, dim) for tensor in self)
        # Copies of the scales, which products may want aligned as no view in the midst of others is.
        return [QuantizedInput(part, scale.clone()) for part, scale in zip(values, scales, strict=True)]


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values [..., channels] of `dtype`, fp32 scales [..., 1]) with values * scales = x, nearly.

    scale = max |x| of the row / the largest number of `dtype` (e4m3 or int8); values round to nearest, ties to even.
    """
    limit = LIMITS[dtype]
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp_min(TINY) * (1 / limit)
    quotients = (x / scales).clamp(-limit, limit)  # a quotient may round to above the limit
    return (quotients if dtype.is_floating_point else quotients.round()).to(dtype), scales


def quantize_by_kernel(x: Tensor, *, gelu: bool = False) -> QuantizedInput:
    """As `quantize` to e4m3 of `x`, or of its GELU(tanh) in fp32: one read and one write of memory.

    The same scales as of `quantize`. It multiplies where that divides, so that a value halfway between two of e4m3 may
    go to the other one.
    """
    x = x.contiguous()
    quantized = empty_like(x)
    if x.numel():
        _quantize_rows(x, *quantized, gelu)
    return quantized


def empty_like(x: Tensor) -> QuantizedInput:
    """For a kernel to write `x` [..., channels] into."""
    scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    return QuantizedInput(torch.empty_like(x, dtype=E4M3), scales)


def triton_can_run(device: torch.device) -> bool:
    """Whether Triton's kernels can write e4m3 on `device`: on CUDA devices from compute capability 8.9 on."""
    found = capability(device)
    return HAS_TRITON and found is not None and found >= FLOAT8_CAPABILITY


def capability(device: torch.device) -> tuple[int, int] | None:
    """Of a CUDA device; None for any other."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)  # a constant to torch.compile
    return properties.major, properties.minor


def row_tile(width: int) -> int:
    """Elements of a row that the kernel takes at a time: a power of two, of which 8 at most make a row of the FFN."""
    return min(1024 if width <= 8192 else 2048, 1 << (width - 1).bit_length())


@operator("wanexp::quantize_rows", mutates=("values", "scales"))
def _quantize_rows(x: Tensor, values: Tensor, scales: Tensor, gelu: bool) -> None:
    from wanexp.wan.triton_kernels import quantize_rows

    tile = row_tile(x.shape[-1])
    with torch.cuda.device_of(x):  # Triton starts on the current device, whatever its tensors say
        quantize_rows[(scales.numel(),)](
            x, values, scales, DIM=x.shape[-1], TILE=tile, HAS_GELU=gelu, num_warps=max(1, tile // 256)
        )
