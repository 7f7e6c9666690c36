"""Predicted peak memory of each device of a plan: weights, activations, workspace and context, in bytes.

Pure. Weights are exact, from the architecture; activations follow `denoise_memory.py`. Training has a formula.
"""

from dataclasses import asdict, dataclass
from typing import Any

from wanexp.config import RunConfig
from wanexp.hardware.devices import Device
from wanexp.planning import activations
from wanexp.planning.activations import Sizes
from wanexp.planning.denoise_memory import denoise_heap
from wanexp.planning.heap import MIB, Heap, reserved_bytes
from wanexp.planning.plan import Plan, RankPlan, reference_plan
from wanexp.planning.sizes import input_bytes, sizes_of

GIB = 1024**3

# CUDA context with the modules of torch, cuBLAS and cuDNN loaded: NVML used less torch reserved, measured on H200 0.82
CONTEXT_BYTES = int(0.82 * GIB)
# NCCL's channels and buffers, outside torch, where a process group is used. Not measured yet: calibrate.py reports it.
NCCL_BYTES = int(0.4 * GIB)
# cuBLAS and cuBLASLt keep a workspace each: 32 MiB on Hopper (torch docs, CUBLAS_WORKSPACE_CONFIG), 8.1 MiB before
WORKSPACE_BYTES = {True: 2 * 32 * MIB, False: 2 * 8320 * 1024}
# Pages that live tensors share with holes when free pages are unmapped under a limit (expandable segments)
PAGE_SLACK = 64 * MIB
# Reserved over live bytes in training: a stated guess, its allocations are not traced
TRAIN_FRAGMENTATION = 1.1


@dataclass(frozen=True)
class DeviceMemory:
    """Peak bytes on one device.

    weights: parameters; in training fp32 masters. states: gradients, optimiser state and DDP buckets (training).
    activations: all other tensors at the worst moment. workspace: cuBLAS's. context: CUDA's and NCCL's, outside torch.
    reserved: what torch's allocator takes when nothing limits it, all but `context` included.
    """

    weights: int
    states: int
    activations: int
    workspace: int
    context: int
    reserved: int

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` will say."""
        return self.weights + self.states + self.activations + self.workspace

    @property
    def needed(self) -> int:
        """The free memory without which it fails: live tensors, the pages they hold partly, and the context."""
        return self.allocated + (PAGE_SLACK if self.context else 0) + self.context

    def summary(self) -> dict[str, float]:
        """The breakdown in GiB, for the record."""
        parts: dict[str, Any] = asdict(self) | {"allocated": self.allocated, "needed": self.needed}
        return {f"{name}_gib": value / GIB for name, value in parts.items()}


def predict_memory(
    config: RunConfig, plan: Plan, *, context_bytes: int | None = None
) -> tuple[DeviceMemory, ...]:
    """One entry for each of `plan.devices`. context_bytes: measured, else a default; CPU devices have none."""
    context = context_bytes_of(plan, context_bytes)
    entries: dict[int, DeviceMemory] = {}
    known: dict[tuple[int, int], tuple[int, int]] = {}  # ranks with as many samples are alike
    for rank in plan.ranks:
        for position, index in enumerate(rank.devices):
            weights, workspace = plan.weight_bytes[index], workspace_bytes(plan.devices[index])
            if config.workload.name == "train":
                entries[index] = _predict_training(config, plan, rank, position, weights, workspace, context)
                continue
            key = rank.num_samples, position
            if key not in known:
                known[key] = _activations(config, plan, rank, position)
            live, reserved = known[key]
            entries[index] = DeviceMemory(
                weights, 0, live, workspace, context, reserved=weights + workspace + reserved
            )
    return tuple(entries[device] for device in range(len(plan.devices)))


def context_bytes_of(plan: Plan, context_bytes: int | None) -> int:
    """CUDA's context and, where there is a process group, NCCL's buffers; nothing on the CPU."""
    if plan.device_type == "cpu":
        return 0
    uses_nccl = plan.layout.num_ranks > 1 or plan.mode == "distributed"
    return (CONTEXT_BYTES if context_bytes is None else context_bytes) + (NCCL_BYTES if uses_nccl else 0)


def _activations(config: RunConfig, plan: Plan, rank: RankPlan, position: int) -> tuple[int, int]:
    """Bytes that are live at the worst moment of a denoising step, and what the allocator reserves for them."""
    heap = denoise_heap(config, plan, rank, position)
    return heap.peak, reserved_bytes(heap.events)


def reference_bytes(config: RunConfig, plan: Plan) -> int:
    """What mode none needs beside weights on the first device of `plan`, computing the shares of a batch in turn."""
    reference = reference_plan(plan, config.model.architecture.num_layers)
    share = RankPlan(0, (0,), 0, max(plan.forward_batches))
    heap = denoise_heap(config, reference, share, 0)
    return heap.peak + workspace_bytes(plan.devices[0]) + context_bytes_of(reference, None)


def workspace_bytes(device: Device) -> int:
    """What cuBLAS keeps on `device`."""
    hopper = device.compute_capability is None or device.compute_capability >= (9, 0)
    return WORKSPACE_BYTES[hopper] if device.type == "cuda" else 0


def _predict_training(
    config: RunConfig, plan: Plan, rank: RankPlan, position: int, weights: int, workspace: int, context: int
) -> DeviceMemory:
    """fp32 masters, gradients, AdamW's two moments, DDP's buckets, activations: the worst of four moments.

    P weights and L blocks on this device:
        end of the forward    2 P of bf16 weight copies that autocast caches, L checkpoints, one block in flight
        backward begins       L checkpoints, one block's saved tensors, its gradients in flight
        backward ends         1 checkpoint, the same, and all gradients
        optimiser step        all gradients, and sqrt(v) of all weights at once (torch's foreach AdamW on CUDA)
    With DDP gradients are views of its buckets, which stay.
    """
    s = sizes_of(config, rank.num_samples)
    arch, checkpointing = s.arch, config.workload.activation_checkpointing
    own_blocks = sum(owner == position for owner in plan.block_owner)
    num_weights = weights // 4 // config.model.num_experts  # the first expert is trained
    gradients, moments = 4 * num_weights, 8 * num_weights
    buckets = gradients if plan.mode == "distributed" else 0
    fresh = 0 if buckets else gradients  # what a backward pass allocates for them
    shard, block_bytes = plan.layout.shard, 4 * arch.num_block_parameters()
    # Under FSDP too autocast keeps a copy of every whole weight, once gathered.
    copies = s.compute * num_weights * shard if s.compute < 4 else 0
    outer_bytes = 4 * arch.num_outer_parameters() if shard > 1 else 0
    is_home = position == plan.block_owner[0]
    kept = sum(input_bytes(config, s.batch)[:3]) + 2 * s.rope if is_home else 2 * s.rope
    kept += s.latent(arch.out_channels) * 2 + s.batch * arch.text_len * (arch.text_dim + 2 * arch.dim) * 4
    if copies:  # those of the embeddings live until their own backward pass, the last
        kept += copies - s.compute * own_blocks * arch.num_block_parameters()
    # A block in use, the next one, and in the backward pass its gradient, whole and on its way to the shards
    of_shards = outer_bytes + 4 * block_bytes if shard > 1 else 0
    begins = of_shards + training_backward_bytes(s, own_blocks, checkpointing)
    ends = of_shards + fresh + training_backward_bytes(s, 1, checkpointing)
    kept_blocks = (own_blocks - 1) * (s.fp32 if checkpointing else s.fp32 + training_block_saved(s))
    gathered = outer_bytes + 3 * block_bytes if shard > 1 else 0  # as in `denoise_memory.py`
    forward = gathered + copies + kept_blocks + training_block_forward(s)
    on_cuda = plan.device_type == "cuda"
    step = fresh + (gradients if on_cuda else 0)  # one weight at a time on the CPU
    worst = max(forward, begins, ends, step)
    of_gradients = fresh if worst in (ends, step) else 0
    allocated = weights + moments + buckets + kept + worst + workspace
    return DeviceMemory(
        weights=weights,
        states=moments + buckets + of_gradients,
        activations=kept + worst - of_gradients,
        workspace=workspace,
        context=context,
        reserved=int(allocated * TRAIN_FRAGMENTATION),
    )


def training_backward_bytes(s: Sizes, num_blocks: int, checkpointing: bool) -> int:
    """Activations alive as the backward pass of the last of `num_blocks` blocks begins.

    The blocks' inputs; what one block saved (recomputed, or without checkpointing what all of them did, and the last
    output, which the head keeps); the gradients in flight.
    """
    inputs, saved = num_blocks * s.fp32, training_block_saved(s)
    kept = saved if checkpointing else num_blocks * saved + s.fp32
    return inputs + kept + training_block_backward(s)


def training_block_saved(s: Sizes) -> int:
    """Bytes that one block keeps for its backward pass under autocast, its checkpointed input aside.

    fp32 [B, T, dim], 4: out of the first and of the last LayerNorm (for the scale), the stream after self-attention
    and after cross-attention. In the compute dtype, 14: projected and normed q and k of self-attention and q of
    cross-attention (6), q k v and out of attention (4), q and out of cross-attention (2), the two gated updates (2).
    Inputs of the linear layers: autocast casts anew for each of q, k, v, cross q and the FFN (5); fp32 shares them (3).
    FFN: before and after the GELU. And the block's weights in the compute dtype.
    """
    arch, mixed = s.arch, s.compute < 4
    num_bytes = 4 * s.fp32 + (14 + (5 if mixed else 3)) * s.hidden + 2 * s.inner
    num_bytes += 4 * s.gathered  # scale and gate at each token, twice
    if arch.clip_tokens:
        num_bytes += 2 * s.hidden  # attention to the image, and the sum of both
    keys = s.batch * (arch.text_len + arch.clip_tokens) * arch.dim * s.compute
    num_bytes += 4 * keys  # the context cast (k, v), projected, normed
    return num_bytes + (s.compute * arch.num_block_parameters() if mixed else 0)


def training_block_backward(s: Sizes) -> int:
    """Bytes in flight as a block's backward pass begins: gradients of its output, of the FFN, and of ffn.2's weight."""
    cast = s.hidden if s.compute < 4 else 0
    return s.fp32 + cast + s.inner + 4 * s.arch.dim * s.arch.ffn_dim


def training_block_forward(s: Sizes) -> int:
    """The worst moment inside a block of the checkpointed forward pass: inference's, and a cast of its normed input."""
    heap = Heap()
    activations.block(heap, s, heap.new(s.stream))
    return heap.peak + (s.hidden if s.compute < 4 else 0)
