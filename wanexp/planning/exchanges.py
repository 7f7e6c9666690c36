"""Self-attention under context parallelism, tensor by tensor: `parallel/ulysses.py` and `parallel/ring.py`.

`met` is what the attention meets: q, k or v of all tokens of a Ulysses group, with this rank's heads of them.
"""

from wanexp.parallel.layout import Layout
from wanexp.parallel.shares import head_shares, heads_of_ranks, rows_apart_pay
from wanexp.planning import activations
from wanexp.planning.activations import Sizes
from wanexp.planning.heap import Heap


def own_bytes(s: Sizes, layout: Layout) -> int:
    """q, k or v of this rank's tokens, with the heads that tensor parallelism leaves it."""
    return s.hidden * heads_of_ranks(s.arch, layout.tp)[0] // s.arch.num_heads


def met_bytes(s: Sizes, layout: Layout) -> int:
    """The same of the tokens that it attends to. s: this rank's share."""
    if layout.ulysses == 1:
        return own_bytes(s, layout)
    heads = -(-heads_of_ranks(s.arch, layout.tp)[0] // layout.ulysses)
    return s.batch * s.tokens * layout.ulysses * heads * s.arch.head_dim * s.compute


def place_bytes(s: Sizes, layout: Layout) -> int:
    """Of each of the four places that copy engines of other ranks write v, k, q and o to; 0 where there are none."""
    return max(own_bytes(s, layout), met_bytes(s, layout)) if layout.ulysses > 1 else 0


def score_bytes(s: Sizes, layout: Layout) -> int:
    """One matrix of scores, fp32 [batch, heads, tokens, tokens], of what this rank attends with. s: its share."""
    heads = -(-heads_of_ranks(s.arch, layout.tp)[0] // layout.ulysses)
    return 4 * s.batch * heads * (s.tokens * layout.ulysses) ** 2


def attended(heap: Heap, s: Sizes, layout: Layout, normed: int = 0, *, copies: bool = False) -> int:
    """From the normed tensor to what was attended, ahead of the last projection.

    normed: on the fused path, which lets it go once q is there; 0 on the plain path. copies: what arrives has its place
    (`place_bytes`).
    """
    own, met = own_bytes(s, layout), met_bytes(s, layout)
    kept, packed = [], []
    for name in ("v", "k", "q"):
        weight = heap.new(s.wide_weight(own // (s.batch * s.tokens * s.compute)))
        # Fused, q and k are normed and turned where they lie.
        x = heap.new(own) if name == "v" or normed else _turned(heap, s, own)
        heap.free(weight)
        if name == "q":
            heap.free(normed)
        if layout.ulysses > 1:
            packed.append(heap.new(own))
            kept.append(heap.new(0 if copies else met))
        if layout.ulysses > 1 and name != "q":
            heap.free(x)
        else:
            kept.append(x)
    heap.free(*packed)
    out = _around_ring(heap, s, met, layout) if layout.ring > 1 else attend(heap, s, met)
    if layout.ulysses > 1:
        if copies and _rows_go_apart(s, layout):  # those of the others have left
            heap.free(out)
            out = heap.new(met // layout.ulysses)
        returned, joined = heap.new(0 if copies else own), heap.new(own)
        heap.free(returned, out)
        out = joined
    heap.free(*kept)
    return out


def _rows_go_apart(s: Sizes, layout: Layout) -> bool:
    heads = head_shares(min(heads_of_ranks(s.arch, layout.tp)), layout.ulysses)
    pays = rows_apart_pay(s.batch, [s.tokens] * layout.ulysses, heads)
    return pays and layout.ring == 1 and not s.float8_attention


def attend(heap: Heap, s: Sizes, met: int) -> int:
    """The kernel; `met` bytes are those of q, k and v each."""
    copies = heap.new(3 * met // s.compute if s.float8_attention else 0)
    out = heap.new(met)
    heap.free(copies)
    return out


def _around_ring(heap: Heap, s: Sizes, met: int, layout: Layout) -> int:
    """The merged result; `met` bytes are those of q, and of each of k and v of one block."""
    # Views of what Ulysses received do not travel as they are.
    block = [heap.new(met), heap.new(met)] if layout.ulysses > 1 else []
    merged = 0
    for step in range(layout.ring):
        arriving = [heap.new(met), heap.new(met)] if step < layout.ring - 1 else []
        attended = attend(heap, s, met)
        if merged:
            total = heap.new(met * 4 // s.compute)
            heap.free(merged, attended)
            merged = total
        else:
            merged = attended
        heap.free(*block)
        block = arriving
    out = heap.new(met)
    heap.free(merged)
    return out


def _turned(heap: Heap, s: Sizes, num_bytes: int) -> int:
    """q or k of the plain path after its norm and RoPE, whose own tensors are those of all heads at most."""
    x = activations.rope(heap, s, activations.project_and_norm(heap, s.hidden))
    if num_bytes != s.hidden:
        heap.free(x)
        x = heap.new(num_bytes)
    return x
