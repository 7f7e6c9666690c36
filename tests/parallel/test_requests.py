"""Batches taken apart into samples, and put together again."""

import torch
from torch import Tensor, nn

from wanexp.parallel.requests import ForwardArguments, by_sample, one_after_another


def request(batch: int, first: int = 0) -> ForwardArguments:
    index = torch.arange(first, first + batch, dtype=torch.float32)
    return ForwardArguments(
        latent=index.view(-1, 1, 1, 1, 1).expand(-1, 2, 1, 2, 2),
        timestep=100 * index,
        image_latent=None,
        context=index.view(-1, 1, 1).expand(-1, 3, 4),
    )


def test_samples_of_a_request_are_views():
    whole = request(3)
    samples = whole.samples()
    assert [len(sample.latent) for sample in samples] == [1, 1, 1]
    for index, sample in enumerate(samples):
        assert sample.timestep.tolist() == [100.0 * index] and sample.latent.flatten()[0] == index
        assert sample.context is not None and sample.context.unique().tolist() == [index]
        assert sample.text is sample.image_latent is sample.clip_features is None
        assert sample.latent.untyped_storage().data_ptr() == whole.latent.untyped_storage().data_ptr()
    alone = request(1)
    assert alone.samples() == [alone]


def test_by_sample_keeps_the_order_of_requests_and_samples():
    handed_over = []

    def forwards(requests: list[ForwardArguments]) -> list[Tensor]:
        handed_over.append([len(one.latent) for one in requests])
        return [one.latent * 10 + one.timestep for one in requests]

    first, second = by_sample(forwards)([request(2), request(3, first=2)])
    assert handed_over == [[1, 1, 1, 1, 1]], "all at once"
    assert first[:, 0, 0, 0, 0].tolist() == [0, 110] and first.shape == (2, 2, 1, 2, 2)
    assert second[:, 0, 0, 0, 0].tolist() == [220, 330, 440]


def test_one_after_another_calls_the_module_with_what_the_request_has():
    class Echo(nn.Module):
        def forward(self, latent, timestep, text, image_latent, clip_features, context):
            assert text is image_latent is clip_features is None
            return latent.sum() + timestep.sum() + context.sum()

    requests = [request(1, first=1), request(2, first=1)]
    flows = one_after_another(Echo())(requests)
    assert [flow.item() for flow in flows] == [8 + 100 + 12, 24 + 300 + 36]
