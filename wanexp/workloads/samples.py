"""The inputs of one sample: noise, text and image conditions.

Drawn on the CPU from (seed, sample, name), so that sample 5 of a batch is the same wherever and beside whatever it
is computed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wanexp.config import ModelConfig, VideoConfig
from wanexp.wan.architecture import PATCH_SIZE, WanArchitecture
from wanexp.workloads.sizes import latent_shape


@dataclass
class Samples:
    """A batch of inputs; every tensor has the batch first.

    noise: fp32 [B, C, F, H, W]. text, negative_text: [B, text_len, text_dim]. image_latent: [B, C_in - C, F, H, W] or
    None. clip_features: [B, clip_tokens, clip_dim] or None.
    """

    noise: Tensor
    text: Tensor
    negative_text: Tensor
    image_latent: Tensor | None = None
    clip_features: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def to(self, device: torch.device) -> "Samples":
        return Samples(**{name: value.to(device) for name, value in self.tensors().items()})


def draw_samples(model: ModelConfig, video: VideoConfig, *, seed: int, indices: Sequence[int]) -> Samples:
    """Unit-variance random inputs for the samples `indices` of the global batch, on the CPU."""
    shapes = sample_shapes(model, video)

    def draw(name: str) -> Tensor:
        return torch.stack([random_tensor(f"{seed}/{index}/{name}", shapes[name]) for index in indices])

    return Samples(**{name: draw(name) for name in shapes})


def sample_shapes(model: ModelConfig, video: VideoConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one sample's inputs."""
    arch: WanArchitecture = model.architecture
    latent = latent_shape(model, video)
    shapes: dict[str, tuple[int, ...]] = {
        "noise": latent,
        "text": (arch.text_len, arch.text_dim),
        "negative_text": (arch.text_len, arch.text_dim),
    }
    if arch.in_channels > arch.out_channels:
        shapes["image_latent"] = (arch.in_channels - arch.out_channels, *latent[1:])
    if arch.clip_tokens:
        shapes["clip_features"] = (arch.clip_tokens, arch.clip_dim)
    return shapes


def random_tensor(name: str, shape: Sequence[int]) -> Tensor:
    """Normal fp32 values that depend on nothing but `name`."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def timesteps_of(model: ModelConfig, latent: Tensor, timestep: float) -> Tensor:
    """The timestep argument of a forward: fp32 [B], or [B, tokens] where the first latent frame is given (t = 0)."""
    batch, _, frames, height, width = latent.shape
    if not model.per_token_timestep:
        return torch.full((batch,), timestep, device=latent.device)
    tokens = torch.full(
        (batch, frames, height // PATCH_SIZE[1], width // PATCH_SIZE[2]), timestep, device=latent.device
    )
    tokens[:, 0] = 0.0
    return tokens.flatten(1)
