"""Distributed: torch DistributedDataParallel, one replica a rank.

Buys throughput in training: every rank computes the gradients of its own samples, DDP averages them while the
backward pass still runs, and all ranks take the same optimiser step. For inference the ranks are independent: each
denoises its own prompts, and nothing is exchanged.
"""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def synchronize_gradients(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap `model` so that its backward pass averages the gradients over all ranks (equal weight a rank)."""
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # gradients live in the buckets: one copy of them less
        bucket_cap_mb=256,  # all-reduces this large run at the speed of the link
        broadcast_buffers=False,  # the model has none
    )
