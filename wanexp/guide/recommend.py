"""Which of the guide's four modes for this checkpoint on these GPUs, and the arithmetic behind it.

A view of the planner (wanexp/planning): nothing is computed twice here.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanexp.config import DeviceProfile, HardwareConfig, RunConfig, conf_dir
from wanexp.errors import UserError
from wanexp.guide.configuration import (
    GUIDE_MODES,
    checkpoint_overrides,
    choices,
    compose_config,
    open_all_experts,
)
from wanexp.guide.gpus import PRECISION_NEEDS
from wanexp.hardware.devices import Device, find_devices
from wanexp.hardware.profiles import profile_for
from wanexp.parallel.layout import REPLICA_MODES
from wanexp.planning.advice import nearest_that_fits
from wanexp.planning.candidates import Candidate, Planned
from wanexp.planning.memory import GIB
from wanexp.planning.planner import plan_layouts
from wanexp.planning.preflight import choose
from wanexp.workloads.sizes import num_tokens

OBJECTIVE = "objective=throughput"
MAX_GIB = 1024.0  # of one GPU: more than that is a number in MiB


def setup_optimal_parallelism(
    path: str | Path, available_vram: float | Sequence[float] | None = None
) -> dict[str, Any]:
    """The mode that gives the most videos an hour for a checkpoint, and why.

    `path`: a safetensors file, a sharded index or a folder, as wanexp's `checkpoint` takes it; only its header is
    read. Or a model that you do not have, by its name in conf/model, such as wan2.1_t2v_14b. `available_vram`: None for
    the GPUs of this machine with the memory that is free now; a number of GiB for one GPU that you do not have, a list
    of them for several.

    Planned for one sample a replica at the model's usual video size, in bf16 (fp16 on GPUs without it) whatever the
    file stores, because that is what runs; `reason` says so. The guide's modes are ranked by throughput, as replicas
    make no single video faster.

    Returns:
        parallelism_type: none, data_parallel, block_distribution or distributed.
        gpu_ids: torch's device indices; empty where there is no GPU.
        enable_block_distribution: whether parallelism_type is block_distribution.
        reason: what each mode needs on each GPU in GiB, what is free, and what follows.
        plan: all layouts as JSON (those the guide does not know, too), `command` to run the choice, and where nothing
            fits `advice`; `winner` is then None, and the type is the one that is short of memory by the least.

    Raises UserError for a missing or unreadable checkpoint and for an available_vram that is no memory size.
    """
    if not isinstance(path, str | Path):
        raise UserError(
            f"path is a {type(path).__name__}; write that of a checkpoint, or a model such as wan2.1_t2v_14b"
        )
    if str(path) in choices("model"):
        experts, model = [], [f"model={path}"]
    else:
        path = Path(path).expanduser()
        experts = open_all_experts(path)
        model = checkpoint_overrides(path, experts)
    devices = _hypothetical_gpus(available_vram) if available_vram is not None else find_devices(_found())
    on_gpu = devices[0].type == "cuda"
    if not on_gpu:
        devices = devices[:1]
    precision = _precision(devices)
    overrides = [*model, f"precision={precision}", OBJECTIVE]
    if overrides[0] == "model=tiny":  # a model of its own sizes: judged at the size most people make
        overrides.append("video=480p")
    config = compose_config(overrides)
    profiles = [_profile(device, is_real=available_vram is None) for device in devices]
    planned = plan_layouts(config, devices, profiles)
    choice = choose(_only_guide_modes(planned))
    advice = nearest_that_fits(config, devices, profiles) if choice.rejection else ""
    mode = choice.parallelism.mode
    stored = sum(checkpoint.num_bytes for checkpoint in experts)
    storage = experts[0].storage if experts else None
    return {
        "parallelism_type": mode,
        "gpu_ids": [device.index for device in choice.devices] if on_gpu else [],
        "enable_block_distribution": mode == "block_distribution",
        "reason": _reason(config, planned, choice, advice, stored=stored, storage=storage, on_gpu=on_gpu),
        "plan": planned.summary()
        | {
            "advice": advice or None,
            "model": config.model.name,
            "video": f"{config.video.width}x{config.video.height}, {config.video.num_frames} frames",
            "precision": config.precision.name,
            "checkpoint_gib": stored / GIB if experts else None,
            "command": None if choice.rejection else _command(overrides, choice),
        },
    }


def _command(overrides: Sequence[str], choice: Candidate) -> str:
    words = [shlex.quote(override) for override in overrides if override != OBJECTIVE]
    return " ".join(["python -m wanexp", *words, choice.settings])


def _found() -> HardwareConfig:
    return HardwareConfig(name="auto")


def _hypothetical_gpus(available_vram: float | Sequence[float]) -> tuple[Device, ...]:
    """GPUs of these sizes in GiB, all of it free, without P2P."""
    sizes = available_vram if isinstance(available_vram, Sequence) else [available_vram]
    is_bad = [isinstance(size, bool | str) or not isinstance(size, int | float) for size in sizes]
    if not sizes or any(is_bad) or not all(0 < size <= MAX_GIB for size in sizes):
        raise UserError(
            f"available_vram is {available_vram!r}; write the GiB of one GPU such as 24, of several such as [24, 24], "
            "or None for the GPUs of this machine"
        )
    return tuple(
        Device("cuda", index, f"a GPU of {size:g} GiB", round(size * GIB), round(size * GIB))
        for index, size in enumerate(sizes)
    )


def _profile(device: Device, *, is_real: bool) -> DeviceProfile | None:
    return profile_for(_found(), device, conf_dir()) if is_real else None


def _precision(devices: Sequence[Device]) -> str:
    known = [device.compute_capability for device in devices if device.compute_capability]
    return "bf16" if all(capability >= PRECISION_NEEDS["bf16"] for capability in known) else "fp16"


def _only_guide_modes(planned: Planned) -> Planned:
    kept = [candidate for candidate in planned.candidates if candidate.parallelism.mode in GUIDE_MODES]
    return dataclasses.replace(planned, candidates=tuple(kept))


def _reason(
    config: RunConfig,
    planned: Planned,
    choice: Candidate,
    advice: str,
    *,
    stored: int,
    storage: str | None,
    on_gpu: bool,
) -> str:
    """Sentences, one a line: the model, what each layout needs and has, the choice."""
    model, video, precision = config.model, config.video, config.precision
    weights = model.architecture.num_parameters() * model.num_experts
    experts = f"{model.num_experts} experts, together " if model.num_experts > 1 else ""
    on_disk = f"{_gib(stored)} GiB as {storage} on disk, " if storage else ""
    dequantised = (
        f", so {precision.name} is what the GPUs hold" if storage not in (None, precision.name) else ""
    )
    lines = [
        f"{model.name}: {experts}{weights / 1e9:.3g} B parameters, {on_disk}"
        f"{_gib(2 * weights)} GiB of weights as {precision.name}{dequantised}.",
        f"At {video.width}x{video.height} and {video.num_frames} frames ({num_tokens(model, video):,} tokens), "
        "GiB on each GPU (weights + activations + CUDA context and workspaces):",
    ]
    if not on_gpu:
        lines[1] = lines[1].replace("GiB on each GPU", "GiB").replace("CUDA context and ", "")
        lines.append(f"{_arithmetic(choice)}: {_verdict(choice)}.")
        lines.append(
            "No GPU can be used here, so it runs in mode none on the CPU, which takes long. To plan for GPUs that this "
            "machine does not have, give available_vram, such as [24, 24]."
        )
        return "\n".join(lines)
    seen = set()
    for candidate in planned.candidates:
        if candidate.plan and candidate.parallelism.mode in GUIDE_MODES and candidate.name not in seen:
            seen.add(candidate.name)
            lines.append(f"{candidate.name}: {_arithmetic(candidate)}: {_verdict(candidate)}.")
    if choice.rejection:
        lines.append(
            f"Nothing fits; {choice.name} is short by the least. What would fit: {advice or 'nothing found'}."
        )
    else:
        lines.append(f"So {choice.name}: {_why(planned, choice)}.")
    best = planned.winner
    if best and best.parallelism.mode not in GUIDE_MODES:
        lines.append(f"Better still, and not among the guide's modes: {best.settings}.")
    return "\n".join(lines)


def _why(planned: Planned, choice: Candidate) -> str:
    mode = choice.parallelism.mode
    if mode == "none":
        return "one GPU holds all of it, and there is no other that would add to it"
    if mode in REPLICA_MODES:
        return "each of these GPUs holds all of it and makes videos of its own; a single video gets no faster"
    if planned.baseline and planned.baseline.rejection:
        return "no GPU holds all of it, together they do"
    return "each GPU holds a part, and that gives the most videos an hour here"


def _verdict(candidate: Candidate) -> str:
    return "does not fit" if candidate.rejection else "fits"


def _arithmetic(candidate: Candidate) -> str:
    """Such as "13.5 + 2.4 + 0.9 = 16.8 of 24.0 free", a device each where they differ."""
    parts: dict[str, list[str]] = {}
    for device, memory in zip(candidate.devices, candidate.memory, strict=True):
        model = memory.weights + memory.states
        rest = memory.needed - model - memory.activations
        numbers = " + ".join(map(_gib, (model, memory.activations, rest)))
        text = f"{numbers} = {_gib(memory.needed)} of {_gib(device.free_bytes)} free"
        parts.setdefault(text, []).append(device.label)
    if len(parts) == 1:
        return next(iter(parts))
    return "; ".join(f"{', '.join(labels)} {text}" for text, labels in parts.items())


def _gib(num_bytes: int) -> str:
    """One decimal; two digits of what is smaller than that."""
    return f"{num_bytes / GIB:.1f}" if num_bytes == 0 or num_bytes >= 0.05 * GIB else f"{num_bytes / GIB:.1g}"
