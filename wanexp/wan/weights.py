"""Where weights come from (a checkpoint, or a hash), and how they get into a model that was built on meta."""

import hashlib
import math
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from wanexp.errors import CheckpointError
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.checkpoint import Announced, open_checkpoint, open_experts
from wanexp.wan.part import Part

if TYPE_CHECKING:
    from wanexp.wan.transformer import WanTransformer

# Elements hashed at once: on a CPU what stays near its cache; a GPU wants more work in one kernel (230 MiB).
_CHUNK = {"cpu": 2**20, "cuda": 2**23}
_LOW_32_BITS = 2**32 - 1


class WeightSource(Protocol):
    """What weights can be read from, tensor by tensor, under native names."""

    @property
    def architecture(self) -> WanArchitecture: ...

    def read(
        self, name: str, *, device: torch.device | str, dtype: torch.dtype, part: Part | None = None
    ) -> torch.Tensor:
        """The tensor `name`, or a part of it, as `dtype` on `device`, in contiguous memory of its own."""
        ...

    def reading_ahead(self, wanted: Sequence[Announced]) -> AbstractContextManager["WeightSource"]:
        """A source of the same weights that reads `wanted`, in this order, before it is asked for them.

        As long as the context lasts, `read` of it is asked for just these, in this order.
        """
        ...

    def fp8_scale(self, name: str) -> float | None:
        """The factor of the numbers that `name` is stored as, if these are float8_e4m3fn; else None.

        `read` with that dtype then gives the numbers as they are stored.
        """
        ...

    def stored_bytes(self, name: str, part: Part | None = None) -> int:
        """Bytes that `read` of the same arguments takes from files; 0 if it takes none."""
        ...

    def describe(self) -> dict[str, Any]:
        """Where the weights come from, for the record."""
        ...


@dataclass(frozen=True)
class RandomWeights:
    """Weights that are a pure function of (seed, tensor name, element index).

    Integer arithmetic makes them, so every device gives the same bits, in any order and on any rank. Every
    value is a bf16 number whatever dtype is asked for: a model in fp32, its bf16 twin and a checkpoint of
    either are the same model. The sizes keep activations of a forward near unit variance.
    """

    architecture: WanArchitecture
    seed: int = 0

    def read(
        self, name: str, *, device: torch.device | str, dtype: torch.dtype, part: Part | None = None
    ) -> torch.Tensor:
        """The tensor of native `name`, or a part of it. Temporaries take 256 MiB at most.

        Raises CheckpointError for an unknown name.
        """
        shape = self._shapes.get(name)
        if shape is None:
            raise CheckpointError(f"this architecture has no tensor {name}")
        part = part or Part.whole(shape)
        mean, std = _distribution(name, shape, self.architecture.dim)
        tensor = torch.empty(part.shape_in(shape), dtype=dtype, device=device)
        chunk = _CHUNK.get(tensor.device.type, 2**20)

        def values(start: int, stop: int) -> torch.Tensor:
            return _to_uniform(_hash_range(self.seed, name, start, stop, tensor.device), mean, std)

        row = math.prod(shape[1:])
        if part.dim == 0:
            flat, first = tensor.view(-1), part.start * row
            for start in range(0, flat.numel(), chunk):
                stop = min(start + chunk, flat.numel())
                flat[start:stop].copy_(values(first + start, first + stop))
        elif not part.is_empty:  # columns: whole rows are made and cut
            step = max(1, chunk // row)
            for start in range(0, shape[0], step):
                stop = min(start + step, shape[0])
                rows = values(start * row, stop * row).view(stop - start, *shape[1:])
                tensor[start:stop].copy_(part.cut(rows))
        return tensor

    def reading_ahead(self, wanted: Sequence[Announced]) -> AbstractContextManager["RandomWeights"]:
        return nullcontext(self)

    def fp8_scale(self, name: str) -> float | None:
        return None

    def stored_bytes(self, name: str, part: Part | None = None) -> int:
        return 0

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.architecture.tensor_shapes())

    def describe(self) -> dict[str, Any]:
        return {"source": "random", "seed": self.seed}


@dataclass(frozen=True)
class LoadReport:
    """What loading cost this rank.

    `num_bytes` counts the parameters as they lie on its devices, `bytes_read` what it took from files and
    `bytes_received` what other ranks read for it (`parallel.loading`).
    """

    num_tensors: int
    num_bytes: int
    seconds: float
    bytes_read: int = 0
    bytes_received: int = 0


def expert_seed(seed: int, expert: int) -> int:
    """Seed of the random weights of expert 0, 1, ... of a model."""
    return seed + expert


def open_weights(
    checkpoint: str | Path | None, architecture: WanArchitecture, *, num_experts: int = 1, seed: int = 0
) -> list[WeightSource]:
    """One source of weights per expert, high noise first: the checkpoint's, or random ones if it is None.

    Raises CheckpointError if the checkpoint cannot be read or is not of this architecture.
    """
    if checkpoint is None:
        return [RandomWeights(architecture, expert_seed(seed, expert)) for expert in range(num_experts)]
    opened = open_experts(checkpoint, num_experts)
    for source in opened:
        source.expect(architecture)
    return list(opened)


def load_weights(
    model: nn.Module,
    source: WeightSource,
    *,
    device_of: Callable[[str], torch.device | str],
    dtype: torch.dtype | None = None,
    requires_grad: bool = False,
    on_tensor: Callable[[str, int], None] | None = None,
    part_of: Callable[[str, tuple[int, ...]], Part] | None = None,
    into: Callable[[str], torch.Tensor | None] | None = None,
) -> LoadReport:
    """Replaces every parameter of `model` (built on meta) by a real one on the device that owns it.

    Only the names that the model has are read, so a model cut down to a few blocks loads from a whole
    checkpoint. `device_of` maps a parameter's name to its device; `dtype` None keeps the dtype that each
    parameter has on meta. `on_tensor(name, num_bytes)` is called after each. `part_of(name, whole shape)` is what
    this model holds of a tensor where it was cut for tensor parallel or FSDP (a parameter that is a DTensor stays
    one); None: all of each. `into(name)` is memory that a tensor is to lie in (the home of a swapped block's on the
    host) or None; the tensor is made on the device of `device_of` and copied there. A module with `read_weight` (a
    quantised layer) reads its own weight and what it keeps beside it. Raises CheckpointError, before anything is
    read, if the source lacks a name or has another shape.
    """
    start = time.perf_counter()
    wanted = dict(model.named_parameters())
    held = dict(source.architecture.tensor_shapes())
    parts = {name: (part_of or _whole)(name, held[name]) for name in wanted if name in held}
    _check_fit(
        {name: tuple(local_tensor(parameter).shape) for name, parameter in wanted.items()},
        {name: part.shape_in(held[name]) for name, part in parts.items()},
    )
    announced = [(name, device_of(name), parts[name]) for name in wanted]
    num_bytes = bytes_read = 0
    devices = set()
    with source.reading_ahead(announced) as source:
        for name, device, part in announced:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            reader = getattr(module, "read_weight", None)
            if leaf == "weight" and reader is not None:
                read = reader(source, name, device=device, part=part)
            else:
                wanted_dtype = dtype or wanted[name].dtype
                read = {leaf: source.read(name, device=device, dtype=wanted_dtype, part=part)}
            loaded = 0
            for attribute, tensor in read.items():
                devices.add(tensor.device)
                full_name = f"{owner}.{attribute}" if owner else attribute
                home = into(full_name) if into else None
                if home is not None:
                    tensor = home.copy_(tensor, non_blocking=True)
                if attribute in module._buffers:
                    setattr(module, attribute, tensor)
                else:
                    _replace_parameter(model, full_name, tensor, requires_grad)
                loaded += tensor.nbytes
            num_bytes += loaded
            bytes_read += source.stored_bytes(name, part)
            if on_tensor:
                on_tensor(name, loaded)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # copies run behind the host; the time must contain them
    return LoadReport(len(wanted), num_bytes, time.perf_counter() - start, bytes_read)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of `tensor`: the local shard of a DTensor, else the tensor itself."""
    # Asked so that DTensor, slow to import, is not imported where none is used.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def load_transformer(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> "WanTransformer":
    """The transformer of a checkpoint (a safetensors file, an index or a folder) on one device, in eval mode.

    Raises CheckpointError, one line, for whatever is wrong with the checkpoint.
    """
    from wanexp.wan.transformer import WanTransformer

    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = WanTransformer(checkpoint.architecture, dtype=dtype)
    load_weights(model, checkpoint, device_of=lambda _: device)
    return model.eval()


def _whole(_name: str, shape: tuple[int, ...]) -> Part:
    return Part.whole(shape)


def _check_fit(wanted: dict[str, tuple[int, ...]], held: dict[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        if name not in held:
            raise CheckpointError(f"the model needs {name}, which the weights do not have")
        if held[name] != shape:
            raise CheckpointError(f"the model's {name} is {list(shape)}, the weights have {list(held[name])}")


def _replace_parameter(model: nn.Module, name: str, tensor: torch.Tensor, requires_grad: bool) -> None:
    """Puts `tensor` in the place of parameter `name`; where that is a DTensor, as its local shard."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = getattr(module, leaf)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import DTensor

        tensor = DTensor.from_local(
            tensor,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=requires_grad))


def _distribution(name: str, shape: tuple[int, ...], dim: int) -> tuple[float, float]:
    """(mean, standard deviation) that a tensor's random values get."""
    if name.endswith("modulation"):
        return 0.0, dim**-0.5  # as Wan initialises it
    if name.endswith(".weight"):
        if len(shape) == 1:
            return 1.0, 0.1  # a norm's
        return 0.0, math.prod(shape[1:]) ** -0.5
    return 0.0, 0.02  # biases and learned positions


def _hash_range(seed: int, name: str, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Hash of each element index in [start, stop): int64 in [0, 2^32).

    A 32-bit finaliser of two multiplications (constants of https://github.com/skeeto/hash-prospector), in
    int64 and with multipliers under 2^31, so that no product overflows. Each tensor starts elsewhere and
    walks with a stride of its own: with one stride large tensors would be shifted copies of each other.
    """
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    offset, stride = struct.unpack("<II", key[:8])
    stride = (stride >> 1) | 1  # odd: every index of a tensor keeps a value of its own
    x = torch.arange(start, stop, dtype=torch.int64, device=device)
    x.mul_(stride).add_(offset).bitwise_and_(_LOW_32_BITS)
    x.bitwise_xor_(x >> 16).mul_(0x21F0AAAD).bitwise_and_(_LOW_32_BITS)
    x.bitwise_xor_(x >> 15).mul_(0x735A2D97).bitwise_and_(_LOW_32_BITS)
    return x.bitwise_xor_(x >> 15)


def _to_uniform(hashed: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """bf16 values of a uniform distribution from 32-bit hashes. Overwrites `hashed`."""
    # The upper 24 bits become an odd integer of (-2^24, 2^24), which fp32 holds exactly; one rounded product
    # and one rounded sum follow, which every device computes alike.
    hashed.bitwise_right_shift_(8).mul_(2).sub_(2**24 - 1)
    values = hashed.to(torch.float32).mul_(_to_float32(std * math.sqrt(3) / 2**24))
    if mean:
        values.add_(mean)
    return values.to(torch.bfloat16)


def _to_float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]
