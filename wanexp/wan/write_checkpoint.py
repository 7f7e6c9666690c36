"""Writes random checkpoints in every layout that `open_checkpoint` reads.

Files are written tensor by tensor: the host holds one tensor of each file being written, whatever the size of the file.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wanexp.errors import UserError
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.checkpoint_files import EXPERT_FOLDERS
from wanexp.wan.key_names import SCALED_FP8_MARKER, native_to_diffusers
from wanexp.wan.safetensors_format import DTYPE_NAMES, encode_header, tensor_bytes
from wanexp.wan.weights import RandomWeights, WeightSource, expert_seed

LAYOUTS = ("native", "prefixed", "diffusers", "fp8", "fp8_scaled")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PREFIX = "model.diffusion_model."
_FP8 = torch.float8_e4m3fn
_DEFAULT_STEM = "diffusion_pytorch_model"  # what both the Wan and the diffusers repositories call it


@dataclass(frozen=True)
class _Entry:
    """One tensor of the model: its native name, its name in the file, its shape and the dtype it is stored
    in.
    """

    native_name: str
    stored_name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_model(
    architecture: WanArchitecture,
    out: str | Path,
    *,
    num_experts: int = 1,
    layout: str = "native",
    num_shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Path]:
    """Writes random weights of every expert; returns the files. Two experts go into two folders under `out`.

    Values are those of RandomWeights with `expert_seed(seed, expert)`. Raises UserError for what cannot be
    written.
    """
    out = Path(out)
    if num_experts == 1:
        return write_checkpoint(
            RandomWeights(architecture, seed),
            out,
            layout=layout,
            num_shards=num_shards,
            dtype=dtype,
            device=device,
        )
    if out.suffix == ".safetensors":
        raise UserError(f"a model of {num_experts} experts needs a folder, not {out}")
    files = []
    for expert, folder in enumerate(EXPERT_FOLDERS[1 if layout == "diffusers" else 0]):
        source = RandomWeights(architecture, expert_seed(seed, expert))
        (out / folder).mkdir(parents=True, exist_ok=True)
        files += write_checkpoint(
            source, out / folder, layout=layout, num_shards=num_shards, dtype=dtype, device=device
        )
    return files


def write_checkpoint(
    source: WeightSource,
    out: Path,
    *,
    layout: str = "native",
    num_shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> list[Path]:
    """Writes one transformer; returns its files. `out` is a `.safetensors` file or a folder.

    `num_shards` > 1 adds an index json; the diffusers layout (a folder) a config.json. `dtype` is that of
    every tensor but the fp8 ones: the matrices of the blocks in the two fp8 layouts. `device` generates the
    values.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if layout == "diffusers" and out.suffix == ".safetensors":
        raise UserError(
            f"the diffusers layout is a folder with a config.json; give a folder instead of {out}"
        )
    entries = list(_entries(source.architecture, layout, dtype))
    if not 1 <= num_shards <= len(entries):
        raise UserError(
            f"the model's {len(entries)} tensors can make 1 to {len(entries)} shards, not {num_shards}"
        )

    if out.suffix == ".safetensors":
        folder, stem = out.parent, out.stem
    else:
        folder, stem = out, _DEFAULT_STEM
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split_evenly(entries, num_shards)
    names = [f"{stem}.safetensors"]
    if num_shards > 1:
        names = [f"{stem}-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]
    metadata = {"format": "pt", "num_heads": str(source.architecture.num_heads)}

    def write(index: int) -> list[str]:
        is_scaled = layout == "fp8_scaled"
        has_marker = is_scaled and index == 0
        return _write_file(
            folder / names[index],
            shards[index],
            source,
            metadata,
            torch.device(device),
            is_scaled,
            has_marker,
        )

    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(min(num_shards, _num_writers(torch.device(device)))) as pool:
        for name, stored in zip(names, pool.map(write, range(num_shards)), strict=True):
            weight_map |= dict.fromkeys(stored, name)
    files = [folder / name for name in names]
    if num_shards > 1:
        index_file = folder / f"{stem}.safetensors.index.json"
        total = sum(entry.num_bytes for entry in entries)
        _write_json(index_file, {"metadata": {"total_size": total}, "weight_map": weight_map})
        files.append(index_file)
    if layout == "diffusers":
        _write_json(folder / "config.json", diffusers_config(source.architecture))
        files.append(folder / "config.json")
    return files


def _num_writers(device: torch.device) -> int:
    """Files written at once. A GPU makes values faster than one thread writes them; a CPU's cores are busy with it."""
    return 8 if device.type == "cuda" else 1


def diffusers_config(architecture: WanArchitecture) -> dict[str, Any]:
    """The config.json from which diffusers builds the same transformer (WanTransformer3DModel)."""
    has_clip = architecture.clip_tokens > 0
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": architecture.num_heads,
        "attention_head_dim": architecture.head_dim,
        "in_channels": architecture.in_channels,
        "out_channels": architecture.out_channels,
        "text_dim": architecture.text_dim,
        "freq_dim": architecture.freq_dim,
        "ffn_dim": architecture.ffn_dim,
        "num_layers": architecture.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-06,
        "image_dim": architecture.clip_dim if has_clip else None,
        "added_kv_proj_dim": architecture.dim if has_clip else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": 514 if architecture.clip_tokens == 514 else None,
    }


def _entries(architecture: WanArchitecture, layout: str, dtype: torch.dtype) -> Iterator[_Entry]:
    for name, shape in architecture.tensor_shapes():
        stored_name = name
        if layout == "diffusers":
            stored_name = native_to_diffusers(name)
        elif layout == "prefixed":
            stored_name = _PREFIX + name
        is_fp8 = layout.startswith("fp8") and name.startswith("blocks.") and len(shape) == 2
        yield _Entry(name, stored_name, shape, _FP8 if is_fp8 else dtype)


def _split_evenly(entries: list[_Entry], num_shards: int) -> list[list[_Entry]]:
    """Cuts the entries, in their order, into non-empty shards of about the same number of bytes."""
    total = sum(entry.num_bytes for entry in entries)
    shards: list[list[_Entry]] = [[]]
    done = 0
    for position, entry in enumerate(entries):
        is_full = done >= total * len(shards) / num_shards
        is_last_chance = len(entries) - position <= num_shards - len(shards)
        if shards[-1] and len(shards) < num_shards and (is_full or is_last_chance):
            shards.append([])
        shards[-1].append(entry)
        done += entry.num_bytes
    return shards


def _write_file(
    path: Path,
    entries: list[_Entry],
    source: WeightSource,
    metadata: dict[str, str],
    device: torch.device,
    is_scaled: bool,
    has_marker: bool,
) -> list[str]:
    """Writes one safetensors file tensor by tensor; returns the names in it."""
    stored = [(entry.stored_name, DTYPE_NAMES[entry.dtype], entry.shape) for entry in entries]
    if is_scaled:
        stored += [(_scale_name(entry), "F32", ()) for entry in entries if entry.dtype == _FP8]
    if has_marker:
        stored.append((SCALED_FP8_MARKER, DTYPE_NAMES[_FP8], (2,)))
    header, offsets = encode_header(stored, metadata)
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("wb") as stream:
            stream.write(header)

            def write(name: str, tensor: torch.Tensor) -> None:
                tensor = tensor.cpu().contiguous()
                stream.seek(offsets[name])
                stream.write(tensor_bytes(tensor))

            for entry in entries:
                if is_scaled and entry.dtype == _FP8:
                    values, scale = _scale(source.read(entry.native_name, device=device, dtype=torch.float32))
                    write(_scale_name(entry), scale)
                    write(entry.stored_name, values)
                else:
                    write(entry.stored_name, source.read(entry.native_name, device=device, dtype=entry.dtype))
            if has_marker:
                write(SCALED_FP8_MARKER, torch.zeros(2).to(_FP8))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return [name for name, _, _ in stored]


def _scale(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp8 values, fp32 scale) with values * scale = weight: the largest value becomes the largest fp8
    number.
    """
    scale = weight.abs().max() / torch.finfo(_FP8).max
    # The quotient may round to a hair above the largest fp8 number, and the cast would make it NaN.
    limit = torch.finfo(_FP8).max
    return weight.div_(scale).clamp_(-limit, limit).to(_FP8), scale


def _scale_name(entry: _Entry) -> str:
    return entry.stored_name.removesuffix(".weight") + ".scale_weight"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
