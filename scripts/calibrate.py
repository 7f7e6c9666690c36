"""Measure what the devices at hand achieve, and write a hardware profile that `hardware=` accepts.

    python scripts/calibrate.py --out my_conf                 # all GPUs, or without GPUs the CPU
    python -m wanexp --config-dir my_conf hardware=calibrated task=plan model=wan2.1_t2v_14b

Each rate is measured on the kernels that a forward spends its time in, at the sizes of Wan 14B at 480p (small ones on
the CPU), from warm devices: matrix products, self-attention, what lies between them, copies between devices. A few
seconds a device: power-limited GPUs settle to their clocks within one. Needs torch and wanexp only.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation, too

from wanexp.config import DeviceProfile, HardwareConfig, conf_dir
from wanexp.hardware.devices import find_devices
from wanexp.hardware.nvml import NvmlUnavailable, handle_of, open_nvml, used_bytes
from wanexp.hardware.profiles import profile_for
from wanexp.planning.activations import Sizes
from wanexp.planning.block_work import block_elementwise_bytes
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.attention import attention_function
from wanexp.wan.attention_choice import AttentionShape
from wanexp.wan.attention_probe import probe
from wanexp.wan.block import Fp32LayerNorm, RMSNorm, gated_add, modulated_norm
from wanexp.wan.rope import apply_rope, rope_tables

WAN_14B = WanArchitecture(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
SMALL = WanArchitecture(dim=512, ffn_dim=1024, num_heads=4, num_layers=8, text_dim=128)
GRID, SMALL_GRID = (21, 30, 52), (3, 8, 12)
WARM_S, MEASURE_S = 1.0, 2.0
GIB = 1024**3


@dataclass(frozen=True)
class Measured:
    """Rates of one device, None where there is nothing to measure, and the kernel that its attention is by."""

    attention_kernel: str
    gemm_tflops: float
    attention_tflops: float
    elementwise_gb_s: float
    memory_bandwidth_gb_s: float
    launch_us: float
    host_link_gb_s: float | None = None
    context_gib: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="config folder; writes hardware/NAME.yaml into it"
    )
    parser.add_argument("--name", default="calibrated", help="what hardware= calls it")
    parser.add_argument("--cpu", action="store_true", help="the CPU, even where there are GPUs")
    arguments = parser.parse_args()
    hardware = HardwareConfig(name="auto", device_type="cpu" if arguments.cpu else "auto")
    found = find_devices(hardware)
    begin = time.perf_counter()
    on_gpu = found[0].type == "cuda"
    devices = [torch.device("cuda", device.index) for device in found] if on_gpu else [torch.device("cpu")]
    measured = [measure_device(device) for device in devices]
    for index, rates in enumerate(measured):
        shown = ", ".join(
            f"{name} {value:.4g}" for name, value in numbers(rates).items() if value is not None
        )
        print(f"{found[index].label} {found[index].name}: {shown}")
    link = measure_link(devices) if len(devices) > 1 else (None, None)
    known = profile_for(hardware, found[0], conf_dir()) or DeviceProfile()
    middle = {
        name: statistics.median(values) if (values := [v for v in column if v is not None]) else None
        for name, column in (
            (name, [getattr(rates, name) for rates in measured]) for name in numbers(measured[0])
        )
    }
    bandwidth = known.memory_bandwidth_gb_s or middle.pop("memory_bandwidth_gb_s")
    middle.pop("memory_bandwidth_gb_s", None)
    capability = found[0].compute_capability
    profile = replace(
        known,
        **middle | {"host_link_gb_s": known.host_link_gb_s or middle["host_link_gb_s"]},
        name=found[0].name,
        attention_kernel=measured[0].attention_kernel,
        memory_gib=round(found[0].total_bytes / GIB, 2),
        compute_capability=float(".".join(map(str, capability))) if capability else None,
        memory_bandwidth_gb_s=bandwidth,
        p2p_gb_s=link[0],
        p2p_latency_us=link[1],
    )
    path = write_profile(arguments.out, arguments.name, profile, len(found), on_gpu)
    print(f"{path} written after {time.perf_counter() - begin:.0f} s; use it with")
    print(f"  python -m wanexp --config-dir {arguments.out} hardware={arguments.name}")


def numbers(rates: Measured) -> dict[str, float | None]:
    """The rates, without the name of the kernel."""
    return {name: value for name, value in asdict(rates).items() if not isinstance(value, str)}


def measure_device(device: torch.device) -> Measured:
    """All rates of one device, one after the other."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    arch, grid = (WAN_14B, GRID) if on_gpu else (SMALL, SMALL_GRID)
    sizes = Sizes(arch, 1, grid)
    tokens, dtype = sizes.tokens, torch.bfloat16
    x = torch.randn(1, tokens, arch.dim, device=device, dtype=dtype)

    gemm_s, gemm_flops = 0.0, 0
    for rows, columns, count in (  # of one block
        (arch.dim, arch.dim, 6),
        (arch.dim, arch.ffn_dim, 1),
        (arch.ffn_dim, arch.dim, 1),
    ):
        gemm_s += count * seconds(device, linear(tokens, rows, columns, device, dtype))
        gemm_flops += count * 2 * tokens * rows * columns

    shape = AttentionShape(1, tokens, tokens, arch.num_heads, arch.head_dim)
    kernel = probe("auto", shape, device=device, dtype=dtype).kernel
    print(f"{device}: self-attention by {kernel}, which attention=auto takes", flush=True)
    attend = attention_function(kernel)
    q, k, v = (x.unflatten(-1, (-1, arch.head_dim)).clone() for _ in range(3))
    attention_s = seconds(device, lambda: attend(q, k, v))

    elementwise_s = seconds(device, elementwise(x, q, arch, grid))
    source, target = torch.empty(2, 2**28 if on_gpu else 2**24, dtype=torch.uint8, device=device)
    copy_s = seconds(device, lambda: target.copy_(source))
    small = torch.zeros(1, device=device)
    launches = 200
    launch_s = seconds(device, lambda: [small.add_(1) for _ in range(launches)]) / launches
    host_link = context = None
    if on_gpu:
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        host_link = host.nbytes / seconds(device, lambda: target.copy_(host, non_blocking=True)) / 1e9
        context = context_gib(device)
    return Measured(
        attention_kernel=kernel,
        gemm_tflops=gemm_flops / gemm_s / 1e12,
        attention_tflops=4 * tokens**2 * arch.dim / attention_s / 1e12,
        elementwise_gb_s=block_elementwise_bytes(sizes) / elementwise_s / 1e9,
        memory_bandwidth_gb_s=2 * source.nbytes / copy_s / 1e9,
        launch_us=launch_s * 1e6,
        host_link_gb_s=host_link,
        context_gib=context,
    )


def linear(
    tokens: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """One linear layer, with its bias, on all tokens."""
    x = torch.randn(tokens, rows, device=device, dtype=dtype)
    weight = torch.randn(columns, rows, device=device, dtype=dtype) / rows**0.5
    bias = torch.zeros(columns, device=device, dtype=dtype)
    return lambda: F.linear(x, weight, bias)


def elementwise(
    x: torch.Tensor, heads: torch.Tensor, arch: WanArchitecture, grid: tuple[int, int, int]
) -> Callable[[], object]:
    """All that one block does between its matrix products and attention."""
    device, dtype = x.device, x.dtype
    vector = torch.rand(1, arch.dim, device=device)
    rope = rope_tables(arch.head_dim, grid, device)
    rms_norm = RMSNorm(arch.dim, dtype).to(device)
    norm3 = Fp32LayerNorm(arch.dim, dtype=dtype).to(device)
    inner = torch.randn(1, x.shape[1], arch.ffn_dim, device=device, dtype=dtype)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(2):
            modulated_norm(x, vector, vector, None, dtype)
            apply_rope(heads, rope)
            gated_add(x, x, vector, None)
        norm3(x)
        for _ in range(3):
            rms_norm(x)
        x + x
        F.gelu(inner, approximate="tanh")

    return run


def seconds(device: torch.device, function: Callable[[], object]) -> float:
    """Median seconds of a call, after WARM_S of calls."""
    scale = 1.0 if device.type == "cuda" else 0.2
    repeats = 1
    warm_until = time.perf_counter() + WARM_S * scale
    while time.perf_counter() < warm_until:
        one = timed(device, function, repeats)
        repeats = max(1, min(50, int(0.05 / max(one, 1e-7))))
    times: list[float] = []
    stop = time.perf_counter() + MEASURE_S * scale
    while time.perf_counter() < stop or len(times) < 3:
        times.append(timed(device, function, repeats))
    return statistics.median(times)


def timed(device: torch.device, function: Callable[[], object], repeats: int) -> float:
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_link(devices: list[torch.device]) -> tuple[float | None, float | None]:
    """GB/s of a copy of Wan's hidden states from the first device to the second, and microseconds of a small one."""
    if devices[0].type != "cuda":
        return None, None
    first, second = devices[:2]
    large = torch.randn(32760 * 5120, device=first, dtype=torch.bfloat16)
    small = large[:1024].clone()

    def copy(tensor: torch.Tensor) -> None:
        tensor.to(second)
        synchronize(second)

    large_s, small_s = seconds(first, lambda: copy(large)), seconds(first, lambda: copy(small))
    return large.nbytes / large_s / 1e9, small_s * 1e6


def context_gib(device: torch.device) -> float | None:
    """Memory of the device in use that torch does not count (of other processes too, where there are any)."""
    try:
        nvml = open_nvml()
    except NvmlUnavailable:
        return None
    try:
        handle = handle_of(nvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        used = None if handle is None else used_bytes(nvml, handle)
    finally:
        nvml.nvmlShutdown()
    return None if used is None else (used - torch.cuda.memory_reserved(device)) / GIB


def write_profile(folder: Path, name: str, profile: DeviceProfile, num_devices: int, on_gpu: bool) -> Path:
    """`hardware/NAME.yaml` in a config folder."""
    lines = [
        f"# Measured by scripts/calibrate.py on {time.strftime('%Y-%m-%d')} with torch {torch.__version__}.",
        f"name: {name}",
        f"device_type: {'cuda' if on_gpu else 'cpu'}",
        f"num_devices: {num_devices}",
        "device:",
    ]
    for key, value in asdict(profile).items():
        shown = f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)
        lines.append(f"  {key}: {shown}")
    path = folder / "hardware" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    main()
