"""Predicted seconds of a forward and of a step: work over achieved rates, kind by kind. Pure.

    forward = GEMM FLOPs / gemm + attention FLOPs / attention + bytes of elementwise kernels / elementwise
              + what of its exchanges with other GPUs is not hidden (`_exchange_seconds`)
    step    = forwards * forward, of the slowest rank; under cfg half as many, pipelined as `pipeline_time` plays it
    training step = (1 + 2 backward + 1 recompute) * forward + 1/2 attention + optimiser bytes
                    + what of DDP's all-reduce is not hidden

Rates come from the profile: measured ones (`scripts/calibrate.py`) or, where it has none, the datasheet's times a
fraction (FRACTIONS). FLOPs as of `WanArchitecture.forward_flops`; bytes are counted kernel by kernel below.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from wanexp.config import DeviceProfile, RunConfig
from wanexp.hardware.devices import Device
from wanexp.offload.sizes import block_bytes
from wanexp.offload.swap_plan import swapped_forward_s
from wanexp.parallel.layout import Layout
from wanexp.parallel.pipeline import pipeline_time, stages_of
from wanexp.parallel.traffic import ring_factor
from wanexp.planning.activations import Sizes
from wanexp.planning.memory import sizes_of
from wanexp.planning.plan import DTYPE_BYTES, Plan, RankPlan
from wanexp.workloads.sizes import forwards_per_step

# Achieved share of the datasheet's peak, as scripts/calibrate.py found it on H200 on 2026-11-22 (eager, bf16): GEMM 692
# of 989 TFLOP/s, cuDNN attention 567 of 989, elementwise kernels (mixed dtypes, strided RoPE) 2538 of 4800 GB/s, P2P
# 383 of 450 GB/s. Taken for devices that nobody has calibrated.
FRACTIONS = {
    "gemm": 0.70,
    "attention": 0.57,
    "elementwise": 0.53,
    "p2p": 0.85,
    "staged": 0.4,
    "host": 0.85,  # 55.5 of 64 GB/s of PCIe 5, pinned
    "fp32_attention": 0.5,
}
BLOCK_KERNELS = 62  # launches in one block's forward, counted in transformer.py
LAUNCH_US = 6.0  # a kernel launch of eager PyTorch: the floor of a small model
LATENCY_US = 15.0  # of a copy between devices
FSDP_COPY_FACTOR = (
    4  # a gathered block is written, and copied to its parameters: read and written; its shard is read
)
HIDDEN_SHARE = 0.9  # of the backward pass, during which DDP's all-reduce can run
ADAMW_BYTES = 80  # read and written per weight by torch's foreach AdamW: 8 fp32 kernels
# Where nothing is known of a device: ratios of a generic GPU, good for ranking and never shown
GENERIC = {
    "bf16_tflops": 100.0,
    "fp32_tflops": 20.0,
    "memory_bandwidth_gb_s": 1000.0,
    "link_gb_s": 32.0,
    "host_link_gb_s": 25.0,
}


@dataclass(frozen=True)
class Rates:
    """Per second: FLOPs of matrix products and attention, bytes of elementwise kernels, copies and memory."""

    gemm: float
    attention: float
    elementwise: float
    memory: float
    link: float
    host: float
    latency_s: float
    launch_s: float
    is_known: bool


@dataclass(frozen=True)
class TimePrediction:
    """is_known: False where a rate is a generic one, which serves to rank layouts and for nothing else."""

    forward_s: float
    step_s: float
    seam_s: float  # of forward_s, crossing between devices
    is_known: bool


def rates_of(profile: DeviceProfile | None, dtype: str, *, has_p2p: bool = True) -> Rates:
    """The rates of one device in `dtype` (as of PrecisionConfig). has_p2p: copies need not go through the host."""

    def pick(name: str) -> float | None:
        return getattr(profile, name) if profile is not None else None

    fp32 = dtype == "float32"
    peak_name = "fp32_tflops" if fp32 else "bf16_tflops"
    measured = pick("gemm_tflops"), pick("attention_tflops"), pick("elementwise_gb_s")
    is_known = (pick(peak_name) or (measured[0] if not fp32 else None)) is not None
    is_known = is_known and (pick("memory_bandwidth_gb_s") or measured[2]) is not None
    peak = pick(peak_name) or GENERIC[peak_name]
    bandwidth = pick("memory_bandwidth_gb_s") or GENERIC["memory_bandwidth_gb_s"]
    attention_share = FRACTIONS["fp32_attention" if fp32 else "attention"]
    gemm, attention = (None, None) if fp32 else measured[:2]
    link = (
        pick("p2p_gb_s")
        or (pick("link_gb_s") or GENERIC["link_gb_s"]) * FRACTIONS["p2p" if has_p2p else "staged"]
    )
    return Rates(
        gemm=(gemm or peak * FRACTIONS["gemm"]) * 1e12,
        attention=(attention or peak * attention_share) * 1e12,
        elementwise=(measured[2] or bandwidth * FRACTIONS["elementwise"]) * 1e9,
        memory=bandwidth * 0.85e9,
        link=link * 1e9,
        host=(pick("host_link_gb_s") or GENERIC["host_link_gb_s"]) * FRACTIONS["host"] * 1e9,
        latency_s=(pick("p2p_latency_us") or LATENCY_US) * 1e-6,
        launch_s=(pick("launch_us") or LAUNCH_US) * 1e-6,
        is_known=is_known,
    )


def block_flops(s: Sizes) -> tuple[int, int]:
    """Matrix products (the context's k and v included) and attention of one block, 2 FLOPs a multiply-add."""
    arch, tokens = s.arch, s.tokens
    keys = arch.text_len + arch.clip_tokens
    gemm = 2 * tokens * (6 * arch.dim**2 + 2 * arch.dim * arch.ffn_dim) + 4 * keys * arch.dim**2
    return s.batch * gemm, s.batch * 4 * tokens * (tokens + keys) * arch.dim


def block_elementwise_bytes(s: Sizes) -> int:
    """Bytes that the kernels between the matrix products read and write in one block, as eager PyTorch runs them."""
    c, r = s.compute, s.residual
    upcast, rounded = (r + 4 if r < 4 else 0), (4 + c if c < 4 else 0)
    narrowed = 4 + r if r < 4 else 0
    norm = upcast + 8 + 8 + 8 + rounded  # modulated_norm: cast, LayerNorm, times, plus, cast
    norm3 = upcast + 8 + (narrowed or rounded)
    qk_norms = 3 * (2 * c + 2 * c)  # RMSNorm and its weight: q and k of self-attention, q of cross-attention
    # Two halves, each: two products of strided 16-bit channels (whole cache lines are read), a sum, a cast; then stack
    rope = 2 * (4 * (c + 2) + 2 * 6 + (4 + c if c < 4 else 0) + 2 * c)
    gated = 2 * (r + c + 4 + narrowed)
    added = 2 * r + c
    gathered = 4 * 8 if s.distinct_timesteps else 0
    gelu = 2 * c * s.arch.ffn_dim / s.arch.dim
    return round(s.elements * (2 * norm + norm3 + qk_norms + rope + gated + added + gathered + gelu))


def block_seconds(s: Sizes, rates: Rates, layout: Layout = Layout()) -> float:  # noqa: B008  # immutable
    """One block's forward on one GPU of `layout`, exchanges included; never faster than its launches."""
    gemm, attention = block_flops(s)
    tokens, shares = layout.ring * layout.ulysses, layout.ring * layout.ulysses * layout.tp
    work = gemm / rates.gemm + attention / rates.attention
    elementwise = block_elementwise_bytes(s) / tokens
    # Ulysses packs q, k and v and puts o together: 4 tensors read and written.
    elementwise += 8 * s.hidden / tokens if layout.ulysses > 1 else 0
    # A ring merges each part but the first: the fp32 result so far and the part read, the result written.
    elementwise += (layout.ring - 1) * (2 * s.fp32 + s.hidden) / tokens
    compute = max(work / shares + elementwise / rates.elementwise, BLOCK_KERNELS * rates.launch_s)
    return _with_exchange(s, rates, layout, compute, attention / shares / rates.attention)


def _with_exchange(s: Sizes, rates: Rates, layout: Layout, compute: float, attention: float) -> float:
    """Seconds of a block with its exchanges: Ulysses and tensor parallel wait for theirs, ring and FSDP hide them.

    Bytes as of `parallel/traffic.py`, a block's share of them.
    """
    seconds, part = compute, s.hidden / (layout.ring * layout.ulysses)
    if layout.ulysses > 1:
        seconds += 4 * part * (layout.ulysses - 1) / layout.ulysses / rates.link + 2 * rates.latency_s
    if layout.ring > 1:  # each step's transfer beside its share of the attention
        passed_on = 2 * part / rates.link + rates.latency_s
        seconds += (layout.ring - 1) * max(0.0, passed_on - attention / layout.ring)
    if layout.tp > 1:
        seconds += 3 * part * ring_factor(layout.tp) / rates.link + 5 * rates.latency_s
    if layout.shard > 1:
        block_bytes = s.compute * s.arch.num_block_parameters()
        gather = block_bytes * (layout.shard - 1) / layout.shard / rates.link + rates.latency_s
        seconds = max(seconds + FSDP_COPY_FACTOR * block_bytes / rates.memory, gather)
    return seconds


def outer_seconds(s: Sizes, rates: Rates) -> float:
    """Embeddings and head: fp32 copies of the time embedding's weights, the head's norm."""
    num_bytes = 7 * s.arch.dim**2 * 10 + s.elements * 36
    return num_bytes / rates.elementwise + 40 * rates.launch_s


def predict_time(config: RunConfig, plan: Plan, profiles: Sequence[DeviceProfile | None]) -> TimePrediction:
    """profiles: what is known of each of `plan.devices`."""
    rates = [
        rates_of(profile, config.precision.dtype, has_p2p=_has_p2p(device, plan.devices))
        for profile, device in zip(profiles, plan.devices, strict=True)
    ]
    per_rank = [_rank_step(config, plan, rank, rates) for rank in plan.ranks]
    slowest = max(range(len(per_rank)), key=lambda rank: per_rank[rank][0])
    step_s, seam_s = per_rank[slowest]
    if plan.device_type == "cpu":
        step_s *= plan.layout.num_ranks  # logical devices share the cores
    forward_s = step_s / forwards_per_step(config)
    if config.workload.name == "train":
        rank = plan.ranks[slowest]
        step_s = _train_step(config, plan, rank, forward_s, rates[rank.devices[0]])
    return TimePrediction(forward_s, step_s, seam_s, is_known=all(rate.is_known for rate in rates))


def _has_p2p(device: Device, devices: Sequence[Device]) -> bool:
    return {other.index for other in devices} <= {device.index, *device.peers}


def _rank_step(config: RunConfig, plan: Plan, rank: RankPlan, rates: Sequence[Rates]) -> tuple[float, float]:
    """Seconds of the forwards of one step of a rank's share, and of one forward what the seams take."""
    batch = 1 if plan.is_pipelined else rank.num_samples
    num_forwards = forwards_per_step(config) // plan.layout.cfg * rank.num_samples // batch
    sizes = sizes_of(config, batch)
    owned = [rates[device] for device in rank.devices]
    outer_s = outer_seconds(sizes, owned[plan.block_owner[0]])
    stages = stages_of(plan.block_owner, len(plan.block_owner))
    stage_s = [
        (stage.stop - stage.start) * block_seconds(sizes, owned[stage.position], plan.layout)
        for stage in stages
    ]
    stage_s[0] += outer_s
    seam_s = 0.0
    if plan.layout.blocks > 1:
        slowest = min(rate.link for rate in owned)
        seam_s = sizes.stream / slowest + max(rate.latency_s for rate in owned)
    seams_s = seam_s * (len(stages) - 1)
    if plan.is_pipelined:
        step_s = pipeline_time(stage_s, [stage.position for stage in stages], num_forwards, seam_s)
    else:
        step_s = num_forwards * (sum(stage_s) + seams_s)
    for position, rate in enumerate(owned):  # swapped blocks are copied beside the computing
        away = sum(plan.block_owner[index] == position for index in plan.swapped)
        swapped_s = swapped_forward_s(
            step_s,
            num_swapped=num_forwards * away if away > config.offload.buffers else 0,
            block_bytes=swapped_block_bytes(config, plan),
            host_bytes_per_s=rate.host,
            buffers=config.offload.buffers,
        )
        step_s = max(step_s, swapped_s)
    return step_s, seams_s


def swapped_block_bytes(config: RunConfig, plan: Plan) -> int:
    """What is copied for one swapped block: this rank's share of it."""
    element = DTYPE_BYTES[config.precision.dtype]
    whole = block_bytes(config.model.architecture, linear=config.precision.linear, element_bytes=element)
    return whole // plan.layout.tp


def _train_step(config: RunConfig, plan: Plan, rank: RankPlan, forward_s: float, rates: Rates) -> float:
    recompute = 1 if config.workload.activation_checkpointing else 0
    num_weights = plan.weight_bytes[0] // 4 // config.model.num_experts
    # The backward pass of a matrix product is two of them; that of attention is five for the forward's two, as it
    # makes the scores again (FlashAttention-2, section 3.1).
    attention_s = len(plan.block_owner) * block_flops(sizes_of(config, rank.num_samples))[1] / rates.attention
    backward_s = (2 + recompute) * forward_s + attention_s / 2
    layout = plan.layout
    # An all-reduce of the fp32 gradients; under FSDP a rank reduces its shard over the copies of it, and the gathers
    # and scatters of all weights (`fsdp_bytes`) run beside the backward pass too.
    reduce_s = ring_factor(layout.dp // layout.shard) * 4 * num_weights / rates.link
    if layout.shard > 1:
        reduce_s += 2 * (layout.shard - 1) * 4 * num_weights / rates.link
    exposed_s = max(0.0, reduce_s - HIDDEN_SHARE * backward_s)
    return forward_s + backward_s + exposed_s + ADAMW_BYTES * num_weights / rates.memory
