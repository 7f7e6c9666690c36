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

import math
import re
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from wanexp.errors import LayoutError
from wanexp.parallel.layout import split_evenly
from wanexp.parallel.sequence_split import Traffic
from wanexp.wan.architecture import NORM_EPS, WanArchitecture
from wanexp.wan.block import RMSNorm, SelfAttention, WanBlock
from wanexp.wan.rope import Rope, apply_rope
from wanexp.wan.safetensors_format import Part
from wanexp.wan.transformer import WanTransformer

_BY_HEADS = re.compile(
    r"blocks\.\d+\.(self|cross)_attn\.(([qkv]|k_img|v_img)\.(weight|bias)|norm_\w+\.weight)"
)
_BY_HEAD_COLUMNS = re.compile(r"blocks\.\d+\.(self|cross)_attn\.o\.weight")
_BY_FFN = re.compile(r"blocks\.\d+\.ffn\.0\.(weight|bias)")
_BY_FFN_COLUMNS = re.compile(r"blocks\.\d+\.ffn\.2\.weight")
_ON_FIRST_RANK = re.compile(r"blocks\.\d+\.((self|cross)_attn\.o|ffn\.2)\.bias")

FFN_UNIT = 64  # columns that stay together where they can: GPUs multiply aligned matrices faster


def check_tensor_parallel(architecture: WanArchitecture, degree: int) -> None:
    """Raises LayoutError unless every one of `degree` ranks gets at least one head and one column of the FFN."""
    if degree > min(architecture.num_heads, architecture.ffn_dim):
        raise LayoutError(
            f"tensor_parallel splits {architecture.num_heads} heads and {architecture.ffn_dim} FFN columns over "
            f"tp {degree} ranks, which leaves some without; write parallelism.tp="
            f"{min(architecture.num_heads, architecture.ffn_dim)} or less"
        )


def heads_of_ranks(architecture: WanArchitecture, degree: int) -> list[int]:
    """How many attention heads each rank holds; they differ by at most one."""
    return split_evenly(architecture.num_heads, degree)


def ffn_columns_of_ranks(architecture: WanArchitecture, degree: int) -> list[int]:
    """How many of the FFN's inner columns each rank holds, in units of FFN_UNIT where that leaves no rank without."""
    unit = math.gcd(architecture.ffn_dim, FFN_UNIT)
    if architecture.ffn_dim // unit < degree:
        unit = 1
    return [unit * share for share in split_evenly(architecture.ffn_dim // unit, degree)]


def tensor_part(
    name: str, shape: Sequence[int], architecture: WanArchitecture, *, degree: int, rank: int
) -> Part:
    """What rank `rank` of `degree` holds of the tensor `name` of (whole) `shape`."""
    if degree == 1:
        return Part.whole(shape)
    if _ON_FIRST_RANK.fullmatch(name):
        return Part.whole(shape) if rank == 0 else Part(0, 0, 0)
    heads = [count * architecture.head_dim for count in heads_of_ranks(architecture, degree)]
    columns = ffn_columns_of_ranks(architecture, degree)
    for pattern, dim, shares in (
        (_BY_HEADS, 0, heads),
        (_BY_HEAD_COLUMNS, 1, heads),
        (_BY_FFN, 0, columns),
        (_BY_FFN_COLUMNS, 1, columns),
    ):
        if pattern.fullmatch(name):
            start = sum(shares[:rank])
            return Part(dim, start, start + shares[rank])
    return Part.whole(shape)


def tensor_parallel_bytes(
    architecture: WanArchitecture, *, batch: int, tokens: int, element_size: int, degree: int
) -> int:
    """Bytes that a rank sends in one forward, by rings: 2 (degree - 1) / degree of every all-reduced tensor.

    A block: three [batch, tokens, dim] of `element_size` an element, and one fp32 sum of squares a row of q and k (of
    both attentions, and of k_img).
    """
    hidden = 3 * batch * tokens * architecture.dim * element_size
    sums = 4 * batch * (3 * tokens + architecture.text_len + architecture.clip_tokens)
    return round(architecture.num_layers * (hidden + sums) * _ring_factor(degree))


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
            cut = (
                None if part.is_empty else nn.Parameter(part.cut(parameter.data).clone(), requires_grad=False)
            )
            setattr(model.get_submodule(owner), leaf, cut)
    reducer = len(_REDUCERS)
    _REDUCERS.append((group, traffic))
    for block in model.blocks:
        assert isinstance(block, WanBlock)
        for attention in (block.self_attn, block.cross_attn):
            for name, norm in list(attention.named_children()):
                if isinstance(norm, RMSNorm):
                    setattr(attention, name, SplitRMSNorm(norm, architecture.dim, reducer))
        block.self_attn.__class__ = SplitSelfAttention  # its parameters, hooks and kernel stay what they are
        # Hooks on what holds the last linear layer, not on that layer, which quantisation may put another in place of.
        for module in (block.self_attn, block.cross_attn, block.ffn):
            module.register_forward_hook(lambda _module, _args, output: _sum_over_ranks(output, reducer))
    return traffic


class SplitRMSNorm(RMSNorm):
    """The RMSNorm over all heads of a tensor of which this rank has some: mean(x^2) is the group's."""

    def __init__(self, norm: RMSNorm, full_dim: int, reducer: int) -> None:
        nn.Module.__init__(self)
        self.weight = norm.weight
        self.full_dim = full_dim
        self.reducer = reducer

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x, _sum_over_ranks(square_sums(x), self.reducer))

    def scale(self, x: Tensor, sums: Tensor) -> Tensor:
        """`x` [batch, tokens, own dim] normed by the group's sums of squares, fp32 [batch, tokens, 1]."""
        normed = x * torch.rsqrt(sums / self.full_dim + NORM_EPS)  # fp32, as the sums are
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class SplitSelfAttention(SelfAttention):
    """Self-attention with the heads of this rank. One all-reduce serves the norms of q and k."""

    norm_q: SplitRMSNorm
    norm_k: SplitRMSNorm

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        q, k = self.q(x), self.k(x)
        sums = _sum_over_ranks(torch.stack((square_sums(q), square_sums(k))), self.norm_q.reducer)
        q = apply_rope(self.split_heads(self.norm_q.scale(q, sums[0])), rope)
        k = apply_rope(self.split_heads(self.norm_k.scale(k, sums[1])), rope)
        v = self.split_heads(self.v(x))
        return self.o(self.attend(q, k, v).flatten(2))


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
@torch.library.custom_op("wanexp::all_reduce", mutates_args=("tensor",))
def _all_reduce(tensor: Tensor, reducer: int) -> None:
    group, traffic = _REDUCERS[reducer]
    dist.all_reduce(tensor, group=group)
    traffic.num_bytes += round(tensor.nbytes * _ring_factor(dist.get_world_size(group)))


def _ring_factor(degree: int) -> float:
    return 2 * (degree - 1) / degree
