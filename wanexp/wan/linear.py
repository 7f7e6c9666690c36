"""Linear layers as the transformer uses them."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`: x [..., in], weight [out, in], bias [out] -> [..., out] in the dtype of x, or of autocast.

    Where a CPU has no instructions for that dtype the numbers are multiplied and added in fp32 and the sums rounded
    once: as GPUs do, and several times as fast as what torch does there.
    """
    if not x.is_cpu:
        return F.linear(x, weight, bias)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if cpu_multiplies(dtype):
        return F.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        x, weight = (t.to(dtype).float() for t in (x, weight))
        return F.linear(x, weight, None if bias is None else bias.to(dtype).float()).to(dtype)


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies matrices of `dtype` by instructions of its own."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype != torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


class Linear(nn.Linear):
    """A linear layer in the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Fp32Linear(nn.Linear):
    """A linear layer computed in fp32 whatever its weights are stored in; any float in, fp32 out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())
