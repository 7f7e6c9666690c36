"""CFG parallel: the two forwards of a guided step at the same time, each on its own rank (or group of ranks).

    rank 0:  latent, prompt          -> forward -> cond   --.
                                                             }-- all-gather of one prediction --> both, on each rank
    rank 1:  latent, negative prompt -> forward -> uncond --'

Buys latency: near 2 of 2, as one prediction of a few MB is all that moves in a step. Every rank holds the whole model,
or its share under the other axes. The answer is bit-equal to one device's: the same kernels on the same inputs.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from wanexp.parallel.requests import ForwardArguments, Forwards
from wanexp.parallel.traffic import Traffic


def split_guidance(forwards: Forwards, group: ProcessGroup, traffic: Traffic) -> Forwards:
    """`forwards` of two requests with one of them on each of the two ranks of `group`; a single one runs on both.

    Every rank gets both predictions. All ranks must ask for the same requests at the same time.
    """
    rank = dist.get_rank(group)

    def run(requests: Sequence[ForwardArguments]) -> list[Tensor]:
        if len(requests) == 1:
            return forwards(requests)
        assert len(requests) == dist.get_world_size(group), len(requests)
        (own,) = forwards([requests[rank]])
        flows = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in requests]
        dist.all_gather(flows, own.contiguous(), group=group)
        traffic.num_bytes += own.nbytes * (len(requests) - 1)
        return flows

    return run
