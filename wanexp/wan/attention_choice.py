"""Which attention kernel to take: shapes, what was measured of each kernel, and the decision. Pure.

`attention_probe.py` measures. Self-attention and cross-attention are decided apart: the fastest kernel for the one, for
the other a steady choice (`steady`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wanexp.errors import UserError
from wanexp.wan.flash_attention import FLASH_KERNELS, CannotRun

# What auto tries; torch's own first, a call of which costs the host less. sdpa_math, which holds all scores in memory,
# only where none of these runs.
CANDIDATES = ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "fa3", "fa4")
LAST_RESORT = "sdpa_math"
CLOSE = 1.15  # times the fastest: of 14B and 5B on H200 cuDNN took at most 1.08 of fa3's time on the text's 512 keys


@dataclass(frozen=True)
class AttentionShape:
    """One call of a kernel: q [batch, queries, heads, head_dim], k and v [batch, keys, heads, head_dim]."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int

    @property
    def flops(self) -> int:
        """Of the forward pass: two matrix products, 2 a multiply-add."""
        return 4 * self.batch * self.queries * self.keys * self.heads * self.head_dim

    def __str__(self) -> str:
        return f"[{self.batch}, {self.queries}, {self.heads}, {self.head_dim}] x {self.keys} keys"


@dataclass(frozen=True)
class KernelResult:
    """What was found of one kernel: `seconds`, or why there are none.

    seconds: median of a call. tflops: FLOPs of the forward pass (in training 3.5 times these) by it, in 10^12.
    rel_l2: of a few rows against fp32. refusal: how "it cannot run" goes on, where that was to be expected (the inputs,
    the GPU, not installed). failure: the same where it was not, or for a wrong answer.
    """

    kernel: str
    seconds: float | None = None
    tflops: float | None = None
    rel_l2: float | None = None
    refusal: str | None = None
    failure: str | None = None

    @property
    def reason(self) -> str | None:
        return self.refusal or self.failure


@dataclass(frozen=True)
class Choice:
    """The kernel to use and the results it was chosen by, none without a probe. `dataclasses.asdict` is JSON-able.

    from_cache: measured by an earlier run, on a GPU of the same name with the same versions.
    """

    kernel: str
    tflops: float | None = None
    results: tuple[KernelResult, ...] = ()
    from_cache: bool = False


def choice_from_dict(values: Mapping[str, Any]) -> Choice:
    """The choice that `dataclasses.asdict` made `values` of, through JSON or not."""
    return Choice(**{**values, "results": tuple(KernelResult(**result) for result in values["results"])})


def attention_shapes(
    *,
    batch: int,
    tokens: int,
    text_tokens: int,
    heads: int,
    head_dim: int,
    ulysses: int = 1,
    ring: int = 1,
    tp: int = 1,
) -> tuple[AttentionShape, AttentionShape]:
    """The shapes of self-attention and of cross-attention to the text on one rank, the one with the largest shares."""

    def share(number: int, parts: int) -> int:
        return -(-number // parts)

    own_heads, ring_tokens = share(heads, tp), share(tokens, ring)
    return (
        AttentionShape(batch, ring_tokens, ring_tokens, share(own_heads, ulysses), head_dim),
        AttentionShape(batch, share(ring_tokens, ulysses), text_tokens, own_heads, head_dim),
    )


def candidates(requested: str, *, training: bool) -> list[str]:
    """The kernels to try."""
    if requested != "auto":
        return [requested]
    return [kernel for kernel in CANDIDATES if not (training and kernel in FLASH_KERNELS)]


def decide(requested: str, results: Sequence[KernelResult], shape: AttentionShape) -> Choice:
    """The fastest kernel that runs and is right. Raises UserError, with the reason of each, if none does."""
    timed = [result for result in results if result.seconds is not None]
    if timed:
        best = min(timed, key=lambda result: result.seconds or math.inf)
        return Choice(best.kernel, best.tflops, tuple(results))
    if requested != "auto":
        raise CannotRun(requested, str(results[0].reason))
    reasons = ", ".join(f"{result.kernel} {result.reason}" for result in results)
    raise UserError(f"no attention kernel runs on {shape}: {reasons}")


def steady(choice: Choice) -> Choice:
    """`choice` with the first of CANDIDATES that is about as fast as the fastest: for cross-attention.

    Cross-attention takes a hundredth of a forward, but its kernels round differently. Where two are a few percent
    apart, noise would choose between them, for each layout anew, and layouts that compute the same would not give the
    same bits.
    """
    seconds = {result.kernel: result.seconds for result in choice.results if result.seconds is not None}
    for kernel in CANDIDATES:
        if kernel in seconds and seconds[kernel] <= CLOSE * min(seconds.values()):
            tflops = next(result.tflops for result in choice.results if result.kernel == kernel)
            return replace(choice, kernel=kernel, tflops=tflops)
    return choice
