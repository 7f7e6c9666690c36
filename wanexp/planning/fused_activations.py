"""As `activations.py`, where what lies between the matrix products is fused (`wan/fused.py`, inference on GPUs).

Written line by line beside `WanBlock._forward_fused`, where updates lie in the residual stream's memory or in that of
what they were computed from, and normed tensors go as soon as they were read. With S = the residual stream, U = [batch,
tokens, dim] in the compute dtype and F = the FFN's wide tensor, the moments that can be the worst are

    self-attention            q, k, v, and normed or attended     S + 4 U    (of own tokens: Ulysses 7 U, ring of 2 9 U)
    cross-attention           of text S + 2 U; with image tokens  S + 4 U
    FFN                       normed or update, and wide          S + U + F
    FFN in c runs             its parts joined, or the last       S + 3 U or S + 2 U + F / c
    head                                                          S + U

With float8 layers a normed tensor is U / 2, o quantises its input, and the FFN's worst is its GELU: S + 3 F / 2 (in c
runs, its parts joined: S + 2.5 U). Float8 attention adds copies of q, k and v, 1.5 U, to its own moment.

Under tp q, k, v and F are divided.
"""

from wanexp.parallel.layout import Layout
from wanexp.planning.activations import Sizes, feed_forward
from wanexp.planning.exchanges import attended, own_bytes
from wanexp.planning.heap import Heap

WHOLE = Layout()


def block(
    heap: Heap,
    s: Sizes,
    hidden: int,
    *,
    layout: Layout = WHOLE,
    copies: bool = False,
    first: bool = False,
    score_bytes: int = 0,
) -> int:
    """One block of a rank whose share is `s`: the next hidden states, in the memory of `hidden` where they can be.

    first: right after the embedding, whose hidden states are in the compute dtype. copies: of `attended`.
    """
    vectors = heap.new(s.modulation)
    x = hidden
    if first and s.residual != s.compute:
        x = heap.new(s.stream)  # hidden_states.to(residual)
    normed = heap.new(s.normed)
    update = self_attention(heap, s, normed, layout, score_bytes, copies=copies)
    update = cross_attention(heap, s, in_place_of(heap, s, update), layout)
    update = feed_forward(heap, s, in_place_of(heap, s, update))
    heap.free(update, vectors, hidden if x != hidden else 0)
    return x


def in_place_of(heap: Heap, s: Sizes, update: int) -> int:
    """The norm that follows an update: written over it, or in float8 beside it before it goes."""
    if not s.writes_float8:
        return update
    normed = heap.new(s.normed)
    heap.free(update)
    return normed


def project(heap: Heap, s: Sizes, attended: int, num_bytes: int) -> int:
    """The last layer of an attention, which gets `attended` of `num_bytes`."""
    quantized = heap.new(s.read_by_layer(num_bytes) if s.writes_float8 else 0)
    out = heap.new(s.hidden)
    heap.free(quantized, attended)
    return out


def self_attention(
    heap: Heap, s: Sizes, normed: int, layout: Layout, score_bytes: int, *, copies: bool = False
) -> int:
    if score_bytes:  # beside q, k and v, for one of which stands normed
        scores = [heap.new(score_bytes), heap.new(score_bytes)]  # of them the second is their softmax
        heap.free(*scores, heap.new(own_bytes(s, layout)), heap.new(own_bytes(s, layout)))
    return project(heap, s, attended(heap, s, layout, normed, copies=copies), own_bytes(s, layout))


def cross_attention(heap: Heap, s: Sizes, normed: int, layout: Layout) -> int:
    own = own_bytes(s, layout)
    per_token = own // s.tokens
    q = heap.new(own)
    heap.free(normed)
    k, v = heap.new(per_token * s.arch.text_len), heap.new(per_token * s.arch.text_len)
    copies = heap.new(own // s.compute if s.float8_attention else 0)
    met = heap.new(own)
    heap.free(v, copies)
    if s.arch.clip_tokens:
        image_k = heap.new(per_token * s.arch.clip_tokens)
        heap.free(k)
        k, v = image_k, heap.new(per_token * s.arch.clip_tokens)
        image = heap.new(own)
        heap.free(v)
        both = heap.new(own)
        heap.free(image, met)
        met = both
    heap.free(q, k)
    return project(heap, s, met, own)


def head(heap: Heap, s: Sizes, hidden: int) -> int:
    """The last norm and projection; the patches in fp32."""
    normed = heap.new(s.hidden)
    patches = heap.new(s.latent(s.arch.out_channels, s.compute))
    out = heap.new(s.latent(s.arch.out_channels) if s.compute < 4 else 0)
    heap.free(normed, patches if out else 0, hidden)
    return out or patches
