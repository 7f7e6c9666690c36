"""The fastest attention kernel for the shapes of a run, found by trying: what `attention=auto` means on a GPU.

candidates -> once each: does it run, does it agree with fp32 -> in turns, timed -> decide -> cache
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanexp.wan.attention import (
    attention_function,
    attention_with_lse,
    check_attention,
    choose_attention,
    is_lossy,
)
from wanexp.wan.attention_cache import add_choice, cache_key, default_cache_file, read_choices
from wanexp.wan.attention_choice import (
    LAST_RESORT,
    AttentionShape,
    Choice,
    KernelResult,
    candidates,
    decide,
)
from wanexp.wan.flash_attention import CannotRun

NUM_CHECKED_QUERIES = 16
MAX_REL_L2, MAX_LOSSY_REL_L2 = 0.01, 0.15  # against fp32, on normal random values; bf16 has 0.003, e4m3 0.05
NUM_ROUNDS = 5
SAMPLE_S = 0.02  # long enough for the host's share in the time of a sample to vanish
SLACK = 1.3  # a kernel this much slower than the fastest in the first round is timed no further

log = logging.getLogger(__name__)


def probe(
    requested: str,
    shape: AttentionShape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    training: bool = False,
    with_lse: bool = False,
    cache_file: Path | None = None,
) -> Choice:
    """The kernel for calls of `shape`: the fastest if `requested` is `auto`, else that one if it can run.

    On CUDA both are measured, a named kernel for its rate; elsewhere `auto` is as of `choose_attention`. Of several
    ranks one should probe and tell the others, so that all use the same kernel.

    Args:
        dtype: that the kernel sees, under autocast the one it casts to.
        training: time forward and backward, and leave out kernels without a backward pass.
        with_lse: time the kernel as a ring calls it, by `attention_with_lse`.
        cache_file: `default_cache_file()` if None. One that cannot be read or written costs time and a warning.

    Raises UserError for an unknown name, a named kernel that cannot run, and where no kernel can.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    unprobed = choose_attention(
        requested,
        device_type=device.type,
        dtype=dtype,
        head_dim=shape.head_dim,
        compute_capability=capability,
    )
    check_attention(
        unprobed,
        device_type=device.type,
        dtype=dtype,
        head_dim=shape.head_dim,
        compute_capability=capability,
        training=training,
    )
    if device.type != "cuda":
        return Choice(unprobed)

    path = cache_file or default_cache_file()
    key = cache_key(requested, shape, device=device, dtype=dtype, training=training, with_lse=with_lse)
    if cached := read_choices(path).get(key):
        return replace(cached, from_cache=True)
    measure = partial(
        measure_kernels, shape=shape, device=device, dtype=dtype, training=training, with_lse=with_lse
    )
    results = measure(candidates(requested, training=training))
    if requested == "auto" and all(result.seconds is None for result in results):
        results += measure([LAST_RESORT])
    choice = decide(requested, results, shape)
    for result in results:
        if result.failure:
            log.warning("attention=%s cannot run %s", result.kernel, result.failure)
    # What the key does not say is not for ever: a kernel that failed is tried again by the next run.
    if not any(result.failure for result in results):
        add_choice(path, key, choice)
    return choice


def attention_ceilings(
    shapes: Iterable[AttentionShape],
    kernels: Sequence[str],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> list[dict[str, Any]]:
    """One row for each shape and kernel, a KernelResult with its shape: what attention can reach on this device."""
    return [
        {"shape": str(shape), **asdict(result)}
        for shape in shapes
        for result in measure_kernels(kernels, shape=shape, device=device, dtype=dtype, slack=math.inf)
    ]


def measure_kernels(
    kernels: Sequence[str],
    *,
    shape: AttentionShape,
    device: torch.device,
    dtype: torch.dtype,
    training: bool = False,
    with_lse: bool = False,
    slack: float = SLACK,
) -> list[KernelResult]:
    """Each kernel on the same normal random q, k, v: checked on a few rows against fp32, then timed in turns.

    A kernel slower than `slack` times the fastest keeps the time of its first round.
    """
    with torch.inference_mode(not training), torch.set_grad_enabled(training):
        found, seconds = _check_and_time(kernels, shape, device, dtype, training, with_lse, slack)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the run, which has its own use for this memory
    flops = shape.flops * (3.5 if training else 1)  # backward: five matrix products for the forward's two
    return [
        replace(result, seconds=seconds[result.kernel], tflops=flops / seconds[result.kernel] / 1e12)
        if result.kernel in seconds
        else result
        for result in found
    ]


def _check_and_time(
    kernels: Sequence[str],
    shape: AttentionShape,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    with_lse: bool,
    slack: float,
) -> tuple[list[KernelResult], dict[str, float]]:
    """Results without times, and the seconds of the kernels that run. No tensor outlives it."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(
            (shape.batch, tokens, shape.heads, shape.head_dim),
            generator=generator,
            device=device,
            dtype=dtype,
            requires_grad=training,
        )
        for tokens in (shape.queries, shape.keys, shape.keys)
    )
    rows = torch.linspace(0, shape.queries - 1, min(NUM_CHECKED_QUERIES, shape.queries), device=device)
    rows = rows.long()
    expected = _attend_in_fp32(q.detach()[:, rows], k.detach(), v.detach())
    found: list[KernelResult] = []
    calls: dict[str, Callable[[], Any]] = {}
    for kernel in kernels:
        attend = _without_lse(kernel) if with_lse else attention_function(kernel)
        call = partial(_forward_and_backward, attend, q, k, v) if training else partial(attend, q, k, v)
        found.append(_check(kernel, attend, call, (q, k, v), rows, expected))
        if found[-1].reason is None:
            calls[kernel] = call
    return found, time_in_turns(calls, device, slack)


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, slack: float = SLACK
) -> dict[str, float]:
    """Seconds of each call, the median of rounds in which they take turns: clocks and heat are then alike for all."""
    if not calls:
        return {}
    first = {name: _seconds(call, 1, device) for name, call in calls.items()}
    num_calls = {name: max(1, min(100, round(SAMPLE_S / max(once, 1e-9)))) for name, once in first.items()}
    samples = {name: [_seconds(call, num_calls[name], device)] for name, call in calls.items()}
    fastest = min(values[0] for values in samples.values())
    for _ in range(NUM_ROUNDS - 1):
        for name, values in samples.items():
            if values[0] <= slack * fastest:
                values.append(_seconds(calls[name], num_calls[name], device))
    return {name: statistics.median(values) for name, values in samples.items()}


def _check(
    kernel: str,
    attend: Callable[..., Tensor],
    call: Callable[[], Any],
    inputs: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    expected: Tensor,
) -> KernelResult:
    """Without times. Whatever a foreign kernel may raise is its result, not the end of the run."""
    try:
        found = attend(*inputs).detach()[:, rows].float()
        call()
        rel_l2 = float((found - expected).norm() / expected.norm())
    except CannotRun as error:
        return KernelResult(kernel, refusal=error.reason)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return KernelResult(kernel, failure=f"here: {type(error).__name__}: {lines[0]}")
    allowed = MAX_LOSSY_REL_L2 if is_lossy(kernel) else MAX_REL_L2
    wrong = None if rel_l2 <= allowed else f"right: relative L2 {rel_l2:.2g}, more than {allowed}"
    return KernelResult(kernel, rel_l2=rel_l2 if math.isfinite(rel_l2) else None, failure=wrong)


def _without_lse(kernel: str) -> Callable[..., Tensor]:
    attend = attention_with_lse(kernel)
    return lambda q, k, v: attend(q, k, v)[0]


def _forward_and_backward(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(attend(q, k, v), (q, k, v), q.detach())  # any gradient of this shape will do


def _attend_in_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head, for all keys in fp32 would be as large as q, k, v and the result together."""
    heads = []
    for head in range(q.shape[2]):
        q_head, k_head, v_head = (x[:, :, head].float() for x in (q, k, v))
        scores = q_head @ k_head.transpose(1, 2) * q.shape[-1] ** -0.5
        heads.append(scores.softmax(-1) @ v_head)
    return torch.stack(heads, dim=2)


def _seconds(call: Callable[[], Any], times: int, device: torch.device) -> float:
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(times):
        call()
    _synchronize(device)
    return (time.perf_counter() - begin) / times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
