"""Block swap and float8 layers against the whole model in bf16, on one GPU: time, peak memory, and the distance.

    python scripts/bench_offload.py --out docs/results/offload.json
    python scripts/bench_offload.py --float8 --attention fa3 --out docs/results/float8.json

Wan 14B at 480p with random weights, one forward at a time: all blocks resident; 36 of 40 on the host; resident again
(so that a drift of the clocks shows); float8 linear layers, made of the same weights. Medians of `--repeats` forwards
after one for warm-up. With `--float8` both models stay on the GPU (43 GiB with a forward) and take turns: bf16, float8
linear layers, these with float8 attention everywhere or in self-attention alone; a case that fails is reported, and the
others go on. The last line of the output is the JSON.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation, too

from gpu_needed import check_device

from wanexp.errors import UserError
from wanexp.offload.block_swap import BlockSwap, swap_blocks
from wanexp.offload.load_device import move_to_owners
from wanexp.offload.quantize import quantize_linears
from wanexp.offload.swap_plan import swapped_blocks
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.fused import choose_kernels
from wanexp.wan.transformer import WanTransformer
from wanexp.wan.weights import RandomWeights, load_weights

WAN_14B = WanArchitecture(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
TINY = WanArchitecture(dim=128, ffn_dim=256, num_heads=2, num_layers=8, text_dim=64)
LATENT, TINY_LATENT = (21, 60, 104), (3, 8, 8)
GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0", help="where it computes (default cuda:0)")
    parser.add_argument("--tiny", action="store_true", help="a model of a second, to try the script")
    parser.add_argument("--swapped", type=int, help="blocks on the host (default: all but 4)")
    parser.add_argument(
        "--buffers", type=int, default=2, help="on the device, for swapped blocks (default 2)"
    )
    parser.add_argument("--linear", default="fp8", help="fp8, fp8_weight or int8_weight (default fp8)")
    parser.add_argument(
        "--float8", action="store_true", help="bf16 and float8 in turns, attention too; no block swap"
    )
    parser.add_argument("--attention", default="auto", help="kernel (default auto)")
    parser.add_argument("--kernels", default="auto", help="auto, triton or torch, between the products")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block's forward")
    parser.add_argument("--repeats", type=int, default=3, help="timed forwards of each (default 3)")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    arguments = parser.parse_args()
    try:
        check_device(arguments.device, instead="--device cpu --tiny")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = bench_float8(arguments) if arguments.float8 else bench(arguments)
    print(table(result["cases"]))
    text = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(text)
    return 0


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    architecture, size = (TINY, TINY_LATENT) if arguments.tiny else (WAN_14B, LATENT)
    num_swapped = architecture.num_layers - 4 if arguments.swapped is None else arguments.swapped
    given = draw_inputs(architecture, size, device)
    model = load(architecture, device, arguments)

    resident = measure(model, given, arguments.repeats)
    begin = time.perf_counter()
    chosen = swapped_blocks([0] * architecture.num_layers, [num_swapped])
    swap = swap_blocks(model, chosen, device_of_block=lambda _: device, buffers=arguments.buffers)
    seconds = time.perf_counter() - begin
    print(f"{swap.host_bytes / GIB:.1f} GiB pinned and filled in {seconds:.1f} s", flush=True)
    swapped = measure(model, given, arguments.repeats, swap)
    swapped["pin_s"] = seconds
    swap.close()
    begin = time.perf_counter()
    move_to_owners(model, lambda _: device)
    print(f"back on the device in {time.perf_counter() - begin:.1f} s", flush=True)
    again = measure(model, given, arguments.repeats)
    quantize_linears(model, arguments.linear)
    quantized = measure(model, given, arguments.repeats)

    reference = resident.pop("flow")
    for case in (swapped, again, quantized):
        compare(case, reference)
    base = (resident["seconds"] + again["seconds"]) / 2
    cases = {
        "resident": resident,
        f"swapped {num_swapped}/{architecture.num_layers}": swapped,
        "resident again": again,
        arguments.linear: quantized,
    }
    for case in cases.values():
        case["time_over_resident"] = case["seconds"] / base
    return report(arguments, given, cases)


def bench_float8(arguments: argparse.Namespace) -> dict[str, Any]:
    """The cases of `--float8`, in rounds of a forward each."""
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    architecture, size = (TINY, TINY_LATENT) if arguments.tiny else (WAN_14B, LATENT)
    given = draw_inputs(architecture, size, device)
    exact = load(architecture, device, arguments)
    float8 = load(architecture, device, arguments, linear="fp8")
    attention = arguments.attention
    turns = {
        "bf16": (exact, attention, attention),
        "fp8": (float8, attention, attention),
        "fp8, attention fa3_fp8": (float8, "fa3_fp8", "fa3_fp8"),
        "fp8, self-attention fa3_fp8": (float8, "fa3_fp8", attention),
    }
    cases: dict[str, dict[str, Any]] = {}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
    for _ in range(arguments.repeats):
        for name, (model, own, cross) in turns.items():
            if "failure" in cases.get(name, {}):
                continue
            model.set_attention(own, cross)
            try:
                rounds[name].append(measure(model, given, 1))
            except Exception as error:
                if model is exact:
                    raise
                traceback.print_exc()
                cases[name] = {"failure": f"{type(error).__name__}: {error}".splitlines()[0]}
                continue
            cases[name] = rounds[name][-1]
            print(f"{name}: {cases[name]['seconds'] * 1000:.0f} ms", flush=True)
    reference = rounds["bf16"][0].pop("flow")
    for name, measured in rounds.items():
        case = cases[name]
        if "failure" in case:
            continue
        case["samples_s"] = [one["seconds"] for one in measured]
        case["seconds"] = statistics.median(case["samples_s"])
        case["peak_above_weights_gib"] = case["peak_gib"] and case["peak_gib"] - case["held_gib"]
        case["speed_over_bf16"] = cases["bf16"]["seconds"] / case["seconds"]
        case["time_over_resident"] = 1 / case["speed_over_bf16"]
        compare(case, reference)
    return report(arguments, given, cases)


def compare(case: dict[str, Any], reference: torch.Tensor) -> None:
    """Puts the distance of a case's flow in its place."""
    flow = case.pop("flow", reference)
    case["bit_equal"] = torch.equal(flow, reference)
    case["rel_l2"] = float((flow - reference).norm() / reference.norm())


def report(
    arguments: argparse.Namespace, given: dict[str, torch.Tensor], cases: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    latent = given["latent"]
    return {
        "device": torch.cuda.get_device_name(latent.device) if latent.is_cuda else "cpu",
        "torch": torch.__version__,
        "settings": {key: str(value) for key, value in vars(arguments).items() if key != "out"},
        "tokens": latent.numel() // latent.shape[1] // 4,
        "cases": cases,
    }


def load(
    architecture: WanArchitecture,
    device: torch.device,
    arguments: argparse.Namespace,
    linear: str = "dtype",
) -> WanTransformer:
    """The model on `device` in bf16 but for its linear layers, ready to run."""
    begin = time.perf_counter()
    with torch.device("meta"):
        model = WanTransformer(architecture, dtype=torch.bfloat16)
    quantize_linears(model, linear)
    load_weights(model, RandomWeights(architecture), device_of=lambda _: device)
    model.eval().set_attention(arguments.attention)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    model.set_kernels(
        choose_kernels(
            arguments.kernels, device_type=device.type, compute_capability=capability, training=False
        )
    )
    if arguments.compile:
        for block in model.blocks:
            block.forward = torch.compile(block.forward)  # and not the call, whose hooks move weights
    print(f"loaded ({linear}) in {time.perf_counter() - begin:.1f} s", flush=True)
    return model


def draw_inputs(
    architecture: WanArchitecture, size: tuple[int, ...], device: torch.device
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latent": torch.randn(1, architecture.out_channels, *size, generator=generator).to(device),
        "timestep": torch.tensor([500.0], device=device),
        "text": torch.randn(1, architecture.text_len, architecture.text_dim, generator=generator).to(device),
    }


@torch.inference_mode()
def measure(
    model: WanTransformer,
    given: dict[str, torch.Tensor],
    repeats: int,
    swap: BlockSwap | None = None,
) -> dict[str, Any]:
    """Seconds of a forward, peak memory, what was swapped, and the flow (fp32, on the CPU)."""
    device = given["latent"].device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    flow = model(**given)  # fetches its memory from the driver, too
    if swap:
        model(**given)  # from here on the order of blocks is known
        swap.reset()
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) if on_gpu else 0
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        model(**given)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    case: dict[str, Any] = {
        "seconds": statistics.median(seconds),
        "samples_s": seconds,
        "peak_gib": torch.cuda.max_memory_allocated(device) / GIB if on_gpu else None,
        "held_gib": held / GIB,
        "weights_gib": weights_on(model, device, swap) / GIB,
        "flow": flow.cpu(),
    }
    if swap:
        case |= {
            "swapped_gib_per_forward": swap.num_bytes / GIB / repeats,
            "late_copies": swap.num_late,
            "stall_s_per_forward": swap.stall_s() / repeats,
        }
    return case


def weights_on(model: WanTransformer, device: torch.device, swap: BlockSwap | None) -> int:
    """Bytes of weights that lie on `device`, the buffers of swapped blocks included."""
    num_bytes = swap.buffer_bytes(device) if swap else 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if swap is None or swap.into(name) is None:
            num_bytes += tensor.nbytes
    return num_bytes


def table(cases: dict[str, dict[str, Any]]) -> str:
    lines = ["| | forward | / resident | peak GiB | weights GiB | rel L2 |", "|---|---|---|---|---|---|"]
    for name, case in cases.items():
        if "failure" in case:
            lines.append(f"| {name} | {case['failure']} | | | | |")
            continue
        peak = "-" if case["peak_gib"] is None else f"{case['peak_gib']:.2f}"
        error = "-" if "rel_l2" not in case else "bit-equal" if case["bit_equal"] else f"{case['rel_l2']:.1e}"
        lines.append(
            f"| {name} | {1000 * case['seconds']:.0f} ms | {case['time_over_resident']:.3f} | {peak} "
            f"| {case['weights_gib']:.2f} | {error} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
