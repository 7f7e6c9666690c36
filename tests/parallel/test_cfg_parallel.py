"""Which rank carries out which forward of a guided step, and what crosses."""

import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.ranks import on_ranks
from wanexp.parallel.cfg_parallel import split_guidance
from wanexp.parallel.requests import ForwardArguments
from wanexp.parallel.traffic import Traffic


def guided_steps(rank: int) -> dict:
    own: list[float] = []

    def forwards(requests: list[ForwardArguments]) -> list[Tensor]:
        own.extend(request.timestep.item() for request in requests)
        # transposed: a prediction may come in any strides
        return [(request.latent + request.timestep).transpose(0, 1) for request in requests]

    def request(timestep: float) -> ForwardArguments:
        return ForwardArguments(torch.arange(6.0).view(2, 3), torch.tensor([timestep]))

    traffic = Traffic()
    run = split_guidance(forwards, dist.group.WORLD, traffic)
    cond, uncond = run([request(100), request(200)])
    sent = traffic.num_bytes
    (alone,) = run([request(300)])
    return {"own": own, "flows": [cond, uncond, alone], "sent": [sent, traffic.num_bytes]}


def test_each_rank_carries_out_one_forward_and_has_both():
    by_rank = on_ranks(2, guided_steps)
    latent = torch.arange(6.0).view(2, 3).T
    assert [result["own"] for result in by_rank] == [[100, 300], [200, 300]], "a single one runs on both"
    for result in by_rank:
        for flow, timestep in zip(result["flows"], (100, 200, 300), strict=True):
            assert torch.equal(flow, latent + timestep)
        assert result["sent"] == [24, 24], (
            "six numbers of fp32 to the other rank; nothing for a single forward"
        )
