"""Applying a layout to a model: the steps in their order, each in a file of its own.

divide_weights -> the weights are loaded -> parallelize_wan
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from wanexp.parallel.block_distribution import Pipeline, Seams, distribute_blocks
from wanexp.parallel.cfg_parallel import split_guidance
from wanexp.parallel.context_parallel import context_parallel
from wanexp.parallel.distributed import synchronize_gradients
from wanexp.parallel.groups import Groups
from wanexp.parallel.peer_memory import PeerMemory
from wanexp.parallel.peer_shards import PeerShards, shard_over_peers
from wanexp.parallel.requests import Forwards, by_sample, one_after_another
from wanexp.parallel.tensor_parallel import tensor_parallel
from wanexp.parallel.traffic import Traffic
from wanexp.planning.plan import Plan
from wanexp.wan.transformer import WanTransformer

Counters = dict[str, Traffic | Seams]
"""What counts the bytes that each mode sends, by the mode's axis."""


@dataclass
class ParallelModel:
    """The model as training calls it, and as a denoising step hands it all its forwards."""

    module: nn.Module
    bare: WanTransformer  # without wrappers
    forwards: Forwards
    traffic: Counters = field(default_factory=dict)


def divide_weights(
    model: WanTransformer, groups: Groups, *, training: bool
) -> tuple[Counters, PeerShards | None]:
    """Cut a model on the meta device down to what this rank holds, as `shares.part_of_rank` says.

    Returns what counts the bytes sent, and the shards that ranks read from each other's memory where they do.
    """
    traffic: Counters = {}
    if (group := groups.get("tp")) is not None:
        traffic["tp"] = tensor_parallel(model, group)
    if groups.shard_mesh is not None:
        memory = groups.memories.get("shard")
        if memory is None or training:
            from wanexp.parallel.fsdp import shard_with_fsdp  # torch's takes a second to import

            traffic["shard"] = shard_with_fsdp(model, groups.shard_mesh, training=training)
        else:
            shards = shard_over_peers(model, PeerMemory(memory.group, memory.device))
            traffic["shard"] = shards.traffic
            return traffic, shards
    return traffic, None


def parallelize_wan(
    model: WanTransformer,
    plan: Plan,
    groups: Groups | None = None,
    *,
    devices: Sequence[torch.device],
    training: bool,
    traffic: Counters | None = None,
) -> ParallelModel:
    """Apply `plan` to a transformer whose weights are already with their owners.

    devices: those of this rank. traffic: of `divide_weights`. The order matters: context parallel wraps the attention
    kernel that is set; hooks belong to the bare blocks; DDP wraps the whole; CFG splits whole forwards.
    """
    groups, traffic = groups or Groups(), dict(traffic or {})
    module: nn.Module = model
    forwards = one_after_another(model)
    ulysses, ring = groups.get("ulysses"), groups.get("ring")
    if ulysses is not None or ring is not None:
        memory = groups.memories.get("ulysses")
        traffic["context"] = context_parallel(model, ulysses=ulysses, ring=ring, memory=memory)
    if plan.layout.blocks > 1:
        seams = distribute_blocks(model, block_owner=plan.block_owner, devices=devices)
        traffic["blocks"] = seams
        if plan.is_pipelined:
            pipeline = Pipeline(model, block_owner=plan.block_owner, devices=devices, seams=seams)
            forwards = by_sample(pipeline.run)
    if plan.mode == "distributed" and training:
        module = synchronize_gradients(model, devices[0])
    if (group := groups.get("cfg")) is not None:
        counter = traffic["cfg"] = Traffic()
        forwards = split_guidance(forwards, group, counter)
    return ParallelModel(module, model, forwards, traffic)
