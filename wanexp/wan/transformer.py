"""The Wan video diffusion transformer, every published size and variant, under the checkpoints' own names.

Nothing here knows of several devices. What spreads the model relies on four promises: every tensor a block or
the head needs is a positional argument of its call (a tensor or a tuple of tensors); the blocks may leave
hidden_states on another device; `attend` of each attention module may be replaced; no argument is changed in
place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wanexp.errors import UserError
from wanexp.wan.architecture import NORM_EPS, PATCH_SIZE, WanArchitecture
from wanexp.wan.attention import AttentionFunction, attention_function
from wanexp.wan.rope import Rope, RopeCache, apply_rope

IMAGE_NORM_EPS = 1e-5  # the norms of img_emb keep PyTorch's default, unlike all others


class Fp32Linear(nn.Linear):
    """A linear layer computed in fp32 whatever its weights are stored in; any float in, fp32 out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class Fp32LayerNorm(nn.LayerNorm):
    """A LayerNorm with affine weights computed in fp32 and rounded once to the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return out.to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: normed in fp32, then cast, then times weight."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        # rms_norm accumulates 16-bit inputs in fp32 and rounds at its end: no fp32 copy of x is needed.
        return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS) * self.weight.to(x.dtype)


def at_tokens(vectors: Tensor, timestep_index: Tensor | None) -> Tensor:
    """What each token gets of one modulation vector per timestep, to broadcast over [batch, tokens, dim].

    Without an index `vectors` is [batch, dim] and the result a view [batch, 1, dim]. With an index
    [batch, tokens] `vectors` is a table [distinct timesteps, dim] and the result [batch, tokens, dim].
    """
    return vectors.unsqueeze(1) if timestep_index is None else F.embedding(timestep_index, vectors)


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, timestep_index: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in fp32 [batch, tokens, dim], rounded once to `dtype`."""
    out = F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
    out = out * at_tokens(1 + scale, timestep_index)  # two statements: one gathered vector alive at a time
    return (out + at_tokens(shift, timestep_index)).to(dtype)


def gated_add(x: Tensor, update: Tensor, gate: Tensor, timestep_index: Tensor | None) -> Tensor:
    """x + gate * update in fp32 (the fp32 gate promotes all three), rounded once to the dtype of `x`."""
    return torch.addcmul(x, update, at_tokens(gate, timestep_index)).to(x.dtype)


class Attention(nn.Module):
    """The projections and norms that self-attention and cross-attention share.

    `attend(q, k, v)` is the kernel on [batch, tokens, heads, head_dim]; parallel modes replace or wrap it.
    Heads are split by head_dim, so q, k and v may hold a part of the heads only.
    """

    attend: AttentionFunction

    def __init__(self, architecture: WanArchitecture, dtype: torch.dtype) -> None:
        super().__init__()
        dim = architecture.dim
        self.head_dim = architecture.head_dim
        self.q = nn.Linear(dim, dim, dtype=dtype)
        self.k = nn.Linear(dim, dim, dtype=dtype)
        self.v = nn.Linear(dim, dim, dtype=dtype)
        self.o = nn.Linear(dim, dim, dtype=dtype)
        self.norm_q = RMSNorm(dim, dtype)
        self.norm_k = RMSNorm(dim, dtype)
        self.attend = attention_function("auto")

    def split_heads(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] -> [batch, tokens, heads, head_dim]"""
        return x.unflatten(-1, (-1, self.head_dim))


class SelfAttention(Attention):
    """Attention of the video tokens among themselves, with RoPE."""

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """`x` [batch, tokens, dim] -> the same shape and dtype; `rope` as of `rope_tables`."""
        q = apply_rope(self.split_heads(self.norm_q(self.q(x))), rope)
        k = apply_rope(self.split_heads(self.norm_k(self.k(x))), rope)
        v = self.split_heads(self.v(x))
        return self.o(self.attend(q, k, v).flatten(2))


class CrossAttention(Attention):
    """Attention of the video tokens to the text and, with `clip_tokens`, to the image tokens before it."""

    def __init__(self, architecture: WanArchitecture, dtype: torch.dtype) -> None:
        super().__init__(architecture, dtype)
        self.clip_tokens = architecture.clip_tokens
        if self.clip_tokens:
            dim = architecture.dim
            self.k_img = nn.Linear(dim, dim, dtype=dtype)
            self.v_img = nn.Linear(dim, dim, dtype=dtype)
            self.norm_k_img = RMSNorm(dim, dtype)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`x` [batch, tokens, dim], `context` [batch, clip_tokens + text_len, dim] -> shape and dtype of `x`.

        The same q attends to image and text apart; the two results are added before the output projection.
        """
        image, text = context[:, : self.clip_tokens], context[:, self.clip_tokens :]
        q = self.split_heads(self.norm_q(self.q(x)))
        k = self.split_heads(self.norm_k(self.k(text)))
        out = self.attend(q, k, self.split_heads(self.v(text)))
        if self.clip_tokens:
            k = self.split_heads(self.norm_k_img(self.k_img(image)))
            out = out + self.attend(q, k, self.split_heads(self.v_img(image)))
        return self.o(out.flatten(2))


class WanBlock(nn.Module):
    """Self-attention, cross-attention and FFN around one residual stream. Time gates the first and last."""

    def __init__(
        self, architecture: WanArchitecture, dtype: torch.dtype, residual: torch.dtype | None
    ) -> None:
        super().__init__()
        dim, ffn_dim = architecture.dim, architecture.ffn_dim
        self.residual = residual
        self.modulation = nn.Parameter(torch.randn(1, 6, dim, dtype=dtype) / dim**0.5)
        self.self_attn = SelfAttention(architecture, dtype)
        self.cross_attn = CrossAttention(architecture, dtype)
        self.norm3 = Fp32LayerNorm(dim, eps=NORM_EPS, dtype=dtype)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(ffn_dim, dim, dtype=dtype),
        )

    def forward(
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        context: Tensor,
        rope: Rope,
        timestep_index: Tensor | None = None,
    ) -> Tensor:
        """One block; gives the new hidden states and leaves the given ones as they are.

        Args:
            hidden_states: [batch, tokens, dim], the residual stream.
            modulation: fp32 [batch, 6, dim]; with `timestep_index` a table [distinct timesteps, 6, dim]. The
                block adds its own and reads shift, scale, gate of self-attention, then of the FFN.
            context: [batch, clip_tokens + text_len, dim].
            rope: cos and sin, each fp32 [tokens, head_dim / 2].
            timestep_index: [batch, tokens], the row of the table for each token, or None.
        """
        # A norm's dtype and not a linear layer's, which quantisation may store in 8 bits.
        dtype = self.self_attn.norm_q.weight.dtype
        x = hidden_states.to(self.residual or dtype)
        context = context.to(dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + modulation).unbind(1)

        normed = modulated_norm(x, shift1, scale1, timestep_index, dtype)
        x = gated_add(x, self.self_attn(normed, rope), gate1, timestep_index)
        normed = self.norm3(x).to(dtype)
        x = x + self.cross_attn(normed, context)
        normed = modulated_norm(x, shift2, scale2, timestep_index, dtype)
        return gated_add(x, self.ffn(normed), gate2, timestep_index)


class Head(nn.Module):
    """The final norm, modulated by the time vector itself, and the projection to patches of the output."""

    def __init__(self, architecture: WanArchitecture, dtype: torch.dtype) -> None:
        super().__init__()
        dim = architecture.dim
        self.modulation = nn.Parameter(torch.randn(1, 2, dim, dtype=dtype) / dim**0.5)
        patch_volume = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
        self.head = nn.Linear(dim, architecture.out_channels * patch_volume, dtype=dtype)

    def forward(
        self, hidden_states: Tensor, time_vector: Tensor, timestep_index: Tensor | None = None
    ) -> Tensor:
        """[batch, tokens, dim] -> fp32 [batch, tokens, patch volume * out_channels].

        `time_vector` is fp32 [batch, dim], or with `timestep_index` [batch, tokens] a table
        [distinct timesteps, dim].
        """
        shift, scale = (self.modulation.float() + time_vector.unsqueeze(1)).unbind(1)
        normed = modulated_norm(hidden_states, shift, scale, timestep_index, self.head.weight.dtype)
        return self.head(normed).float()


class PatchEmbedding(nn.Conv3d):
    """The patch convolution. As patches do not overlap it is one matrix product, done as such."""

    def forward(self, latent: Tensor) -> Tensor:
        """[batch, in_channels, frames, height, width] -> [batch, tokens, dim] in the dtype of the weights."""
        batch, channels, frames, height, width = latent.shape
        pt, ph, pw = PATCH_SIZE
        patches = latent.to(self.weight.dtype)
        patches = patches.reshape(batch, channels, frames // pt, pt, height // ph, ph, width // pw, pw)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class ImageEmbedding(nn.Module):
    """CLIP features of the conditioning image (first and last frame: of two images) to context tokens."""

    def __init__(self, architecture: WanArchitecture, dtype: torch.dtype) -> None:
        super().__init__()
        clip_dim, dim = architecture.clip_dim, architecture.dim
        self.proj = nn.Sequential(
            Fp32LayerNorm(clip_dim, eps=IMAGE_NORM_EPS, dtype=dtype),
            nn.Linear(clip_dim, clip_dim, dtype=dtype),
            nn.GELU(),
            nn.Linear(clip_dim, dim, dtype=dtype),
            Fp32LayerNorm(dim, eps=IMAGE_NORM_EPS, dtype=dtype),
        )
        self.emb_pos: nn.Parameter | None = None
        if "img_emb.emb_pos" in architecture.outer_shapes():
            self.emb_pos = nn.Parameter(torch.zeros(1, architecture.clip_tokens, clip_dim, dtype=dtype))

    def forward(self, clip_features: Tensor) -> Tensor:
        """[batch, clip_tokens, clip_dim] -> [batch, clip_tokens, dim], all in the dtype of the weights."""
        if self.emb_pos is not None:
            clip_features = clip_features + self.emb_pos
        return self.proj(clip_features)


class WanTransformer(nn.Module):
    """Predicts the flow (velocity) of a noisy video latent. `state_dict` has the checkpoints' native names.

    Can be built under `torch.device("meta")`: it has parameters only, all else is computed when used. Blocks
    compute in the dtype of their weights; time embedding, modulation, norms and RoPE in fp32 in any case.

    Args:
        architecture: the sizes.
        dtype: what all weights are stored in.
        residual: None keeps the residual stream in the compute dtype (each addition still in fp32, rounded
            once); torch.float32 keeps the stream itself in fp32.

    Attributes:
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        architecture: WanArchitecture,
        *,
        dtype: torch.dtype = torch.float32,
        residual: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if residual not in (None, torch.float32):
            raise UserError(f"the residual stream can be None (as computed) or float32; found {residual}")
        dim, freq_dim, text_dim = architecture.dim, architecture.freq_dim, architecture.text_dim
        self.architecture = architecture
        self.gradient_checkpointing = False
        self.patch_embedding = PatchEmbedding(
            architecture.in_channels, dim, kernel_size=PATCH_SIZE, stride=PATCH_SIZE, dtype=dtype
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(text_dim, dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(dim, dim, dtype=dtype),
        )
        self.time_embedding = nn.Sequential(
            Fp32Linear(freq_dim, dim, dtype=dtype), nn.SiLU(), Fp32Linear(dim, dim, dtype=dtype)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Fp32Linear(dim, 6 * dim, dtype=dtype))
        if architecture.clip_tokens:
            self.img_emb = ImageEmbedding(architecture, dtype)
        self.blocks = nn.ModuleList(
            WanBlock(architecture, dtype, residual) for _ in range(architecture.num_layers)
        )
        self.head = Head(architecture, dtype)
        self._rope = RopeCache(architecture.head_dim)
        self._num_blocks_run = architecture.num_layers  # fewer inside first_blocks()

    def set_attention(self, kernel_name: str) -> None:
        """Use this kernel in every attention; names as of `attention_function`. Raises UserError for others.

        Replaces `attend` everywhere, so it comes before a parallel mode that wraps it.
        """
        attend = attention_function(kernel_name)
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend

    def embed_text(self, text: Tensor, clip_features: Tensor | None = None) -> Tensor:
        """The context of all blocks, constant over the steps of one video: compute it once and pass it on.

        Args:
            text: [batch, n <= text_len, text_dim], padded here with zeros to text_len, which are attended to.
            clip_features: [batch, clip_tokens, clip_dim] where the architecture has CLIP tokens, else None.

        Returns:
            [batch, clip_tokens + text_len, dim], image tokens first.

        Raises:
            UserError: a shape that does not fit, or image features missing or not wanted.
        """
        arch = self.architecture
        device, dtype = self.patch_embedding.weight.device, self.patch_embedding.weight.dtype
        if text.ndim != 3 or text.shape[1] > arch.text_len or text.shape[2] != arch.text_dim:
            raise UserError(
                f"text must be [batch, at most {arch.text_len}, {arch.text_dim}]; found {list(text.shape)}"
            )
        padded = F.pad(text.to(device, dtype), (0, 0, 0, arch.text_len - text.shape[1]))
        context = self.text_embedding(padded)
        if not arch.clip_tokens:
            if clip_features is not None:
                raise UserError("this model has no CLIP tokens: leave clip_features out")
            return context
        wanted = (text.shape[0], arch.clip_tokens, arch.clip_dim)
        if clip_features is None:
            raise UserError(f"this model needs clip_features {list(wanted)}; found none")
        if clip_features.shape != wanted:
            raise UserError(f"clip_features must be {list(wanted)}; found {list(clip_features.shape)}")
        return torch.cat((self.img_emb(clip_features.to(device, dtype)), context), dim=1)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Time vector, modulation of the blocks, and for timesteps per token the index into both.

        Args:
            timestep: [batch], or [batch, tokens]. Of the latter only the distinct values are embedded: all of
                [batch, tokens, 6, dim] would be gigabytes, and an image as first frame makes just two.

        Returns:
            (fp32 [batch, dim], fp32 [batch, 6, dim], None), or with K distinct timesteps
            (fp32 [K, dim], fp32 [K, 6, dim], [batch, tokens]).
        """
        timestep = timestep.to(self.patch_embedding.weight.device)
        timestep_index = None
        if timestep.ndim == 2:
            timestep, timestep_index = torch.unique(timestep, return_inverse=True)
        time_vector = self.time_embedding(sinusoid(timestep, self.architecture.freq_dim))
        return time_vector, self.time_projection(time_vector).unflatten(1, (6, -1)), timestep_index

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        text: Tensor | None = None,
        image_latent: Tensor | None = None,
        clip_features: Tensor | None = None,
        *,
        context: Tensor | None = None,
    ) -> Tensor:
        """The predicted flow of `latent`.

        Args:
            latent: [batch, out_channels, frames, height, width], any float dtype.
            timestep: 0 to 1000, [batch] or one for each token [batch, tokens].
            text, clip_features: as of `embed_text`, or
            context: the result of `embed_text` in their place.
            image_latent: [batch, in_channels - out_channels, frames, height, width] (I2V: 4 mask, 16 latent
                channels) where the architecture has these channels, else None.

        Returns:
            fp32, the shape of `latent`, on the device of the head.

        Raises:
            UserError: an input that is missing, not wanted or of a wrong shape.
        """
        grid = self._check_latent(latent, image_latent)
        self._check_timestep(timestep, latent.shape[0], grid)
        if context is None:
            if text is None:
                raise UserError("give the model text, or context = embed_text(text); found neither")
            context = self.embed_text(text, clip_features)
        elif text is not None or clip_features is not None:
            raise UserError("context already holds text and clip_features: give one or the other, not both")
        self._check_context(context, latent.shape[0])

        device = self.patch_embedding.weight.device
        if image_latent is not None:
            latent = torch.cat((latent.to(device), image_latent.to(device, latent.dtype)), dim=1)
        hidden_states = self.patch_embedding(latent.to(device))
        time_vector, modulation, timestep_index = self.embed_time(timestep)
        inputs = (modulation, context.to(device), self._rope(grid, device), timestep_index)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in islice(self.blocks, self._num_blocks_run):
            if recompute:
                # There is no randomness in a block, so no state of it to put back.
                hidden_states = checkpoint(
                    block, hidden_states, *inputs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_states = block(hidden_states, *inputs)
        patches = self.head(hidden_states, time_vector, timestep_index)
        return unpatchify(patches, grid, self.architecture.out_channels)

    def _check_latent(self, latent: Tensor, image_latent: Tensor | None) -> tuple[int, int, int]:
        arch = self.architecture
        if latent.ndim != 5 or latent.shape[1] != arch.out_channels:
            raise UserError(
                f"latent must be [batch, {arch.out_channels}, frames, height, width]; "
                f"found {list(latent.shape)}"
            )
        grid = arch.token_grid(*latent.shape[2:])
        image_channels = arch.in_channels - arch.out_channels
        wanted = (latent.shape[0], image_channels, *latent.shape[2:])
        if image_latent is None:
            if image_channels:
                raise UserError(f"this model needs image_latent {list(wanted)}; found none")
        elif not image_channels:
            raise UserError("this model has no channels for an image: leave image_latent out")
        elif image_latent.shape != wanted:
            raise UserError(f"image_latent must be {list(wanted)}; found {list(image_latent.shape)}")
        return grid

    def _check_timestep(self, timestep: Tensor, batch: int, grid: tuple[int, int, int]) -> None:
        tokens = grid[0] * grid[1] * grid[2]
        if timestep.shape not in ((batch,), (batch, tokens)):
            raise UserError(
                f"timestep must be [{batch}] (one a sample) or [{batch}, {tokens}] (one a token); "
                f"found {list(timestep.shape)}"
            )

    def _check_context(self, context: Tensor, batch: int) -> None:
        arch = self.architecture
        wanted = (batch, arch.clip_tokens + arch.text_len, arch.dim)
        if context.shape != wanted:
            raise UserError(f"the context (text, images) must be {list(wanted)}; found {list(context.shape)}")


def sinusoid(timestep: Tensor, freq_dim: int) -> Tensor:
    """cos, then sin, of timestep * 10000^(-i / half) for i < half = freq_dim / 2: [n] -> fp32 [n, freq_dim].

    Float64 inside: in fp32 the angles of timesteps near 1000 are off by 1e-4.
    """
    half = freq_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = torch.outer(timestep.double(), 10000.0**-exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def unpatchify(patches: Tensor, grid: tuple[int, int, int], out_channels: int) -> Tensor:
    """[batch, tokens, patch volume * out_channels] -> [batch, out_channels, frames, height, width].

    Channels vary fastest inside a patch.
    """
    batch = patches.shape[0]
    pieces = patches.reshape(batch, *grid, *PATCH_SIZE, out_channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
    frames, height, width = (size * patch for size, patch in zip(grid, PATCH_SIZE, strict=True))
    return pieces.reshape(batch, out_channels, frames, height, width)


@contextmanager
def first_blocks(model: WanTransformer, k: int) -> Iterator[WanTransformer]:
    """Inside, `model` runs its first `k` blocks and the head. Raises UserError unless 1 <= k <= all."""
    if not 1 <= k <= len(model.blocks):
        raise UserError(f"the model has {len(model.blocks)} blocks: choose from 1 to all of them; found {k}")
    before = model._num_blocks_run
    model._num_blocks_run = k
    try:
        yield model
    finally:
        model._num_blocks_run = before
