"""The safetensors format: 8 bytes header length, a JSON header, then the tensors' raw bytes.

Written out here, and not left to the library, because a 26 GB file must open by its header alone, be read
tensor by tensor into memory that is the tensor's own (the library hands out views of the mapped file), and be
written tensor by tensor. Every number in a header is checked before it is used.
"""

import ctypes
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wanexp.errors import CheckpointError
from wanexp.wan.part import Part

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_AXES = 8
LFS_POINTER = b"version https://git-lfs"  # what such a pointer begins with
SHORT_ROW_BYTES = 2**20

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} | {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("U16", "I16"), 2),
    **dict.fromkeys(("U32", "I32"), 4),
    **dict.fromkeys(("U64", "I64"), 8),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `offset` in bytes from the start of `file`, `dtype` in safetensors' words."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Header:
    """What the header of one file says; `raw` is its JSON text as it stands in the file."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    raw: bytes
    file_bytes: int


def read_header(file: Path) -> Header:
    """Reads and checks the header of a safetensors file, and nothing else of it.

    Raises CheckpointError for a file that is no safetensors file, or whose tensors do not lie inside it
    (truncated).
    """
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
            _check_start(file, start)
            length = struct.unpack("<Q", start[:8])[0]
            stream.seek(8)
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file} is not a safetensors file: its header claims {length} bytes "
                    f"(allowed: 2 to {MAX_HEADER_BYTES})"
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    if len(raw) < length:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file: header of {length} bytes in {file_bytes}"
        )
    content = _parse_json(raw, file)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file} is damaged: its __metadata__ is not a table")
    data_start = 8 + length
    tensors = {name: _stored_tensor(file, name, entry, data_start) for name, entry in content.items()}
    _check_places(file, tensors, file_bytes)
    return Header(tensors, metadata, raw, file_bytes)


def _check_start(file: Path, start: bytes) -> None:
    """Raises CheckpointError where the first bytes hold no length of a header."""
    if start == LFS_POINTER:
        raise CheckpointError(f"{file} is a Git LFS pointer; run git lfs pull")
    if not start:
        raise CheckpointError(f"{file} is empty; download or copy it again")
    if len(start) < 8:
        raise CheckpointError(
            f"{file} has {len(start)} bytes, too few for a header; download or copy it again"
        )


def part_bytes(stored: StoredTensor, part: Part | None = None) -> int:
    """Bytes of the file that a part (None: all) of the tensor takes."""
    if part is None:
        return stored.num_bytes
    return math.prod(part.shape_in(stored.shape)) * _ITEM_BYTES[stored.dtype]


@dataclass(frozen=True)
class ByteRows:
    """Where the bytes of a tensor, or of a part of it, lie in its file: rows of `width` bytes, `stride` bytes apart.

    What lies in one piece is one row. `offset` is from the start of the file, `num_bytes` counts all rows.
    """

    stored: StoredTensor
    offset: int
    num_bytes: int
    width: int
    stride: int

    @classmethod
    def of(cls, stored: StoredTensor, part: Part | None = None) -> "ByteRows":
        """Those of the part; None: of the whole tensor."""
        num_bytes, before, num_rows = part_bytes(stored, part), 0, 1
        if part is not None and num_bytes:
            before = part_bytes(stored, Part(part.dim, 0, part.start))
            num_rows = 1 if num_bytes == stored.num_bytes else math.prod(stored.shape[: part.dim])
        offset = stored.offset + before // num_rows
        return cls(stored, offset, num_bytes, num_bytes // num_rows, stored.num_bytes // num_rows)

    @property
    def is_short(self) -> bool:
        """Whether there are many rows of few bytes (a matrix's columns): these are read by whole rows."""
        return self.width < self.num_bytes and self.width <= SHORT_ROW_BYTES

    def read(self, target: torch.Tensor, start: int) -> None:
        """Fills `target` (uint8 [bytes], on the CPU) with the bytes from `start` on, counted without the gaps.

        Raises CheckpointError if the file cannot be read or has become shorter since its header was read.
        """
        try:
            file = os.open(self.stored.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                (self._copy_short_rows if self.is_short else self._read)(file, target, start)
            finally:
                os.close(file)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.stored.file}: {error.strerror or error}") from error

    def _read(self, file: int, target: torch.Tensor, start: int) -> None:
        view = memoryview(tensor_bytes(target)).cast("B")
        done = 0
        while done < len(view):
            row, column = divmod(start + done, self.width)
            rest_of_row = view[done : done + self.width - column]
            count = os.preadv(file, [rest_of_row], self.offset + row * self.stride + column)
            if not count:
                raise self._truncated()
            done += count

    def _copy_short_rows(self, file: int, target: torch.Tensor, start: int) -> None:
        # Through a mapping: a call for each row (600,000 for a 14B model) would cost more than its bytes. The pages
        # are the page cache's own, so no anonymous memory grows.
        first, num_rows = start // self.width, len(target) // self.width
        begin = self.offset + first * self.stride
        end = begin + (num_rows - 1) * self.stride + self.width
        map_start = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        # Reading a mapping behind the end of its file kills the process: look before.
        if os.fstat(file).st_size < end:
            raise self._truncated()
        mapped = mmap.mmap(file, end - map_start, access=mmap.ACCESS_READ, offset=map_start)
        rows = np.lib.stride_tricks.as_strided(
            np.frombuffer(mapped, dtype=np.uint8, offset=begin - map_start),
            shape=(num_rows, self.width),
            strides=(self.stride, 1),
            writeable=False,
        )
        # By numpy, as torch would start threads of its own in each thread that reads.
        to = np.frombuffer(memoryview(tensor_bytes(target)).cast("B"), dtype=np.uint8)
        np.copyto(to.reshape(num_rows, self.width), rows)

    def _truncated(self) -> CheckpointError:
        return CheckpointError(f"{self.stored.file} is truncated: it ends inside {self.stored.name}")


def encode_header(
    entries: list[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Header bytes (length included) for (name, dtype, shape) entries, and each tensor's offset in the file.

    Wide dtypes come first: with the header padded to 8 bytes every tensor is then aligned to its items, which
    the safetensors library needs.
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    starts = {}
    for name, dtype, shape in sorted(entries, key=lambda entry: -_ITEM_BYTES[entry[1]]):
        num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
        content[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + num_bytes],
        }
        starts[name] = position
        position += num_bytes
    raw = json.dumps(content, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    data_start = 8 + len(raw)
    return struct.pack("<Q", len(raw)) + raw, {name: data_start + start for name, start in starts.items()}


def tensor_bytes(tensor: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    """The memory of a contiguous CPU tensor as a buffer. The tensor must outlive the buffer."""
    # Not Tensor.numpy: it knows neither bf16 nor fp8.
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    return (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())


def _parse_json(raw: bytes, file: Path) -> dict[str, Any]:
    def refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise ValueError("a name stands twice")
        return table

    try:
        content = json.loads(raw, object_pairs_hook=refuse_doubles)
        if not isinstance(content, dict):
            raise ValueError("not a table")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not a safetensors file: its header is not valid JSON ({error})"
        ) from error
    return content


def _stored_tensor(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    if not name.isprintable() or len(name) > 300:  # names stand in one-line messages
        raise CheckpointError(f"{file} is damaged: its header has the strange tensor name {name[:40]!r}")
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
        sane = isinstance(dtype, str) and dtype.isprintable() and len(dtype) <= 16 and len(shape) <= MAX_AXES
        sane = sane and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    except (KeyError, TypeError, ValueError):
        sane = False
    if not sane:
        raise CheckpointError(
            f"{file} is damaged: its header does not describe {name} (dtype, shape, offsets)"
        )
    if dtype in _ITEM_BYTES and math.prod(shape) * _ITEM_BYTES[dtype] != end - start:
        raise CheckpointError(
            f"{file} is damaged: {name} is {dtype} {list(shape)} but has {end - start} bytes in the header"
        )
    return StoredTensor(file, name, dtype, tuple(shape), data_start + start, end - start)


def _check_places(file: Path, tensors: dict[str, StoredTensor], file_bytes: int) -> None:
    """Raises CheckpointError where tensors overlap or end behind the end of the file."""
    previous_end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        end = tensor.offset + tensor.num_bytes
        if tensor.num_bytes < 0 or tensor.offset < previous_end:
            raise CheckpointError(f"{file} is damaged: {tensor.name} overlaps another tensor")
        previous_end = end
    if previous_end > file_bytes:
        beyond = [t.name for t in tensors.values() if t.offset + t.num_bytes > file_bytes]
        raise CheckpointError(
            f"{file} is truncated: it has {file_bytes} bytes of {previous_end}; {len(beyond)} tensors are "
            f"incomplete, such as {beyond[0]}; download or copy it again"
        )
