"""Tensor parallel gives the same answer as one rank, for every kind of model, and counts what it sends."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from tests.parallel.ranks import on_ranks
from wanexp.errors import LayoutError
from wanexp.parallel.loading import Loader
from wanexp.parallel.shares import check_tensor_parallel, ffn_columns_of_ranks, heads_of_ranks, tensor_part
from wanexp.parallel.tensor_parallel import tensor_parallel
from wanexp.parallel.traffic import tensor_parallel_bytes
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.transformer import WanTransformer
from wanexp.wan.weights import RandomWeights, load_weights

T2V = WanArchitecture(
    dim=96,
    ffn_dim=200,
    num_heads=6,
    num_layers=2,
    text_dim=32,
    text_len=24,
    freq_dim=16,
    in_channels=4,
    out_channels=4,
)
I2V = dataclasses.replace(T2V, clip_tokens=9, clip_dim=24, in_channels=12)
VARIANTS = {"t2v": T2V, "i2v": I2V, "ti2v": T2V}
GRIDS = {"t2v": (3, 6, 10), "i2v": (3, 6, 6), "ti2v": (3, 2, 10)}  # 45, 27 and 15 tokens


def inputs(variant: str, batch: int) -> dict[str, torch.Tensor]:
    arch, (frames, height, width) = VARIANTS[variant], GRIDS[variant]
    generator = torch.Generator().manual_seed(batch)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    given = {
        "latent": normal(batch, arch.out_channels, frames, height, width),
        "timestep": torch.linspace(100, 900, batch),
        "text": normal(batch, 20, arch.text_dim),
    }
    if variant == "i2v":
        given["image_latent"] = normal(batch, 8, frames, height, width)
        given["clip_features"] = normal(batch, arch.clip_tokens, arch.clip_dim)
    if variant == "ti2v":  # the first latent frame, an image, at t = 0
        per_frame = height * width // 4
        given["timestep"] = given["timestep"][:, None].repeat(1, frames * per_frame)
        given["timestep"][:, :per_frame] = 0
    return given


def build(architecture: WanArchitecture, dtype: torch.dtype = torch.float32) -> WanTransformer:
    with torch.device("meta"):
        return WanTransformer(architecture, dtype=dtype)


def plain(architecture: WanArchitecture, dtype: torch.dtype = torch.float32) -> WanTransformer:
    model = build(architecture, dtype)
    load_weights(model, RandomWeights(architecture), device_of=lambda name: "cpu")
    return model


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def answers(rank: int) -> dict:
    """What one rank computes of every variant, and how far it is from the plain model."""
    group, degree = dist.group.WORLD, dist.get_world_size()
    results = {}
    for variant, arch in VARIANTS.items():
        model = build(arch)
        traffic = tensor_parallel(model, group)
        loader = Loader(
            arch,
            part_of=lambda rank, name, shape, arch=arch: tensor_part(
                name, shape, arch, degree=degree, rank=rank
            ),
            nodes=[range(degree)],
            rank=rank,
            home=torch.device("cpu"),
        )
        loader.load(model, RandomWeights(arch), device_of=lambda name: "cpu")
        whole = plain(arch)
        for batch in (1, 3):
            traffic.reset()
            given = inputs(variant, batch)
            with torch.inference_mode():
                found, expected = model(**given), whole(**given)
            tokens = torch.Size(GRIDS[variant]).numel() // 4
            results[variant, batch] = {
                "distance": distance(found, expected),
                "sum": found.sum().item(),
                "bytes": traffic.num_bytes,
                "expected_bytes": tensor_parallel_bytes(
                    arch, batch=batch, tokens=tokens, element_size=4, degree=degree
                ),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            }
    return results


def other_cases(rank: int) -> dict:
    """A model cut after it was loaded; bf16; a compiled block."""
    group = dist.group.WORLD
    given = inputs("i2v", 1)
    with torch.inference_mode():
        expected = plain(I2V)(**given)
        in_bf16 = plain(I2V, torch.bfloat16)(**given)
        results = {"none_bf16": distance(in_bf16, expected)}
        model = plain(I2V)
        traffic = tensor_parallel(model, group)
        results["cut_after_loading"] = distance(model(**given), expected)
        results["bytes"] = traffic.num_bytes
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        traffic.reset()
        results["compiled"] = distance(model(**given), expected)
        results["compiled_bytes"] = traffic.num_bytes
        model = plain(I2V, torch.bfloat16)
        tensor_parallel(model, group)
        results["bf16"] = distance(model(**given), expected)
    return results


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_same_answer(degree):
    by_rank = on_ranks(degree, answers)
    for case, result in by_rank[0].items():
        assert result["distance"] <= 1e-5, (case, result)
    for results in by_rank:
        for case, result in results.items():
            assert result["sum"] == by_rank[0][case]["sum"]  # all ranks hold the very same prediction
            # Rounded once a collective, 7 or 8 of them a block.
            assert abs(result["bytes"] - result["expected_bytes"]) <= 8 * T2V.num_layers
    for variant, arch in VARIANTS.items():
        held = [results[variant, 1]["parameters"] for results in by_rank]
        copied = arch.num_outer_parameters() + arch.num_layers * (6 + 2) * arch.dim
        assert sum(held) == arch.num_parameters() + (degree - 1) * copied
        assert max(held) < arch.num_parameters()


def test_cut_after_loading_compiled_and_bf16():
    result = on_ranks(2, other_cases)[1]
    assert result["cut_after_loading"] <= 1e-5
    assert result["compiled"] <= 1e-5
    assert result["compiled_bytes"] == result["bytes"] > 0
    assert result["bf16"] <= 2 * result["none_bf16"]


def test_parts_cover_each_tensor_once_or_are_copies():
    for degree in (1, 2, 4, 5, 6):
        for name, shape in I2V.tensor_shapes():
            parts = [tensor_part(name, shape, I2V, degree=degree, rank=rank) for rank in range(degree)]
            if len(set(parts)) == 1:
                assert parts[0].shape_in(shape) == shape
            elif name.endswith(("o.bias", "ffn.2.bias")):
                assert [part.is_empty for part in parts] == [False] + [True] * (degree - 1)
            else:
                (dim,) = {part.dim for part in parts}
                assert [part.start for part in parts] == [0] + [part.stop for part in parts[:-1]]
                assert parts[-1].stop == shape[dim]


def test_shares_of_the_published_sizes():
    wan_1_3b = WanArchitecture(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
    assert heads_of_ranks(wan_1_3b, 8) == [2, 2, 2, 2, 1, 1, 1, 1]
    assert sum(ffn_columns_of_ranks(wan_1_3b, 8)) == 8960
    assert all(share % 64 == 0 for share in ffn_columns_of_ranks(wan_1_3b, 8))
    assert ffn_columns_of_ranks(dataclasses.replace(wan_1_3b, ffn_dim=96), 4) == [24] * 4
    assert ffn_columns_of_ranks(dataclasses.replace(wan_1_3b, ffn_dim=97), 2) == [49, 48]


def test_bytes_of_14b_at_480p():
    """The number in docs/modes/tensor_parallel.md."""
    wan_14b = WanArchitecture(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    sent = tensor_parallel_bytes(wan_14b, batch=1, tokens=32760, element_size=2, degree=2)
    assert 40.2e9 < sent < 40.3e9


def test_more_ranks_than_heads():
    check_tensor_parallel(T2V, 6)
    with pytest.raises(LayoutError, match=r"6 heads and 200 FFN columns over tp 7 ranks.*tp=6 or less"):
        check_tensor_parallel(T2V, 7)
