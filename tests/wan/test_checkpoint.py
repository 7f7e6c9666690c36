"""Every layout is recognised by its content and reads the same weights; every damage is one clear line."""

import dataclasses
import json
import struct
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from wanexp.errors import CheckpointError
from wanexp.sweep.fingerprint import checkpoint_identity
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.checkpoint import open_checkpoint, open_experts
from wanexp.wan.key_names import diffusers_to_native, native_to_diffusers
from wanexp.wan.part import Part
from wanexp.wan.weights import RandomWeights
from wanexp.wan.write_checkpoint import write_checkpoint, write_model

SMALL = WanArchitecture(
    dim=128, ffn_dim=96, num_heads=2, num_layers=3, text_dim=32, freq_dim=16, in_channels=4, out_channels=4
)
CLIP = dataclasses.replace(SMALL, clip_tokens=257, clip_dim=24, in_channels=36)
FLF = dataclasses.replace(CLIP, clip_tokens=514)
ARCHITECTURES = {"t2v": SMALL, "i2v": CLIP, "flf2v": FLF}


def state_dict(architecture: WanArchitecture = SMALL, dtype: torch.dtype = torch.bfloat16) -> dict:
    weights = RandomWeights(architecture, 0)
    return {name: weights.read(name, device="cpu", dtype=dtype) for name, _ in architecture.tensor_shapes()}


def save(tensors: dict, path: Path, num_heads: int | None = 2, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if num_heads:
        metadata["num_heads"] = str(num_heads)
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path


def check_error(path: Path, *pieces: str) -> None:
    """Opening fails with one line that has all the pieces."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for piece in pieces:
        assert piece in message, message


def raw_safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# Layouts


@pytest.mark.parametrize("variant", ARCHITECTURES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["native", "prefixed", "diffusers", "fp8", "fp8_scaled"])
def test_round_trip(tmp_path, layout, shards, variant):
    architecture = ARCHITECTURES[variant]
    source = RandomWeights(architecture, 5)
    write_checkpoint(source, tmp_path / "x", layout=layout, num_shards=shards, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path / "x")
    assert checkpoint.architecture == architecture
    assert checkpoint.storage == {"fp8": "fp8_e4m3fn", "fp8_scaled": "fp8_scaled"}.get(layout, "bf16")
    assert checkpoint.layout == {
        "prefixed": "native behind 'model.diffusion_model.'",
        "diffusers": "diffusers",
    }.get(layout, "native")
    assert len(checkpoint.files) == shards
    for name, shape in architecture.tensor_shapes():
        read = checkpoint.read(name, device="cpu", dtype=torch.float32)
        expected = source.read(name, device="cpu", dtype=torch.float32)
        assert read.shape == shape
        if layout.startswith("fp8") and name.startswith("blocks.") and len(shape) == 2:
            # e4m3: 3 bits behind the point, and steps of 2^-9 (times the scale) near 0
            step = 2**-9 * (expected.abs().max() / 448 if layout == "fp8_scaled" else 1)
            torch.testing.assert_close(read, expected, rtol=2**-4, atol=float(step) / 2 * 1.01)
        else:
            assert torch.equal(read, expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_read_gives_wanted_dtype_in_own_memory(tmp_path, dtype):
    path = save(state_dict(dtype=torch.bfloat16), tmp_path / "a.safetensors")
    tensor = open_checkpoint(path).read("blocks.1.ffn.0.weight", device="cpu", dtype=dtype)
    assert tensor.dtype == dtype
    assert tensor.data_ptr() % 64 == 0
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    tensor.zero_()  # must reach neither the file nor a second read
    again = open_checkpoint(path).read("blocks.1.ffn.0.weight", device="cpu", dtype=dtype)
    assert again.abs().max() > 0


# Parts


def parts_of(shape: tuple[int, ...]) -> list[Part]:
    """Some parts along every dimension: first, middle, last, all and none."""
    return [
        Part(dim, start, stop)
        for dim, size in enumerate(shape)
        for start, stop in (
            (0, size // 2),
            (size // 3, size - size // 3),
            (size - 1, size),
            (0, size),
            (size, size),
        )
    ]


@pytest.mark.parametrize("layout", ["native", "fp8_scaled", "random"])
def test_part_is_what_would_be_cut_from_the_whole(tmp_path, monkeypatch, layout):
    monkeypatch.setattr("wanexp.wan.weights._CHUNK", {"cpu": 1000})
    source = RandomWeights(FLF, 5)
    if layout != "random":
        write_checkpoint(source, tmp_path, layout=layout, num_shards=2)
        source = open_checkpoint(tmp_path)
    for name, shape in FLF.tensor_shapes():
        if name.startswith(("blocks.1.", "blocks.2.")):
            continue
        whole = source.read(name, device="cpu", dtype=torch.float32)
        for part in parts_of(shape):
            read = source.read(name, device="cpu", dtype=torch.float32, part=part)
            assert torch.equal(read, part.cut(whole)), (name, part)
            assert read.is_contiguous() and read.untyped_storage().nbytes() == read.nbytes
            if layout == "random" or part.is_empty:
                assert source.stored_bytes(name, part) == 0
    if layout != "random":
        assert sum(source.stored_bytes(name) for name, _ in FLF.tensor_shapes()) == source.num_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("staging", [100, 10_000, 64 * 2**20])
def test_part_read_to_a_gpu(tmp_path, monkeypatch, staging):
    monkeypatch.setattr("wanexp.wan.reading.PIECE_BYTES", staging)
    monkeypatch.setattr("wanexp.wan.safetensors_format.SHORT_ROW_BYTES", staging // 16)
    write_checkpoint(RandomWeights(SMALL, 5), tmp_path, layout="fp8_scaled")
    checkpoint = open_checkpoint(tmp_path)
    for name, shape in SMALL.tensor_shapes():
        for part in parts_of(shape):
            on_gpu = checkpoint.read(name, device="cuda", dtype=torch.bfloat16, part=part)
            assert torch.equal(
                on_gpu.cpu(), checkpoint.read(name, device="cpu", dtype=torch.bfloat16, part=part)
            )


def test_part_of_a_file_truncated_after_opening(tmp_path):
    path = save(state_dict(), tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for dim in (0, 1):
        with pytest.raises(CheckpointError, match="truncated"):
            for name, shape in SMALL.tensor_shapes():
                if len(shape) == 2:
                    checkpoint.read(name, device="cpu", dtype=torch.float32, part=Part(dim, 1, 5))
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.read("blocks.0.ffn.2.weight", device="cpu", dtype=torch.float32, part=Part(1, 1, 5))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model.", "diffusion_model."])
@pytest.mark.parametrize("diffusers", [False, True])
def test_every_prefix_whatever_the_file_is_called(tmp_path, prefix, diffusers):
    rename = native_to_diffusers if diffusers else str
    tensors = {prefix + rename(name): tensor for name, tensor in state_dict().items()}
    checkpoint = open_checkpoint(save(tensors, tmp_path / "vace_lora_fp8.bf16"))
    assert checkpoint.architecture == SMALL
    assert checkpoint.storage == "bf16"


def test_all_in_one_file_keeps_the_transformer_only(tmp_path):
    tensors = {"model.diffusion_model." + name: tensor for name, tensor in state_dict().items()}
    tensors |= {"vae.encoder.conv1.weight": torch.zeros(3), "text_encoders.umt5.a.weight": torch.zeros(3)}
    assert open_checkpoint(save(tensors, tmp_path / "a.safetensors")).architecture == SMALL


@pytest.mark.parametrize("fp8, word", [(torch.float8_e4m3fn, "fp8_e4m3fn"), (torch.float8_e5m2, "fp8_e5m2")])
def test_plain_fp8(tmp_path, fp8, word):
    tensors = {
        name: tensor.to(fp8) if tensor.dim() == 2 else tensor.float() for name, tensor in state_dict().items()
    }
    checkpoint = open_checkpoint(save(tensors, tmp_path / "a.safetensors"))
    assert checkpoint.storage == word
    name = "blocks.0.ffn.2.weight"
    assert torch.equal(checkpoint.read(name, device="cpu", dtype=torch.float32), tensors[name].float())


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_with_companions(tmp_path, suffix, shape, prefix):
    tensors = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    for name, tensor in state_dict().items():
        stem = prefix + name.removesuffix(".weight")
        if name.startswith("blocks.") and tensor.dim() == 2:
            tensors[stem + ".weight"] = (tensor.float() * 100).to(torch.float8_e4m3fn)
            tensors[f"{stem}.{suffix}"] = torch.full(shape, 0.01)
            tensors[f"{stem}.scale_input"] = torch.tensor(1.0)
            tensors[f"{stem}.comfy_quant"] = torch.zeros(5, dtype=torch.uint8)
        else:
            tensors[prefix + name] = tensor
    checkpoint = open_checkpoint(save(tensors, tmp_path / "a.safetensors"))
    assert checkpoint.storage == "fp8_scaled"
    name = "blocks.2.cross_attn.o.weight"
    expected = tensors[prefix + name].float() * torch.tensor(0.01)
    assert torch.equal(checkpoint.read(name, device="cpu", dtype=torch.float32), expected)
    assert torch.equal(checkpoint.read(name, device="cpu", dtype=torch.bfloat16), expected.to(torch.bfloat16))


def test_names_convert_back_and_forth():
    for name, _ in FLF.tensor_shapes():
        assert diffusers_to_native(native_to_diffusers(name)) == name
    assert native_to_diffusers("blocks.11.norm3.bias") == "blocks.11.norm2.bias"
    assert native_to_diffusers("head.modulation") == "scale_shift_table"
    assert native_to_diffusers("blocks.0.modulation") == "blocks.0.scale_shift_table"


# Heads


def test_heads_from_metadata_before_config(tmp_path):
    path = save(state_dict(), tmp_path / "a.safetensors", num_heads=4)
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    assert open_checkpoint(path).architecture.num_heads == 4


@pytest.mark.parametrize("key", ["num_heads", "num_attention_heads"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_heads_from_config(tmp_path, key, as_folder):
    path = save(state_dict(), tmp_path / "a.safetensors", num_heads=None)
    (tmp_path / "config.json").write_text(json.dumps({key: 2}))
    assert open_checkpoint(tmp_path if as_folder else path).architecture.num_heads == 2


def test_heads_from_dim(tmp_path):
    path = save(state_dict(), tmp_path / "a.safetensors", num_heads=None)
    (tmp_path / "config.json").write_text('{"d_model": 4096, "num_heads": 64}')  # a T5's
    assert open_checkpoint(path).architecture.num_heads == 1


@pytest.mark.parametrize(
    "config, piece",
    [
        ('{"num_heads": 3}', "3 heads"),
        ('{"num_heads": "2"}', "'2' heads"),
        ('{"num_attention_heads": 2, "attention_head_dim": 128}', "2 heads of 128"),
        ('{"num_attention_heads": 2, "attention_head_dim": {}}', "2 heads of {}"),
        ("{", "not valid JSON"),
    ],
)
def test_config_that_does_not_fit(tmp_path, config, piece):
    path = save(state_dict(), tmp_path / "a.safetensors", num_heads=None)
    (tmp_path / "config.json").write_text(config)
    check_error(path, "config.json", piece)


def test_a_head_dim_of_null_is_none(tmp_path):
    path = save(state_dict(), tmp_path / "a.safetensors", num_heads=None)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2, "attention_head_dim": null}')
    assert open_checkpoint(path).architecture.num_heads == 2


@pytest.mark.parametrize("text", ["", "0", "two", "-2", "1" * 5000])
def test_bad_heads_in_metadata(tmp_path, text):
    path = save(state_dict(), tmp_path / "a.safetensors", num_heads=None, num_heads_=text)
    blob = path.read_bytes().replace(b'"num_heads_"', b'"num_heads" ')
    path.write_bytes(blob)
    with pytest.raises(CheckpointError, match="heads"):
        open_checkpoint(path)


def test_heads_unknown(tmp_path):
    odd = dataclasses.replace(SMALL, dim=64)
    path = save(state_dict(odd), tmp_path / "a.safetensors", num_heads=None)
    check_error(path, "dim 64", "config.json")


# Folders


def test_pipeline_folder(tmp_path):
    write_checkpoint(RandomWeights(SMALL), tmp_path / "transformer", layout="diffusers")
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae").mkdir()
    assert open_checkpoint(tmp_path).architecture == SMALL


def test_published_folder_with_pickles_beside(tmp_path):
    write_checkpoint(RandomWeights(SMALL), tmp_path, num_shards=2)
    (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"x")
    assert open_checkpoint(tmp_path).architecture == SMALL


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_experts(tmp_path, layout):
    write_model(SMALL, tmp_path, num_experts=2, layout=layout, seed=3)
    high, low = open_experts(tmp_path, 2)
    assert high.files[0].parent.name in ("high_noise_model", "transformer")
    assert high.fingerprint != low.fingerprint  # same header, same size
    for expert, checkpoint in enumerate((high, low)):
        name = "blocks.0.ffn.0.weight"
        expected = RandomWeights(SMALL, 3 + expert).read(name, device="cpu", dtype=torch.float32)
        assert torch.equal(checkpoint.read(name, device="cpu", dtype=torch.float32), expected)
    check_error(tmp_path, "two experts")
    assert len(open_experts(high.files[0].parent, 1)) == 1


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("missing", [0, 1])
def test_expert_missing(tmp_path, layout, missing):
    write_model(SMALL, tmp_path, num_experts=2, layout=layout)
    names = (
        ("transformer", "transformer_2") if layout == "diffusers" else ("high_noise_model", "low_noise_model")
    )
    (tmp_path / names[missing]).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"no {names[missing]}/ beside"):
        open_experts(tmp_path, 2)


def test_experts_not_there_or_different(tmp_path):
    with pytest.raises(CheckpointError, match="two experts"):
        open_experts(tmp_path, 2)
    write_checkpoint(RandomWeights(SMALL), tmp_path / "transformer")
    write_checkpoint(RandomWeights(CLIP), tmp_path / "transformer_2")
    with pytest.raises(CheckpointError, match="in_channels"):
        open_experts(tmp_path, 2)


def test_folder_errors(tmp_path):
    check_error(tmp_path / "nowhere", "no checkpoint", "nowhere")
    check_error(tmp_path, "no safetensors file")
    (tmp_path / "model.pth").write_bytes(b"x")
    check_error(tmp_path, "model.pth", "pickle")
    for name in ("a", "b"):
        save(state_dict(), tmp_path / f"{name}.safetensors")
    check_error(tmp_path, "2 candidates", "a.safetensors, b.safetensors")


def test_a_path_that_the_system_refuses(tmp_path):
    for path in (tmp_path / ("x" * 300), tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=r"cannot read the checkpoint|no checkpoint at"):
            open_checkpoint(path)
        with pytest.raises(CheckpointError):
            open_experts(path, 2)
        assert checkpoint_identity(str(path)) == []


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt", "a.gguf"])
def test_other_formats_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04" * 10)
    check_error(tmp_path / name, name, "safetensors")


# Index files


def edit_index(folder: Path, edit) -> Path:
    path = next(folder.glob("*.index.json"))
    content = json.loads(path.read_text())
    edit(content["weight_map"])
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:x", "", ".."])
def test_index_cannot_leave_its_folder(tmp_path, name):
    write_checkpoint(RandomWeights(SMALL), tmp_path, num_shards=2)
    path = edit_index(tmp_path, lambda table: table.update({"head.head.bias": name}))
    check_error(path, "own folder")


def test_index_that_does_not_match(tmp_path):
    write_checkpoint(RandomWeights(SMALL), tmp_path, num_shards=2)
    first = sorted(tmp_path.glob("*.safetensors"))[0].name
    path = edit_index(tmp_path, lambda table: table.update({"head.head.bias": first}))
    check_error(path, "lack head.head.bias")
    path = edit_index(tmp_path, lambda table: table.update({"head.head.bias": "gone.safetensors"}))
    check_error(path, "gone.safetensors", "not there")
    path = edit_index(tmp_path, lambda table: table.update({"head.head.bias": "a.bin"}))
    check_error(path, "a.bin", "pickle")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"\\n": "a"}}',
        '{"weight_map": {"a": "x\\u001b[2Jy"}}',
        '{"weight_map": {"a": "x\\u0000"}}',
        "[" * 10**5,
    ],
)
def test_index_that_is_none(tmp_path, text):
    (tmp_path / "a.index.json").write_text(text)
    check_error(tmp_path, "a.index.json", "weight_map")


def test_same_tensor_in_two_shards(tmp_path):
    write_checkpoint(RandomWeights(SMALL), tmp_path, num_shards=2)
    for file in tmp_path.glob("*.safetensors"):
        save({**load_file(file), "head.head.bias": torch.zeros(16)}, file)
    check_error(tmp_path, "both hold head.head.bias")


def test_one_shard_alone(tmp_path):
    write_checkpoint(RandomWeights(SMALL), tmp_path, num_shards=3)
    check_error(sorted(tmp_path.glob("*.safetensors"))[2], "shard")


# Damage


def test_missing_unexpected_and_misshaped(tmp_path):
    tensors = state_dict()
    for index in range(3):
        del tensors[f"blocks.{index}.norm3.bias"]
    del tensors["patch_embedding.weight"]
    tensors["blocks.1.extra.weight"] = torch.zeros(3)
    path = save(tensors, tmp_path / "a.safetensors")
    check_error(
        path,
        "4 tensors are missing",
        "patch_embedding.weight",
        "1 more",
        "1 are unexpected",
        "blocks.1.extra",
    )

    tensors = state_dict() | {"blocks.1.ffn.0.bias": torch.zeros(95), "head.head.weight": torch.zeros(16)}
    path = save(tensors, tmp_path / "a.safetensors")
    check_error(path, "blocks.1.ffn.0.bias is [95], not [96]", "head.head.weight is [16], not [16, 128]")

    path = save(state_dict() | {"patch_embedding.weight": torch.zeros(128)}, tmp_path / "a.safetensors")
    check_error(path, "patch_embedding.weight has shape [128]")


def test_gap_in_layers(tmp_path):
    tensors = {name: tensor for name, tensor in state_dict().items() if not name.startswith("blocks.1.")}
    check_error(save(tensors, tmp_path / "a.safetensors"), "gap", "it lacks 1")
    tensors["blocks.999999.modulation"] = torch.zeros(1)
    check_error(save(tensors, tmp_path / "a.safetensors"), "gap")
    tensors = {name: tensor for name, tensor in state_dict().items() if not name.startswith("blocks.")}
    check_error(save(tensors, tmp_path / "a.safetensors"), "no blocks")


def test_truncated(tmp_path):
    path = save(state_dict(), tmp_path / "a.safetensors")
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:size])
        check_error(path, "a.safetensors", "truncated")
    for size in (8, 100):
        path.write_bytes(whole[:size])
        check_error(path, "a.safetensors", "safetensors file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer; run git lfs pull"),
        (b"", "is empty"),
        (b"12345", "has 5 bytes, too few for a header"),
    ],
)
def test_what_is_no_file_of_weights_is_named(tmp_path, content, words):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    check_error(path, "a.safetensors", words)


def test_truncated_after_opening(tmp_path):
    path = save(state_dict(), tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        for name, _ in SMALL.tensor_shapes():
            checkpoint.read(name, device="cpu", dtype=torch.float32)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.read("head.head.bias", device="cpu", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="no tensor nonsense"):
        checkpoint.read("nonsense", device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**31) + b"{}",
        struct.pack("<Q", 0),
        b"\x89PNG not a checkpoint at all",
        raw_safetensors(b"not json"),
        raw_safetensors(b"\xff\xfe\x00"),
        raw_safetensors([]),
        raw_safetensors(b"[" * 100_000),
        raw_safetensors(b'{"a": {}, "a": {}}'),
        raw_safetensors({"a": 3}),
        raw_safetensors({"a": {"dtype": "F32", "shape": [1]}}),
        raw_safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        raw_safetensors({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"),
        raw_safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        raw_safetensors({"a": {"dtype": "F32", "shape": [2**80], "data_offsets": [0, 2**82]}}, b"1234"),
        raw_safetensors({"a": {"dtype": "X", "shape": [1], "data_offsets": [4, 0]}}, b"1234"),
        raw_safetensors({"a": {"dtype": 5, "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        raw_safetensors({"a": {"dtype": "\x1b[2J", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        raw_safetensors({"a": {"dtype": "F32", "shape": [9] * 500_000, "data_offsets": [0, 4]}}, b"1234"),
        raw_safetensors({"__metadata__": 3}),
        raw_safetensors({"two\nlines": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        raw_safetensors({"x" * 301: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        raw_safetensors(
            {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in ("a", "b")}, b"1234"
        ),
    ],
)
def test_damaged_header(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    begin = time.process_time()
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert time.process_time() - begin < 2
    text = str(error.value)
    assert "a.safetensors" in text and text.isprintable() and len(text) < 1000


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory):
    path = save(state_dict(), tmp_path_factory.mktemp("fuzz") / "a.safetensors")
    return path, path.read_bytes()


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 11_000), change=st.binary(min_size=1, max_size=20))
def test_any_change_of_the_header_opens_or_is_one_clear_error(valid_file, place, change):
    path, content = valid_file
    path.write_bytes(content[:place] + change + content[place + len(change) :])
    try:
        checkpoint = open_checkpoint(path)
        for name, _ in checkpoint.architecture.tensor_shapes():
            checkpoint.read(name, device="cpu", dtype=torch.float32)
    except CheckpointError as error:
        assert "\n" not in str(error)


# Other models


@pytest.mark.parametrize(
    "name, word",
    [
        ("vace_blocks.0.self_attn.q.weight", "VACE"),
        ("vace_patch_embedding.weight", "VACE"),
        ("casual_audio_encoder.encoder.final_linear.weight", "S2V"),
        ("audio_injector.injector.0.q.weight", "S2V"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
        ("motion_encoder.enc.fc.0.weight", "Animate"),
        ("pose_patch_embedding.weight", "Animate"),
        ("control_adapter.conv.weight", "camera"),
        ("audio_proj.audio_proj_glob_1.layer.bias", "HuMo"),
        ("ref_conv.weight", "Fun-Control"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_variants_are_refused_by_name(tmp_path, name, word, prefix):
    tensors = {prefix + key: tensor for key, tensor in {**state_dict(), name: torch.zeros(2)}.items()}
    check_error(save(tensors, tmp_path / "a.safetensors"), word, name)


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "blocks.0.self_attn.q.lora_up.weight",
        "lora_unet_blocks_0_self_attn_q.lora_down.weight",
        "transformer.blocks.0.attn1.to_q.lora.up.weight",
        "blocks.0.vace_blocks.q.lora_B.weight",
    ],
)
def test_loras_are_refused(tmp_path, name):
    check_error(save({name: torch.zeros(2, 2)}, tmp_path / "a.safetensors"), "LoRA", name)


def test_another_model_is_refused(tmp_path):
    tensors = {f"encoder.block.{i}.weight": torch.zeros(2) for i in range(9)}
    check_error(
        save(tensors, tmp_path / "a.safetensors"), "not a Wan transformer", "encoder.block.0", "6 more"
    )
    check_error(save({}, tmp_path / "b.safetensors"), "holds no tensors", "Wan transformer")


def test_other_quantisation_is_refused(tmp_path):
    tensors = state_dict() | {"blocks.0.ffn.0.weight": torch.zeros(96, 128, dtype=torch.int8)}
    check_error(save(tensors, tmp_path / "a.safetensors"), "quantised", "blocks.0.ffn.0.weight (I8)")


def test_scales_must_be_one_per_tensor_and_complete(tmp_path):
    name = "blocks.0.ffn.0"
    fp8 = state_dict()[f"{name}.weight"].to(torch.float8_e4m3fn)
    tensors = {**state_dict(), f"{name}.weight": fp8, f"{name}.weight_scale": torch.ones(96)}
    check_error(save(tensors, tmp_path / "a.safetensors"), "one float scale per tensor", "weight_scale")
    tensors = {**state_dict(), f"{name}.weight": fp8, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    check_error(save(tensors, tmp_path / "a.safetensors"), f"no scale for {name}.weight")
    tensors = {**state_dict(), "blocks.0.foo.scale_weight": torch.ones(())}
    check_error(save(tensors, tmp_path / "a.safetensors"), "without a weight", "blocks.0.foo")


def test_expect(tmp_path):
    checkpoint = open_checkpoint(save(state_dict(), tmp_path / "a.safetensors"))
    checkpoint.expect(SMALL)
    checkpoint.expect(dataclasses.replace(SMALL, text_len=77, clip_dim=5))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.expect(dataclasses.replace(SMALL, num_layers=4, in_channels=36))
    message = str(caught.value)
    assert "num_layers is 3 (configured: 4)" in message
    assert "in_channels is 4 (configured: 36)" in message
    assert "ffn_dim" not in message


# Cost


def test_opening_reads_headers_only(tmp_path):
    """A 26 GB file (sparse: its data takes no room on disk) opens at once and without its data."""
    big = WanArchitecture(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    header, position = {}, 0
    for name, shape in big.tensor_shapes():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    path = tmp_path / "a.safetensors"
    blob = raw_safetensors(header)
    with path.open("wb") as stream:
        stream.write(blob)
        stream.truncate(len(blob) + position)
    before = psutil.Process().io_counters().read_chars
    checkpoint = open_checkpoint(path)
    assert psutil.Process().io_counters().read_chars - before < 2 * len(blob) + 2**20
    assert checkpoint.architecture == big
    assert checkpoint.num_bytes == position > 26e9
    assert checkpoint.fingerprint == open_checkpoint(path).fingerprint


def test_reading_holds_one_tensor(tmp_path):
    """Reading a checkpoint of 190 MB takes the memory of its largest tensor; no handle stays open."""
    wide = WanArchitecture(dim=1024, ffn_dim=4096, num_heads=8, num_layers=6, text_dim=32, freq_dim=16)
    write_checkpoint(RandomWeights(wide), tmp_path, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.num_bytes > 180e6
    process = psutil.Process()
    files = process.num_fds()
    start, peak = process.memory_full_info().uss, 0
    for name, _ in wide.tensor_shapes():
        tensor = checkpoint.read(name, device="cpu", dtype=torch.bfloat16)
        peak = max(peak, process.memory_full_info().uss)
        del tensor
    assert peak - start < 60e6
    assert process.num_fds() == files


def test_files_written_at_once_are_those_written_one_by_one(tmp_path, monkeypatch):
    written = []
    for folder, num_writers in (("one", 1), ("three", 3)):
        monkeypatch.setattr("wanexp.wan.write_checkpoint._num_writers", lambda _, num=num_writers: num)
        files = write_checkpoint(RandomWeights(SMALL), tmp_path / folder, layout="fp8_scaled", num_shards=4)
        written.append({file.name: file.read_bytes() for file in files})
    assert written[0] == written[1]
