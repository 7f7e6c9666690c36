"""How fast the fused kernels are beside plain torch: each alone in ms and GB/s, then a whole block and its peak memory.

    python scripts/bench_kernels.py --out multirun/kernels            # under 90 s on an H200
    python scripts/bench_kernels.py --out multirun/kernels --tune     # also other tiles and numbers of warps

GB/s counts the bytes that an operation must move: its operands once, its results once. The ceiling beside it is a copy
on the same device. "compiled" is torch.compile of the plain path, on the first shape only, for compiling takes longer
than measuring. Without a GPU it runs interpreted (TRITON_INTERPRET=1, --tokens 8): a check of this script, no result.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation, too

from gpu_needed import check_device

from wanexp.errors import UserError
from wanexp.wan import fused
from wanexp.wan import quantize_rows as rows
from wanexp.wan.architecture import NORM_EPS, WanArchitecture
from wanexp.wan.block import Fp32LayerNorm, RMSNorm, WanBlock, gated_add, modulated_norm, set_fused, turned
from wanexp.wan.flash_attention import quantise_by_kernels, quantise_in_torch
from wanexp.wan.linear import Linear
from wanexp.wan.rope import rope_tables

WAN_14B = WanArchitecture(dim=5120, ffn_dim=13824, num_heads=40, num_layers=1)
WAN_1_3B = WanArchitecture(dim=1536, ffn_dim=8960, num_heads=12, num_layers=1)
SHAPES = {
    "14B 480p": (WAN_14B, (21, 30, 52)),
    "1.3B 480p": (WAN_1_3B, (21, 30, 52)),
    "14B 720p": (WAN_14B, (21, 45, 80)),
}
DTYPE = torch.bfloat16
GIB = 1024**3
BUDGET_S = 0.15  # of measuring, for each candidate
TILES, WARPS = (512, 1024, 2048, 8192), (2, 4, 8, 16)

Function = Callable[[], object]


@dataclass(frozen=True)
class Operation:
    """One fused kernel, the plain torch path it replaces, and the bytes that both must move."""

    name: str
    num_bytes: int
    run_fused: Function
    run_plain: Function
    is_tiled: bool = True


@dataclass(frozen=True)
class Row:
    """What was measured of one operation. compiled_ms: None where it was not compiled."""

    shape: str
    operation: str
    fused_ms: float
    gb_s: float
    share_of_copy: float
    plain_ms: float
    compiled_ms: float | None

    def __str__(self) -> str:
        compiled = f"{self.compiled_ms:9.3f}" if self.compiled_ms else "        -"
        return (
            f"{self.shape:10} {self.operation:24} {self.fused_ms:8.3f} {self.gb_s:8.0f} {self.share_of_copy:7.2f} "
            f"{self.plain_ms:9.3f} {compiled} {self.plain_ms / self.fused_ms:8.2f}x"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder; writes bench_kernels.json into it")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, help="tokens in place of the shape's own")
    parser.add_argument("--tune", action="store_true", help="try tiles and numbers of warps on each kernel")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    try:
        if not os.environ.get("TRITON_INTERPRET"):
            check_device("cuda", instead="TRITON_INTERPRET=1 before the command and --tokens 8 behind it")
        if importlib.util.find_spec("triton") is None:
            raise UserError("triton is not installed; write pip install triton")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    rows: list[Row] = []
    blocks: list[dict[str, object]] = []
    tuned: list[dict[str, object]] = []
    print(
        f"{'shape':10} {'operation':24} {'fused ms':>8} {'GB/s':>8} {'of copy':>7} {'plain ms':>9} "
        f"{'compiled':>9} {'plain/fused':>9}"
    )
    with torch.inference_mode():
        for shape in arguments.shapes:
            arch, grid = SHAPES[shape]
            grid = (1, 1, arguments.tokens) if arguments.tokens else grid
            compiles = shape == arguments.shapes[0] and not arguments.no_compile
            for row in measure_operations(shape, arch, grid, device, compiles):
                rows.append(row)
                print(row, flush=True)
            if arguments.tune:
                tuned += tune(shape, arch, grid, device)
            blocks.append({"shape": shape} | measure_block(arch, grid, device))
            print(json.dumps(blocks[-1]), flush=True)
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, interpreted",
        "torch": torch.__version__,
        "seconds": time.perf_counter() - begin,
        "operations": [asdict(row) for row in rows],
        "blocks": blocks,
        "tuned": tuned,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "bench_kernels.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['seconds']:.0f} s; {arguments.out / 'bench_kernels.json'}")
    return 0


def operations(
    arch: WanArchitecture, grid: tuple[int, int, int], device: torch.device
) -> Iterator[Operation]:
    """Every fused operation of a block at a shape. Operands are written over many times, and stay finite."""
    tokens, dim = grid[0] * grid[1] * grid[2], arch.dim
    x, update = (torch.randn(1, tokens, dim, dtype=DTYPE, device=device) for _ in range(2))
    shift, scale, gate = (0.1 * torch.randn(1, 6, dim, device=device)).unbind(1)[:3]
    norm3 = Fp32LayerNorm(dim, eps=NORM_EPS, dtype=DTYPE, device=device)
    norm_q = RMSNorm(dim, DTYPE).to(device)
    rope = rope_tables(arch.head_dim, grid, device)
    one = x.nbytes

    def plain_gated_add_and_norm() -> tuple[Tensor, Tensor]:
        total = gated_add(x, update, gate, None)
        return total, norm3(total)

    def plain_add_and_modulated_norm() -> tuple[Tensor, Tensor]:
        total = x + update
        return total, modulated_norm(total, shift, scale, None, DTYPE)

    yield Operation(
        "modulated_norm",
        2 * one,
        lambda: fused.modulated_norm(x, shift, scale, None, DTYPE),
        lambda: modulated_norm(x, shift, scale, None, DTYPE),
    )
    yield Operation(
        "gated_add_and_norm",
        4 * one,
        lambda: fused.gated_add_and_norm(x, update, gate, None, norm3, overwrite=True),
        plain_gated_add_and_norm,
    )
    yield Operation(
        "add_and_modulated_norm",
        4 * one,
        lambda: fused.add_and_modulated_norm(x, update, shift, scale, None),
        plain_add_and_modulated_norm,
    )
    yield Operation(
        "gated_add",
        3 * one,
        lambda: fused.gated_add(x, update, gate, None),
        lambda: gated_add(x, update, gate, None),
    )
    yield Operation(
        "rms_norm and RoPE (q or k)",
        2 * one + 2 * rope[0].nbytes,
        lambda: fused.rms_norm(update, norm_q.weight, rope),
        lambda: turned(norm_q(update), rope),
    )
    yield Operation(
        "rms_norm (cross q)",
        2 * one,
        lambda: fused.rms_norm(update, norm_q.weight),
        lambda: norm_q(update),
    )
    inner = torch.randn(1, tokens, arch.ffn_dim, dtype=DTYPE, device=device)
    yield Operation(
        "gelu",
        2 * inner.nbytes,
        lambda: fused.gelu(inner),
        lambda: F.gelu(inner, approximate="tanh"),
        is_tiled=False,
    )
    linear = Linear(dim, arch.ffn_dim, dtype=DTYPE, device=device)
    moved = one + linear.weight.nbytes + tokens * arch.ffn_dim * DTYPE.itemsize
    yield Operation(
        "linear_gelu",
        moved,
        lambda: fused.linear_gelu(linear, update),
        lambda: F.gelu(linear(update), approximate="tanh"),
        is_tiled=False,
    )
    yield Operation(
        "linear, then gelu",  # what linear_gelu must beat; "plain" is the product alone
        moved,
        lambda: fused.gelu(linear(update)),
        lambda: linear(update),
        is_tiled=False,
    )
    if device.type == "cpu" or rows.triton_can_run(device):
        yield from float8_operations(x, update, inner, (shift, scale, gate), norm3, arch)


def float8_operations(
    x: Tensor,
    update: Tensor,
    inner: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor],
    norm3: Fp32LayerNorm,
    arch: WanArchitecture,
) -> Iterator[Operation]:
    """What float8 layers and float8 attention read, written in float8. Plain: the exact kernel, then plain torch."""
    shift, scale, gate = vectors
    one, wide = x.nbytes, inner.nbytes
    reader = nn.Module()
    reader.takes_float8 = True  # type: ignore[assignment]
    heads = update.unflatten(-1, (arch.num_heads, arch.head_dim))

    def kept(function: Function) -> Function:
        """With its operands left to the next call."""

        def run() -> None:
            with patch.object(fused, "release", lambda _: None):
                function()

        return run

    yield Operation(
        "modulated_norm, float8",
        one + one // 2,
        lambda: fused.modulated_norm(x, shift, scale, None, DTYPE, reader=reader),
        lambda: rows.quantize(modulated_norm(x, shift, scale, None, DTYPE), rows.E4M3),
    )
    yield Operation(
        "gated_add_and_norm, fl8",
        3 * one + one // 2,
        kept(lambda: fused.gated_add_and_norm(x, update, gate, None, norm3, overwrite=True, reader=reader)),
        lambda: rows.quantize(norm3(gated_add(x, update, gate, None)), rows.E4M3),
    )
    yield Operation(
        "add_and_modulated_n, fl8",
        3 * one + one // 2,
        kept(lambda: fused.add_and_modulated_norm(x, update, shift, scale, None, reader=reader)),
        lambda: rows.quantize(modulated_norm(x + update, shift, scale, None, DTYPE), rows.E4M3),
    )
    yield Operation(
        "gelu, float8",
        wide + wide // 2,
        lambda: rows.quantize_by_kernel(inner, gelu=True),
        lambda: rows.quantize(F.gelu(inner, approximate="tanh"), rows.E4M3),
        is_tiled=False,
    )
    yield Operation(
        "rows, float8",
        one + one // 2,
        lambda: rows.quantize_by_kernel(update),
        lambda: rows.quantize(update, rows.E4M3),
        is_tiled=False,
    )
    yield Operation(
        "heads, float8 (q, k or v)",
        2 * one + one // 2,
        lambda: quantise_by_kernels(heads),
        lambda: quantise_in_torch(heads),
        is_tiled=False,
    )


def measure_operations(
    shape: str, arch: WanArchitecture, grid: tuple[int, int, int], device: torch.device, compiles: bool
) -> Iterator[Row]:
    x = torch.randn(grid[0] * grid[1] * grid[2], arch.dim, dtype=DTYPE, device=device)
    other = torch.empty_like(x)
    copy_gb_s = 2 * x.nbytes / seconds(lambda: other.copy_(x), device) / 1e9
    print(f"{shape:10} {'copy (ceiling)':24} {2 * x.nbytes / copy_gb_s / 1e6:8.3f} {copy_gb_s:8.0f}")
    for operation in operations(arch, grid, device):
        try:
            fused_s, plain_s = alternating((operation.run_fused, operation.run_plain), device)
        except Exception as error:  # the others are still worth knowing
            print(f"{shape:10} {operation.name:24} failed: {type(error).__name__}: {error}", flush=True)
            continue
        compiled_s = None
        if compiles:
            torch.compiler.reset()
            compiled_s = seconds(torch.compile(operation.run_plain, dynamic=False), device)
        gb_s = operation.num_bytes / fused_s / 1e9
        yield Row(
            shape,
            operation.name,
            fused_s * 1e3,
            gb_s,
            gb_s / copy_gb_s,
            plain_s * 1e3,
            compiled_s and compiled_s * 1e3,
        )


def tune(
    shape: str, arch: WanArchitecture, grid: tuple[int, int, int], device: torch.device
) -> list[dict[str, object]]:
    """Each tiled kernel under other tiles and warps; prints the three fastest."""
    found: list[dict[str, object]] = []
    for operation in operations(arch, grid, device):
        if not operation.is_tiled:
            continue
        times: dict[tuple[int, int], float] = {}
        for tile, warps in itertools.product(TILES, WARPS):
            whole = tile >= arch.dim and tile < 2 * arch.dim
            if not whole and (arch.dim % tile or tile < 32 * warps):
                continue
            with (
                patch.object(fused, "tile_of", lambda *_, tile=tile: tile),
                patch.object(fused, "warps_of", lambda *_, warps=warps: warps),
            ):
                times[tile, warps] = seconds(operation.run_fused, device)
        best = sorted(times, key=times.__getitem__)
        print(
            f"{shape} {operation.name}: "
            + ", ".join(f"tile {t} warps {w} {1e3 * times[t, w]:.3f} ms" for t, w in best[:3])
        )
        found += [
            {"shape": shape, "operation": operation.name, "tile": t, "warps": w, "ms": 1e3 * times[t, w]}
            for t, w in best
        ]
    return found


def measure_block(
    arch: WanArchitecture, grid: tuple[int, int, int], device: torch.device
) -> dict[str, object]:
    """One block of random weights, fused and plain on the same input: ms, peak memory, distance of the answers.

    Peaks are above weights, text and RoPE tables, and hold the block's input.
    """
    tokens = grid[0] * grid[1] * grid[2]
    torch.manual_seed(0)
    with device:
        block = WanBlock(arch, DTYPE, None)
        hidden = torch.randn(1, tokens, arch.dim, dtype=DTYPE)
        arguments = (
            0.5 * torch.randn(1, 6, arch.dim),
            torch.randn(1, arch.text_len, arch.dim, dtype=DTYPE),
            rope_tables(arch.head_dim, grid, device),
        )

    def run(is_fused: bool) -> Tensor:
        set_fused(block, is_fused)
        # In place on the same tensor every time: the values grow, and stay finite and random.
        return block(hidden, *arguments, in_place=True)

    before = hidden.clone()
    plain = run(False)
    fused_out = run(True)  # over `hidden`
    distance = ((fused_out.float() - plain.float()).norm() / plain.float().norm()).item()
    hidden.copy_(before)
    del plain, fused_out, before
    fused_s, plain_s = alternating((lambda: run(True), lambda: run(False)), device)
    result: dict[str, object] = {
        "fused_ms": fused_s * 1e3,
        "plain_ms": plain_s * 1e3,
        "rel_l2": distance,
        "hidden_gib": hidden.nbytes / GIB,
    }
    if device.type == "cuda":
        for name, is_fused in (("fused", True), ("plain", False)):
            torch.cuda.synchronize()
            base = torch.cuda.memory_allocated() - hidden.nbytes
            torch.cuda.reset_peak_memory_stats()
            run(is_fused)
            result[f"{name}_peak_gib"] = (torch.cuda.max_memory_allocated() - base) / GIB
    return result


def seconds(function: Function, device: torch.device) -> float:
    return alternating((function,), device)[0]


def alternating(functions: tuple[Function, ...], device: torch.device) -> list[float]:
    """The median seconds of a call of each, called in turns."""
    for function in functions:  # compiles, and settles the allocator
        function()
        function()
    samples: list[list[float]] = [[] for _ in functions]
    begin, number = time.perf_counter(), 0
    while number < 3 or time.perf_counter() - begin < BUDGET_S * len(functions):
        for function, times in zip(functions, samples, strict=True):
            times.append(_one_call(function, device))
        number += 1
    return [statistics.median(times) for times in samples]


def _one_call(function: Function, device: torch.device) -> float:
    if device.type == "cpu":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Keep the device busy while the host launches, or the time of a short kernel is that of its launch.
    torch.cuda._sleep(200_000)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


if __name__ == "__main__":
    sys.exit(main())
