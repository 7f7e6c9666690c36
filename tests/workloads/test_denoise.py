"""The sampler against numbers by hand, with experts whose answer is known."""

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import PER_TOKEN, TWO_EXPERTS, Composer
from wanexp.parallel.requests import ForwardArguments
from wanexp.workloads.denoise import Denoise
from wanexp.workloads.samples import Samples, draw_samples
from wanexp.workloads.schedule import expert_for, sigma_schedule
from wanexp.workloads.sizes import guidance_of


class KnownExpert(nn.Module):
    """Predicts its `value` with the text, half of it with the negative one; notes its calls."""

    @property
    def bare(self) -> "KnownExpert":
        return self

    def __init__(self, value: float, samples: Samples) -> None:
        super().__init__()
        self.value, self.samples = value, samples
        self.timesteps: list[Tensor] = []
        self.num_requests: list[int] = []

    def forwards(self, requests: Sequence[ForwardArguments]) -> list[Tensor]:
        self.num_requests.append(len(requests))
        return [
            self(
                request.latent,
                request.timestep,
                image_latent=request.image_latent,
                context=request.context,
            )
            for request in requests
        ]

    def embed_text(self, text: Tensor, clip_features: Tensor | None) -> Tensor:
        return torch.tensor(0.5 if text is self.samples.negative_text else 1.0)

    def forward(
        self, latent: Tensor, timestep: Tensor, *, image_latent: Tensor | None, context: Tensor
    ) -> Tensor:
        self.timesteps.append(timestep)
        return torch.full_like(latent, self.value) * context


def workload(config, *values: float, batch: int = 2) -> Denoise:
    samples = draw_samples(config.model, config.video, seed=0, indices=range(batch))
    experts = [KnownExpert(value, samples) for value in values]
    return Denoise(config, experts, samples, nullcontext)


def test_the_schedule():
    assert sigma_schedule(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    # shift 5: 5 s / (1 + 4 s)
    assert sigma_schedule(4, 5.0) == pytest.approx([1.0, 3.75 / 4, 2.5 / 3, 1.25 / 2, 0.0])
    assert sigma_schedule(2, 12.0)[1] == pytest.approx(6 / 6.5)


def test_euler_steps_without_guidance(run_config: Composer):
    denoise = workload(run_config("workload.guidance_scale=[1]"), 2.0)
    assert denoise.forwards_per_step == 1
    noise = denoise.samples.noise.clone()
    denoise.step(0)
    torch.testing.assert_close(denoise.latent, noise + (0.9375 - 1) * 2.0)
    denoise.step(1)
    torch.testing.assert_close(denoise.latent, noise + (2.5 / 3 - 1) * 2.0)
    for index in (2, 3):
        denoise.step(index)
    torch.testing.assert_close(denoise.latent, noise - 2.0, msg="all steps together go from sigma 1 to 0")
    assert torch.equal(denoise.samples.noise, noise), "the inputs stay as they are"
    (expert,) = denoise.experts
    assert [timestep.tolist() for timestep in expert.timesteps] == [
        pytest.approx([1000 * sigma] * 2) for sigma in sigma_schedule(4, 5.0)[:4]
    ]
    denoise.restart()
    assert torch.equal(denoise.latent, noise)


def test_guidance(run_config: Composer):
    """uncond + g (cond - uncond) with cond 2, uncond 1, g 3: 4."""
    denoise = workload(run_config("workload.guidance_scale=[3]"), 2.0)
    assert denoise.forwards_per_step == 2
    denoise.step(0)
    torch.testing.assert_close(denoise.latent, denoise.samples.noise + (0.9375 - 1) * 4.0)


def test_the_guidance_is_the_workloads_else_the_models(run_config: Composer):
    assert guidance_of(run_config()) == [5.0]
    assert guidance_of(run_config("workload.guidance_scale=[2]", *TWO_EXPERTS)) == [2.0, 2.0]
    assert guidance_of(run_config(*TWO_EXPERTS)) == [4.0, 3.0]


def test_experts_change_at_the_boundary(run_config: Composer):
    config = run_config(*TWO_EXPERTS)
    assert expert_for(config, 1000.0) == 0
    assert expert_for(config, 900.0) == 0, "the first serves t >= boundary"
    assert expert_for(config, 899.999) == 1
    assert expert_for(run_config(), 0.0) == 0
    # sigmas 1, 0.9375 | 0.833, 0.625; guidance 4 and 3; cond v, uncond v / 2: v (1 + g) / 2
    denoise = workload(config, 2.0, 10.0)
    for index in range(4):
        denoise.step(index)
    first, second = denoise.experts
    assert [len(first.timesteps), len(second.timesteps)] == [4, 4]
    boundary = 2.5 / 3
    expected = (boundary - 1) * 2.0 * 2.5 + (0 - boundary) * 10.0 * 2.0
    torch.testing.assert_close(denoise.latent, denoise.samples.noise + expected)


def test_an_expert_without_guidance_runs_one_forward(run_config: Composer):
    denoise = workload(run_config(*TWO_EXPERTS, "workload.guidance_scale=[1,3]"), 2.0, 10.0)
    for index in range(4):
        denoise.step(index)
    first, second = denoise.experts
    assert [len(first.timesteps), len(second.timesteps)] == [2, 4]


def test_the_model_sees_timesteps_per_token(run_config: Composer):
    denoise = workload(run_config(*PER_TOKEN), 1.0)
    denoise.step(1)
    timestep = denoise.experts[0].timesteps[0]
    assert timestep.shape == (2, 32)
    assert timestep[:, :16].max() == 0 and timestep[:, 16:].min() == pytest.approx(937.5)


def test_parity_flows_cover_the_schedule_both_experts_and_both_texts(run_config: Composer):
    denoise = workload(run_config(*TWO_EXPERTS), 2.0, 10.0)
    denoise.step(0)
    flows = denoise.parity_flows()
    assert flows.shape == (2, 4, 16, 2, 8, 8)
    # the first step and the last, each with the text and with the negative one
    assert flows[0, :, 0, 0, 0, 0].tolist() == [2.0, 1.0, 10.0, 5.0]
    assert torch.equal(denoise.latent, denoise.samples.noise)
    one = workload(run_config("workload.num_steps=1"), 2.0).parity_flows()
    assert one.shape[1] == 2
    # without guidance a step between them too: 0, 2 (round half to even of 1.5) and 3
    single = workload(run_config("workload.guidance_scale=[1]"), 2.0)
    assert single.parity_flows().shape[1] == 3
    assert single.experts[0].timesteps[1][0] == pytest.approx(1000 * sigma_schedule(4, 5.0)[2])


def test_a_step_hands_its_forwards_over_at_once(run_config: Composer):
    denoise = workload(run_config(), 2.0)
    denoise.step(0)
    denoise.parity_flows()
    assert denoise.experts[0].num_requests == [2, 2, 2]
