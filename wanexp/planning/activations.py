"""The tensors of a forward pass in the order in which they come and go: `wan/block.py` without the numbers.

Written line by line beside that file and `wan/transformer.py`; where they change, this must too, and
`tests/planning/test_activations.py` compares the two (live bytes on the CPU, within 1 %). With T tokens, local batch B,
U = B T dim elements in the compute dtype, W = the same in fp32 and F = B T ffn_dim elements in the compute dtype, the
moments that can be the worst are

    FFN, at the GELU:         hidden + x + normed + 2 F                        3 U + 2 F    (8.4 U at 14B)
    norm2, rounding its end:  hidden + x + old normed + 2 W + new normed       4 U + 2 W    (8 U in 16 bits; 1.3B: FFN)
    RoPE of q:                hidden + normed + v + k + q + U / 2 + 3 W / 2    5.5 U + 1.5 W       (8.5 U, 14B: worst)
    self-attention:           hidden + normed + q + k + v + attended           6 U

hidden: the caller's reference to the block's input. Kernel internals (split-K workspace, attention statistics) are not
in here. The fused path is in `fused_activations.py`.
"""

from dataclasses import dataclass

from wanexp.planning.heap import Heap
from wanexp.wan.architecture import PATCH_SIZE, WanArchitecture


@dataclass(frozen=True)
class Sizes:
    """What the sizes of a forward's tensors follow from. compute, residual: bytes an element."""

    arch: WanArchitecture
    batch: int
    grid: tuple[int, int, int]  # tokens along time, height and width
    compute: int = 2
    residual: int = 2
    distinct_timesteps: int = 0  # 0: one timestep a sample; else they are given per token
    ffn_chunks: int = 1  # runs of tokens that the FFN takes one after the other
    writes_float8: bool = False  # fused kernels write what float8 layers read, and with a scale a row
    float8_attention: bool = False  # beside q, k and v lie copies of 8 bits
    widens_weights: bool = False  # kept in 8 bits, for their products in the compute dtype

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def elements(self) -> int:
        """Of [batch, tokens, dim]."""
        return self.batch * self.tokens * self.arch.dim

    @property
    def hidden(self) -> int:
        """[batch, tokens, dim] in the compute dtype (U)."""
        return self.elements * self.compute

    @property
    def stream(self) -> int:
        """[batch, tokens, dim] of the residual stream."""
        return self.elements * self.residual

    @property
    def fp32(self) -> int:
        """[batch, tokens, dim] in fp32 (W)."""
        return self.elements * 4

    @property
    def inner(self) -> int:
        """[batch, tokens, ffn_dim] in the compute dtype (F)."""
        return self.batch * self.tokens * self.arch.ffn_dim * self.compute

    def wide_weight(self, columns: int) -> int:
        """A weight [dim, columns] or [columns, dim] for its product, where it is kept in 8 bits."""
        return self.arch.dim * columns * self.compute if self.widens_weights else 0

    @property
    def normed(self) -> int:
        """What a norm of the fused path writes: [batch, tokens, dim] in the compute dtype or in float8."""
        return self.read_by_layer(self.hidden) if self.writes_float8 else self.hidden

    def read_by_layer(self, num_bytes: int) -> int:
        """What a float8 layer reads of `num_bytes` in the compute dtype of [batch, tokens, ...], scales included."""
        return num_bytes // self.compute + 4 * self.batch * self.tokens

    @property
    def gathered(self) -> int:
        """A modulation vector for each token; without per-token timesteps it is broadcast and takes nothing."""
        return self.fp32 if self.distinct_timesteps else 0

    @property
    def upcast(self) -> int:
        """`x.float()` of the residual stream."""
        return self.fp32 if self.residual < 4 else 0

    @property
    def rounded(self) -> int:
        """`.to(dtype)` of an fp32 tensor."""
        return self.hidden if self.compute < 4 else 0

    @property
    def modulation(self) -> int:
        """fp32 [batch, 6, dim], or a table [distinct timesteps, 6, dim]."""
        return (self.distinct_timesteps or self.batch) * 6 * self.arch.dim * 4

    @property
    def context(self) -> int:
        """[batch, clip_tokens + text_len, dim] in the compute dtype."""
        return self.batch * (self.arch.clip_tokens + self.arch.text_len) * self.arch.dim * self.compute

    @property
    def rope(self) -> int:
        """One of the two fp32 tables [tokens, head_dim / 2]."""
        return self.tokens * self.arch.head_dim // 2 * 4

    def latent(self, channels: int, element: int = 4) -> int:
        """[batch, channels, frames, height, width] of the latent."""
        patch = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
        return self.batch * channels * self.tokens * patch * element

    @property
    def timestep_index(self) -> int:
        """int64 [batch, tokens] where timesteps are per token."""
        return self.batch * self.tokens * 8 if self.distinct_timesteps else 0


def embed(heap: Heap, s: Sizes) -> tuple[int, int]:
    """Patch and time embedding, on the first device: (hidden states, modulation)."""
    arch = s.arch
    joined = heap.new(
        s.latent(arch.in_channels) if arch.in_channels > arch.out_channels else 0
    )  # noise and image
    latent = heap.new(
        s.latent(arch.in_channels, s.compute) if s.compute < 4 else 0
    )  # latent.to(weight.dtype)
    patches = heap.new(s.latent(arch.in_channels, s.compute))  # permuted and made contiguous
    heap.free(latent)
    hidden = heap.new(s.hidden)
    heap.free(patches)
    rows = s.distinct_timesteps or s.batch
    vector = 0
    for width, height in ((arch.freq_dim, arch.dim), (arch.dim, arch.dim), (arch.dim, 6 * arch.dim)):
        # Fp32Linear: the weight in fp32 for the moment of its use (time_projection of 14B: 600 MiB)
        weight = heap.new(4 * height * (width + 1) if s.compute < 4 else 0)
        out = heap.new(4 * rows * height)
        heap.free(weight)
        if height == arch.dim:
            activated = heap.new(4 * rows * height)  # SiLU
            heap.free(vector, out)
            vector = activated
    heap.free(vector, joined)
    return hidden, out


def modulated_norm(heap: Heap, s: Sizes) -> int:
    """LayerNorm(x) * (1 + scale) + shift: the result in the compute dtype."""
    x = heap.new(s.upcast)
    normed = heap.new(s.fp32)
    heap.free(x)
    scale = heap.new(s.gathered)
    scaled = heap.new(s.fp32)
    heap.free(scale, normed)
    shift = heap.new(s.gathered)
    shifted = heap.new(s.fp32)
    heap.free(shift)
    out = heap.new(s.rounded)
    heap.free(scaled, shifted if out else 0)
    return out or shifted


def gated_add(heap: Heap, s: Sizes) -> int:
    """x + gate * update: the new residual stream."""
    gate = heap.new(s.gathered)
    total = heap.new(s.fp32)
    heap.free(gate)
    if s.residual == 4:
        return total
    out = heap.new(s.stream)
    heap.free(total)
    return out


def project_and_norm(heap: Heap, num_bytes: int) -> int:
    """norm(linear(x)): the linear layer, the normed, and that times its weight."""
    projected, normed = heap.new(num_bytes), heap.new(num_bytes)
    out = heap.new(num_bytes)
    heap.free(projected, normed)
    return out


def rope(heap: Heap, s: Sizes, x: int) -> int:
    """`apply_rope`: even and odd channels are turned in fp32, one after the other, then joined; x goes."""
    halves = []
    for _ in range(2):
        products = [heap.new(s.fp32 // 2) for _ in range(2)]
        turned = heap.new(s.fp32 // 2)
        heap.free(*products)
        half = heap.new(s.rounded // 2)
        heap.free(turned if half else 0)
        halves.append(half or turned)
    joined = heap.new(s.hidden)
    heap.free(*halves, x)
    return joined


def self_attention(heap: Heap, s: Sizes, score_bytes: int) -> int:
    v = heap.new(s.hidden)
    k = rope(heap, s, project_and_norm(heap, s.hidden))
    q = rope(heap, s, project_and_norm(heap, s.hidden))
    heap.free(heap.new(score_bytes), heap.new(score_bytes))  # scores and their softmax, where kept
    attended = heap.new(s.hidden)
    heap.free(q, k, v)
    out = heap.new(s.hidden)
    heap.free(attended)
    return out


def cross_attention(heap: Heap, s: Sizes) -> int:
    per_token = s.batch * s.arch.dim * s.compute
    q = project_and_norm(heap, s.hidden)
    k = project_and_norm(heap, per_token * s.arch.text_len)
    v = heap.new(per_token * s.arch.text_len)
    attended = heap.new(s.hidden)
    heap.free(v)
    if s.arch.clip_tokens:
        image_k = project_and_norm(heap, per_token * s.arch.clip_tokens)
        heap.free(k)
        v, image = heap.new(per_token * s.arch.clip_tokens), heap.new(s.hidden)
        heap.free(v)
        k, both = image_k, heap.new(s.hidden)
        heap.free(image, attended)
        attended = both
    heap.free(q, k)
    out = heap.new(s.hidden)
    heap.free(attended)
    return out


def block(heap: Heap, s: Sizes, hidden: int, *, first: bool = False, score_bytes: int = 0) -> int:
    """One block: frees `hidden`, the caller's reference, at its end and gives the next."""
    vectors = heap.new(s.modulation)  # the block's own added; its six parts are views
    widened = heap.new(s.stream if first and s.residual != s.compute else 0)  # hidden_states.to(residual)
    normed = modulated_norm(heap, s)
    update = self_attention(heap, s, score_bytes)
    x = gated_add(heap, s)
    heap.free(update, widened)

    as_fp32, out = heap.new(s.upcast), heap.new(s.fp32)  # norm3
    heap.free(as_fp32)
    cast = heap.new(s.rounded)
    heap.free(normed, out if cast else 0)
    normed = cast or out
    update = cross_attention(heap, s)
    total = heap.new(s.stream)
    heap.free(update, x)
    x = total

    second = modulated_norm(heap, s)
    heap.free(normed)
    update = feed_forward(heap, s)
    out = gated_add(heap, s)
    heap.free(update, second, x, vectors, hidden)
    return out


def feed_forward(heap: Heap, s: Sizes, consumed: int = 0) -> int:
    """Runs of tokens one after the other, then joined.

    consumed: the input on the fused path, whose first product is the last to read a whole input. The GELU is in that
    product, or on the way to float8.
    """
    parts = []
    for _ in range(s.ffn_chunks):
        weight = heap.new(s.wide_weight(s.arch.ffn_dim))
        wide = heap.new(s.inner // s.ffn_chunks)
        heap.free(weight)
        if not consumed:
            activated = heap.new(s.inner // s.ffn_chunks)
            heap.free(wide)
            wide = activated
        elif s.ffn_chunks == 1:
            heap.free(consumed)
        if s.writes_float8:  # the GELU
            narrow = heap.new(s.read_by_layer(s.inner) // s.ffn_chunks)
            heap.free(wide)
            wide = narrow
        weight = heap.new(s.wide_weight(s.arch.ffn_dim))
        parts.append(heap.new(s.hidden // s.ffn_chunks))
        heap.free(wide, weight)
    if len(parts) == 1:
        return parts[0]
    joined = heap.new(s.hidden)
    heap.free(*parts, consumed)
    return joined


def head(heap: Heap, s: Sizes, hidden: int) -> int:
    """The last norm and projection; the patches in fp32."""
    normed = modulated_norm(heap, s)
    patches = heap.new(s.latent(s.arch.out_channels, s.compute))
    out = heap.new(s.latent(s.arch.out_channels) if s.compute < 4 else 0)
    heap.free(normed, patches if out else 0, hidden)
    return out or patches
