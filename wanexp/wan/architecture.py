"""What a Wan transformer is, in numbers: sizes, tensor shapes, parameters, tokens and work. No torch here.

Sizes are those of the published Wan 2.1 and 2.2 configurations; the tensor names are the native ones of these
checkpoints.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from wanexp.errors import UserError

PATCH_SIZE = (1, 2, 2)  # latent frames, rows and columns in one token
NORM_EPS = 1e-6


@dataclass(eq=True)
class WanArchitecture:
    """Sizes of one Wan transformer. `clip_tokens` is 0 without image tokens, 257 for I2V 2.1, 514 for FLF2V."""

    dim: int = 512
    ffn_dim: int = 1024
    num_heads: int = 4
    num_layers: int = 8
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    clip_tokens: int = 0
    clip_dim: int = 1280

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UserError(
                f"dim {self.dim} must be num_heads x an even head_dim; found {self.num_heads} heads"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor names inside `blocks.N.` and their shapes."""
        dim, ffn = self.dim, self.ffn_dim
        shapes: dict[str, tuple[int, ...]] = {"modulation": (1, 6, dim)}
        for attention in ("self_attn", "cross_attn"):
            projections = ["q", "k", "v", "o"]
            norms = ["norm_q", "norm_k"]
            if attention == "cross_attn" and self.clip_tokens:
                projections += ["k_img", "v_img"]
                norms += ["norm_k_img"]
            for name in projections:
                shapes[f"{attention}.{name}.weight"] = (dim, dim)
                shapes[f"{attention}.{name}.bias"] = (dim,)
            for name in norms:
                shapes[f"{attention}.{name}.weight"] = (dim,)
        shapes |= {"norm3.weight": (dim,), "norm3.bias": (dim,)}
        shapes |= {"ffn.0.weight": (ffn, dim), "ffn.0.bias": (ffn,)}
        shapes |= {"ffn.2.weight": (dim, ffn), "ffn.2.bias": (dim,)}
        return shapes

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors outside the blocks: embeddings and head."""
        dim, patch_volume = self.dim, PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
        shapes: dict[str, tuple[int, ...]] = {
            "patch_embedding.weight": (dim, self.in_channels, *PATCH_SIZE),
            "patch_embedding.bias": (dim,),
            "text_embedding.0.weight": (dim, self.text_dim),
            "text_embedding.0.bias": (dim,),
            "text_embedding.2.weight": (dim, dim),
            "text_embedding.2.bias": (dim,),
            "time_embedding.0.weight": (dim, self.freq_dim),
            "time_embedding.0.bias": (dim,),
            "time_embedding.2.weight": (dim, dim),
            "time_embedding.2.bias": (dim,),
            "time_projection.1.weight": (6 * dim, dim),
            "time_projection.1.bias": (6 * dim,),
            "head.modulation": (1, 2, dim),
            "head.head.weight": (self.out_channels * patch_volume, dim),
            "head.head.bias": (self.out_channels * patch_volume,),
        }
        if self.clip_tokens:
            clip = self.clip_dim
            shapes |= {
                "img_emb.proj.0.weight": (clip,),
                "img_emb.proj.0.bias": (clip,),
                "img_emb.proj.1.weight": (clip, clip),
                "img_emb.proj.1.bias": (clip,),
                "img_emb.proj.3.weight": (dim, clip),
                "img_emb.proj.3.bias": (dim,),
                "img_emb.proj.4.weight": (dim,),
                "img_emb.proj.4.bias": (dim,),
            }
            if self.clip_tokens == 514:  # first and last frame: two images of 257 tokens, with a position
                shapes["img_emb.emb_pos"] = (1, 514, clip)
        return shapes

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the model under its native name, in the order of the forward pass."""
        outer = self.outer_shapes()
        yield from ((name, shape) for name, shape in outer.items() if not name.startswith("head."))
        for index in range(self.num_layers):
            for name, shape in self.block_shapes().items():
                yield f"blocks.{index}.{name}", shape
        yield from ((name, shape) for name, shape in outer.items() if name.startswith("head."))

    def num_block_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.block_shapes().values())

    def num_outer_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.outer_shapes().values())

    def num_parameters(self) -> int:
        return self.num_outer_parameters() + self.num_layers * self.num_block_parameters()

    def token_grid(self, latent_frames: int, latent_height: int, latent_width: int) -> tuple[int, int, int]:
        """Tokens along time, height and width of a latent; raises UserError where the patches do not divide."""
        if latent_height % PATCH_SIZE[1] or latent_width % PATCH_SIZE[2]:
            raise UserError(
                f"the latent is {latent_height} x {latent_width}; both must be even (patches of 2 x 2)"
            )
        return (latent_frames // PATCH_SIZE[0], latent_height // PATCH_SIZE[1], latent_width // PATCH_SIZE[2])

    def forward_flops(self, num_tokens: int) -> int:
        """FLOPs of one forward of one sample: matrix products and attention, 2 a multiply-add.

        Linear layers on the video tokens 2*T*(6 d^2 + 2 d ffn) a block (q, k, v, o of self-attention, q and o of
        cross-attention, the FFN), attention 4*T*keys*d a block, keys = T in self-attention and the context's
        length in cross-attention. The context's own k and v and the embeddings (under 0.3 % at 480p) are left out.
        """
        context = self.text_len + self.clip_tokens
        linear = 2 * num_tokens * (6 * self.dim**2 + 2 * self.dim * self.ffn_dim)
        attention = 4 * num_tokens * (num_tokens + context) * self.dim
        return self.num_layers * (linear + attention)
