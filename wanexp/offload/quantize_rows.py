"""Symmetric quantisation with a scale a row: in plain torch, and for activations on GPUs in one pass with Triton."""

import importlib.util
from functools import cache

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LIMITS = {E4M3: 448.0, torch.int8: 127.0}
TINY = 1e-12  # the least largest value of a row: a row of zeros stays one
MAX_WIDTH = 16384  # channels of a row that the kernel keeps in registers


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values [..., channels] of `dtype`, fp32 scales [..., 1]) with values * scales = x, nearly.

    scale = max |x| of the row / the largest number of `dtype` (e4m3 or int8); values round to nearest, ties to even.
    """
    limit = LIMITS[dtype]
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp_min(TINY) * (1 / limit)
    quotients = (x / scales).clamp(-limit, limit)  # a quotient may round to above the limit
    return (quotients if dtype.is_floating_point else quotients.round()).to(dtype), scales


def quantize_on_gpu(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize` of e4m3, the same bits: one read and one write of memory."""
    from wanexp.offload.triton_kernels import quantize_rows

    x = x.contiguous()
    width = x.shape[-1]
    values = torch.empty_like(x, dtype=E4M3)
    scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if scales.numel():
        tile = 1 << (width - 1).bit_length()
        with torch.cuda.device_of(x):  # Triton starts on the current device, whatever its tensors say
            quantize_rows[(scales.numel(),)](
                x,
                values,
                scales,
                width,
                TINY,
                LIMITS[E4M3],
                1 / LIMITS[E4M3],
                TILE=tile,
                num_warps=max(1, min(16, tile // 512)),
            )
    return values, scales


def triton_can_run(device: torch.device) -> bool:
    """Whether `quantize_on_gpu` can run on `device`: Triton converts to e4m3 from compute capability 8.9 on."""
    return importlib.util.find_spec("triton") is not None and _capability(device) >= (8, 9)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
