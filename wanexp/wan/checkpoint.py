"""Checkpoints of Wan transformers: recognise what is in them, check it, read single tensors.

Opening reads headers only, so a 26 GB file opens in milliseconds on a machine that could never hold it. What
a file is is told from its tensors' names and shapes, never from its own name.
"""

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from wanexp.errors import CheckpointError, UserError
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.checkpoint_files import EXPERT_FOLDERS, find_files, some
from wanexp.wan.key_names import Naming, is_marker, recognise, scaled_weight_of, unsupported_kind
from wanexp.wan.reading import Reader, Wanted, read_tensor
from wanexp.wan.safetensors_format import (
    TORCH_DTYPES,
    Header,
    Part,
    StoredTensor,
    part_bytes,
    read_header,
)

_STORAGE_WORDS = {
    "F64": "fp64",
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "F8_E4M3": "fp8_e4m3fn",
    "F8_E5M2": "fp8_e5m2",
}
_SAMPLE_BYTES, _NUM_SAMPLES = 4096, 8

Announced = tuple[str, torch.device | str, Part | None]
"""(native name, device, part) of a tensor that will be read; the part None: all of it."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One Wan transformer on disk. Names are native ones, whatever the file calls them.

    `layout` is "native" or "diffusers", with the prefix if there is one; `storage` is the dtype most bytes
    have ("bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2") or "fp8_scaled"; `num_bytes` is what the
    transformer's tensors take on disk.
    """

    architecture: WanArchitecture
    layout: str
    storage: str
    files: tuple[Path, ...]
    num_bytes: int
    tensors: Mapping[str, StoredTensor]
    scales: Mapping[str, StoredTensor]
    headers: tuple[Header, ...]
    reader: Reader | None = None  # of the copies that `reading_ahead` gives out

    @contextmanager
    def reading_ahead(self, wanted: Iterable[Announced]) -> Iterator["Checkpoint"]:
        """This checkpoint with the `wanted` tensors on their way; they must be read in this order, and no others."""
        with Reader(
            Wanted(self.tensors[name], torch.device(device), part) for name, device, part in wanted
        ) as reader:
            yield dataclasses.replace(self, reader=reader)

    def read(
        self, name: str, *, device: torch.device | str, dtype: torch.dtype, part: Part | None = None
    ) -> torch.Tensor:
        """The tensor of native `name`, dequantised, converted to `dtype` on `device`, in memory of its own.

        With `part` that part of it, and only its bytes are read. As float8_e4m3fn a tensor with an `fp8_scale` comes as
        it is stored, not multiplied. Raises CheckpointError for an unknown name or a
        file that has changed since it was opened.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{_place(self.files)} has no tensor {name}")
        device = torch.device(device)
        tensor = read_tensor(self.tensors[name], device, part, self.reader)
        if name in self.scales and not (dtype == torch.float8_e4m3fn == tensor.dtype):
            # From the host a number goes with the kernel that uses it.
            scale = read_tensor(self.scales[name], torch.device("cpu")).to(torch.float32).reshape(())
            tensor = tensor.to(torch.float32).mul_(scale)
        return tensor.to(dtype)

    def fp8_scale(self, name: str) -> float | None:
        """The scale of a tensor that is stored as float8_e4m3fn, 1 where the file has none; None for all others."""
        if self.tensors[name].dtype != "F8_E4M3":
            return None
        return float(read_tensor(self.scales[name], torch.device("cpu"))) if name in self.scales else 1.0

    def stored_bytes(self, name: str, part: Part | None = None) -> int:
        """Bytes that `read` of the same arguments takes from the files; a scale counts with every part."""
        scale = self.scales[name].num_bytes if name in self.scales else 0
        num_bytes = part_bytes(self.tensors[name], part)
        return num_bytes + scale if num_bytes else 0

    def expect(self, architecture: WanArchitecture) -> None:
        """Raises CheckpointError, naming the fields that differ, if this is another architecture.

        `text_len` is not compared (no tensor tells it), nor `clip_dim` without image tokens.
        """
        skipped = {"text_len"} if architecture.clip_tokens else {"text_len", "clip_dim"}
        differences = [
            f"{field.name} is {found} (configured: {wanted})"
            for field in dataclasses.fields(architecture)
            if field.name not in skipped
            and (found := getattr(self.architecture, field.name))
            != (wanted := getattr(architecture, field.name))
        ]
        if differences:
            raise CheckpointError(
                f"{_place(self.files)} is another model than the configured one: {'; '.join(differences)}"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Cheap identity of the content: SHA-256 over the headers, the file sizes and samples of the data.

        Headers and sizes alone would not do: the two experts of Wan 2.2, or a model and its fine-tune, share
        them.
        """
        digest = hashlib.sha256()
        for file, header in zip(self.files, self.headers, strict=True):
            digest.update(header.raw)
            digest.update(str(header.file_bytes).encode())
            data_start = 8 + len(header.raw)
            try:
                with file.open("rb") as stream:
                    for index in range(_NUM_SAMPLES):
                        stream.seek(data_start + (header.file_bytes - data_start) * index // _NUM_SAMPLES)
                        digest.update(stream.read(_SAMPLE_BYTES))
            except OSError as error:
                raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the record keeps of where the weights came from."""
        return {
            "source": "checkpoint",
            "files": [str(file) for file in self.files],
            "layout": self.layout,
            "storage": self.storage,
            "num_bytes": self.num_bytes,
            "fingerprint": self.fingerprint,
        }


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a safetensors file, a sharded `*.index.json`, or a folder that holds one of them.

    A folder is the transformer's own, or that of a diffusers pipeline with `transformer/` inside. Only
    headers are read. Raises CheckpointError (one line) for anything missing, damaged, ambiguous or not
    supported.
    """
    path = Path(path).expanduser()
    try:
        files, index = find_files(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    place = _place(files)
    headers = tuple(read_header(file) for file in files)
    stored = _merge(files, headers)
    if not stored:
        raise CheckpointError(f"{place} holds no tensors; give the safetensors of a Wan transformer")
    if index:
        _check_index(files, headers, index, place)

    if refused := unsupported_kind(stored):
        kind, name = refused
        raise CheckpointError(
            f"{place} is {kind} (it has {name}); only plain Wan 2.1 and 2.2 transformers are supported"
        )
    naming = recognise(stored)
    if naming is None:
        raise CheckpointError(f"{place} is not a Wan transformer; it has {some(stored)}")
    tensors, scales = _to_native(stored, naming, place)
    num_heads = _heads_from_metadata(files, headers)
    architecture = _architecture(tensors, num_heads, files, place)
    is_scaled = bool(scales) or any(is_marker(name, naming.prefix) for name in stored)
    if is_scaled:
        _check_scales(tensors, scales, place)
    return Checkpoint(
        architecture=architecture,
        layout=str(naming),
        storage="fp8_scaled" if is_scaled else _storage(tensors),
        files=tuple(files),
        num_bytes=sum(tensor.num_bytes for tensor in [*tensors.values(), *scales.values()]),
        tensors=tensors,
        scales=scales,
        headers=headers,
    )


def open_experts(path: str | Path, num_experts: int) -> list[Checkpoint]:
    """Opens every transformer of a model; with two (Wan 2.2 A14B) the high-noise one comes first.

    Two experts: a folder with `high_noise_model/` and `low_noise_model/`, or `transformer/` and
    `transformer_2/`. Raises CheckpointError if one is missing, or if the two differ in architecture.
    """
    if num_experts == 1:
        return [open_checkpoint(path)]
    assert num_experts == 2
    path = Path(path).expanduser()
    for pair in EXPERT_FOLDERS:
        try:
            present = [(path / name).is_dir() for name in pair]
        except OSError as error:
            raise _unreadable(path, error) from None
        if not any(present):
            continue
        if not all(present):
            raise CheckpointError(
                f"{path} has no {pair[present.index(False)]}/ beside {pair[present.index(True)]}/"
            )
        high, low = (open_checkpoint(path / name) for name in pair)
        low.expect(high.architecture)
        return [high, low]
    raise CheckpointError(
        f"{path} does not hold two experts; give a folder with high_noise_model/ and low_noise_model/, "
        "or transformer/ and transformer_2/"
    )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}")


# Recognising and checking what is in them


def _merge(files: list[Path], headers: tuple[Header, ...]) -> dict[str, StoredTensor]:
    merged: dict[str, StoredTensor] = {}
    for file, header in zip(files, headers, strict=True):
        doubles = merged.keys() & header.tensors.keys()
        if doubles:
            raise CheckpointError(f"{file} and another shard both hold {some(sorted(doubles))}")
        merged |= header.tensors
    return merged


def _check_index(files: list[Path], headers: tuple[Header, ...], index: dict[str, Path], place: str) -> None:
    held = {file: header.tensors for file, header in zip(files, headers, strict=True)}
    absent = [name for name, file in index.items() if name not in held[file]]
    if absent:
        raise CheckpointError(f"{place}: the shards lack {some(absent)}, which the index places there")


def _to_native(
    stored: Mapping[str, StoredTensor], naming: Naming, place: str
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Weights and scales, both under the native name of the weight."""
    tensors: dict[str, StoredTensor] = {}
    scales: dict[str, StoredTensor] = {}
    for stored_name, tensor in stored.items():
        if naming.is_ignored(stored_name):
            continue
        name = naming.to_native(stored_name)
        weight = scaled_weight_of(name)
        table, key = (tensors, name) if weight is None else (scales, weight)
        if key in table:
            raise CheckpointError(f"{place} holds {key} twice, as {table[key].name} and {stored_name}")
        table[key] = tensor
    strange = [
        f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in TORCH_DTYPES
    ]
    if strange:
        raise CheckpointError(
            f"{place} is quantised in a way that is not supported: {some(strange)}; "
            "use a bf16, fp16, fp32 or fp8 file"
        )
    return tensors, scales


def _architecture(
    tensors: Mapping[str, StoredTensor], num_heads: int | None, files: list[Path], place: str
) -> WanArchitecture:
    """The architecture that the shapes tell, after checking that they tell it without a contradiction."""
    num_layers = _count_layers(tensors, place)
    has_clip = any(name.startswith("img_emb.") or "_img." in name for name in tensors)
    clip_tokens = (514 if "img_emb.emb_pos" in tensors else 257) if has_clip else 0
    # The names depend on no size but these two.
    names = WanArchitecture(num_layers=num_layers, clip_tokens=clip_tokens).tensor_shapes()
    _check_names(tensors, [name for name, _ in names], place)

    def size(name: str, axis: int, ndim: int) -> int:
        shape = tensors[name].shape
        if len(shape) != ndim or not shape[axis]:
            raise CheckpointError(f"{place}: {name} has shape {list(shape)}; expected {ndim} dimensions")
        return shape[axis]

    dim = size("patch_embedding.weight", 0, 5)
    num_heads = num_heads or _heads_from_config(files[0].parent / "config.json", dim)
    if num_heads is None and dim % 128:
        raise CheckpointError(
            f"{place}: dim {dim} is no multiple of 128, so the number of heads is unknown; "
            'put a config.json with "num_heads" beside it'
        )
    try:
        architecture = WanArchitecture(
            dim=dim,
            ffn_dim=size("blocks.0.ffn.0.bias", 0, 1),
            num_heads=num_heads or dim // 128,
            num_layers=num_layers,
            in_channels=size("patch_embedding.weight", 1, 5),
            out_channels=size("head.head.bias", 0, 1) // 4,  # a patch is 1 x 2 x 2
            text_dim=size("text_embedding.0.weight", 1, 2),
            freq_dim=size("time_embedding.0.weight", 1, 2),
            clip_tokens=clip_tokens,
            clip_dim=size("img_emb.proj.0.weight", 0, 1) if has_clip else WanArchitecture.clip_dim,
        )
    except CheckpointError:
        raise
    except UserError as error:
        raise CheckpointError(f"{place}: {error}") from error
    wrong = [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in architecture.tensor_shapes()
        if tensors[name].shape != shape
    ]
    if wrong:
        raise CheckpointError(f"{place} has tensors of a wrong shape: {some(wrong)}")
    return architecture


def _count_layers(tensors: Mapping[str, StoredTensor], place: str) -> int:
    present = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.([0-9]{1,6})\.", name))}
    if not present:
        raise CheckpointError(f"{place} has no blocks (tensors blocks.0.*)")
    num_layers = max(present) + 1
    if len(present) < num_layers:
        gaps = [str(index) for index in range(num_layers) if index not in present]
        raise CheckpointError(
            f"{place} has a gap: of blocks 0 to {num_layers - 1} it lacks {some(gaps)}; is a shard missing?"
        )
    return num_layers


def _check_names(tensors: Mapping[str, StoredTensor], expected: list[str], place: str) -> None:
    missing = [name for name in expected if name not in tensors]
    unexpected = sorted(tensors.keys() - set(expected))
    complaints = []
    if missing:
        complaints.append(f"{len(missing)} tensors are missing ({some(missing)})")
    if unexpected:
        complaints.append(f"{len(unexpected)} are unexpected ({some([tensors[n].name for n in unexpected])})")
    if complaints:
        raise CheckpointError(f"{place} is not a complete, plain Wan transformer: {' and '.join(complaints)}")


def _heads_from_metadata(files: list[Path], headers: tuple[Header, ...]) -> int | None:
    for file, header in zip(files, headers, strict=True):
        text = header.metadata.get("num_heads")
        if text is not None:
            if not re.fullmatch(r"[1-9][0-9]{0,4}", str(text)):
                raise CheckpointError(
                    f"{file}: num_heads in its metadata is {str(text)[:20]!r}, not a number"
                )
            return int(text)
    return None


def _heads_from_config(path: Path, dim: int) -> int | None:
    """Heads that a config.json tells; None without one, or if it is another model's (a text encoder's)."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON") from error
    if not isinstance(config, dict) or not str(config.get("_class_name", "Wan")).startswith("Wan"):
        return None
    num_heads = config.get("num_attention_heads", config.get("num_heads"))
    if num_heads is None or "d_model" in config:  # d_model: a T5's
        return None
    if type(num_heads) is not int or num_heads < 1 or dim % num_heads:
        raise CheckpointError(
            f"{path} says {num_heads!r} heads, which does not fit the checkpoint's dim {dim}"
        )
    head_dim = config.get("attention_head_dim")
    if head_dim not in (None, dim // num_heads):
        raise CheckpointError(
            f"{path} says {num_heads} heads of {head_dim!r}, but the checkpoint's dim is {dim}"
        )
    return num_heads


def _check_scales(
    tensors: Mapping[str, StoredTensor], scales: Mapping[str, StoredTensor], place: str
) -> None:
    strange = sorted(scales.keys() - tensors.keys())
    if strange:
        raise CheckpointError(
            f"{place} has scales without a weight: {some([scales[n].name for n in strange])}"
        )
    wrong = [
        f"{scale.name} is {scale.dtype} {list(scale.shape)}"
        for scale in scales.values()
        if scale.dtype not in TORCH_DTYPES or any(size != 1 for size in scale.shape)
    ]
    if wrong:
        raise CheckpointError(f"{place} must have one float scale per tensor, but {some(wrong)}")
    # An fp8 matrix without its scale would be read far too large or too small without a sign of it.
    bare = [
        n for n, t in tensors.items() if t.dtype.startswith("F8_") and len(t.shape) == 2 and n not in scales
    ]
    if bare:
        raise CheckpointError(f"{place} is scaled fp8 but has no scale for {some(bare)}")


def _storage(tensors: Mapping[str, StoredTensor]) -> str:
    num_bytes: Counter[str] = Counter()
    for tensor in tensors.values():
        num_bytes[tensor.dtype] += tensor.num_bytes
    return _STORAGE_WORDS[num_bytes.most_common(1)[0][0]]


def _place(files: Iterable[Path]) -> str:
    files = list(files)
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} shards)"
