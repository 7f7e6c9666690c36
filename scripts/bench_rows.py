#!/usr/bin/env python
"""The matrix products of a block at given numbers of rows: which kernel cuBLAS takes, and how fast it is.

cuBLAS chooses a kernel by the exact number of rows, and one row more can change the choice. Under context parallelism
the rows are this project's to choose (`wanexp/parallel/shares.py`, `padded_rows`); this measures whether it chooses
well on a GPU. Products take turns, each for a quarter of a second at a time, on a GPU that has been warmed up.

    python scripts/bench_rows.py --rows 16376,16380,16384,16392,32760 --out docs/results/rows.json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works without an installation, too

from bench_case import parse_case
from gpu_needed import check_device

from wanexp.errors import UserError

ROUNDS = 4
TURN_S = 0.25
TURN_FLOPS = 7e14 * TURN_S
WARM_UP_S = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="wan2.1_t2v_14b:480p", help="model:video, for the widths")
    parser.add_argument("--rows", default="16376,16380,16384,16392,32760", help="with commas")
    parser.add_argument("--turn-flops", type=float, default=TURN_FLOPS, help="work of one turn")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default cuda)")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    rows = [int(number) for number in options.rows.split(",")]
    try:
        check_device(options.device, instead="--device cpu --case tiny:tiny --turn-flops 1")
        architecture = parse_case(options.case).architecture
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    found = measure(architecture, rows, options.turn_flops, device)
    print("| product | rows | ms | TFLOP/s | kernel |\n|---|---:|---:|---:|---|")
    for row in found:
        print(
            f"| {row['product']} | {row['rows']} | {row['ms']:.3f} | {row['tflops']:.0f} | {row['kernel'] or ''} |"
        )
    if options.out:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        document = {"device": name, "torch": torch.__version__, "case": options.case, "products": found}
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


@torch.inference_mode()
def measure(architecture: Any, rows: list[int], turn_flops: float, device: torch.device) -> list[dict]:
    dim, ffn = architecture.dim, architecture.ffn_dim
    found = []
    for name, inner, columns, gelu in (
        ("q, k, v, o", dim, dim, False),
        ("ffn up", dim, ffn, True),
        ("ffn down", ffn, dim, False),
    ):
        x = torch.randn(max(rows), inner, device=device).bfloat16()
        weight = (torch.randn(columns, inner, device=device) * inner**-0.5).bfloat16()
        bias = torch.randn(columns, device=device).bfloat16()
        calls = {number: partial(product, bias, x[:number], weight, gelu=gelu) for number in rows}
        kernels = {number: kernel_of(call, device) for number, call in calls.items()}
        warm_up(calls[rows[0]], device)
        seconds: dict[int, list[float]] = {number: [] for number in rows}
        for _ in range(ROUNDS):
            for number, call in calls.items():
                repeats = max(3, int(turn_flops / (2 * number * inner * columns)))
                seconds[number].append(timed(call, repeats, device))
        for number, samples in seconds.items():
            one = statistics.median(samples)
            found.append(
                {
                    "product": name,
                    "rows": number,
                    "ms": one * 1000,
                    "tflops": 2 * number * inner * columns / one / 1e12,
                    "kernel": kernels[number],
                }
            )
    return found


def product(bias: Tensor, x: Tensor, weight: Tensor, *, gelu: bool) -> Tensor:
    if gelu:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return torch.addmm(bias, x, weight.t())


def kernel_of(call: Callable[[], Tensor], device: torch.device) -> str | None:
    """The name of the longest kernel of a call; None on the CPU."""
    if device.type != "cuda":
        return None
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    events = profiler.key_averages()
    return max(events, key=lambda event: event.self_device_time_total).key if events else None


def warm_up(call: Callable[[], Tensor], device: torch.device) -> None:
    begin = time.perf_counter()
    while device.type == "cuda" and time.perf_counter() - begin < WARM_UP_S:
        timed(call, 20, device)


def timed(call: Callable[[], Tensor], repeats: int, device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
