"""Attention kernels by name. Each takes and gives [batch, tokens, heads, head_dim].

`attention_function` gives the kernel of a model; those of PyTorch (`sdpa_*`) support autograd, those of
`flash_attention.py` do not. `attention_with_lse` gives the same kernel together with the log-sum-exp of each row of
scores, by which results over several parts of the keys can be merged; for `sdpa_*` it calls the PyTorch operators below
scaled_dot_product_attention, for only they return it, and is for inference. Which kernel is fastest on a GPU is found
by `attention_probe.py`.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanexp.errors import UserError
from wanexp.wan.flash_attention import FLASH_KERNELS, CannotRun, flash_attention, refusal

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [batch, tokens, heads, head_dim], k and v [batch, keys, heads, head_dim] -> the shape of q. No mask."""

AttentionWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""As AttentionFunction, and beside its result fp32 [batch, heads, tokens]: log(sum over keys of exp(scaled score))."""

SDPA_BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
KERNELS = (*SDPA_BACKENDS, *FLASH_KERNELS)
LOSSY_KERNELS = ("fa3_fp8",)
CPU_KERNELS = ("auto", "sdpa_flash", "sdpa_math")
HALF_DTYPES = (torch.bfloat16, torch.float16)

# How PyTorch words that the one permitted backend does not take these inputs on this device.
_REFUSALS = (
    "no available kernel",
    "no viable backend",
    "no valid execution plan",
    "no execution plans support",
)


def attention_function(name: str) -> AttentionFunction:
    """The kernel called `name`, one of KERNELS or `auto`.

    A named kernel never falls back to another one: called with inputs it cannot take it raises UserError.
    `auto` chooses by the device and dtype of the tensors of each call, as `choose_attention` does.

    Raises UserError for an unknown name.
    """
    if name != "auto":
        _check_name(name)
    return partial(_attend, name=name)


def attention_with_lse(name: str) -> AttentionWithLse:
    """The kernel called `name`, as of `attention_function`, that returns its log-sum-exp too. No autograd.

    Raises UserError for an unknown name, and when called with inputs that the kernel cannot take.
    """
    if name != "auto":
        _check_name(name)
    return partial(_attend_with_lse, name=name)


def kernel_name(attend: AttentionFunction) -> str:
    """The name that `attention_function` was given to make `attend`.

    Raises UserError for a function that it did not make.
    """
    if isinstance(attend, partial) and attend.func is _attend:
        return attend.keywords["name"]
    raise UserError(f"an attention kernel with a name is wanted, as of attention_function; found {attend!r}")


def is_lossy(name: str) -> bool:
    """Whether a kernel gives up exactness for speed: its runs are a class of their own, and `auto` never takes it."""
    return name in LOSSY_KERNELS


def choose_attention(
    requested: str,
    *,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    compute_capability: tuple[int, int] | None,
) -> str:
    """The name of the kernel to run without a probe. Pure, so a planner can call it for another machine.

    A name is returned as it is. `auto` is resolved to the fastest exact kernel of PyTorch (measured on H200: cuDNN
    beats flash by 1.6 to 1.9x in self-attention): on CUDA in bf16 and fp16 `sdpa_cudnn` from sm 9.0 on and
    `sdpa_flash` from sm 8.0 on, else and in fp32 `sdpa_efficient`; on the CPU `sdpa_flash`; else `sdpa_math`.

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
            ampere = compute_capability is None or compute_capability >= (8, 0)
            return "sdpa_flash" if ampere and head_dim <= 256 else "sdpa_efficient"
        return "sdpa_efficient" if dtype == torch.float32 else "sdpa_math"
    if device_type == "cpu" and dtype in (*HALF_DTYPES, torch.float32, torch.float64):
        return "sdpa_flash"
    return "sdpa_math"


def check_attention(
    name: str,
    *,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    compute_capability: tuple[int, int] | None,
    training: bool,
) -> None:
    """Raise CannotRun for a kernel that these facts rule out. Pure; what only trying shows is not seen here."""
    reason = None
    if name in FLASH_KERNELS:
        reason = refusal(
            name,
            device_type=device_type,
            dtype=dtype,
            head_dim=head_dim,
            compute_capability=compute_capability,
            training=training,
        )
    elif device_type == "cpu" and name not in CPU_KERNELS:
        reason = "on cpu: it needs a CUDA device"
    if reason:
        raise CannotRun(name, reason)


def _check_name(name: str) -> None:
    if name not in KERNELS:
        raise UserError(f"unknown attention kernel {name!r}; write one of: auto, {', '.join(KERNELS)}")


def _attend(q: Tensor, k: Tensor, v: Tensor, *, name: str) -> Tensor:
    name = _resolve(name, q)
    if name in FLASH_KERNELS:
        return flash_attention(name, q, k, v)[0]
    try:
        # The permitted backends are a setting of the whole process: two threads must not attend at once.
        with sdpa_kernel(SDPA_BACKENDS[name]):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    except RuntimeError as error:
        if not any(refusal in str(error).lower() for refusal in _REFUSALS):
            raise
        raise _refusal(name, q) from error
    return out.transpose(1, 2)


def _resolve(name: str, q: Tensor) -> str:
    if name != "auto":
        return name
    return choose_attention(
        name,
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        compute_capability=torch.cuda.get_device_capability(q.device) if q.is_cuda else None,
    )


def _refusal(name: str, q: Tensor) -> CannotRun:
    dtype = str(q.dtype).removeprefix("torch.")
    return CannotRun(name, f"on {q.device.type} with {dtype} and head_dim {q.shape[-1]}")


def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    name = _resolve(name, q)
    if name in FLASH_KERNELS:
        return flash_attention(name, q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not _can_run(name, q, k, v):
        raise _refusal(name, q)
    out, lse = _WITH_LSE[name](q, k, v)
    # [batch, heads, tokens], to which cuDNN adds an axis of 1 and the efficient kernel tokens up to a multiple of 32.
    lse = lse.reshape(*q.shape[:2], -1)[..., : q.shape[2]]
    return out.transpose(1, 2), lse.float()


def _can_run(name: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a kernel takes these inputs: asked first, for the bare operators do not check all they rely on."""
    if name == "sdpa_math":
        return True
    if not q.is_cuda:
        return q.device.type == "cpu" and name in CPU_KERNELS and q.is_floating_point()
    checks = {
        "sdpa_flash": torch.backends.cuda.can_use_flash_attention,
        "sdpa_cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "sdpa_efficient": torch.backends.cuda.can_use_efficient_attention,
    }
    return checks[name](torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False))


# Below, q, k, v and the result are [batch, heads, tokens, head_dim]. The operators agree in PyTorch 2.11 and 2.13.


def _flash_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if not q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    head_dim = q.shape[-1]
    if padding := -head_dim % 8:  # scaled_dot_product_attention does this before it calls the operator
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=head_dim**-0.5)
    return out[..., :head_dim], lse


def _cudnn_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, lse


def _efficient_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, lse


def _math_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).transpose(-1, -2)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v.to(dtype)).to(q.dtype), lse


_WITH_LSE: dict[str, AttentionWithLse] = {
    "sdpa_flash": _flash_with_lse,
    "sdpa_cudnn": _cudnn_with_lse,
    "sdpa_efficient": _efficient_with_lse,
    "sdpa_math": _math_with_lse,
}
