#!/usr/bin/env python
"""The floor of a forward on this GPU: the time of its matrix products and of its attention, and of nothing else.

Each product of the model is timed by itself at its own shape (torch.mm in bf16, torch._scaled_mm in float8 with a
scale for each row), each attention with every kernel that is installed; all on normal random values, in turns, on a
GPU warmed up before, so that clocks are those of a long run. What a forward needs of each, summed, is a time that it
cannot beat. Left out as too small to count: the embeddings, the head, and the products of the text in them.

    python scripts/bench_floor.py --out docs/results/floor.json
    python scripts/bench_floor.py --case wan2.1_t2v_1.3b:480p --out /tmp/floor.json

On two GPUs (Ulysses) each has half the tokens in the products and half the heads in the attention; the links are left
out. bench_peers.py reads the file and says what share of the floor a result is. Takes under a minute on an H200.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works without an installation, too

from bench_case import Case, parse_case
from gpu_needed import check_device

from wanexp.errors import UserError
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.attention import is_lossy
from wanexp.wan.attention_choice import attention_shapes
from wanexp.wan.attention_probe import attention_ceilings, time_in_turns

SCHEMA = "wanexp.floor/1"
CASES = ("wan2.1_t2v_14b:480p", "wan2.1_t2v_14b:720p", "wan2.1_t2v_1.3b:480p")
KERNELS = ("sdpa_flash", "sdpa_cudnn", "fa3", "fa4", "fa3_fp8")
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Gemm:
    """[rows, inner] x [inner, columns], `times` of them in a forward."""

    what: str
    rows: int
    inner: int
    columns: int
    times: int

    @property
    def flops(self) -> int:
        """Of one."""
        return 2 * self.rows * self.inner * self.columns


def gemms(architecture: WanArchitecture, num_tokens: int, degree: int) -> list[Gemm]:
    """The products of all blocks on the rank with the largest share of the tokens."""
    rows, dim, ffn = -(-num_tokens // degree), architecture.dim, architecture.ffn_dim
    layers = architecture.num_layers
    return [
        Gemm("q, k, v, o; cross q, o", rows, dim, dim, 6 * layers),
        Gemm("ffn up", rows, dim, ffn, layers),
        Gemm("ffn down", rows, ffn, dim, layers),
        Gemm("cross k, v", architecture.text_len, dim, dim, 2 * layers),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", help=f"model:video; default: {' '.join(CASES)}")
    parser.add_argument("--degree", type=int, action="append", help="GPUs of a forward; default: 1 and 2")
    parser.add_argument(
        "--kernel", action="append", help=f"attention kernel; default: all installed of {KERNELS}"
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default cuda)")
    parser.add_argument("--warm-up-s", type=float, default=2.0, help="of products before anything is timed")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    options = parser.parse_args()
    try:
        check_device(options.device, instead="--device cpu --case tiny:tiny")
        cases = [parse_case(text) for text in options.case or CASES]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = measure(
        cases,
        options.degree or [1, 2],
        options.kernel or KERNELS,
        device=torch.device(options.device),
        warm_up_s=options.warm_up_s,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["floors"]))
    return 0


@torch.inference_mode()
def measure(
    cases: Sequence[Case],
    degrees: Sequence[int],
    kernels: Sequence[str],
    *,
    device: torch.device,
    warm_up_s: float,
) -> dict[str, Any]:
    """What the file holds: the floor of each case and degree, and the rates that it is made of."""
    warm_up(device, warm_up_s)
    begin, rates, ceilings, floors = time.time(), [], [], []
    for case in cases:
        architecture, tokens = case.architecture, case.num_tokens
        for degree in degrees:
            if architecture.num_heads % degree:
                continue
            where = {"model": case.model, "video": case.video, "num_gpus": degree}
            products = gemms(architecture, tokens, degree)
            timed = time_gemms(products, device)
            self_shape, cross_shape = attention_shapes(
                batch=1,
                tokens=tokens,
                text_tokens=architecture.text_len,
                heads=architecture.num_heads,
                head_dim=architecture.head_dim,
                ulysses=degree,
            )
            attention = {
                name: attention_ceilings([shape], kernels, device=device)
                for name, shape in (("self", self_shape), ("cross", cross_shape))
            }
            rates += [where | row for row in timed]
            ceilings += [where | {"of": name} | row for name, rows in attention.items() for row in rows]
            floors.append(where | floor_of(timed, attention, architecture.num_layers))
    return {
        "schema": SCHEMA,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "seconds": round(time.time() - begin, 1),
        "floors": floors,
        "gemms": rates,
        "attention": ceilings,
    }


def time_gemms(products: Sequence[Gemm], device: torch.device) -> list[dict[str, Any]]:
    """One row for each product and dtype: `seconds` of one and its rate. float8 only where the device has it."""
    calls: dict[str, Callable[[], Any]] = {}
    rows = []
    for number, gemm in enumerate(products):
        x = torch.randn(gemm.rows, gemm.inner, device=device).bfloat16()
        weight = (torch.randn(gemm.columns, gemm.inner, device=device) * gemm.inner**-0.5).bfloat16()
        names = {"bf16": f"{number} bf16"}
        calls[names["bf16"]] = bf16_call(x, weight)
        if has_fp8(device):
            names["fp8"] = f"{number} fp8"
            calls[names["fp8"]] = fp8_call(x, weight)
        rows += [(gemm, dtype, name) for dtype, name in names.items()]
    seconds = time_in_turns(calls, device, slack=math.inf)
    return [
        asdict(gemm) | {"dtype": dtype, "seconds": seconds[name], "tflops": gemm.flops / seconds[name] / 1e12}
        for gemm, dtype, name in rows
    ]


def bf16_call(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], Any]:
    out = x.new_empty(len(x), len(weight))
    return lambda: torch.mm(x, weight.t(), out=out)


def fp8_call(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], Any]:
    """The product alone: x and weight are rounded before, with a scale for each row."""
    (x8, x_scale), (w8, w_scale) = (to_fp8(tensor) for tensor in (x, weight))
    return lambda: torch._scaled_mm(
        x8, w8.t(), scale_a=x_scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, inner] in e4m3, and fp32 [rows, 1] that multiplied with it gives x."""
    scale = x.abs().amax(1, keepdim=True).float() / FP8_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def has_fp8(device: torch.device) -> bool:
    """Whether scaled products by rows run here: from sm 9.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def floor_of(
    products: Sequence[dict[str, Any]], attention: dict[str, list[dict[str, Any]]], num_layers: int
) -> dict[str, Any]:
    """Seconds of a forward: products + the fastest exact attention; with `fp8_` in front, float8 and any attention.

    Pure. products: rows of `time_gemms`; attention: those of `attention_ceilings`, by `self` and `cross`. What was not
    measured is None.
    """
    floor: dict[str, Any] = {}
    for prefix, dtype, lossy in (("", "bf16", False), ("fp8_", "fp8", True)):
        times = [row["seconds"] * row["times"] for row in products if row["dtype"] == dtype]
        gemm_s = sum(times) if times else None
        attention_s = 0.0
        for name, rows in attention.items():
            exact = [row for row in rows if row["seconds"] and (lossy or not is_lossy(row["kernel"]))]
            best = min(exact, key=lambda row: row["seconds"], default=None)
            floor[f"{prefix}{name}_kernel"] = best and best["kernel"]
            attention_s += num_layers * best["seconds"] if best else math.nan
        known = gemm_s is not None and not math.isnan(attention_s)
        floor |= {
            f"{prefix}gemm_s": gemm_s,
            f"{prefix}attention_s": None if math.isnan(attention_s) else attention_s,
            f"{prefix}floor_s": (gemm_s or 0.0) + attention_s if known else None,
        }
    return floor


def warm_up(device: torch.device, seconds: float) -> None:
    """Multiply until the GPU has the clocks and the heat of a long run."""
    size = 8192 if device.type == "cuda" else 256
    x = torch.randn(size, size, device=device).bfloat16()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for _ in range(20):
            torch.mm(x, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def table(floors: Sequence[dict[str, Any]]) -> str:
    """As Markdown, in ms."""
    lines = [
        "| model | video | GPUs | GEMM | attention (kernels) | floor | fp8 floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for floor in floors:
        cells = (
            floor["model"],
            floor["video"],
            floor["num_gpus"],
            milliseconds(floor["gemm_s"]),
            f"{milliseconds(floor['attention_s'])} ({floor['self_kernel']}, {floor['cross_kernel']})",
            milliseconds(floor["floor_s"]),
            milliseconds(floor["fp8_floor_s"]),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.4g} ms"


if __name__ == "__main__":
    sys.exit(main())
