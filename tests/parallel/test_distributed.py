"""DDP training between real processes equals one process on the joined batch, after several optimiser steps."""

from contextlib import nullcontext

import pytest
import torch

from tests.conftest import Composer, compose_run
from tests.parallel.ranks import on_ranks
from tests.parallel.test_block_distribution import load
from wanexp.config import RunConfig
from wanexp.parallel.distributed import synchronize_gradients
from wanexp.workloads.samples import draw_samples
from wanexp.workloads.train import Train

BATCH, STEPS = 4, 4
OVERRIDES = ("workload=train", "model.architecture.num_layers=2")


def train_share(rank: int, config: RunConfig, world_size: int, synchronised: bool) -> dict:
    """Losses, and the weights at the end, of one rank's share of the batch."""
    share = BATCH // world_size
    first = rank * share
    samples = draw_samples(config.model, config.video, seed=0, indices=range(first, first + share))
    bare = load(config, requires_grad=True)
    bare.gradient_checkpointing = True
    model = synchronize_gradients(bare, torch.device("cpu")) if synchronised else bare
    train = Train(config, model, samples, nullcontext, chunks=[share], first_sample=first)
    for index in range(STEPS):
        train.step(index)
    return {"losses": train.losses, "weights": {n: p.detach().clone() for n, p in bare.named_parameters()}}


@pytest.fixture(scope="module")
def alone() -> dict:
    return train_share(0, compose_run(*OVERRIDES), 1, synchronised=False)


@pytest.fixture(scope="module")
def start() -> dict:
    return {name: weight.detach() for name, weight in load(compose_run(*OVERRIDES)).named_parameters()}


def distance(found: dict, expected: dict) -> float:
    """Largest difference of a weight."""
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


def error_of_the_way(found: dict, expected: dict, start: dict) -> float:
    """Relative L2 distance between where two trainings went from `start`."""
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in start])
    way = torch.cat([(expected[name] - start[name]).flatten() for name in start])
    return (difference.norm() / way.norm()).item()


@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_weights_equal_one_process_on_the_joined_batch(
    run_config: Composer, alone, start, world_size
):
    ranks = on_ranks(world_size, train_share, run_config(*OVERRIDES), world_size, True)
    for rank in ranks:
        assert distance(rank["weights"], alone["weights"]) < 1e-6
        assert error_of_the_way(rank["weights"], alone["weights"], start) < 1e-2
        assert distance(rank["weights"], ranks[0]["weights"]) == 0.0, "all ranks hold the same weights"
    for step, loss in enumerate(alone["losses"]):
        mean = sum(rank["losses"][step] for rank in ranks) / world_size
        assert mean == pytest.approx(loss, rel=1e-6)
    assert distance(alone["weights"], start) > 3e-5, "training moved the weights: four steps of 1e-5"


def test_without_synchronisation_the_weights_differ(run_config: Composer, alone, start):
    """The checks above can fail: bare models in the place of DDP."""
    ranks = on_ranks(2, train_share, run_config(*OVERRIDES), 2, False)
    assert distance(ranks[0]["weights"], alone["weights"]) > 1e-5
    assert error_of_the_way(ranks[0]["weights"], alone["weights"], start) > 0.1
    assert distance(ranks[0]["weights"], ranks[1]["weights"]) > 1e-5
