"""The sizes that a run's forwards have: of whole samples, and of the share that one rank computes. Pure."""

import dataclasses

from wanexp.config import RunConfig
from wanexp.parallel.layout import Layout
from wanexp.parallel.shares import ffn_columns_of_ranks
from wanexp.planning.activations import Sizes
from wanexp.planning.plan import DTYPE_BYTES
from wanexp.workloads.sizes import latent_shape


def sizes_of(config: RunConfig, batch: int) -> Sizes:
    """Sizes of the tensors of one forward of `batch` samples."""
    _, frames, height, width = latent_shape(config.model, config.video)
    compute = DTYPE_BYTES[config.precision.dtype]
    return Sizes(
        config.model.architecture,
        batch,
        config.model.architecture.token_grid(frames, height, width),
        compute=compute,
        residual=4 if has_wide_residual(config) else compute,
        distinct_timesteps=2 if config.model.per_token_timestep else 0,
        ffn_chunks=config.ffn_chunks,
    )


def has_wide_residual(config: RunConfig) -> bool:
    """Whether the residual stream is in fp32: where asked for, and in training, whose weights are."""
    return config.precision.residual_fp32 or config.workload.name == "train"


def share_of(whole: Sizes, layout: Layout) -> Sizes:
    """What the blocks and the head of the rank with the largest share see: its tokens, its columns of the FFN."""
    arch = whole.arch
    if layout.tp > 1:
        arch = dataclasses.replace(arch, ffn_dim=ffn_columns_of_ranks(arch, layout.tp)[0])
    tokens = -(-whole.tokens // (layout.ring * layout.ulysses))
    grid = whole.grid if tokens == whole.tokens else (1, 1, tokens)
    return dataclasses.replace(whole, arch=arch, grid=grid)


def input_bytes(config: RunConfig, batch: int) -> tuple[int, ...]:
    """The samples as `workloads.samples` draws them, fp32, and the latent that is being denoised."""
    arch = config.model.architecture
    sizes = sizes_of(config, batch)
    text = batch * arch.text_len * arch.text_dim * 4
    parts = [sizes.latent(arch.out_channels)] * 2 + [text, text]
    parts.append(sizes.latent(arch.in_channels - arch.out_channels))
    parts.append(batch * arch.clip_tokens * arch.clip_dim * 4)
    return tuple(parts)
