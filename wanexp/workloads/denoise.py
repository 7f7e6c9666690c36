"""The denoise workload: flow-matching Euler steps, with or without guidance (CFG), on one share of a batch.

    x += (sigma_next - sigma_now) * v,  v = uncond + guidance * (cond - uncond)

Formulas of the Wan 2.1 sampler (flow matching, Euler), with the noise levels of `schedule.py`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from wanexp.config import RunConfig
from wanexp.parallel.parallelize import ParallelModel
from wanexp.parallel.requests import ForwardArguments
from wanexp.workloads.samples import Samples, timesteps_of
from wanexp.workloads.schedule import expert_for, parity_steps, sigma_schedule
from wanexp.workloads.sizes import forwards_per_step, guidance_of


class Denoise:
    """One share of a batch, from noise to the last step.

    experts: transformers on this rank's devices. samples: on the first device.
    time_forwards wraps the forwards of a step (a context manager factory, given their number), to time them.
    """

    forwards_per_step: int

    def __init__(
        self,
        config: RunConfig,
        experts: Sequence[ParallelModel],
        samples: Samples,
        time_forwards: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        self.config = config
        self.experts = experts
        self.samples = samples
        self.time_forwards = time_forwards
        self.sigmas = sigma_schedule(config.workload.num_steps, config.model.shift)
        self.guidance = guidance_of(config)
        self.forwards_per_step = forwards_per_step(config)
        self.context = [embed_text(expert, samples.text, samples) for expert in experts]
        self.negative_context = (
            [embed_text(expert, samples.negative_text, samples) for expert in experts]
            if self.forwards_per_step == 2
            else []
        )
        self.latent = samples.noise
        self.restart()

    def restart(self) -> None:
        """Back to pure noise."""
        self.latent = self.samples.noise.clone()

    @torch.inference_mode()
    def step(self, index: int) -> None:
        """One denoising step, `index` in 0..num_steps-1."""
        sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
        timestep = 1000 * sigma
        expert = expert_for(self.config, timestep)
        flow, *uncond = self.predict(expert, timestep)
        if uncond:
            flow = uncond[0] + self.guidance[expert] * (flow - uncond[0])
        self.latent += (sigma_next - sigma) * flow

    def is_finite(self) -> bool:
        """Whether no NaN and no infinity has come up in the steps since pure noise."""
        return bool(torch.isfinite(self.latent).all())

    def predict(self, expert: int, timestep: float) -> list[Tensor]:
        """The forwards of a step: predicted flows, fp32, the shape of the latent; with the prompt, then without."""
        contexts = [self.context[expert]]
        if self.guidance[expert] > 1:
            contexts.append(self.negative_context[expert])
        timesteps = timesteps_of(self.config.model, self.latent, timestep)
        requests = [
            ForwardArguments(self.latent, timesteps, image_latent=self.samples.image_latent, context=context)
            for context in contexts
        ]
        with self.time_forwards(len(requests)):
            return self.experts[expert].forwards(requests)

    @torch.inference_mode()
    def parity_flows(self) -> Tensor:
        """Flows of the noise at a few timesteps of the schedule: fp32 [B, forwards, C, F, H, W]."""
        self.restart()
        flows = []
        for index in parity_steps(self.config):
            timestep = 1000 * self.sigmas[index]
            flows += self.predict(expert_for(self.config, timestep), timestep)
        return torch.stack(flows, dim=1)


@torch.inference_mode()
def embed_text(expert: ParallelModel, text: Tensor, samples: Samples) -> Tensor:
    """The context of one prompt batch, computed once a video (see `WanTransformer.embed_text`)."""
    return expert.bare.embed_text(text, samples.clip_features)
