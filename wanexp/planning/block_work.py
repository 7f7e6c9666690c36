"""What one block computes in a forward, in FLOPs and bytes, and how much faster some kernels are than others. Pure."""

from dataclasses import dataclass

from wanexp.config import DeviceProfile, RunConfig
from wanexp.hardware.devices import Device
from wanexp.planning.activations import Sizes

# Self-attention of 32,760 tokens and 40 heads by each kernel over that by cuDNN at 580 TFLOP/s: measured on H200 on
# 2026-11-22, fa3_fp8 without its quantisation; sdpa_efficient by the probes in docs/results/layouts_2gpus.json (171 of
# 568 TFLOP/s) and h100.json (171 of 564). A profile's `attention_tflops` is of its `attention_kernel`.
ATTENTION_SPEED = {
    "sdpa_cudnn": 1.0,
    "sdpa_flash": 0.63,
    "sdpa_efficient": 0.30,
    "fa3": 711 / 580,
    "fa4": 1.19,
    "fa3_fp8": 1.60,
}
# What auto takes where these cannot be had: in training, for they have no backward pass, and in fp16
BF16_FORWARD_ONLY, INSTEAD = ("fa3", "fa3_fp8", "fa4"), "sdpa_cudnn"
FP32_KERNEL = "sdpa_efficient"  # what auto takes in fp32
# Off Hopper nobody has measured how slow these are; the others count alike there.
SLOW_KERNELS = ("sdpa_efficient", "sdpa_math")
FP8_SPEED = 1.88  # of float8 products over 16-bit ones at Wan shapes, measured likewise
FP8_CAPABILITY = (8, 9)
FUSED_CAPABILITY = (8, 0)
HOPPER = (9, 0)


@dataclass(frozen=True)
class Kernels:
    """What a block computes with on one device.

    attention_speed, linear_speed: over the profile's rates. is_known: False where nobody has measured the attention
    kernel, which counts like the profile's. writes_float8: fused kernels quantise what they write for float8 layers.
    has_float8_attention: q, k and v are quantised first.
    """

    is_fused: bool = False
    linear: str = "dtype"
    linear_speed: float = 1.0
    attention_speed: float = 1.0
    is_known: bool = True
    writes_float8: bool = False
    has_float8_attention: bool = False


def kernels_of(config: RunConfig, device: Device, profiled: str = DeviceProfile.attention_kernel) -> Kernels:
    """Those that the run will choose: fused ones for inference on GPUs, if they are not refused or unknown there.

    profiled: the kernel that the profile's rate of attention is of, and `auto` stands for. Another one counts with its
    speed over that, on a Hopper.
    """
    attention, dtype = config.attention, config.precision.dtype
    if attention == "auto" and profiled in BF16_FORWARD_ONLY:
        attention = INSTEAD if config.workload.name == "train" or dtype == "float16" else profiled
    capability = device.compute_capability
    can_fuse = device.type == "cuda" and (capability is None or capability >= FUSED_CAPABILITY)
    wants_fused = config.kernels == "triton" or (config.kernels == "auto" and can_fuse)
    has_fp8 = device.type == "cuda" and capability is not None and capability >= FP8_CAPABILITY
    is_hopper = device.type == "cuda" and (capability is None or capability >= HOPPER)
    has_ratios = is_hopper and dtype != "float32"
    base = FP32_KERNEL if dtype == "float32" else profiled
    speed = _attention_speed(attention, base, has_ratios=has_ratios)
    is_fused = wants_fused and config.workload.name == "denoise"
    is_fp8 = config.precision.linear == "fp8" and has_fp8
    return Kernels(
        is_fused=is_fused,
        linear=config.precision.linear,
        linear_speed=FP8_SPEED if is_fp8 else 1.0,
        attention_speed=1.0 if speed is None else speed,
        is_known=speed is not None,
        writes_float8=is_fused and is_fp8,
        has_float8_attention=attention == "fa3_fp8",
    )


def _attention_speed(attention: str, profiled: str, *, has_ratios: bool) -> float | None:
    """Of a kernel over the profiled one; None where nobody has measured it."""
    if attention in ("auto", profiled):
        return 1.0
    if not has_ratios:
        return None if attention in SLOW_KERNELS else 1.0
    speed, base = ATTENTION_SPEED.get(attention), ATTENTION_SPEED.get(profiled)
    return speed / base if speed and base else None


def block_flops(s: Sizes) -> tuple[int, int]:
    """Matrix products (the context's k and v included) and attention of one block, 2 FLOPs a multiply-add."""
    arch, tokens = s.arch, s.tokens
    keys = arch.text_len + arch.clip_tokens
    gemm = 2 * tokens * (6 * arch.dim**2 + 2 * arch.dim * arch.ffn_dim) + 4 * keys * arch.dim**2
    return s.batch * gemm, s.batch * 4 * tokens * (tokens + keys) * arch.dim


def block_elementwise_bytes(s: Sizes, *, tp: int = 1) -> int:
    """Bytes that the kernels between the matrix products read and write in one block, as eager PyTorch runs them.

    tp: ranks that share the heads and the columns of the FFN.
    """
    c, r = s.compute, s.residual
    upcast, rounded = (r + 4 if r < 4 else 0), (4 + c if c < 4 else 0)
    narrowed = 4 + r if r < 4 else 0
    norm = upcast + 8 + 8 + 8 + rounded  # modulated_norm: cast, LayerNorm, times, plus, cast
    norm3 = upcast + 8 + (narrowed or rounded)
    qk_norm = 2 * c + 2 * c  # RMSNorm, and its weight
    if tp > 1:  # sums of squares; normed in fp32; rounded; weight
        qk_norm = c + (c + 4) + rounded + 2 * c
    # Two halves, each: two products of strided 16-bit channels (whole cache lines are read), a sum, a cast; then stack
    rope = 2 * (4 * (c + 2) + 2 * 6 + (4 + c if c < 4 else 0) + 2 * c)
    gelu = 2 * c * s.arch.ffn_dim / s.arch.dim
    split = (3 * qk_norm + rope + gelu) / tp  # q and k of self-attention, q of cross-attention
    gated = 2 * (r + c + 4 + narrowed)
    added = 2 * r + c
    gathered = 4 * 8 if s.distinct_timesteps else 0
    return round(s.elements * (2 * norm + norm3 + split + gated + added + gathered))


def fused_elementwise_bytes(s: Sizes, *, tp: int = 1) -> int:
    """The same of the kernels of `wan/fused.py`, which read and write each tensor once; the GELU is in a product.

    Of [tokens, dim]: norm 2, RMSNorm and RoPE of q and k 4 and of the cross-attention's q 2, sum and norm 4 twice, the
    last sum 3: 19, of which 7 are of the residual stream.
    """
    sums = 3 * s.compute if tp > 1 else 0  # of squares, in a pass of their own
    return round(s.elements * (7 * s.residual + 6 * s.compute + (6 * s.compute + sums) / tp))


def quantized_bytes(s: Sizes, kernels: Kernels, *, tp: int = 1) -> int:
    """What 8-bit linear layers read and write beside their products, more than 16-bit ones. s: with all columns.

    fp8: an input is read and written in 8 bits, that of q, k and v once; the fused GELU is a pass of its own again.
    Where that pass and the norms write 8 bits themselves, only the two inputs of o are read once more, and three norms
    write less.
    Weights in 8 bits: each is read, widened, and scaled in place.
    """
    if kernels.linear == "dtype":
        return 0
    wide = s.arch.ffn_dim / s.arch.dim
    if kernels.writes_float8:
        return round(s.elements * ((2 + wide) / tp * (s.compute + 1) - 3 * (s.compute - 1)))
    if kernels.linear == "fp8":
        return round(s.elements * (3 + (2 + wide) / tp) * (s.compute + 1))
    return s.arch.num_block_parameters() // tp * (1 + 3 * s.compute)


def quantized_heads_bytes(s: Sizes, *, tp: int = 1) -> int:
    """What float8 attention reads and writes beforehand: q, k and v read for the peaks of heads, and for 8 bits."""
    return s.elements * 3 * (2 * s.compute + 1) // tp
