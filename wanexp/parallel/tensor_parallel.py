"""Tensor parallel: the heads of every attention and the columns of every FFN split over ranks.

                 .-> q, k, v: own heads -> attend -> o: own columns -.
    x (whole) ---|                                                   +-- all-reduce --> x (whole)
                 `-> the same on the other ranks --------------------'
                     (the FFN likewise: ffn.0 by rows, ffn.2 by columns)

Buys latency and memory. All ranks call the model with the same inputs and get the same answer. q, k, v and ffn.0 are
split by rows, o and ffn.2 by columns, so that one all-reduce after each attention and FFN makes the residual stream
whole again; its bias is held by the first rank alone, so it is added once. The RMSNorm of q and k is over all heads:
the ranks add up their sums of squares. Embeddings, modulation, norm3 and head are copies. For inference.

Plain slices in the model's own modules, not DTensor: its Shard(0) of 12 heads of q on 8 ranks would cut through heads.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from wanexp.parallel.shares import check_tensor_parallel, tensor_part
from wanexp.parallel.traffic import Traffic, ring_factor
from wanexp.wan import fused
from wanexp.wan.architecture import NORM_EPS
from wanexp.wan.block import RMSNorm, WanBlock
from wanexp.wan.operators import operator
from wanexp.wan.part import Part
from wanexp.wan.rope import Rope
from wanexp.wan.transformer import WanTransformer


def tensor_parallel(model: WanTransformer, group: ProcessGroup) -> Traffic:
    """Cut `model` down to this rank's share and join it with those of `group`; returns what counts the bytes sent.

    Comes before the weights are loaded (then on meta: load with `tensor_part`) and before what wraps `attend`. A model
    that has its weights is cut too.

    Raises LayoutError for more ranks than heads.
    """
    architecture = model.architecture
    degree, rank = dist.get_world_size(group), dist.get_rank(group)
    check_tensor_parallel(architecture, degree)
    traffic = Traffic()
    if degree == 1:
        return traffic
    shapes = dict(architecture.tensor_shapes())
    for name, parameter in list(model.named_parameters()):
        part = tensor_part(name, shapes[name], architecture, degree=degree, rank=rank)
        if part != Part.whole(shapes[name]):
            owner, _, leaf = name.rpartition(".")
            own = part.cut(parameter.data)
            # Not own.clone(), which on the meta device loads torch's compiler.
            kept = torch.empty(own.shape, dtype=own.dtype, device=own.device).copy_(own)
            cut = None if part.is_empty else nn.Parameter(kept, requires_grad=False)
            setattr(model.get_submodule(owner), leaf, cut)
    reducer = len(_REDUCERS)
    _REDUCERS.append((group, traffic))
    for block in model.blocks:
        assert isinstance(block, WanBlock)
        for attention in (block.self_attn, block.cross_attn):
            for name, norm in list(attention.named_children()):
                if isinstance(norm, RMSNorm):
                    setattr(attention, name, SplitRMSNorm(norm, architecture.dim, reducer))
        # Hooks on what holds the last linear layer, not on that layer, which quantisation may put another in place of.
        for module in (block.self_attn, block.cross_attn, block.ffn):
            module.register_forward_hook(lambda _module, _args, output: _sum_over_ranks(output, reducer))
    return traffic


class SplitRMSNorm(RMSNorm):
    """The RMSNorm over all heads of a tensor of which this rank has some: mean(x^2) is the group's."""

    def __init__(self, norm: RMSNorm, full_dim: int, reducer: int) -> None:
        nn.Module.__init__(self)
        self.weight = norm.weight
        self.is_fused = norm.is_fused
        self.full_dim = full_dim
        self.reducer = reducer

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        sums = _sum_over_ranks(square_sums(x), self.reducer)  # fp32 [batch, tokens, 1]
        if self.is_fused:
            return fused.rms_norm(x, self.weight, rope, square_sums=sums, full_dim=self.full_dim)
        normed = x * torch.rsqrt(sums / self.full_dim + NORM_EPS)  # fp32, as the sums are
        return normed.to(x.dtype) * self.weight.to(x.dtype)


def square_sums(x: Tensor) -> Tensor:
    """Sums of squares over the last axis: [..., dim] -> fp32 [..., 1]. Makes no fp32 copy of `x`."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()


_REDUCERS: list[tuple[ProcessGroup, Traffic]] = []
"""The group and the counter of each model that was split; an operator takes numbers and tensors only."""


def _sum_over_ranks(tensor: Tensor, reducer: int) -> Tensor:
    """Adds the tensors of all ranks up, in place."""
    _all_reduce(tensor, reducer)
    return tensor


# An operator of its own, so that torch.compile keeps it whole and the bytes are counted when it runs, not when traced.
@operator("wanexp::all_reduce", mutates=("tensor",))
def _all_reduce(tensor: Tensor, reducer: int) -> None:
    group, traffic = _REDUCERS[reducer]
    dist.all_reduce(tensor, group=group)
    traffic.num_bytes += round(tensor.nbytes * ring_factor(dist.get_world_size(group)))
