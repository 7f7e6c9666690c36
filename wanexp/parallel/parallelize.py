"""Applying a layout to a model: the steps in their order, each in a file of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from wanexp.parallel.block_distribution import Seams, distribute_blocks
from wanexp.parallel.distributed import synchronize_gradients
from wanexp.planning.plan import Plan
from wanexp.wan.transformer import WanTransformer


@dataclass
class ParallelModel:
    """The model as it is called, and what its hooks count."""

    module: nn.Module
    bare: WanTransformer  # without wrappers
    seams: Seams | None = None


def parallelize_wan(
    model: WanTransformer, plan: Plan, *, devices: Sequence[torch.device], training: bool
) -> ParallelModel:
    """Apply `plan` to a transformer whose weights are already with their owners.

    devices: those of this rank. The order matters: hooks belong to the bare blocks, DDP wraps the whole.
    """
    module: nn.Module = model
    seams = None
    if plan.layout.blocks > 1:
        seams = distribute_blocks(model, block_owner=plan.block_owner, devices=devices)
    if plan.mode == "distributed" and training:
        module = synchronize_gradients(model, devices[0])
    return ParallelModel(module, model, seams)
