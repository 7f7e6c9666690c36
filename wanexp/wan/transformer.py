"""The Wan video diffusion transformer, every published size and variant, under the checkpoints' own names.

Nothing here knows of several devices. What spreads the model relies on the promises of `block.py`, which the head
keeps too, and on one more: the blocks may leave hidden_states on another device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wanexp.errors import UserError
from wanexp.wan import fused
from wanexp.wan.architecture import PATCH_SIZE, WanArchitecture
from wanexp.wan.attention import attention_function
from wanexp.wan.block import (
    Attention,
    CrossAttention,
    FeedForward,
    Fp32LayerNorm,
    WanBlock,
    modulated_norm,
    modulation_table,
    set_fused,
)
from wanexp.wan.linear import Fp32Linear, Linear, linear
from wanexp.wan.rope import Rope, RopeCache

IMAGE_NORM_EPS = 1e-5  # the norms of img_emb keep PyTorch's default, unlike all others


class Head(nn.Module):
    """The final norm, modulated by the time vector itself, and the projection to patches of the output."""

    is_fused = False

    def __init__(self, architecture: WanArchitecture, dtype: torch.dtype) -> None:
        super().__init__()
        dim = architecture.dim
        self.modulation = modulation_table(2, dim, dtype)
        patch_volume = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
        self.head = Linear(dim, architecture.out_channels * patch_volume, dtype=dtype)

    def forward(
        self, hidden_states: Tensor, time_vector: Tensor, timestep_index: Tensor | None = None
    ) -> Tensor:
        """[batch, tokens, dim] -> fp32 [batch, tokens, patch volume * out_channels].

        `time_vector` is fp32 [batch, dim], or with `timestep_index` [batch, tokens] a table
        [distinct timesteps, dim].
        """
        shift, scale = (self.modulation.float() + time_vector.unsqueeze(1)).unbind(1)
        norm = fused.modulated_norm if self.is_fused else modulated_norm
        normed = norm(hidden_states, shift, scale, timestep_index, self.head.weight.dtype)
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
        return linear(patches, self.weight.flatten(1), self.bias)


class ImageEmbedding(nn.Module):
    """CLIP features of the conditioning image (first and last frame: of two images) to context tokens."""

    def __init__(self, architecture: WanArchitecture, dtype: torch.dtype) -> None:
        super().__init__()
        clip_dim, dim = architecture.clip_dim, architecture.dim
        self.proj = nn.Sequential(
            Fp32LayerNorm(clip_dim, eps=IMAGE_NORM_EPS, dtype=dtype),
            Linear(clip_dim, clip_dim, dtype=dtype),
            nn.GELU(),
            Linear(clip_dim, dim, dtype=dtype),
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


@dataclass
class Pending:
    """A forward on its way through the blocks. `inputs` is what every block gets after the hidden states."""

    hidden_states: Tensor
    inputs: tuple[Tensor, Tensor, Rope, Tensor | None]  # modulation, context, rope, timestep_index
    time_vector: Tensor
    grid: tuple[int, int, int]


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
            Linear(text_dim, dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            Linear(dim, dim, dtype=dtype),
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
        self.num_blocks_run = architecture.num_layers  # fewer inside first_blocks()

    def set_attention(self, kernel_name: str, cross_kernel_name: str | None = None) -> None:
        """Use this kernel in every self-attention, the other (or the same) in every cross-attention.

        Names as of `attention_function`; raises UserError for others. Replaces `attend` everywhere, so it comes before
        a parallel mode that wraps it.
        """
        attend, cross_attend = (
            attention_function(name) for name in (kernel_name, cross_kernel_name or kernel_name)
        )
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = cross_attend if isinstance(module, CrossAttention) else attend

    def set_kernels(self, name: str) -> None:
        """Compute what lies between the matrix products in plain `torch`, or in one pass each by `triton`.

        name: as `fused.choose_kernels` gives it, for inference only if `triton`.
        """
        if name not in ("triton", "torch"):
            raise ValueError(f"kernels are triton or torch, as choose_kernels decides; found {name!r}")
        set_fused(self, name == "triton")

    def set_ffn_chunks(self, num_chunks: int) -> None:
        """Run each FFN over this many runs of tokens, one after the other. Raises UserError for less than 1."""
        if num_chunks < 1:
            raise UserError(f"ffn_chunks is 1 (all tokens at once) or more; found {num_chunks}")
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.num_chunks = num_chunks

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
        pending = self.begin(latent, timestep, text, image_latent, clip_features, context=context)
        self.run_blocks(pending, 0, self.num_blocks_run)
        return self.finish(pending)

    def begin(
        self,
        latent: Tensor,
        timestep: Tensor,
        text: Tensor | None = None,
        image_latent: Tensor | None = None,
        clip_features: Tensor | None = None,
        *,
        context: Tensor | None = None,
    ) -> Pending:
        """The part of `forward` before the blocks; arguments and errors are the same."""
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
        return Pending(hidden_states, inputs, time_vector, grid)

    def run_blocks(self, pending: Pending, start: int, stop: int) -> None:
        """Take `pending` through the blocks `start` to `stop` - 1."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in islice(self.blocks, start, stop):
            if recompute:
                # There is no randomness in a block, so no state of it to put back.
                pending.hidden_states = checkpoint(
                    block,
                    pending.hidden_states,
                    *pending.inputs,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                # The hidden states of a forward are its own: nobody sees those between two blocks.
                pending.hidden_states = block(pending.hidden_states, *pending.inputs, in_place=True)

    def finish(self, pending: Pending) -> Tensor:
        """The part of `forward` after the blocks."""
        patches = self.head(pending.hidden_states, pending.time_vector, pending.inputs[-1])
        return unpatchify(patches, pending.grid, self.architecture.out_channels)

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
    before = model.num_blocks_run
    model.num_blocks_run = k
    try:
        yield model
    finally:
        model.num_blocks_run = before
