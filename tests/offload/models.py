"""Small models for the tests of offloading, loaded as a run loads them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.part import Part
from wanexp.wan.transformer import WanTransformer
from wanexp.wan.weights import WeightSource, load_weights

SMALL = WanArchitecture(
    dim=64,
    ffn_dim=96,
    num_heads=2,
    num_layers=6,
    text_dim=24,
    text_len=16,
    freq_dim=32,
    in_channels=4,
    out_channels=4,
)


def meta_model(architecture: WanArchitecture = SMALL, dtype: torch.dtype = torch.float32) -> WanTransformer:
    with torch.device("meta"):
        return WanTransformer(architecture, dtype=dtype).requires_grad_(False).eval()


def inputs(architecture: WanArchitecture = SMALL, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    given = {
        "latent": torch.randn(1, architecture.out_channels, 3, 6, 10, generator=generator),
        "timestep": torch.tensor([500.0]),
        "text": torch.randn(1, 12, architecture.text_dim, generator=generator),
    }
    if architecture.clip_tokens:
        given["clip_features"] = torch.randn(
            1, architecture.clip_tokens, architecture.clip_dim, generator=generator
        )
        shape = (1, architecture.in_channels - architecture.out_channels, 3, 6, 10)
        given["image_latent"] = torch.randn(shape, generator=generator)
    return {name: tensor.to(device) for name, tensor in given.items()}


def load(
    model: WanTransformer,
    source: WeightSource,
    *,
    device: torch.device | str = "cpu",
    into: Callable[[str], Tensor | None] | None = None,
    part_of: Callable[[str, tuple[int, ...]], Part] | None = None,
) -> WanTransformer:
    load_weights(model, source, device_of=lambda _: device, into=into, part_of=part_of)
    return model
