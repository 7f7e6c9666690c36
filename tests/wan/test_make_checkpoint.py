"""What is written is read by the safetensors library, by diffusers and by us, and takes little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanexp.errors import CheckpointError, UserError
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.checkpoint import open_checkpoint, open_experts
from wanexp.wan.key_names import native_to_diffusers
from wanexp.wan.weights import RandomWeights
from wanexp.wan.write_checkpoint import write_checkpoint, write_model

SMALL = WanArchitecture(dim=128, ffn_dim=96, num_heads=2, num_layers=3, text_dim=32, freq_dim=16)
ARCHITECTURES = {
    "t2v": SMALL,
    "i2v": WanArchitecture(
        dim=128,
        ffn_dim=96,
        num_heads=2,
        num_layers=2,
        in_channels=36,
        text_dim=32,
        freq_dim=16,
        clip_tokens=257,
        clip_dim=24,
    ),
    "flf2v": WanArchitecture(
        dim=128,
        ffn_dim=96,
        num_heads=2,
        num_layers=2,
        in_channels=36,
        text_dim=32,
        freq_dim=16,
        clip_tokens=514,
        clip_dim=24,
    ),
}
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_checkpoint.py"


@pytest.fixture
def run_script(monkeypatch, capsys):
    """The exit code, what it printed and what it complained of, in this process."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import make_checkpoint

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["make_checkpoint.py", *arguments])
        return (make_checkpoint.main(), *capsys.readouterr())

    return call


@pytest.mark.parametrize("layout", ["native", "prefixed", "fp8", "fp8_scaled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_safetensors_library_reads_it(tmp_path, layout, dtype):
    source = RandomWeights(SMALL, 2)
    [path] = write_checkpoint(source, tmp_path / "a.safetensors", layout=layout, dtype=dtype)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "num_heads": "2"}
    held = load_file(path)
    ours = open_checkpoint(path)
    for name, _ in SMALL.tensor_shapes():
        tensor = held.pop("model.diffusion_model." + name if layout == "prefixed" else name)
        scale = held.pop(name.removesuffix("weight") + "scale_weight", None)
        is_fp8 = layout.startswith("fp8") and name.startswith("blocks.") and tensor.dim() == 2
        assert tensor.dtype == (torch.float8_e4m3fn if is_fp8 else dtype)
        assert (scale is not None) == (is_fp8 and layout == "fp8_scaled")
        values = tensor.float() * (1 if scale is None else scale)
        assert torch.equal(ours.read(name, device="cpu", dtype=torch.float32), values)
    assert list(held) == (["scaled_fp8"] if layout == "fp8_scaled" else [])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_diffusers_loads_it(tmp_path, variant, shards, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    # Whole modules kept in fp32 need the package accelerate; in an fp32 model they make no difference.
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keep_in_fp32_modules", None)
    architecture = ARCHITECTURES[variant]
    source = RandomWeights(architecture, 2)
    write_checkpoint(source, tmp_path, layout="diffusers", num_shards=shards, dtype=torch.float32)
    model, info = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = model.state_dict()
    assert len(state) == len(list(architecture.tensor_shapes()))
    for name, _ in architecture.tensor_shapes():
        assert torch.equal(
            state[native_to_diffusers(name)], source.read(name, device="cpu", dtype=torch.float32)
        )


def test_diffusers_writes_what_we_read(tmp_path):
    """The other way round: a checkpoint that diffusers itself saved."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        text_dim=32,
        freq_dim=16,
        ffn_dim=96,
        num_layers=3,
    )
    model.save_pretrained(tmp_path / "transformer", max_shard_size="500KB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.architecture == SMALL
    assert len(checkpoint.files) > 1
    state = model.state_dict()
    for name, _ in SMALL.tensor_shapes():
        assert torch.equal(
            checkpoint.read(name, device="cpu", dtype=torch.float32), state[native_to_diffusers(name)]
        )


@pytest.mark.parametrize("shards", [2, 7, 96])
def test_shards_are_even_and_indexed(tmp_path, shards):
    files = write_checkpoint(RandomWeights(SMALL), tmp_path / "wan.safetensors", num_shards=shards)
    assert len(files) == shards + 1
    index = json.loads(files[-1].read_text())
    assert files[-1].name == "wan.safetensors.index.json"
    assert set(index["weight_map"].values()) == {file.name for file in files[:-1]}
    assert index["metadata"]["total_size"] == 2 * SMALL.num_parameters()
    largest_tensor = 2 * 6 * 128 * 128
    if shards < 10:
        assert max(f.stat().st_size for f in files[:-1]) < (
            2 * SMALL.num_parameters() / shards + largest_tensor + 2e4
        )
    assert open_checkpoint(files[-1]).architecture == SMALL


def test_what_cannot_be_written(tmp_path):
    source = RandomWeights(SMALL)
    with pytest.raises(UserError, match="unknown layout 'gguf'; choose one of native"):
        write_checkpoint(source, tmp_path, layout="gguf")
    with pytest.raises(UserError, match="folder"):
        write_checkpoint(source, tmp_path / "a.safetensors", layout="diffusers")
    with pytest.raises(UserError, match="1 to 96 shards, not 97"):
        write_checkpoint(source, tmp_path, num_shards=97)
    with pytest.raises(UserError, match="folder"):
        write_model(SMALL, tmp_path / "a.safetensors", num_experts=2)
    assert not list(tmp_path.iterdir())


def test_nothing_half_written_stays(tmp_path):
    class Broken(RandomWeights):
        def read(self, name, **options):
            if name == "blocks.1.modulation":
                raise KeyboardInterrupt
            return super().read(name, **options)

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(Broken(SMALL), tmp_path)
    assert not list(tmp_path.iterdir())


def test_script(tmp_path):
    arguments = ("--model", "tiny", "--out", str(tmp_path / "tiny"), "--shards", "2", "--dtype", "fp16")
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert "MiB" in done.stdout
    assert open_checkpoint(tmp_path / "tiny").storage == "fp16"


def test_script_errors(tmp_path, run_script):
    code, _, line = run_script("--model", "nonsense", "--out", str(tmp_path / "x"))
    assert code == 2
    assert line.startswith("error: unknown model 'nonsense'; choose one of tiny, wan2.1")
    out = tmp_path / "x.safetensors"
    code, _, line = run_script("--model", "tiny", "--out", str(out), "--layout", "diffusers")
    assert code == 2 and line.startswith("error: ") and line.count("\n") == 1
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "x.safetensors"
    code, _, line = run_script("--model", "tiny", "--out", str(out))
    assert code == 2
    assert line.startswith(f"error: cannot write {out}: ") and line.count("\n") == 1


@pytest.mark.parametrize(
    ("device", "count", "line"),
    [
        ("foo", 0, "--device is 'foo'; write cpu or cuda:0"),
        ("meta", 0, "--device is 'meta'; write cpu or cuda:0"),
        ("cuda:0", 0, "--device is 'cuda:0' and torch finds 0 CUDA devices; write cpu"),
        ("cuda", 0, "--device is 'cuda' and torch finds 0 CUDA devices; write cpu"),
        ("cuda:2", 2, "--device is 'cuda:2' and torch finds 2 CUDA devices; write cpu or cuda:0 or cuda:1"),
    ],
)
def test_a_device_that_is_not_there(tmp_path, monkeypatch, run_script, device, count, line):
    import make_checkpoint  # found by `run_script`

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    arguments = ["--model", "tiny", "--out", str(tmp_path / "x"), "--device", device]
    assert run_script(*arguments) == (2, "", f"error: {line}\n")
    for good in ("cpu", *(f"cuda:{index}" for index in range(count))):
        make_checkpoint.check_device(good)


def test_a_file_without_tensors_is_no_checkpoint(tmp_path):
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors holds no tensors; give the safetensors of a Wan"
    ):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("layout", ["fp8_scaled", "diffusers"])
def test_experts(tmp_path, layout):
    files = write_model(SMALL, tmp_path, num_experts=2, layout=layout, num_shards=2)
    assert len({file.parent for file in files}) == 2
    assert [checkpoint.architecture for checkpoint in open_experts(tmp_path, 2)] == [SMALL, SMALL]


def test_writing_holds_one_tensor(tmp_path):
    """260 MB in one file need the memory of one tensor (17 MB and its making), not of the file."""
    code = f"""
from pathlib import Path
import psutil
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.weights import RandomWeights
from wanexp.wan.write_checkpoint import write_checkpoint
used = []
class Watched(RandomWeights):
    def read(self, name, **options):
        used.append(psutil.Process().memory_full_info().uss)
        return super().read(name, **options)
wide = WanArchitecture(dim=1024, ffn_dim=8192, num_heads=8, num_layers=5, text_dim=32, freq_dim=16)
write_checkpoint(Watched(wide), Path({str(tmp_path)!r}))
print(max(used) - used[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 250e6
    assert float(done.stdout) < 120e6
