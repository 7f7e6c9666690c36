"""What each rank has: of the video tokens, of the attention heads, of each tensor of weights. Pure; no torch."""

import math
import re
from collections.abc import Sequence
from functools import lru_cache

from wanexp.errors import LayoutError
from wanexp.parallel.layout import Layout, split_evenly
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.part import Part

ROWS_MULTIPLE, ROWS_REST = 16, 8
MIN_HEADS_SENT = 5.25  # of each token: in the middle of what was measured to cost and to pay

_BY_HEADS = re.compile(
    r"blocks\.\d+\.(self|cross)_attn\.(([qkv]|k_img|v_img)\.(weight|bias)|norm_\w+\.weight)"
)
_BY_HEAD_COLUMNS = re.compile(r"blocks\.\d+\.(self|cross)_attn\.o\.weight")
_BY_FFN = re.compile(r"blocks\.\d+\.ffn\.0\.(weight|bias)")
_BY_FFN_COLUMNS = re.compile(r"blocks\.\d+\.ffn\.2\.weight")
_ON_FIRST_RANK = re.compile(r"blocks\.\d+\.((self|cross)_attn\.o|ffn\.2)\.bias")

SHARD_BUFFERS = (
    2  # blocks that a rank has whole where it reads shards out of others' memory: in use, and the next
)
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


def shard_part(shape: tuple[int, ...], *, degree: int, index: int) -> Part:
    """What shard `index` of `degree` has of a tensor: rows, the last shards fewer or none, as torch.chunk cuts."""
    rows = -(-shape[0] // degree)
    start = min(index * rows, shape[0])
    return Part(0, start, min(start + rows, shape[0]))


def part_of_rank(
    layout: Layout, architecture: WanArchitecture, rank: int, name: str, shape: tuple[int, ...]
) -> Part:
    """What `rank` holds of the tensor `name` of (whole) `shape`. `tp` and `shard` exclude each other."""
    if layout.shard > 1:
        return shard_part(shape, degree=layout.shard, index=rank % layout.shard)
    return tensor_part(name, shape, architecture, degree=layout.tp, rank=layout.coordinate(rank, "tp"))


def padded_rows(tokens: int) -> int:
    """The rows that a rank's `tokens` are computed as under context parallelism, at most 15 more.

    For 8 more than a multiple of 16 rows cuBLAS 13 takes other kernels on Hopper, faster in most products: measured on
    H200 over 5120 x 5120, 16,376 and 16,392 rows at 682 TFLOP/s, 16,380 at 669, 16,384 at 674 (docs/results/rows.md).
    """
    return tokens + (ROWS_REST - tokens) % ROWS_MULTIPLE


@lru_cache(maxsize=16)
def token_shares(num_tokens: int, *, ulysses: int, ring: int) -> tuple[tuple[int, ...], ...]:
    """How many tokens each rank holds, as [ring rank][ulysses rank].

    Raises LayoutError for fewer tokens than ranks.
    """
    if num_tokens < ulysses * ring:
        raise LayoutError(
            f"context_parallel splits {num_tokens} video tokens over ulysses {ulysses} x ring {ring} = "
            f"{ulysses * ring} ranks, which leaves some without; write smaller degrees or a larger video"
        )
    shares = split_evenly(num_tokens, ulysses * ring)
    return tuple(tuple(shares[first : first + ulysses]) for first in range(0, len(shares), ulysses))


@lru_cache(maxsize=16)
def head_shares(num_heads: int, ulysses: int) -> tuple[int, ...]:
    """How many heads each rank of a Ulysses group attends with. Raises LayoutError for fewer heads than ranks."""
    if num_heads < ulysses:
        raise LayoutError(
            f"context_parallel gives the {num_heads} attention heads of a rank's q, k and v to ulysses {ulysses} "
            f"ranks, which leaves {ulysses - num_heads} without; write parallelism.ulysses={num_heads} or less, "
            "and spread the rest over ring"
        )
    return tuple(split_evenly(num_heads, ulysses))


def rows_apart_pay(batch: int, tokens: Sequence[int], heads: Sequence[int]) -> bool:
    """Whether a Ulysses rank gains by attending some rows of q while q and o of others travel.

    What it hides is the time of an exchange; what it costs are more kernels' ends, each with multiprocessors idle for a
    part of the time that one tile of rows takes against all keys. But for the hardware's speeds their ratio is the
    number of heads that a rank sends of each token of the video. On H200 over NVLink it pays at 10 and 7.5 (14B on two
    and four GPUs) and costs at 3 and 2.3 (1.3B): docs/results/exchanges.md.

    batch: of a forward. tokens, heads: of each rank of the group, so that all come to the same answer.
    """
    return batch * min(tokens) * (sum(heads) - max(heads)) >= MIN_HEADS_SENT * sum(tokens)


def check_context_parallel(*, num_heads: int, num_tokens: int, ulysses: int, ring: int) -> None:
    """Raises LayoutError unless `ulysses` x `ring` ranks get at least one token, and Ulysses ranks one head, each.

    num_heads: of one rank before the exchange, so under tensor parallelism its share.
    """
    head_shares(num_heads, ulysses)
    token_shares(num_tokens, ulysses=ulysses, ring=ring)
