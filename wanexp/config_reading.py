"""From what Hydra composed, or from plain values, to the run configuration: checked, and with nothing left to resolve.

Below this boundary nobody sees OmegaConf. Every mistake is a UserError of one line: what is wrong, what was found, what
to write.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wanexp.config import (
    ATTENTIONS,
    AUTO_MODE,
    DEVICE_TYPES,
    DTYPES,
    KERNELS,
    LINKS,
    LOAD_DEVICES,
    MODES,
    OBJECTIVES,
    PLACEMENTS,
    SWEEP_ORDERS,
    TASKS,
    TRANSPORTS,
    VERIFY,
    WORKLOADS,
    ModelConfig,
    RunConfig,
    VideoConfig,
)
from wanexp.config_keys import (
    LIST_EXAMPLES,
    known_items,
    leaves,
    missing_message,
    nested_list,
    omegaconf_message,
    unknown_choice_message,
    unknown_key_message,
    unknown_keys,
)
from wanexp.errors import UserError
from wanexp.offload.sizes import LINEARS
from wanexp.tracking.location import resolve_uri
from wanexp.wan.architecture import PATCH_SIZE
from wanexp.workloads.sizes import num_tokens

MAX_LIMIT_S = 1e9  # far more overflows the timeouts of torch and of the system


def to_run_config(config: DictConfig) -> RunConfig:
    """The composed config as dataclasses, checked. Raises UserError for the first thing that is wrong."""
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(missing_message(missing))
        container = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(omegaconf_message(error)) from error
    assert isinstance(container, dict)
    values = {str(key): value for key, value in container.items()}
    for key in unknown_keys(RunConfig, values):  # `+key=value` goes past the schema
        raise UserError(unknown_key_message(RunConfig, key))
    return run_config_from_dict(values)


def run_config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """A config from plain containers, such as the `requested` of a record, checked as `to_run_config` does.

    Keys that this version does not know are ignored, those it misses take their defaults. Raises UserError.
    """
    known = known_items(RunConfig, values)
    if nested := nested_list(known):
        key, value = nested
        raise UserError(f"{key} is {value}; write plain numbers, such as {key}={LIST_EXAMPLES[key]}")
    for key, value in leaves(known):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} is {value}; write a finite number")
        if key.startswith("model.architecture.") and isinstance(value, int):  # its own check divides by some
            least = 0 if key.endswith(".clip_tokens") else 1
            if value < least:
                raise UserError(f"{key} is {value}; write {least} or more")
    try:
        schema = OmegaConf.merge(_schema(), known)
        missing = sorted(OmegaConf.missing_keys(schema))
        if missing:
            raise UserError(f"{missing[0]} has no value")
        config = OmegaConf.to_object(schema)
    except OmegaConfBaseException as error:
        raise UserError(omegaconf_message(error)) from error
    assert isinstance(config, RunConfig)
    _check(config)
    return config


@cache
def _schema() -> DictConfig:
    """Made once, as it takes as long as filling it in."""
    schema = OmegaConf.structured(RunConfig)
    assert isinstance(schema, DictConfig)
    return schema


def _check(config: RunConfig) -> None:
    """Raise UserError for the first value that makes no sense; spread guidance scales over the experts."""
    model, video, workload, hardware = config.model, config.video, config.workload, config.hardware
    for key, found, valid in (
        ("task", config.task, TASKS),
        ("objective", config.objective, OBJECTIVES),
        ("parallelism.mode", config.parallelism.mode, (*MODES, AUTO_MODE)),
        ("parallelism.block_placement", config.parallelism.block_placement, PLACEMENTS),
        ("workload.name", workload.name, WORKLOADS),
        ("precision.dtype", config.precision.dtype, DTYPES),
        ("hardware.device_type", hardware.device_type, DEVICE_TYPES),
        ("attention", config.attention, ATTENTIONS),
        ("kernels", config.kernels, KERNELS),
        ("transport", config.transport, TRANSPORTS),
        ("precision.linear", config.precision.linear, LINEARS),
        ("offload.load_device", config.offload.load_device, LOAD_DEVICES),
        ("verify", config.verify, VERIFY),
        ("sweep_order", config.sweep_order, SWEEP_ORDERS),
    ):
        if found not in valid:
            raise UserError(unknown_choice_message(key, found, valid))

    at_least: list[tuple[str, float | None, int]] = [
        ("model.num_experts", model.num_experts, 1),
        ("model.sampling_steps", model.sampling_steps, 1),
        ("hardware.num_devices", hardware.num_devices, 1),
        ("workload.num_steps", workload.num_steps, 1),
        ("workload.num_warmup_steps", workload.num_warmup_steps, 0),
        ("workload.batch_size", workload.batch_size, 1),
        ("workload.weight_decay", workload.weight_decay, 0),
        ("video.num_frames", video.num_frames, 1),
        ("video.width", video.width, 1),
        ("video.height", video.height, 1),
        ("video.fps", video.fps, 1),
        ("seed", config.seed, 0),
        ("ffn_chunks", config.ffn_chunks, 1),
        ("offload.buffers", config.offload.buffers, 1),
        ("repeats", config.repeats, 1),
    ]
    for key, number, least in at_least:
        if number is not None and number < least:
            raise UserError(f"{key} is {number}; write {least} or more")

    above_zero: list[tuple[str, float | None]] = [
        ("model.shift", model.shift),
        ("workload.learning_rate", workload.learning_rate),
        ("precision.tolerance", config.precision.tolerance),
        ("tracking.timeout_s", config.tracking.timeout_s),
        ("limits.run_s", config.limits.run_s),
        ("limits.stall_s", config.limits.stall_s),
        ("hardware.usd_per_gpu_hour", hardware.usd_per_gpu_hour),
    ]
    if hardware.device is not None:
        device = hardware.device
        above_zero += [
            ("hardware.device.memory_gib", device.memory_gib),
            *(
                (f"hardware.device.{item.name}", getattr(device, item.name))
                for item in fields(device)
                if isinstance(getattr(device, item.name), float) and item.name != "memory_gib"
            ),
        ]
        if device.link is not None and device.link not in LINKS:
            raise UserError(unknown_choice_message("hardware.device.link", device.link, LINKS))
        if device.attention_kernel not in ATTENTIONS:
            key = "hardware.device.attention_kernel"
            raise UserError(unknown_choice_message(key, device.attention_kernel, ATTENTIONS))
    if hardware.enforce_memory and (hardware.device is None or hardware.device.memory_gib is None):
        raise UserError(
            f"hardware.enforce_memory is true and hardware={hardware.name} has no memory_gib; choose a named "
            "machine such as hardware=4x_rtx3080"
        )
    for key, number in above_zero:
        if number is not None and number <= 0:
            raise UserError(f"{key} is {number}; write a number above 0")
    for key, limit in (("limits.run_s", config.limits.run_s), ("limits.stall_s", config.limits.stall_s)):
        if limit > MAX_LIMIT_S:
            raise UserError(f"{key} is {limit:g}; write 1e9 or less, in seconds")

    if config.gpus is not None:
        if not config.gpus:
            raise UserError(
                "gpus is empty; write device numbers such as gpus=[0], or gpus=null to choose by the mode"
            )
        for index in config.gpus:
            if index < 0:
                raise UserError(f"gpus has {index}; write device numbers of 0 or more")
            if config.gpus.count(index) > 1:
                raise UserError(
                    f"gpus names device {index} {config.gpus.count(index)} times; write each once"
                )
    if config.offload.blocks != "auto" and not config.offload.blocks.isdecimal():
        raise UserError(f"offload.blocks is '{config.offload.blocks}'; write a number of blocks, or auto")
    if config.offload.name == "none" and config.offload.blocks != "0":
        raise UserError(
            f"offload.blocks is {config.offload.blocks} with offload=none; write offload=block_swap "
            f"offload.blocks={config.offload.blocks}"
        )
    if config.checkpoint is not None and not config.checkpoint.strip():
        raise UserError("checkpoint is empty; write a path, or checkpoint=null for random weights")
    check_sweep_name(config.sweep_name)
    if not config.tracking.experiment.strip():
        raise UserError("tracking.experiment is empty; write a name, such as tracking.experiment=wanexp")
    if config.tracking.enabled and config.task == "run":
        resolve_uri(config.tracking.uri)  # what it refuses would be lost at the end of the run
    _check_model(model)
    _check_video(video, model)
    if config.ffn_chunks > (tokens := num_tokens(model, video)):
        raise UserError(f"ffn_chunks is {config.ffn_chunks}; write {tokens} (the video's tokens) or less")
    model.guidance_scale = _per_expert("model.guidance_scale", model.guidance_scale, model.num_experts)
    if workload.guidance_scale is not None:
        workload.guidance_scale = _per_expert(
            "workload.guidance_scale", workload.guidance_scale, model.num_experts
        )


def check_sweep_name(name: str | None) -> None:
    """Raise UserError for a name that cannot be a sweep's folder under multirun/."""
    if name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise UserError(f"sweep_name is '{name}'; write a folder name of letters, digits and . _ -")
    if name == "runs":
        raise UserError("sweep_name is 'runs', the folder of single runs; write another name")


def _check_model(model: ModelConfig) -> None:
    if model.num_experts > 2:
        raise UserError(f"model.num_experts is {model.num_experts}; write 1, or 2 (high and low noise)")
    if model.num_experts > 1 and model.expert_boundary is None:
        raise UserError(
            f"model.num_experts is {model.num_experts} and model.expert_boundary is null; write the share of "
            "the timesteps where the experts change, such as model.expert_boundary=0.875"
        )
    if model.expert_boundary is not None and not 0 < model.expert_boundary < 1:
        raise UserError(f"model.expert_boundary is {model.expert_boundary}; write a number between 0 and 1")
    if len(model.vae_stride) != 3 or min(model.vae_stride) < 1:
        raise UserError(
            f"model.vae_stride is {model.vae_stride}; write three numbers (frames, rows, columns), such as "
            "[4,8,8]"
        )
    if model.architecture.clip_tokens not in (0, 257, 514):
        raise UserError(
            f"model.architecture.clip_tokens is {model.architecture.clip_tokens}; write 0 (no CLIP tokens), "
            "257 (one image) or 514 (two)"
        )
    if model.architecture.freq_dim % 2:  # half are sines, half cosines
        raise UserError(f"model.architecture.freq_dim is {model.architecture.freq_dim}; write an even number")


def _check_video(video: VideoConfig, model: ModelConfig) -> None:
    """The latent has whole frames, and whole patches of rows and columns."""
    stride, rows, columns = model.vae_stride
    if (video.num_frames - 1) % stride:
        below = (video.num_frames - 1) // stride * stride + 1
        raise UserError(
            f"video.num_frames is {video.num_frames}; write a number of the form {stride}n + 1, such as "
            f"{below} or {below + stride}"
        )
    for key, size, multiple in (
        ("video.height", video.height, rows * PATCH_SIZE[1]),
        ("video.width", video.width, columns * PATCH_SIZE[2]),
    ):
        if size % multiple:
            nearest = max(1, size // multiple) * multiple
            raise UserError(
                f"{key} is {size}; {model.name} takes multiples of {multiple} (VAE stride x patch), such as "
                f"{nearest}"
            )


def _per_expert(key: str, scales: list[float], num_experts: int) -> list[float]:
    if scales and min(scales) < 0:
        raise UserError(f"{key} has {min(scales)}; write 0 or more, such as {key}={LIST_EXAMPLES[key]}")
    if len(scales) == 1:
        return scales * num_experts
    if len(scales) != num_experts:
        wanted = (
            "one number, such as [5]" if num_experts == 1 else f"one number, or {num_experts} (one an expert)"
        )
        raise UserError(f"{key} has {len(scales)} numbers; write {wanted}")
    return scales
