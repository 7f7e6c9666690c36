"""Random weights are one model everywhere; loading fills a meta model with exactly what the source holds."""

import dataclasses

import pytest
import torch
from torch import nn

from wanexp.errors import CheckpointError
from wanexp.wan import load_transformer
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.part import Part
from wanexp.wan.transformer import WanTransformer
from wanexp.wan.weights import RandomWeights, _hash_range, load_weights, open_weights
from wanexp.wan.write_checkpoint import write_checkpoint, write_model

SMALL = WanArchitecture(dim=128, ffn_dim=256, num_heads=2, num_layers=3, text_dim=32, freq_dim=16)
I2V = dataclasses.replace(SMALL, clip_tokens=514, clip_dim=24, in_channels=36)


def read(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, arch: WanArchitecture = SMALL):
    return RandomWeights(arch, seed).read(name, device="cpu", dtype=dtype)


def meta_model(architecture: WanArchitecture = SMALL, dtype: torch.dtype = torch.float32) -> WanTransformer:
    with torch.device("meta"):
        return WanTransformer(architecture, dtype=dtype)


# Random weights


def test_hash_is_the_documented_function():
    """Written out in plain integers, so that a change of the weights cannot pass unseen."""
    import hashlib

    key = hashlib.sha256(b"7:head.head.weight").digest()
    offset, stride = int.from_bytes(key[:4], "little"), (int.from_bytes(key[4:8], "little") >> 1) | 1

    def plain(index: int) -> int:
        x = (index * stride + offset) % 2**32
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0x735A2D97 % 2**32
        return x ^ (x >> 15)

    indices = [0, 1, 2, 1000, 2**31 - 1, 2**31, 2**32 - 2]
    for index in indices:
        hashed = _hash_range(7, "head.head.weight", index, index + 1, torch.device("cpu"))
        assert hashed.tolist() == [plain(index)]


def test_values_are_fixed():
    """A record's numbers can be had again years later only if these never change."""
    values = read("blocks.0.self_attn.q.weight").view(-1)[:4].tolist()
    assert values == [0.0037384033203125, -0.134765625, -0.0091552734375, -0.13671875]


def test_deterministic_and_keyed():
    q = read("blocks.0.self_attn.q.weight")
    assert torch.equal(q, read("blocks.0.self_attn.q.weight"))
    for other in (read("blocks.0.self_attn.q.weight", seed=1), read("blocks.1.self_attn.q.weight")):
        assert abs(torch.corrcoef(torch.stack([q.view(-1), other.view(-1)]))[0, 1]) < 0.03


def test_chunks_do_not_show(monkeypatch):
    whole = read("blocks.0.ffn.0.weight")
    monkeypatch.setattr("wanexp.wan.weights._CHUNK", {"cpu": 1000})
    assert torch.equal(whole, read("blocks.0.ffn.0.weight"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_same_model_in_every_dtype(dtype):
    for name, _ in SMALL.tensor_shapes():
        assert torch.equal(read(name, dtype=dtype).float(), read(name))


@pytest.mark.parametrize(
    "name, mean, std",
    [
        ("blocks.0.self_attn.q.weight", 0, 128**-0.5),
        ("blocks.0.ffn.2.weight", 0, 256**-0.5),
        ("patch_embedding.weight", 0, 64**-0.5),
        ("blocks.0.modulation", 0, 128**-0.5),
        ("blocks.0.norm3.weight", 1, 0.1),
        ("blocks.0.norm3.bias", 0, 0.02),
        ("blocks.0.cross_attn.norm_q.weight", 1, 0.1),
        ("time_projection.1.bias", 0, 0.02),
    ],
)
def test_statistics(name, mean, std):
    values = torch.cat([read(name, seed=seed).view(-1) for seed in range(30)]).double()
    assert abs(values.mean() - mean) < 5 * std / values.numel() ** 0.5
    assert abs(values.std() / std - 1) < 0.03
    assert (values - mean).abs().max() <= std * 3**0.5 * 1.01


def test_neighbours_are_unrelated():
    values = read("blocks.0.ffn.0.weight").view(-1)
    for lag in (1, 2, 128, 256):
        assert abs(torch.corrcoef(torch.stack([values[lag:], values[:-lag]]))[0, 1]) < 0.03


def test_unknown_name():
    with pytest.raises(CheckpointError, match=r"blocks\.3\.modulation"):
        read("blocks.3.modulation")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits(tmp_path):
    wide = dataclasses.replace(SMALL, dim=2048, ffn_dim=16384, num_layers=1)  # several chunks on both devices
    for name, shape in wide.tensor_shapes():
        for dtype in (torch.float32, torch.bfloat16):
            on_gpu = RandomWeights(wide, 3).read(name, device="cuda", dtype=dtype)
            assert torch.equal(on_gpu.cpu(), read(name, 3, dtype, wide)), name
            if len(shape) == 2:
                part = Part(1, 3, shape[1] // 2)
                cut = RandomWeights(wide, 3).read(name, device="cuda", dtype=dtype, part=part)
                assert torch.equal(cut, part.cut(on_gpu)), name
    files = write_checkpoint(RandomWeights(wide, 3), tmp_path, layout="fp8_scaled")
    sources = open_weights(files[0], wide)
    for name, _ in wide.tensor_shapes():
        on_gpu, on_cpu = (sources[0].read(name, device=d, dtype=torch.bfloat16) for d in ("cuda", "cpu"))
        assert torch.equal(on_gpu.cpu(), on_cpu), name


# Loading


def test_load_fills_a_meta_model():
    model = meta_model(I2V, torch.bfloat16)
    source = RandomWeights(I2V, 1)
    seen = []
    report = load_weights(
        model, source, device_of=lambda name: "cpu", on_tensor=lambda name, size: seen.append((name, size))
    )
    parameters = dict(model.named_parameters())
    assert parameters.keys() == dict(I2V.tensor_shapes()).keys() == {name for name, _ in seen}
    for name, parameter in parameters.items():
        assert isinstance(parameter, nn.Parameter)
        assert not parameter.requires_grad
        assert torch.equal(parameter, source.read(name, device="cpu", dtype=torch.bfloat16))
    assert report.num_tensors == len(parameters)
    assert report.num_bytes == sum(size for _, size in seen) == 2 * I2V.num_parameters()
    assert report.seconds > 0


def test_load_dtype_devices_and_grad():
    model = meta_model()
    load_weights(
        model,
        RandomWeights(SMALL),
        dtype=torch.float16,
        requires_grad=True,
        device_of=lambda name: "meta" if name.startswith("blocks.1.") else "cpu",
    )
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float16
        assert parameter.requires_grad
        assert parameter.is_meta == name.startswith("blocks.1.")


def test_load_a_part_of_each_tensor():
    model = meta_model(I2V)
    source = RandomWeights(I2V)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(parameter[: parameter.shape[0] // 2]))
    report = load_weights(
        model, source, device_of=lambda name: "cpu", part_of=lambda name, shape: Part(0, 0, shape[0] // 2)
    )
    for name, parameter in model.named_parameters():
        whole = source.read(name, device="cpu", dtype=torch.float32)
        assert torch.equal(parameter, whole[: len(whole) // 2]), name
    assert report.num_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert report.bytes_read == report.bytes_received == 0


def test_truncated_model_reads_its_own_names_only():
    model = meta_model()
    del model.blocks[2]
    assert load_weights(model, RandomWeights(SMALL), device_of=lambda name: "cpu").num_tensors == 27 * 2 + 15


def test_model_that_does_not_fit_is_refused_before_reading():
    model = meta_model(dataclasses.replace(SMALL, num_layers=4))
    with pytest.raises(CheckpointError, match=r"needs blocks\.3\.modulation"):
        load_weights(model, RandomWeights(SMALL), device_of=lambda name: "cpu")
    model = meta_model(dataclasses.replace(SMALL, ffn_dim=128))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.ffn\.0\.weight is \[128, 128\]"):
        load_weights(model, RandomWeights(SMALL), device_of=lambda name: "cpu")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_random_model_gives_values_of_order_one():
    deep = dataclasses.replace(SMALL, num_layers=12, text_len=64)
    model = meta_model(deep)
    load_weights(model, RandomWeights(deep), device_of=lambda name: "cpu")
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 16, 2, 8, 8, generator=generator)
    text = torch.randn(1, 20, deep.text_dim, generator=generator)
    with torch.no_grad():
        out = model(latent, torch.tensor([500.0]), text)
    assert out.isfinite().all()
    assert 0.3 < out.std() < 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_random_weights_and_a_written_checkpoint_are_the_same_model(tmp_path, dtype, layout):
    write_checkpoint(RandomWeights(SMALL, 4), tmp_path, dtype=dtype, layout=layout)
    for wanted in (torch.float32, torch.bfloat16):
        loaded = load_transformer(tmp_path, dtype=wanted)
        assert not loaded.training
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, read(name, 4, wanted)), name


def test_open_weights(tmp_path):
    assert [source.describe() for source in open_weights(None, SMALL, num_experts=2, seed=8)] == [
        {"source": "random", "seed": 8},
        {"source": "random", "seed": 9},
    ]
    write_model(SMALL, tmp_path, num_experts=2, seed=8)
    name = "blocks.2.ffn.0.bias"
    for random, opened in zip(
        open_weights(None, SMALL, num_experts=2, seed=8),
        open_weights(tmp_path, SMALL, num_experts=2),
        strict=True,
    ):
        values = [source.read(name, device="cpu", dtype=torch.float32) for source in (random, opened)]
        assert torch.equal(*values)
        assert opened.describe()["source"] == "checkpoint"
    with pytest.raises(CheckpointError, match="in_channels"):
        open_weights(tmp_path, I2V, num_experts=2)
