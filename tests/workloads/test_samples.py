"""Inputs that depend on nothing but the seed and their number."""

import torch

from tests.conftest import CLIP, PER_TOKEN, Composer
from wanexp.workloads.samples import draw_samples, random_tensor, sample_shapes, timesteps_of
from wanexp.workloads.sizes import latent_shape, num_tokens


def test_shapes(run_config: Composer):
    config = run_config(*CLIP)
    assert sample_shapes(config.model, config.video) == {
        "noise": (16, 2, 8, 8),
        "text": (512, 64),
        "negative_text": (512, 64),
        "image_latent": (20, 2, 8, 8),
        "clip_features": (257, 80),
    }
    plain = run_config()
    assert set(sample_shapes(plain.model, plain.video)) == {"noise", "text", "negative_text"}


def test_sizes_of_the_published_videos(run_config: Composer):
    config = run_config("video.width=832", "video.height=480", "video.num_frames=81")
    assert latent_shape(config.model, config.video) == (16, 21, 60, 104)
    assert num_tokens(config.model, config.video) == 32760
    config = run_config(
        *("model.vae_stride=[4,16,16]", "video.width=1280", "video.height=704", "video.num_frames=121")
    )
    assert num_tokens(config.model, config.video) == 31 * 22 * 40


def test_a_sample_does_not_depend_on_its_batch(run_config: Composer):
    config = run_config(*CLIP)
    batch = draw_samples(config.model, config.video, seed=3, indices=range(4)).tensors()
    alone = draw_samples(config.model, config.video, seed=3, indices=[2]).tensors()
    other = draw_samples(config.model, config.video, seed=4, indices=[2]).tensors()
    assert set(batch) == set(alone)
    for name, tensor in batch.items():
        assert torch.equal(tensor[2:3], alone[name]), name
        assert not torch.equal(tensor[1:2], alone[name]), name
        assert not torch.equal(other[name], alone[name]), name
        assert tensor.dtype == torch.float32
        assert 0.9 < tensor.std() < 1.1 and abs(tensor.mean()) < 0.1
    assert not torch.equal(batch["text"], batch["negative_text"])


def test_random_tensors_are_those_of_their_name():
    assert torch.equal(random_tensor("a", (3,)), random_tensor("a", (3,)))
    assert not torch.equal(random_tensor("a", (3,)), random_tensor("b", (3,)))


def test_timesteps(run_config: Composer):
    config = run_config()
    latent = torch.zeros(3, 16, 2, 8, 8)
    assert torch.equal(timesteps_of(config.model, latent, 250.0), torch.full((3,), 250.0))


def test_timesteps_per_token_are_zero_on_the_first_latent_frame(run_config: Composer):
    config = run_config(*PER_TOKEN)
    timesteps = timesteps_of(config.model, torch.zeros(2, 48, 3, 8, 8), 250.0)
    assert timesteps.shape == (2, 3 * 4 * 4)
    assert torch.equal(timesteps[:, :16], torch.zeros(2, 16))
    assert torch.equal(timesteps[:, 16:], torch.full((2, 32), 250.0))
