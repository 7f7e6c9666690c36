"""Attention kernels by name. Each takes and gives [batch, tokens, heads, head_dim] and supports autograd."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanexp.errors import UserError

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [batch, tokens, heads, head_dim], k and v [batch, keys, heads, head_dim] -> the shape of q. No mask."""

SDPA_BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
HALF_DTYPES = (torch.bfloat16, torch.float16)

# How PyTorch words that the one permitted backend does not take these inputs on this device.
_REFUSALS = (
    "no available kernel",
    "no viable backend",
    "no valid execution plan",
    "no execution plans support",
)


def attention_function(name: str) -> AttentionFunction:
    """The kernel called `name`, one of `sdpa_flash`, `sdpa_cudnn`, `sdpa_efficient`, `sdpa_math` or `auto`.

    A named kernel never falls back to another one: called with inputs it cannot take it raises UserError.
    `auto` chooses by the device and dtype of the tensors of each call, as `choose_attention` does.

    Raises UserError for an unknown name.
    """
    if name == "auto":
        return _attend_auto
    _check_name(name)
    return partial(_attend_sdpa, name=name)


def choose_attention(
    requested: str,
    *,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    compute_capability: tuple[int, int] | None,
) -> str:
    """The name of the kernel to run. Pure: needs no device, so a planner can call it for another machine.

    A name is returned as it is. `auto` is resolved to the fastest exact kernel (measured on H200: cuDNN beats
    flash by 1.6 to 1.9x in self-attention): on CUDA in bf16 and fp16 `sdpa_cudnn` from sm 9.0 on and
    `sdpa_flash` before, in fp32 `sdpa_efficient`; on the CPU `sdpa_flash`; else `sdpa_math`.

    Raises UserError for an unknown name.
    """
    if requested != "auto":
        _check_name(requested)
        return requested
    if device_type == "cuda":
        if dtype in HALF_DTYPES:
            hopper = compute_capability is not None and compute_capability >= (9, 0)
            if hopper and head_dim <= 128 and head_dim % 8 == 0:  # the limits of cuDNN's fused attention
                return "sdpa_cudnn"
            return "sdpa_flash" if head_dim <= 256 else "sdpa_efficient"
        return "sdpa_efficient" if dtype == torch.float32 else "sdpa_math"
    if device_type == "cpu" and dtype in (*HALF_DTYPES, torch.float32, torch.float64):
        return "sdpa_flash"
    return "sdpa_math"


def _check_name(name: str) -> None:
    if name not in SDPA_BACKENDS:
        raise UserError(f"unknown attention kernel {name!r}; write one of: auto, {', '.join(SDPA_BACKENDS)}")


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, *, name: str) -> Tensor:
    try:
        # The permitted backends are a setting of the whole process: two threads must not attend at once.
        with sdpa_kernel(SDPA_BACKENDS[name]):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    except RuntimeError as error:
        if not any(refusal in str(error).lower() for refusal in _REFUSALS):
            raise
        raise UserError(
            f"attention={name} cannot run on {q.device.type} with {str(q.dtype).removeprefix('torch.')} and "
            f"head_dim {q.shape[-1]}; write attention=auto, or another of: {', '.join(SDPA_BACKENDS)}"
        ) from error
    return out.transpose(1, 2)


def _attend_auto(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    name = choose_attention(
        "auto",
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        compute_capability=torch.cuda.get_device_capability(q.device) if q.is_cuda else None,
    )
    return _attend_sdpa(q, k, v, name=name)
