"""Ranks that share what they read load quantised and swapped blocks as one rank does."""

import pytest
import torch

from tests.offload.models import SMALL, inputs, load, meta_model
from tests.parallel.ranks import on_ranks
from wanexp.offload.block_swap import swap_blocks
from wanexp.offload.quantize import quantize_linears
from wanexp.parallel.loading import Loader
from wanexp.wan.checkpoint import open_checkpoint
from wanexp.wan.part import Part
from wanexp.wan.weights import RandomWeights
from wanexp.wan.write_checkpoint import write_checkpoint


def replica(rank: int, file: str, linear: str) -> torch.Tensor:
    model = meta_model()
    quantize_linears(model, linear)
    swap = swap_blocks(model, (1, 2, 4), device_of_block=lambda _: torch.device("cpu"))
    loader = Loader(
        SMALL,
        part_of=lambda _rank, _name, shape: Part.whole(shape),
        nodes=[range(2)],
        rank=rank,
        home=torch.device("cpu"),
    )
    report = loader.load(model, open_checkpoint(file), device_of=lambda _: "cpu", into=swap.into)
    assert report.bytes_received > 0
    with torch.inference_mode():
        return model(**inputs())


@pytest.mark.parametrize("linear", ["dtype", "fp8", "int8_weight"])
@pytest.mark.parametrize("layout", ["native", "fp8_scaled"])
def test_replicas_share_what_they_read(tmp_path, layout, linear):
    file = write_checkpoint(RandomWeights(SMALL), tmp_path / "model.safetensors", layout=layout)[0]
    model = meta_model()
    quantize_linears(model, linear)
    load(model, open_checkpoint(file))
    with torch.inference_mode():
        expected = model(**inputs())
    for flow in on_ranks(2, replica, str(file), linear):
        assert (flow - expected).norm() <= 1e-6 * expected.norm()
