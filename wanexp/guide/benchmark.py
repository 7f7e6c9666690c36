"""The guide's modes on a live model, in this process, on every device of the machine, one after the other.

    none                 the model as it is, on the first device
    data_parallel        a replica a device; inputs go out from the first device, outputs come back to it
    distributed          a replica a device; each has its own inputs and keeps its output
    block_distribution   the blocks spread over the devices

The model itself is never touched: a mode runs on a twin, which shares the weights that already lie where the mode
wants them and has copies of the others. Hooks go onto the twin and die with it. Replicas are enqueued by one thread
(they compute at once, as GPU work is asynchronous); wanexp's own runs give each a process.
"""

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from wanexp.config import HardwareConfig
from wanexp.errors import UserError
from wanexp.guide.configuration import GUIDE_MODES
from wanexp.hardware.devices import Device, find_devices, select_devices
from wanexp.measure.memory import GIB
from wanexp.measure.parity import compare_answers
from wanexp.measure.statistics import noise_warning, summarise_samples
from wanexp.parallel.block_distribution import distribute_blocks, position_of
from wanexp.parallel.layout import REPLICA_MODES, place_blocks
from wanexp.wan.transformer import WanTransformer
from wanexp.worker import torch_device

NUM_WARMUP_RUNS = 2
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """A mode, ready: `run` enqueues one round and gives its outputs; `twins` are the modules that hold its weights."""

    run: Callable[[], list[Any]]
    twins: Sequence[nn.Module]


def benchmark_model(model: nn.Module, input_data: Any, num_runs: int) -> dict[str, dict[str, Any]]:
    """Figures of every mode; see `wanexp.multi_gpu_utils.benchmark_multi_gpu_performance`."""
    if any(module._forward_pre_hooks for module in getattr(model, "blocks", None) or ()):
        raise UserError(
            "the model's blocks have hooks (is it distributed already?); give the bare model, on one device or the CPU"
        )
    owned = _devices(model)
    call = _as_call(input_data)
    results: dict[str, dict[str, Any]] = {}
    reference: list[Any] = []
    for mode in GUIDE_MODES:
        used = owned[:1] if mode == "none" else owned
        try:
            figures = _measure(model, call, mode, used, num_runs, reference)
        except UserError as error:
            results[mode] = {"ran": False, "reason": str(error)}
        except torch.OutOfMemoryError as error:
            results[mode] = {"ran": False, "reason": f"out of memory: {str(error).splitlines()[0]}"}
        else:
            results[mode] = {"ran": True, **figures}
        _release(used)
    for mode, figures in results.items():
        if figures["ran"] and results["none"]["ran"] and mode != "none":
            ratio = figures["samples_per_s"] / results["none"]["samples_per_s"]
            figures["throughput_ratio" if mode in REPLICA_MODES else "speedup"] = ratio
            if "warning" in results["none"] and "warning" not in figures:
                figures["warning"] = "mode none was noisy, so the ratio to it is doubtful"
    return results


def _measure(
    model: nn.Module, call: Call, mode: str, owned: Sequence[Device], num_runs: int, reference: list[Any]
) -> dict[str, Any]:
    """One mode. `reference`: outputs of mode none, filled by it. Raises UserError for what cannot be."""
    devices = [torch_device(device) for device in owned]
    if mode != "none" and len(devices) < 2:
        raise UserError(f"{mode} needs two devices; found 1: {owned[0].name}")
    with torch.no_grad():
        prepared = _PREPARE[mode](model, call, devices)
        for _ in range(NUM_WARMUP_RUNS):
            prepared.run()
        with _peaks(prepared.twins, model, owned, devices) as peaks:
            samples, outputs = _time(prepared.run, devices, num_runs)
    if mode == "none":
        reference += outputs
    rounds = len(outputs) * _batch(call)
    summary = summarise_samples(samples)
    figures: dict[str, Any] = {
        "devices": [device.label for device in owned],
        "num_runs": num_runs,
        "median_ms": summary.median * 1000,
        "iqr_ms": summary.iqr * 1000,
        "min_ms": summary.minimum * 1000,
        "max_ms": summary.maximum * 1000,
        "samples_ms": [sample * 1000 for sample in samples],
        "samples_per_run": rounds,
        "samples_per_s": rounds / summary.median,
        "peak_gib": peaks,
    }
    if mode != "none" and reference:
        errors = [compare_answers(_tensors(output), _tensors(reference[0])) for output in outputs]
        figures["rel_l2"] = max(error.rel_l2 for error in errors)
        figures["bit_equal"] = all(error.bit_equal for error in errors)
    if warning := noise_warning(summary, f"the time of {mode}"):
        figures["warning"] = warning.replace("measure more steps (workload.num_steps)", "raise num_runs")
    return figures


# The modes


def _prepare_none(model: nn.Module, call: Call, devices: Sequence[torch.device]) -> Prepared:
    twin, inputs = twin_of(model, lambda _: devices[0]), _to(call, devices[0])
    return Prepared(lambda: [_forward(twin, inputs, devices[0])], [twin])


def _prepare_data_parallel(model: nn.Module, call: Call, devices: Sequence[torch.device]) -> Prepared:
    twins, batch = _replicas(model, devices), _to(call, devices[0])

    def run() -> list[Any]:
        parts = [batch, *(_to(batch, device) for device in devices[1:])]
        outputs = [_forward(*each) for each in zip(twins, parts, devices, strict=True)]
        return [outputs[0], *(_to(output, devices[0]) for output in outputs[1:])]

    return Prepared(run, twins)


def _prepare_distributed(model: nn.Module, call: Call, devices: Sequence[torch.device]) -> Prepared:
    twins, own = _replicas(model, devices), [_to(call, device) for device in devices]
    return Prepared(lambda: [_forward(*each) for each in zip(twins, own, devices, strict=True)], twins)


def _prepare_block_distribution(model: nn.Module, call: Call, devices: Sequence[torch.device]) -> Prepared:
    if not isinstance(model, WanTransformer):
        raise UserError(
            f"block_distribution needs wanexp's WanTransformer (wanexp.wan.load_transformer gives it); this is a "
            f"{type(model).__name__}"
        )
    owner = place_blocks(len(model.blocks), len(devices), placement="contiguous")
    twin = twin_of(model, lambda name: devices[position_of(name, owner)])
    distribute_blocks(twin, block_owner=owner, devices=devices)
    inputs = _to(call, devices[owner[0]])
    return Prepared(lambda: [_forward(twin, inputs, devices[owner[0]])], [twin])


_PREPARE: dict[str, Callable[[nn.Module, Call, Sequence[torch.device]], Prepared]] = {
    "none": _prepare_none,
    "data_parallel": _prepare_data_parallel,
    "distributed": _prepare_distributed,
    "block_distribution": _prepare_block_distribution,
}


# Twins and inputs


def twin_of(model: nn.Module, device_of: Callable[[str], torch.device], *, own: bool = False) -> nn.Module:
    """A copy of `model` in eval mode, weights and buffers where `device_of` says, shared if they are there already.

    own: copy those, too (a second replica on a logical CPU device).
    """
    memo: dict[int, Any] = {}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        device = device_of(name)
        is_there = tensor.device == device and not own
        moved = tensor.detach() if is_there else tensor.detach().to(device, copy=True)
        memo[id(tensor)] = (
            nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
        )
    return copy.deepcopy(model, memo).eval()


def _replicas(model: nn.Module, devices: Sequence[torch.device]) -> list[nn.Module]:
    if devices[0].type == "cpu":
        needed, free = _num_bytes([model]) * (len(devices) - 1), psutil.virtual_memory().available
        if needed > free:
            raise UserError(
                f"needs {needed / GIB:.1f} GiB of host memory for the replicas, {free / GIB:.1f} free"
            )
    return [
        twin_of(model, lambda _, device=device: device, own=position > 0)  # type: ignore[misc]
        for position, device in enumerate(devices)
    ]


def _as_call(input_data: Any) -> Call:
    if isinstance(input_data, Mapping):
        call: Call = ((), {str(name): value for name, value in input_data.items()})
    elif isinstance(input_data, Tensor):
        call = ((input_data,), {})
    elif isinstance(input_data, tuple | list):
        call = (tuple(input_data), {})
    else:
        raise UserError(
            f"input_data is {type(input_data).__name__}; write the arguments of the model's forward, a dict such as "
            "{'latent': ..., 'timestep': ..., 'text': ...} or a tuple"
        )
    if not any(isinstance(leaf, Tensor) for leaf in tree_flatten(call)[0]):
        raise UserError("input_data holds no tensor; write the arguments of the model's forward")
    return call


def _batch(call: Call) -> int:
    """Samples of one call: the first axis of its first tensor."""
    first = next(leaf for leaf in tree_flatten(call)[0] if isinstance(leaf, Tensor))
    return len(first) if first.ndim else 1


def _to(value: Any, device: torch.device) -> Any:
    """Copies of the tensors in `value` on `device`; logical CPU devices copy, too."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, copy=True, non_blocking=True), value)


def _forward(module: nn.Module, call: Call, device: torch.device) -> Any:
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        return module(*call[0], **call[1])


def _tensors(output: Any) -> dict[str, Tensor]:
    leaves = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
    return {str(number): leaf for number, leaf in enumerate(leaves)}


# Devices, time and memory


def _devices(model: nn.Module) -> tuple[Device, ...]:
    """All GPUs, the model's first; without GPUs two logical CPU devices."""
    found = find_devices(HardwareConfig(name="auto"))
    if found[0].type == "cpu":
        return select_devices(found, None, "data_parallel")
    homes = [parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"]
    first = homes[0] if homes else found[0].index
    return tuple(sorted(found, key=lambda device: (device.index != first, device.index)))


def _time(
    run: Callable[[], list[Any]], devices: Sequence[torch.device], num_runs: int
) -> tuple[list[float], list[Any]]:
    """Wall-clock seconds of each run, all devices idle before and after; and the last outputs."""
    samples: list[float] = []
    outputs: list[Any] = []
    for _ in range(num_runs):
        outputs.clear()
        _synchronize(devices)
        begin = time.perf_counter()
        outputs = run()
        _synchronize(devices)
        samples.append(time.perf_counter() - begin)
    return samples, outputs


@contextmanager
def _peaks(
    twins: Sequence[nn.Module], model: nn.Module, owned: Sequence[Device], devices: Sequence[torch.device]
) -> Iterator[dict[str, float]]:
    """Peak GiB of each device by label, filled at the end: without weights of `model` that the mode does not use.

    A logical CPU device counts the weights that it owns.
    """
    peaks: dict[str, float] = {}
    on_gpu = devices[0].type == "cuda"
    for torch_dev in devices:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(torch_dev)
    yield peaks
    used = {tensor.data_ptr() for twin in twins for tensor in (*twin.parameters(), *twin.buffers())}
    for position, (device, torch_dev) in enumerate(zip(owned, devices, strict=True)):
        if on_gpu:
            idle = sum(
                tensor.nbytes
                for tensor in (*model.parameters(), *model.buffers())
                if tensor.device == torch_dev and tensor.data_ptr() not in used
            )
            peaks[device.label] = (torch.cuda.max_memory_allocated(torch_dev) - idle) / GIB
        else:
            peaks[device.label] = _owned_bytes(twins, position, len(devices)) / GIB


def _owned_bytes(twins: Sequence[nn.Module], position: int, num_devices: int) -> int:
    """Weights of a logical CPU device: of its replica, or of its blocks."""
    if len(twins) > 1 or num_devices == 1:
        return _num_bytes([twins[position]])
    twin = twins[0]
    owner = place_blocks(len(twin.blocks), num_devices, placement="contiguous")  # type: ignore[arg-type]
    return sum(p.nbytes for name, p in twin.named_parameters() if position_of(name, owner) == position)


def _num_bytes(modules: Sequence[nn.Module]) -> int:
    return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


def _synchronize(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _release(owned: Sequence[Device]) -> None:
    gc.collect()
    if owned[0].type == "cuda":
        torch.cuda.empty_cache()
