"""Training steps: the loss by hand, chunks, the steps of AdamW."""

from contextlib import nullcontext

import pytest
import torch

from tests.conftest import Composer
from tests.parallel.test_block_distribution import load
from wanexp.workloads.samples import draw_samples, random_tensor
from wanexp.workloads.train import Train, parity_parameters


def training(config, *, chunks=(2,), first_sample: int = 0, batch: int = 2) -> Train:
    samples = draw_samples(
        config.model, config.video, seed=0, indices=range(first_sample, first_sample + batch)
    )
    model = load(config, requires_grad=True)
    return Train(config, model, samples, nullcontext, chunks=chunks, first_sample=first_sample)


def test_the_loss_is_that_of_flow_matching(run_config: Composer):
    config = run_config("workload=train", "workload.learning_rate=1e-3")
    train = training(config)
    expected = load(config)
    raw = random_tensor("0/sigma/0", (1,)).sigmoid().item()
    sigma = 5 * raw / (1 + 4 * raw)
    data = torch.stack([random_tensor(f"0/{index}/data", (16, 2, 8, 8)) for index in (0, 1)])
    noise = train.samples.noise
    with torch.no_grad():
        flow = expected(
            (1 - sigma) * data + sigma * noise, torch.full((2,), 1000 * sigma), train.samples.text
        )
        loss = (flow - (noise - data)).square().mean().item()
    before = train.model.blocks[0].ffn[0].weight.detach().clone()
    train.step(0)
    assert train.losses == [pytest.approx(loss, rel=1e-5)]
    after = train.model.blocks[0].ffn[0].weight.detach()
    change = (after - before * (1 - 1e-3 * 0.01)).abs()
    assert change.max() == pytest.approx(1e-3, rel=1e-3), "the first step of Adam is the learning rate"
    assert all(parameter.grad is None for parameter in train.model.parameters())


def test_chunks_give_the_gradients_of_the_whole(run_config: Composer):
    config = run_config("workload=train")
    whole = training(config, chunks=[3], batch=3).first_gradients()
    parts = training(config, chunks=[2, 1], batch=3).first_gradients()
    assert whole.keys() == parts.keys() and len(whole) == 15
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7)


def test_the_first_gradients_take_no_step(run_config: Composer):
    config = run_config("workload=train")
    train, plain = training(config), training(config)
    train.first_gradients()
    train.restart()
    for one in (train, plain):
        one.step(0)
        one.step(1)
    assert train.losses == plain.losses and train.losses[0] != train.losses[1]


def test_a_rank_trains_on_its_own_samples(run_config: Composer):
    config = run_config("workload=train")
    second = training(config, first_sample=1, batch=1, chunks=[1])
    assert torch.equal(second.data[0], random_tensor("0/1/data", (16, 2, 8, 8)))


def test_bf16_computes_in_bf16_and_keeps_master_weights(run_config: Composer):
    config = run_config("workload=train", "precision=bf16", "precision.dtype=float32")
    exact = training(config)
    exact.step(0)
    config.precision.dtype = "bfloat16"
    samples = draw_samples(config.model, config.video, seed=0, indices=range(2))
    reduced = Train(config, exact.model, samples, nullcontext, chunks=[2], first_sample=0)
    assert all(parameter.dtype == torch.float32 for parameter in reduced.model.parameters())
    reduced.num_steps_taken = 0
    reduced.step(0)
    assert all(parameter.dtype == torch.float32 for parameter in reduced.model.parameters())
    assert reduced.losses[0] == pytest.approx(exact.losses[0], rel=0.1)
    assert reduced.losses[0] != exact.losses[0]


def test_parity_looks_at_both_ends_and_the_middle(run_config: Composer):
    names = set(parity_parameters(load(run_config())))
    assert {"patch_embedding.weight", "head.head.weight", "time_projection.1.bias"} < names
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {"0", "1", "3"}
