"""FSDP: the weights sharded over ranks, gathered a block at a time, and let go after use.

    rank 0: shard 0 of all --.   all-gather block 1    all-gather block 2       sample 0 -> prediction 0
                              }-- while the embeddings -- while block 1    -- ..
    rank 1: shard 1 of all --'    compute                computes               sample 1 -> prediction 1

Buys memory: a rank keeps 1 / shards of the weights, and in training of the gradients and the optimiser's state, and two
blocks as they are in use. Each rank computes its own sample (or its part of one, under cfg and context parallel) as if
it had the whole model. PyTorch's FSDP2; with a 2-D mesh HSDP, copies of the shards on several groups of ranks.

All ranks of a group must do the same forwards in the same order, as each gather needs them all. Inference between GPUs
that reach each other's memory needs none of this: `peer_shards.py`.
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from wanexp.parallel.traffic import Traffic, fsdp_bytes
from wanexp.wan.transformer import WanTransformer


def shard_with_fsdp(model: WanTransformer, mesh: DeviceMesh, *, training: bool) -> Traffic:
    """Shard every block of `model`, and what is outside of them, over `mesh`; returns what counts the bytes sent.

    Comes before the weights are loaded: the parameters, on meta, become DTensors that `load_weights` fills shard by
    shard (`shard_part`). A model that has its weights is sharded too. The numbers stay those of the unsharded model:
    what is gathered has the dtype it is stored in, and activations are not cast (autocast does that in training).

    Args:
        model: called through `forward` (and `embed_text`) only, with the same number of calls on all ranks, and
            for inference always under `torch.inference_mode()` or always not (FSDP2 keeps its buffers between calls).
        mesh: 1-D over the shards, or 2-D with named dimensions, replicas then shards (HSDP).
        training: average the gradients of all ranks, with equal weight, as DDP does.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # After a forward the backward pass starts with the head; without one the embeddings would stay for nothing.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=not training)
    stages = [cast(FSDPModule, module) for module in (model, *model.blocks)]
    for stage, following in pairwise(stages):
        stage.set_modules_to_forward_prefetch([following])
    _gather_for_embed_text(model)
    return _count_bytes(model, mesh, training)


def full_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The whole gradient of a parameter, sharded or not. All ranks of its mesh must ask at the same time."""
    gradient = parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _gather_for_embed_text(model: WanTransformer) -> None:
    """Let `embed_text` be called outside of `forward` too, where nothing has gathered its weights yet."""
    inside_forward = model.embed_text
    register_fsdp_forward_method(model, "embed_text")
    outside = model.embed_text

    def embed_text(text: Tensor, clip_features: Tensor | None = None) -> Tensor:
        # Not always `outside`: called by `forward` it would let the embeddings go before the forward is done.
        is_gathered = not isinstance(model.patch_embedding.weight, DTensor)
        return (inside_forward if is_gathered else outside)(text, clip_features)

    setattr(model, "embed_text", embed_text)  # noqa: B010


def _count_bytes(model: WanTransformer, mesh: DeviceMesh, training: bool) -> Traffic:
    traffic = Traffic()
    replicas, shards = (1, mesh.size()) if mesh.ndim == 1 else (mesh.size(0), mesh.size(1))
    parameters = dict(model.named_parameters())
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    element_size = next(iter(parameters.values())).element_size()
    per_block = [0] * len(model.blocks)
    for name, size in sizes.items():
        if name.startswith("blocks."):
            per_block[int(name.split(".")[1])] += size
    outer = sum(sizes.values()) - sum(per_block)

    def count(_module: nn.Module, _args: object, _output: object) -> None:
        traffic.num_bytes += fsdp_bytes(
            outer + sum(per_block[: model.num_blocks_run]),
            element_size=element_size,
            shards=shards,
            replicas=replicas,
            training=training and torch.is_grad_enabled(),
        )

    model.register_forward_hook(count)
    return traffic
