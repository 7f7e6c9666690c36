"""What one forward gets, and the ways of carrying out several of them that need no mode.

A step hands all its forwards over at once (with and without the prompt), so that a mode can spread them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ForwardArguments:
    """What one forward gets, as of `WanTransformer.forward`."""

    latent: Tensor
    timestep: Tensor
    text: Tensor | None = None
    image_latent: Tensor | None = None
    clip_features: Tensor | None = None
    context: Tensor | None = None

    def samples(self) -> "list[ForwardArguments]":
        """The same forward for one sample at a time: views."""
        if len(self.latent) == 1:
            return [self]

        def one(index: int) -> ForwardArguments:
            parts = {
                name: value[index : index + 1] for name, value in vars(self).items() if value is not None
            }
            return ForwardArguments(**parts)

        return [one(index) for index in range(len(self.latent))]


Forwards = Callable[[Sequence[ForwardArguments]], list[Tensor]]
"""Carries out forwards and gives their predictions, in order, on the device of the latents."""


def one_after_another(module: nn.Module) -> Forwards:
    """Calls `module` for each request."""
    return lambda requests: [module(**vars(request)) for request in requests]


def by_sample(forwards: Forwards) -> Forwards:
    """Takes batches apart, so that every sample is a request of its own, and puts the predictions together again."""

    def run(requests: Sequence[ForwardArguments]) -> list[Tensor]:
        sizes = [len(request.latent) for request in requests]
        flows = iter(forwards([single for request in requests for single in request.samples()]))
        return [torch.cat([next(flows) for _ in range(size)]) for size in sizes]

    return run
