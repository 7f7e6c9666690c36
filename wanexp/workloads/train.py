"""The train workload: flow-matching training steps with fp32 master weights, reduced-precision compute and AdamW.

    x_t = (1 - sigma) * data + sigma * noise,  target = noise - data,  loss = mean((model(x_t, 1000 sigma) - target)^2)

Each step uses the same drawn data and noise with a new sigma, so that losses of different layouts can be compared.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanexp.config import RunConfig
from wanexp.workloads.samples import Samples, random_tensor, timesteps_of


class Train:
    """One rank's share of a training batch.

    model: fp32 weights that require gradients, possibly wrapped by DDP. chunks: sizes of the micro-batches that the
    share is computed in, gradients accumulated (one for a rank; the reference run uses the ranks' shares).
    """

    forwards_per_step = 1

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        samples: Samples,
        time_forward: Callable[[], object],
        *,
        chunks: Sequence[int],
        first_sample: int,
    ) -> None:
        self.config = config
        self.model = model
        self.samples = samples
        self.time_forward = time_forward
        self.chunks = list(chunks)
        self.first_sample = first_sample
        self.losses: list[float] = []
        self.data = torch.stack(
            [
                random_tensor(f"{config.seed}/{first_sample + index}/data", samples.noise.shape[1:])
                for index in range(len(samples.noise))
            ]
        ).to(samples.noise.device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.workload.learning_rate, weight_decay=config.workload.weight_decay
        )
        self.num_steps_taken = 0

    def restart(self) -> None:
        """Training goes on from where the warm-up left it."""
        self.losses = []

    def step(self, index: int) -> None:
        """One optimiser step."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def is_finite(self) -> bool:
        """Whether all losses are numbers."""
        return all(map(math.isfinite, self.losses))

    def backward(self) -> None:
        """Loss and gradients of the whole share; adds the share's mean loss to `losses`."""
        total = len(self.samples.noise)
        loss_sum, start = 0.0, 0
        for size in self.chunks:
            with self.time_forward():  # type: ignore[attr-defined]
                loss = self._loss(slice(start, start + size))
            (loss * (size / total)).backward()
            loss_sum += loss.item() * size / total
            start += size
        self.losses.append(loss_sum)
        self.num_steps_taken += 1

    def first_gradients(self) -> dict[str, Tensor]:
        """Gradients of a few parameters at the weights as they are; leaves no gradient and takes no step."""
        from wanexp.parallel.fsdp import full_gradient  # torch's FSDP takes a second to import

        self.backward()
        gradients = {}
        for name, parameter in parity_parameters(self.model).items():
            if (gradient := full_gradient(parameter)) is not None:  # asked on every rank
                gradients[name] = gradient.clone()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps_taken = 0
        return gradients

    def _loss(self, share: slice) -> Tensor:
        samples, model = self.samples, self.config.model
        noise, data = samples.noise[share], self.data[share]
        sigma = self._sigma()
        device_type = noise.device.type
        dtype = getattr(torch, self.config.precision.dtype)
        with torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32):
            flow = self.model(
                torch.lerp(data, noise, sigma),
                timesteps_of(model, noise, 1000 * sigma),
                samples.text[share],
                None if samples.image_latent is None else samples.image_latent[share],
                None if samples.clip_features is None else samples.clip_features[share],
            )
        return F.mse_loss(flow, noise - data)

    def _sigma(self) -> float:
        """The noise level of this step: logit-normal, the same on all ranks, then shifted as in sampling."""
        sigma = random_tensor(f"{self.config.seed}/sigma/{self.num_steps_taken}", (1,)).sigmoid().item()
        shift = self.config.model.shift
        return shift * sigma / (1 + (shift - 1) * sigma)


def parity_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters whose gradients the parity check compares: inputs, first, middle and last block, and head."""
    model = getattr(model, "module", model)  # DDP's
    last = len(model.blocks) - 1  # type: ignore[arg-type]
    blocks = {f"blocks.{index}." for index in (0, last // 2, last)}
    endings = ("self_attn.q.weight", "cross_attn.k.weight", "ffn.2.weight", "modulation")
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(("patch_embedding.weight", "time_projection.1.bias", "head.head.weight"))
        or any(name == block + ending for block in blocks for ending in endings)
    }
