"""diffusers' WanTransformer3DModel as an independent reference: built from our sizes, given our weights.

The table of names here is written apart from the one wanexp loads checkpoints with: each checks the other.
"""

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from wanexp.wan.architecture import PATCH_SIZE, WanArchitecture

OUTER_NAMES = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb": "condition_embedder.image_embedder",  # of emb_pos
    "head": "",  # of modulation
    "head.head": "proj_out",
}
ATTENTION_NAMES = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
BLOCK_NAMES = {"": "", "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    BLOCK_NAMES |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in ATTENTION_NAMES.items()}
LEAF_NAMES = {"weight": "weight", "bias": "bias", "modulation": "scale_shift_table", "emb_pos": "pos_embed"}


def diffusers_name(native: str) -> str:
    """The name diffusers gives a tensor of ours, e.g. blocks.0.ffn.0.bias -> blocks.0.ffn.net.0.proj.bias."""
    owner, _, leaf = native.rpartition(".")
    if owner.startswith("blocks."):
        _, index, *inner = owner.split(".")
        owner = ".".join(part for part in ("blocks", index, BLOCK_NAMES[".".join(inner)]) if part)
    else:
        owner = OUTER_NAMES[owner]
    return ".".join(part for part in (owner, LEAF_NAMES[leaf]) if part)


class Reference:
    """diffusers' model behind the call signature of ours."""

    def __init__(self, architecture: WanArchitecture, state: dict[str, Tensor]) -> None:
        clip = architecture.clip_tokens
        self.architecture = architecture
        self.model = WanTransformer3DModel(
            patch_size=PATCH_SIZE,
            num_attention_heads=architecture.num_heads,
            attention_head_dim=architecture.head_dim,
            in_channels=architecture.in_channels,
            out_channels=architecture.out_channels,
            text_dim=architecture.text_dim,
            freq_dim=architecture.freq_dim,
            ffn_dim=architecture.ffn_dim,
            num_layers=architecture.num_layers,
            image_dim=architecture.clip_dim if clip else None,
            added_kv_proj_dim=architecture.dim if clip else None,
            pos_embed_seq_len=clip if clip == 514 else None,
        )
        self.model.load_state_dict({diffusers_name(name): tensor for name, tensor in state.items()})
        self.model.eval()

    @torch.no_grad()
    def __call__(
        self,
        latent: Tensor,
        timestep: Tensor,
        text: Tensor,
        image_latent: Tensor | None = None,
        clip_features: Tensor | None = None,
    ) -> Tensor:
        arch = self.architecture
        # Its pipelines pad the text, join image and latent, and hold first and last image as two samples.
        padded = torch.zeros(text.shape[0], arch.text_len, arch.text_dim)
        padded[:, : text.shape[1]] = text
        if image_latent is not None:
            latent = torch.cat((latent, image_latent), dim=1)
        if clip_features is not None:
            clip_features = clip_features.reshape(-1, 257, arch.clip_dim)
        (out,) = self.model(
            latent,
            timestep,
            padded,
            encoder_hidden_states_image=clip_features,
            return_dict=False,
        )
        return out.float()
