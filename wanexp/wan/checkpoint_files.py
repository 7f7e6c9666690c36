"""From what a person writes (a file, an index, a folder) to the safetensors files of one transformer."""

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from wanexp.errors import CheckpointError
from wanexp.wan.safetensors_format import MAX_HEADER_BYTES

EXPERT_FOLDERS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def find_files(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The safetensors files of the checkpoint, and its index's tensor -> file table ({} without one)."""
    if path.is_dir():
        path = _choose_in_folder(path)
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}; give a safetensors file, an index json or a folder")
    if path.suffix == ".json":
        index = _read_index(path)
        files = sorted(set(index.values()))
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{path} names shards that are not there: {some(missing)}")
        return files, index
    _refuse_pickle(path)
    return [path], {}


def _choose_in_folder(folder: Path) -> Path:
    indices = sorted(p for p in folder.glob("*.index.json") if not p.name.endswith(".bin.index.json"))
    candidates = indices or sorted(folder.glob("*.safetensors"))
    if len(candidates) > 1:
        raise CheckpointError(
            f"{folder} holds {len(candidates)} candidates ({some([p.name for p in candidates])}); "
            "give one of them"
        )
    if candidates:
        return candidates[0]
    for pair in EXPERT_FOLDERS:
        if all((folder / name).is_dir() for name in pair):
            raise CheckpointError(
                f"{folder} holds two experts (Wan 2.2 A14B); give {pair[0]}/ or {pair[1]}/ for one "
                "transformer, or a model with num_experts: 2"
            )
    if (folder / "transformer").is_dir():
        return _choose_in_folder(folder / "transformer")
    pickles = sorted(p for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        _refuse_pickle(pickles[0])
    raise CheckpointError(f"{folder} holds no safetensors file, no *.index.json and no transformer/ folder")


def _refuse_pickle(path: Path) -> None:
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is read; convert it to safetensors "
            "(safetensors.torch.save_file) or download the .safetensors version"
        )
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path} is a GGUF file, which is not supported; use a .safetensors version")


def _read_index(path: Path) -> dict[str, Path]:
    """Tensor -> file of a sharded checkpoint's index. Names that leave its folder are refused."""
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError("too large")
        content = json.loads(path.read_bytes())
        table = content["weight_map"]
        sane = (
            isinstance(table, dict)
            and table
            and all(isinstance(name, str) and (tensor + name).isprintable() for tensor, name in table.items())
        )
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        sane = False
    if not sane:
        raise CheckpointError(
            f"{path} is no index of a sharded checkpoint (a table weight_map: tensor -> file)"
        )
    for name in sorted(set(table.values())):
        parts = PurePosixPath(name)
        if (
            parts.is_absolute()
            or ".." in parts.parts
            or "\\" in name
            or ":" in name
            or "\0" in name
            or not name
        ):
            raise CheckpointError(
                f"{path} names the shard {name!r}; shards must lie in the index's own folder"
            )
        _refuse_pickle(path.parent / name)
    return {tensor: path.parent / name for tensor, name in table.items()}


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names and the number of the others, for a message."""
    names = list(names)
    text = ", ".join(names[:limit])
    return f"{text} and {len(names) - limit} more" if len(names) > limit else text
