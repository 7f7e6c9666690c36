"""Predicted seconds of a forward and of a step: work over achieved rates, kind by kind. Pure.

    forward = GEMM FLOPs / gemm + attention FLOPs / attention + bytes of elementwise kernels / elementwise
              + what of its exchanges with other GPUs is not hidden (`block_seconds`)
    step    = forwards * forward, of the slowest rank; under cfg half as many, pipelined as `pipeline_time` plays it
    training step = (1 + 2 backward + 1 recompute) * forward + 1/2 attention + optimiser bytes
                    + what of DDP's all-reduce is not hidden

Rates come from the profile: measured ones (`scripts/calibrate.py`) or, where it has none, the datasheet's times a
fraction (FRACTIONS). FLOPs and bytes as of `block_work.py`, counted kernel by kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from wanexp.config import DeviceProfile, RunConfig
from wanexp.hardware.devices import Device
from wanexp.offload.sizes import block_bytes
from wanexp.offload.swap_plan import swapped_forward_s
from wanexp.parallel.layout import Layout
from wanexp.parallel.pipeline import best_chunks, pipeline_time, stages_of
from wanexp.parallel.shares import head_shares, heads_of_ranks, rows_apart_pay, token_shares
from wanexp.parallel.traffic import ring_factor
from wanexp.planning.activations import Sizes
from wanexp.planning.block_work import (
    Kernels,
    block_elementwise_bytes,
    block_flops,
    fused_elementwise_bytes,
    kernels_of,
    quantized_bytes,
    quantized_heads_bytes,
)
from wanexp.planning.plan import DTYPE_BYTES, Plan, RankPlan
from wanexp.planning.sizes import share_of, sizes_of
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
    "collective": 0.65,  # NCCL over NVLink, of the rate of copies: 236 (all-gather) to 297 (all-reduce) of 394 GB/s
    "host": 0.85,  # 55.5 of 64 GB/s of PCIe 5, pinned
    "fp32_attention": 0.5,
}
# What the host takes for a block's forward, in launches of the simplest kernel: with fused kernels, measured where
# nothing else counts (docs/results/host_4gpus.md). For the other axes of any degree, for ring a round. Ulysses is that
# by copies; by NCCL between two GPUs it took a third longer than this says.
HOST_LAUNCHES = {"block": 115, "ulysses": 200, "ring": 125, "tp": 160, "shard": 170, "blocks": 43}
LAUNCH_US = 6.0  # a kernel launch of eager PyTorch
LATENCY_US = 15.0  # of a copy between devices
FSDP_COPY_FACTOR = (
    4  # FSDP2: a gathered block is written, and copied to its parameters: read and written; its shard is read
)
# Fitted to docs/results/layouts_4gpus.json: a round of a ring, both ways at once, against NCCL's rate; and all kernels
# while copies keep NVLink busy, at a lower clock (docs/performance.md).
RING_FACTOR, BUSY_LINKS_FACTOR = 1.9, 1.02
ENOUGH_MICROBATCHES = 16  # more do not change how many chunks are the fastest, only how long the answer takes
NCCL_SHARE = (
    32 / 132
)  # of an H200's multiprocessors, a channel each, are kept from what is computed beside a transfer
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
    """Per second: FLOPs of matrix products and attention, bytes of elementwise kernels, copies and memory.

    link, collective: from one device to another, by a copy and by NCCL. nccl_share: of the device, which that keeps
    from what is computed beside it.
    """

    gemm: float
    attention: float
    elementwise: float
    memory: float
    link: float
    collective: float
    nccl_share: float
    host: float
    latency_s: float
    launch_s: float
    is_known: bool
    attention_kernel: str = DeviceProfile.attention_kernel  # which `attention` is of


@dataclass(frozen=True)
class TimePrediction:
    """is_known: False where a rate is a generic one, which serves to rank layouts and for nothing else.

    So it is where the attention kernel's speed was never measured.
    """

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
    has_nvlink = profile is not None and profile.link == "nvlink"
    return Rates(
        gemm=(gemm or peak * FRACTIONS["gemm"]) * 1e12,
        attention=(attention or peak * attention_share) * 1e12,
        elementwise=(measured[2] or bandwidth * FRACTIONS["elementwise"]) * 1e9,
        memory=bandwidth * 0.85e9,
        link=link * 1e9,
        collective=link * 1e9 * (FRACTIONS["collective"] if has_nvlink else 1.0),
        nccl_share=NCCL_SHARE if has_nvlink else 0.0,
        host=(pick("host_link_gb_s") or GENERIC["host_link_gb_s"]) * FRACTIONS["host"] * 1e9,
        latency_s=(pick("p2p_latency_us") or LATENCY_US) * 1e-6,
        launch_s=(pick("launch_us") or LAUNCH_US) * 1e-6,
        is_known=is_known,
        attention_kernel=(profile or DeviceProfile()).attention_kernel,
    )


def block_seconds(
    s: Sizes,
    rates: Rates,
    layout: Layout = Layout(),  # noqa: B008  # immutable
    kernels: Kernels = Kernels(),  # noqa: B008
    *,
    copies: bool = False,
    stored: int | None = None,
) -> float:
    """One block's forward on one GPU of `layout`, exchanges included; never faster than its host.

    copies: copy engines carry the exchanges of ulysses and shard, which NCCL does else. stored: bytes of a weight in a
    shard, as it is gathered; None: as it is computed with.
    """
    gemm, attention = block_flops(s)
    tokens, shares = layout.ring * layout.ulysses, layout.ring * layout.ulysses * layout.tp
    gemm_s = gemm / rates.gemm / kernels.linear_speed / shares
    attention_s = attention / rates.attention / kernels.attention_speed / shares
    compute_s = gemm_s + attention_s + _elementwise_seconds(s, rates, layout, kernels)
    part = s.hidden / tokens  # of hidden states on a rank, in bytes
    carried, taken = (rates.link, 0.0) if copies else (rates.collective, rates.nccl_share)
    if layout.ulysses > 1:
        query_s = 2 * s.batch * s.tokens * s.arch.dim**2 / rates.gemm / kernels.linear_speed / shares
        sent = part / layout.tp * (layout.ulysses - 1) / layout.ulysses
        one_s = sent / carried + rates.latency_s
        # v and k travel beside the products of k and q; q and the result by copy engines each beside half of the own
        # rows' attention where these go apart, else beside nothing.
        pays = rows_apart_pay(
            s.batch,
            token_shares(s.tokens, ulysses=layout.ulysses, ring=layout.ring)[-1],
            head_shares(min(heads_of_ranks(s.arch, layout.tp)), layout.ulysses),
        )
        apart = copies and pays and layout.ring == 1 and not kernels.has_float8_attention
        half_s = attention_s / layout.ulysses / 2 if apart else 0.0
        compute_s += waited_for(2 * one_s, 2 * query_s, taken) + 2 * max(0.0, one_s - half_s)
    if layout.ring > 1:
        passed_on = 2 * part / layout.tp / rates.collective + rates.latency_s
        beside_s = attention_s / layout.ring
        if rates.nccl_share:
            # Over NVLink not hidden by the attention beside it (measured): a kernel that keeps every multiprocessor to
            # its end waits for those that NCCL has.
            passed_on, beside_s = RING_FACTOR * passed_on, 0.0
        compute_s += (layout.ring - 1) * waited_for(passed_on, beside_s, rates.nccl_share)
    if layout.tp > 1:
        compute_s += 3 * part * ring_factor(layout.tp) / rates.collective + 6 * rates.latency_s
    if layout.shard > 1:  # the next block is gathered beside this one
        weights = (stored or s.compute) * s.arch.num_block_parameters()
        gather_s = weights * (layout.shard - 1) / layout.shard / carried + rates.latency_s
        if copies:  # straight to where it is used; the own shard is read and written
            gather_s += 2 * weights / layout.shard / rates.memory
            compute_s *= BUSY_LINKS_FACTOR if rates.nccl_share else 1.0
        else:
            compute_s += FSDP_COPY_FACTOR * weights / rates.memory
        compute_s += waited_for(gather_s, compute_s, taken)
    return max(compute_s, host_seconds(rates, layout))


def host_seconds(rates: Rates, layout: Layout) -> float:
    """Of one block on one rank: what its host needs to launch it, where a core is its own."""
    launches = HOST_LAUNCHES["block"] + (layout.ring - 1) * HOST_LAUNCHES["ring"]
    launches += sum(
        HOST_LAUNCHES[axis] for axis in ("ulysses", "tp", "shard", "blocks") if getattr(layout, axis) > 1
    )
    return launches * rates.launch_s


def _elementwise_seconds(s: Sizes, rates: Rates, layout: Layout, kernels: Kernels) -> float:
    """What lies between the products and the attention, and what a layout adds to it, each rank's share."""
    own = share_of(s, layout)
    if kernels.is_fused:
        seconds = fused_elementwise_bytes(own, tp=layout.tp) / rates.memory
    else:
        seconds = (
            block_elementwise_bytes(s, tp=layout.tp) / (layout.ring * layout.ulysses) / rates.elementwise
        )
    quantized = quantized_bytes(replace(own, arch=s.arch), kernels, tp=layout.tp)
    seconds += quantized / (rates.memory if kernels.writes_float8 else rates.elementwise)
    if kernels.has_float8_attention:  # under ring again for each part
        seconds += layout.ring * quantized_heads_bytes(own, tp=layout.tp) / rates.memory
    # Ulysses packs q, k and v and puts o together: 4 tensors read and written.
    num_bytes = 8 * own.hidden // layout.tp if layout.ulysses > 1 else 0
    if layout.ring > 1:
        # Merging a part: the result so far (of 16 bits at first) scaled to fp32; the part added to it. Rounded at last.
        merged = own.hidden + own.fp32 + (layout.ring - 2) * 2 * own.fp32
        merged += (layout.ring - 1) * (2 * own.fp32 + own.hidden) + own.fp32 + own.hidden
        num_bytes += merged // layout.tp
    return seconds + num_bytes / rates.elementwise


def waited_for(transfer_s: float, beside_s: float, nccl_share: float) -> float:
    """How much longer a transfer makes the computing beside it: what outlasts it, and the multiprocessors it takes."""
    return max(0.0, transfer_s - beside_s) + nccl_share * min(transfer_s, beside_s)


def outer_seconds(s: Sizes, rates: Rates) -> float:
    """Embeddings and head: fp32 copies of the time embedding's weights, the head's norm."""
    num_bytes = 7 * s.arch.dim**2 * 10 + s.elements * 36
    return num_bytes / rates.elementwise + 40 * rates.launch_s


def predict_time(config: RunConfig, plan: Plan, profiles: Sequence[DeviceProfile | None]) -> TimePrediction:
    """profiles: what is known of each of `plan.devices`."""
    rates = _rates(config, plan, profiles)
    per_rank = [_rank_step(config, plan, rank, rates) for rank in plan.ranks]
    slowest = max(range(len(per_rank)), key=lambda rank: per_rank[rank][0])
    step_s, seam_s = per_rank[slowest]
    if plan.device_type == "cpu":
        step_s *= plan.layout.num_ranks  # logical devices share the cores
    forward_s = step_s / forwards_per_step(config)
    if config.workload.name == "train":
        rank = plan.ranks[slowest]
        step_s = _train_step(config, plan, rank, forward_s, rates[rank.devices[0]])
    is_known = all(
        rate.is_known and kernels_of(config, device, rate.attention_kernel).is_known
        for device, rate in zip(plan.devices, rates, strict=True)
    )
    return TimePrediction(forward_s, step_s, seam_s, is_known)


def _rates(config: RunConfig, plan: Plan, profiles: Sequence[DeviceProfile | None]) -> list[Rates]:
    return [
        rates_of(profile, config.precision.dtype, has_p2p=_has_p2p(device, plan.devices))
        for profile, device in zip(profiles, plan.devices, strict=True)
    ]


def _has_p2p(device: Device, devices: Sequence[Device]) -> bool:
    return {other.index for other in devices} <= {device.index, *device.peers}


def _rank_step(config: RunConfig, plan: Plan, rank: RankPlan, rates: Sequence[Rates]) -> tuple[float, float]:
    """Seconds of the forwards of one step of a rank's share, and of one forward what the seams take."""
    batch = 1 if plan.is_pipelined else rank.num_samples
    num_forwards = forwards_per_step(config) // plan.layout.cfg * rank.num_samples // batch
    sizes = sizes_of(config, batch)
    owned = [rates[device] for device in rank.devices]
    kernels = [
        kernels_of(config, plan.devices[device], rates[device].attention_kernel) for device in rank.devices
    ]
    stages = stages_of(plan.block_owner, len(plan.block_owner))
    copies = plan.transport == "copies"
    stored = 4 if config.workload.name == "train" else None  # fp32 masters
    block_s = [
        block_seconds(sizes, rate, plan.layout, kernel, copies=copies, stored=stored)
        for rate, kernel in zip(owned, kernels, strict=True)
    ]
    stage_s = [(stage.stop - stage.start) * block_s[stage.position] for stage in stages]
    stage_s[0] += outer_seconds(sizes, owned[plan.block_owner[0]])
    seam_s = seam_seconds(sizes, owned) if plan.layout.blocks > 1 else 0.0
    seams_s = seam_s * (len(stages) - 1)
    if plan.is_pipelined and plan.device_type != "cpu":  # logical devices share the cores
        step_s = pipeline_time(stage_s, [stage.position for stage in stages], num_forwards, seam_s)
    else:
        step_s = num_forwards * (sum(stage_s) + seams_s)
    # One host launches the blocks of all of a rank's devices.
    step_s = max(step_s, num_forwards * len(plan.block_owner) * host_seconds(owned[0], plan.layout))
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


def seam_seconds(s: Sizes, rates: Sequence[Rates]) -> float:
    """A copy of the hidden states from one GPU of a rank to another, by the slowest of their links."""
    return s.stream / min(rate.link for rate in rates) + max(rate.latency_s for rate in rates)


def fastest_chunks(config: RunConfig, plan: Plan, profiles: Sequence[DeviceProfile | None]) -> int:
    """In how many runs to deal the blocks out so that a step is the fastest (`parallelism.block_chunks`)."""
    if not plan.is_pipelined:
        return plan.layout.blocks
    rank, sizes = plan.ranks[0], sizes_of(config, 1)
    rates = _rates(config, plan, profiles)[: plan.layout.blocks]
    kernels = kernels_of(config, plan.devices[0], rates[0].attention_kernel)
    block_s = max(block_seconds(sizes, rate, plan.layout, kernels) for rate in rates)
    num_microbatches = forwards_per_step(config) // plan.layout.cfg * rank.num_samples
    return best_chunks(
        len(plan.block_owner),
        plan.layout.blocks,
        len(plan.block_owner) * block_s,
        seam_seconds(sizes, rates),
        min(num_microbatches, ENOUGH_MICROBATCHES),
    )


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
    kernels = kernels_of(config, plan.devices[rank.devices[0]], rates.attention_kernel)
    attention = rates.attention * kernels.attention_speed
    attention_s = len(plan.block_owner) * block_flops(sizes_of(config, rank.num_samples))[1] / attention
    backward_s = (2 + recompute) * forward_s + attention_s / 2
    layout = plan.layout
    # An all-reduce of the fp32 gradients; under FSDP a rank reduces its shard over the copies of it, and the gathers
    # and scatters of all weights (`fsdp_bytes`) run beside the backward pass too.
    reduce_s = ring_factor(layout.dp // layout.shard) * 4 * num_weights / rates.collective
    if layout.shard > 1:
        reduce_s += 2 * (layout.shard - 1) * 4 * num_weights / rates.collective
    exposed_s = max(0.0, reduce_s - HIDDEN_SHARE * backward_s)
    return forward_s + backward_s + exposed_s + ADAMW_BYTES * num_weights / rates.memory
