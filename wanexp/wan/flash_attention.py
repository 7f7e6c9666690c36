"""FlashAttention 3 and 4, from packages that may or may not be installed, as operators of torch.

    fa3      fa3-fwd, or FlashAttention's own flash_attn_interface; Hopper
    fa3_fp8  the same on q, k and v rounded to 8 bits: lossy
    fa4      flash-attn-4; Ampere and newer

Custom operators, so that torch.compile takes each as one node of its graph. All give the log-sum-exp too, 4 bytes
beside the 2 * head_dim of a row of the result. Forward only: fa3-fwd is built so, and the others are wrapped so.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from wanexp.errors import KernelError
from wanexp.wan.operators import operator
from wanexp.wan.quantize_rows import triton_can_run

FLASH_KERNELS = ("fa3", "fa4", "fa3_fp8")

# The modules that have `flash_attn_func` (the first one found is taken) and the distributions they come in.
MODULES = {"fa3": ("fa3_fwd_interface", "flash_attn_interface"), "fa4": ("flash_attn.cute",)}
DISTRIBUTIONS = {"fa3": ("fa3-fwd", "flash-attn-3"), "fa4": ("flash-attn-4",)}

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
SMALLEST = torch.finfo(torch.float32).tiny  # scale: a head of zeros stays one
TOKENS_AT_ONCE = 64  # of one head, in each program of the quantisation


class CannotRun(KernelError):
    """A kernel that was asked for cannot run. reason: how the sentence "it cannot run" goes on."""

    def __init__(self, kernel: str, reason: str) -> None:
        super().__init__(f"attention={kernel} cannot run {reason}; write attention=auto or another kernel")
        self.reason = reason


def flash_attention(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention by one of FLASH_KERNELS, and the log of the sum over keys of exp(scaled score).

    Args:
        q: [batch, tokens, heads, head_dim]. k and v: [batch, keys, heads, head_dim]. Any strides.

    Returns:
        The result in the shape and dtype of q, and fp32 [batch, heads, tokens].

    Raises CannotRun, also where autograd would need its backward pass.
    """
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    # What an operator does not see; it asks again, with the device.
    if reason := refusal(kernel, dtype=q.dtype, training=training):
        raise CannotRun(kernel, reason)
    if kernel == "fa3":
        return _fa3(q, k, v)
    if kernel == "fa4":
        return _fa4(q, k, v)
    q, q_descale = quantise_per_head(q)
    k, k_descale = quantise_per_head(k)
    v, v_descale = quantise_per_head(v)
    return _fa3_fp8(q, k, v, q_descale, k_descale, v_descale)


def refusal(
    kernel: str,
    *,
    device_type: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    compute_capability: tuple[int, int] | None = None,
    training: bool = False,
) -> str | None:
    """The reason why one of FLASH_KERNELS cannot run with these facts, None if they allow it. Pure."""
    if training:
        return "in training: it has no backward pass"
    if device_type != "cuda":
        return f"on {device_type}: it needs a CUDA device"
    if compute_capability is not None:
        found = "sm_{}{}".format(*compute_capability)
        if kernel.startswith("fa3") and compute_capability[0] != 9:
            return f"on {found}: it is made for Hopper (sm_90)"
        if compute_capability < (8, 0):
            return f"on {found}: it needs sm_80 or newer"
    dtypes = (torch.bfloat16, torch.float16) if kernel == "fa4" else (torch.bfloat16,)  # fa3-fwd has no fp16
    if dtype not in dtypes:
        return f"in {_name(dtype)}: it takes {' and '.join(map(_name, dtypes))}"
    step = 16 if kernel == "fa3_fp8" else 8  # 16 bytes
    if head_dim % step or head_dim > 256:
        return f"with head_dim {head_dim}: it takes up to 256, divisible by {step}"
    return None


def _empty_quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, heads, _ = x.shape
    return x.new_empty(x.shape, dtype=FP8), x.new_empty((batch, heads), dtype=torch.float32)


@operator("wanexp::quantise_per_head", fake=_empty_quantised)
def quantise_per_head(x: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, tokens, heads, head_dim] -> the same in e4m3, and fp32 [batch, heads] that multiplied with it gives x.

    The largest element of each head becomes the largest of e4m3. On GPUs two Triton kernels, which read `x` twice and
    multiply where plain torch divides: a value halfway between two of e4m3 may go to the other one.
    """
    if triton_can_run(x.device) and x.numel():
        return quantise_by_kernels(x)
    return quantise_in_torch(x)


def quantise_in_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_per_head` in plain torch."""
    peak = x.abs().amax(dim=(1, 3)).float()
    descale = (peak / FP8_MAX).clamp_min(SMALLEST)
    return (x.float() / descale[:, None, :, None]).to(FP8).contiguous(), descale


def quantise_by_kernels(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_per_head` by Triton; any strides but for the last axis."""
    from wanexp.wan.triton_kernels import peaks_of_heads, quantize_heads

    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, tokens, heads, head_dim = x.shape
    peaks = x.new_zeros(batch, heads, dtype=torch.float32)
    descale = torch.empty_like(
        peaks
    )  # memory of its own: compiled code asserts that an operator's results are aligned
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    sizes = {"HEAD_DIM": head_dim, "WIDTH": 1 << (head_dim - 1).bit_length(), "TOKENS": TOKENS_AT_ONCE}
    grid = (heads, -(-tokens // TOKENS_AT_ONCE), batch)
    with torch.cuda.device_of(x):  # Triton starts on the current device, whatever its tensors say
        peaks_of_heads[grid](x, peaks, tokens, *x.stride()[:3], **sizes)
        quantize_heads[grid](x, peaks, values, descale, tokens, *x.stride()[:3], SMALLEST, **sizes)
    return values, descale


@cache
def package_function(package: str) -> Callable[..., Any]:
    """`flash_attn_func` of `fa3` or `fa4`, set to give its log-sum-exp.

    Raises CannotRun if no such package is installed, whatever importing it raises if it is but does not work.
    """
    for module in MODULES[package]:
        try:
            function = importlib.import_module(module).flash_attn_func
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the package is there, and what it needs is not
            continue
        # Called differently from version to version; the oldest FlashAttention 3 gives it unasked.
        flags = {"return_attn_probs", "return_lse"} & inspect.signature(function).parameters.keys()
        return partial(function, **dict.fromkeys(flags, True))
    raise CannotRun(package, f"here: {' or '.join(DISTRIBUTIONS[package])} is not installed")


def _call(kernel: str, q: Tensor, k: Tensor, v: Tensor, **options: Tensor) -> tuple[Tensor, Tensor]:
    reason = refusal(
        kernel,
        device_type=q.device.type,
        dtype=torch.bfloat16 if q.dtype == FP8 else q.dtype,
        head_dim=q.shape[-1],
        compute_capability=torch.cuda.get_device_capability(q.device) if q.is_cuda else None,
    )
    if reason:
        raise CannotRun(kernel, reason)
    function = package_function("fa4" if kernel == "fa4" else "fa3")
    with torch.cuda.device_of(q):  # flash-attn-4 launches on the current device, whatever its inputs lie on
        result = function(q, k, v, **options)
    if not isinstance(result, tuple) or len(result) < 2 or result[1] is None:
        raise RuntimeError(f"the package of {kernel} gave no log-sum-exp: wanexp does not know this version")
    out, lse = result[:2]  # more may follow
    # As _empty_results promises. The known versions give them so, and nothing is copied.
    return out.contiguous(), lse.contiguous()


def _empty_results(q: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads = q.shape[:3]
    dtype = torch.bfloat16 if q.dtype == FP8 else q.dtype
    return q.new_empty(q.shape, dtype=dtype), q.new_empty((batch, heads, tokens), dtype=torch.float32)


@operator("wanexp::fa3", fake=_empty_results)
def _fa3(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _call("fa3", q, k, v)


@operator("wanexp::fa4", fake=_empty_results)
def _fa4(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _call("fa4", q, k, v)


@operator("wanexp::fa3_fp8", fake=_empty_results)
def _fa3_fp8(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor, k_descale: Tensor, v_descale: Tensor
) -> tuple[Tensor, Tensor]:
    return _call("fa3_fp8", q, k, v, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
