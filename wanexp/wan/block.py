"""One block of the Wan transformer: its norms, its two attentions, its FFN, its modulation by the timestep.

What spreads the model relies on three promises: every tensor a block needs is an argument of its call (a tensor or a
tuple of tensors); `attend` of each attention may be replaced; no argument is changed in place, but the hidden states
where the caller says `in_place`.

Plain torch throughout; a module with `is_fused` set computes in `fused.py` what lies between its matrix products.
Then attentions and FFN consume what they are called with, the tensor that the block normed for them: its memory is
given back as soon as it was read, so that it is not there at the peak. Float8 layers get it in float8.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanexp.wan import fused
from wanexp.wan.architecture import NORM_EPS, WanArchitecture
from wanexp.wan.attention import AttentionFunction, attention_function
from wanexp.wan.linear import Linear
from wanexp.wan.quantize_rows import QuantizedInput
from wanexp.wan.rope import Rope, apply_rope


def modulation_table(rows: int, dim: int, dtype: torch.dtype) -> nn.Parameter:
    """[1, rows, dim], begun with as Wan does; on the meta device empty, where normal numbers take torch's compiler."""
    table = torch.empty(1, rows, dim, dtype=dtype)
    return nn.Parameter(table if table.is_meta else table.normal_(std=dim**-0.5))


def set_fused(module: nn.Module, is_fused: bool) -> None:
    """Have `module`, with all that is in it, compute between its matrix products by `fused.py`, or in plain torch."""
    for part in module.modules():
        if hasattr(type(part), "is_fused"):
            part.is_fused = is_fused  # type: ignore[assignment]  # mypy takes it for a submodule


class Fp32LayerNorm(nn.LayerNorm):
    """A LayerNorm with affine weights computed in fp32 and rounded once to the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return out.to(x.dtype)


def turned(x: Tensor, rope: Rope | None) -> Tensor:
    """`x` [batch, tokens, dim] with RoPE applied to each of its heads, if there are tables."""
    return x if rope is None else apply_rope(x.unflatten(-1, (-1, 2 * rope[0].shape[-1])), rope).flatten(2)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: normed in fp32, then cast, then times weight.

    Fused it writes over x, and with RoPE tables turns each head as well.
    """

    is_fused = False

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype))

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        if self.is_fused:
            return fused.rms_norm(x, self.weight, rope)
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
    is_fused = False

    def __init__(self, architecture: WanArchitecture, dtype: torch.dtype) -> None:
        super().__init__()
        dim = architecture.dim
        self.head_dim = architecture.head_dim
        self.q = Linear(dim, dim, dtype=dtype)
        self.k = Linear(dim, dim, dtype=dtype)
        self.v = Linear(dim, dim, dtype=dtype)
        self.o = Linear(dim, dim, dtype=dtype)
        self.norm_q = RMSNorm(dim, dtype)
        self.norm_k = RMSNorm(dim, dtype)
        self.attend = attention_function("auto")

    def split_heads(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] -> [batch, tokens, heads, head_dim]"""
        return x.unflatten(-1, (-1, self.head_dim))


class SelfAttention(Attention):
    """Attention of the video tokens among themselves, with RoPE.

    `send(x)` is handed v and k as soon as they are there, and `attend` gets what it returns; context parallelism begins
    to exchange them there.
    """

    send: Callable[[Tensor], Any] = staticmethod(lambda x: x)

    def forward(self, x: Tensor | QuantizedInput, rope: Rope) -> Tensor:
        """`x` [batch, tokens, dim] -> the same shape in the compute dtype; `rope` as of `rope_tables`."""
        # RoPE is fused into the norm, or done when what went into the norm is gone.
        within, after = (rope, None) if self.is_fused else (None, rope)
        # v and k first: what sends them to other ranks does so beside the products that follow.
        v = self.send(self.split_heads(self.v(x)))
        k = self.send(self.split_heads(turned(self.norm_k(self.k(x), within), after)))
        q = self.split_heads(turned(self.norm_q(self.q(x), within), after))
        if self.is_fused:
            fused.release(x)
        attended = self.attend(q, k, v)
        del q, k, v
        return self.o(attended.flatten(2))


class CrossAttention(Attention):
    """Attention of the video tokens to the text and, with `clip_tokens`, to the image tokens before it."""

    def __init__(self, architecture: WanArchitecture, dtype: torch.dtype) -> None:
        super().__init__(architecture, dtype)
        self.clip_tokens = architecture.clip_tokens
        if self.clip_tokens:
            dim = architecture.dim
            self.k_img = Linear(dim, dim, dtype=dtype)
            self.v_img = Linear(dim, dim, dtype=dtype)
            self.norm_k_img = RMSNorm(dim, dtype)

    def forward(self, x: Tensor | QuantizedInput, context: Tensor) -> Tensor:
        """`x` [batch, tokens, dim], `context` [batch, clip_tokens + text_len, dim] -> the shape of `x`.

        The same q attends to image and text apart; the two results are added before the output projection.
        """
        image, text = context[:, : self.clip_tokens], context[:, self.clip_tokens :]
        q = self.split_heads(self.norm_q(self.q(x)))
        if self.is_fused:
            fused.release(x)
        k = self.split_heads(self.norm_k(self.k(text)))
        out = self.attend(q, k, self.split_heads(self.v(text)))
        if self.clip_tokens:
            k = self.split_heads(self.norm_k_img(self.k_img(image)))
            out = out + self.attend(q, k, self.split_heads(self.v_img(image)))
        del q, k
        return self.o(out.flatten(2))


class FeedForward(nn.Sequential):
    """Linear-GELU(tanh)-Linear, over all tokens at once or over `num_chunks` runs of them one after the other.

    The wide tensor between the layers is then that much smaller; the answer is the same, for tokens do not meet here.
    """

    is_fused = False
    num_chunks = 1

    def __init__(self, architecture: WanArchitecture, dtype: torch.dtype) -> None:
        dim, ffn_dim = architecture.dim, architecture.ffn_dim
        super().__init__(
            Linear(dim, ffn_dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            Linear(ffn_dim, dim, dtype=dtype),
        )

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        """`x` [batch, tokens, dim] -> the same shape in the compute dtype."""
        if self.num_chunks > 1:
            return torch.cat([self._run(part) for part in x.chunk(self.num_chunks, dim=1)], dim=1)
        return self._run(x, consume=self.is_fused)

    def _run(self, x: Tensor | QuantizedInput, *, consume: bool = False) -> Tensor:
        if not self.is_fused:
            return super().forward(x)
        return self[2](fused.linear_gelu(self[0], x, reader=self[2], consume=consume))


class WanBlock(nn.Module):
    """Self-attention, cross-attention and FFN around one residual stream. Time gates the first and last."""

    is_fused = False

    def __init__(
        self, architecture: WanArchitecture, dtype: torch.dtype, residual: torch.dtype | None
    ) -> None:
        super().__init__()
        dim = architecture.dim
        self.residual = residual
        self.modulation = modulation_table(6, dim, dtype)
        self.self_attn = SelfAttention(architecture, dtype)
        self.cross_attn = CrossAttention(architecture, dtype)
        self.norm3 = Fp32LayerNorm(dim, eps=NORM_EPS, dtype=dtype)
        self.ffn = FeedForward(architecture, dtype)

    def forward(
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        context: Tensor,
        rope: Rope,
        timestep_index: Tensor | None = None,
        *,
        in_place: bool = False,
    ) -> Tensor:
        """One block; gives the new hidden states and leaves the given ones as they are, unless `in_place`.

        Args:
            hidden_states: [batch, tokens, dim], the residual stream.
            modulation: fp32 [batch, 6, dim]; with `timestep_index` a table [distinct timesteps, 6, dim]. The
                block adds its own and reads shift, scale, gate of self-attention, then of the FFN.
            context: [batch, clip_tokens + text_len, dim].
            rope: cos and sin, each fp32 [tokens, head_dim / 2].
            timestep_index: [batch, tokens], the row of the table for each token, or None.
            in_place: the caller needs `hidden_states` no more; a fused block writes its result over them.

        Raises:
            UserError: fused, with gradients switched on or on a device without Triton.
        """
        # A norm's dtype and not a linear layer's, which quantisation may store in 8 bits.
        dtype = self.self_attn.norm_q.weight.dtype
        x = hidden_states.to(self.residual or dtype)
        context = context.to(dtype)
        vectors = (self.modulation.float() + modulation).unbind(1)
        if self.is_fused:
            fused.check_inference(x)
            owned = in_place or x is not hidden_states
            return self._forward_fused(x, vectors, context, rope, timestep_index, dtype, owned=owned)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors

        normed = modulated_norm(x, shift1, scale1, timestep_index, dtype)
        x = gated_add(x, self.self_attn(normed, rope), gate1, timestep_index)
        normed = self.norm3(x).to(dtype)
        x = x + self.cross_attn(normed, context)
        normed = modulated_norm(x, shift2, scale2, timestep_index, dtype)
        return gated_add(x, self.ffn(normed), gate2, timestep_index)

    def _forward_fused(
        self,
        x: Tensor,
        vectors: tuple[Tensor, ...],
        context: Tensor,
        rope: Rope,
        timestep_index: Tensor | None,
        dtype: torch.dtype,
        *,
        owned: bool,
    ) -> Tensor:
        """The same with every norm fused to the addition before it; writes over `x` if `owned`.

        Each `normed` takes the place of the update before it, and is consumed by the module that it goes into, whose
        first layer says whether that is in float8 (q speaks for k and v).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        attention, cross_attention, ffn = self.self_attn, self.cross_attn, self.ffn
        normed = fused.modulated_norm(x, shift1, scale1, timestep_index, dtype, reader=attention.q)
        update = attention(normed, rope)
        x, normed = fused.gated_add_and_norm(
            x, update, gate1, timestep_index, self.norm3, overwrite=owned, reader=cross_attention.q
        )
        update = cross_attention(normed, context)
        normed = fused.add_and_modulated_norm(x, update, shift2, scale2, timestep_index, reader=ffn[0])
        update = ffn(normed)
        fused.gated_add(x, update, gate2, timestep_index)
        return x
