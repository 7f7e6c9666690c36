"""How large a sample is, its latent and its tokens, and how many forwards a step takes. Pure; no torch."""

from wanexp.config import ModelConfig, RunConfig, VideoConfig


def latent_shape(model: ModelConfig, video: VideoConfig) -> tuple[int, int, int, int]:
    """[channels, frames, height, width] of one sample's latent: frames (f-1)/stride+1, the rest over its stride."""
    stride_t, stride_h, stride_w = model.vae_stride
    return (
        model.architecture.out_channels,
        (video.num_frames - 1) // stride_t + 1,
        video.height // stride_h,
        video.width // stride_w,
    )


def num_tokens(model: ModelConfig, video: VideoConfig) -> int:
    """Video tokens of one sample. Raises UserError where the patches do not divide the latent."""
    frames, rows, columns = model.architecture.token_grid(*latent_shape(model, video)[1:])
    return frames * rows * columns


def guidance_of(config: RunConfig) -> list[float]:
    """The guidance scale of each expert: the workload's, else the model's."""
    return config.workload.guidance_scale or config.model.guidance_scale


def forwards_per_step(config: RunConfig) -> int:
    """Two under classifier-free guidance (a scale above 1), else one; training has one."""
    return 2 if config.workload.name == "denoise" and max(guidance_of(config)) > 1 else 1
