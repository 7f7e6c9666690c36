"""From what the guide's users write (a JSON configuration, a checkpoint's path) to overrides and a run config."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from wanexp.config import LOAD_DEVICES, RunConfig, conf_dir, register
from wanexp.config_keys import did_you_mean, unknown_choice_message
from wanexp.config_reading import to_run_config
from wanexp.errors import UserError
from wanexp.wan.architecture import WanArchitecture

if TYPE_CHECKING:
    from wanexp.wan.checkpoint import Checkpoint

GUIDE_MODES = ("none", "data_parallel", "block_distribution", "distributed")
GUIDE_KEYS = (
    "model",
    "base_precision",
    "load_device",
    "parallelism_type",
    "gpu_ids",
    "enable_block_distribution",
)
# Sizes as file names give them, for a checkpoint that is not there to be asked: the latest match wins
NAMED_SIZES = (
    (r"14b", "wan2.1_t2v_14b"),
    (r"1[._]3b", "wan2.1_t2v_1.3b"),
    (r"5b", "wan2.2_ti2v_5b"),
    (r"i2v.*14b", "wan2.1_i2v_14b_480p"),
    (r"i2v.*720p.*14b|i2v.*14b.*720p", "wan2.1_i2v_14b_720p"),
    (r"flf2v.*14b", "wan2.1_flf2v_14b"),
    (r"a14b", "wan2.2_t2v_a14b"),
    (r"i2v.*a14b", "wan2.2_i2v_a14b"),
)


def config_from_guide(settings: Mapping[str, Any]) -> list[str]:
    """The overrides that say what one of the guide's JSON configurations says.

    Keys, none of them required: `model` (a checkpoint's path, or the name of a model in conf/model), `base_precision`,
    `load_device`, `parallelism_type`, `gpu_ids` ("0,1" or [0, 1]) and `enable_block_distribution`. A checkpoint that is
    there is asked for its architecture; of one that is not, the file name has to give the size (14b, 1_3b, ...).

    Whether the run fits is not judged here: every run is planned before it starts. Raises UserError for unknown keys
    and values, and for settings that contradict each other.
    """
    unknown = [str(key) for key in settings if key not in GUIDE_KEYS]
    if unknown:
        hints = ", ".join(f"{key}{did_you_mean(key, GUIDE_KEYS)}" for key in unknown)
        raise UserError(f"unknown settings: {hints}; write only: {', '.join(GUIDE_KEYS)}")
    overrides = []
    if "model" in settings:
        overrides += _model_overrides(settings["model"])
    if "base_precision" in settings:
        precision, valid = settings["base_precision"], choices("precision")
        if precision not in valid:
            raise UserError(unknown_choice_message("base_precision", precision, valid))
        overrides.append(f"precision={precision}")
    load_device = settings.get("load_device", LOAD_DEVICES[0])
    if load_device not in LOAD_DEVICES:
        raise UserError(unknown_choice_message("load_device", load_device, LOAD_DEVICES))
    if load_device != LOAD_DEVICES[0]:
        overrides.append(f"offload.load_device={load_device}")
    gpu_ids = _gpu_ids(settings["gpu_ids"]) if "gpu_ids" in settings else None
    mode = _mode(settings, gpu_ids)
    if mode is not None:
        overrides.append(f"parallelism={mode}")
    if gpu_ids is not None:
        overrides.append(f"gpus=[{','.join(str(index) for index in gpu_ids)}]")
    return overrides


def _mode(settings: Mapping[str, Any], gpu_ids: Sequence[int] | None) -> str | None:
    """parallelism_type and enable_block_distribution say the same twice: they must agree."""
    mode, enable = settings.get("parallelism_type"), settings.get("enable_block_distribution")
    if mode is not None and mode not in GUIDE_MODES:
        raise UserError(unknown_choice_message("parallelism_type", mode, GUIDE_MODES))
    if enable is not None and not isinstance(enable, bool):
        raise UserError(f"enable_block_distribution is {enable!r}; write true or false")
    if enable and mode not in (None, "block_distribution"):
        raise UserError(
            f"enable_block_distribution is true and parallelism_type is '{mode}', which keeps the model whole on each "
            "GPU; write parallelism_type 'block_distribution', or enable_block_distribution false"
        )
    if enable is False and mode == "block_distribution":
        raise UserError(
            "parallelism_type is 'block_distribution' and enable_block_distribution is false; write true, or another "
            "parallelism_type"
        )
    if mode == "none" and gpu_ids is not None and len(gpu_ids) > 1:
        raise UserError(
            f"parallelism_type 'none' uses one GPU and gpu_ids names {len(gpu_ids)}; write one of them, or another "
            "parallelism_type"
        )
    return "block_distribution" if enable else mode


def _gpu_ids(written: Any) -> list[int]:
    """From "0,1", from 0 or from [0, 1]."""
    parts = written.split(",") if isinstance(written, str) else written
    parts = parts if isinstance(parts, list | tuple) else [parts]
    indices = []
    for part in parts:
        text = str(part).strip()
        if isinstance(part, bool) or not re.fullmatch(r"[0-9]{1,4}", text):
            raise UserError(f"gpu_ids is {written!r}; write device numbers of 0 or more such as '0,1'")
        indices.append(int(text))
    if not indices:
        raise UserError("gpu_ids is empty; write device numbers such as '0,1'")
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if twice:
        raise UserError(f"gpu_ids names GPU {twice[0]} {indices.count(twice[0])} times; write each once")
    return indices


def _model_overrides(written: Any) -> list[str]:
    if not isinstance(written, str | Path) or not str(written):
        raise UserError(f"model is {written!r}; write the path of a checkpoint or the name of a model")
    if str(written) in choices("model"):
        return [f"model={written}"]
    path = Path(written).expanduser()
    if path.exists():
        return checkpoint_overrides(path, open_all_experts(path))
    matches = [model for pattern, model in NAMED_SIZES if re.search(pattern, path.stem.lower())]
    if not matches:
        raise UserError(
            f"there is no checkpoint at {path}, and its name does not say which model it is; write the path of a "
            f"checkpoint or one of: {', '.join(choices('model'))}"
        )
    return [f"model={matches[-1]}", f"checkpoint={quoted(path)}"]


def open_all_experts(path: Path) -> "list[Checkpoint]":
    """Every transformer at `path`: both of a folder with two experts (Wan 2.2 A14B). Headers only."""
    from wanexp.wan.checkpoint import open_checkpoint, open_experts  # torch is slow to import
    from wanexp.wan.checkpoint_files import EXPERT_FOLDERS

    has_two = any(all((path / name).is_dir() for name in pair) for pair in EXPERT_FOLDERS)
    return open_experts(path, 2) if has_two else [open_checkpoint(path)]


def checkpoint_overrides(path: Path, experts: "Sequence[Checkpoint]") -> list[str]:
    """The overrides that run this checkpoint: the published model it is, or else its sizes one by one."""
    architecture, num_experts = experts[0].architecture, len(experts)
    name = published_name(architecture, num_experts)
    if name is not None:
        return [f"model={name}", f"checkpoint={quoted(path)}"]
    tiny = _published("tiny")[0]
    sizes = [
        f"model.architecture.{item.name}={size}"
        for item in fields(architecture)
        if (size := getattr(architecture, item.name)) != getattr(tiny, item.name)
    ]
    pair = [f"model.num_experts={num_experts}", "model.expert_boundary=0.9"] if num_experts > 1 else []
    return ["model=tiny", "model.name=custom", *sizes, *pair, f"checkpoint={quoted(path)}"]


def published_name(architecture: WanArchitecture, num_experts: int) -> str | None:
    """The first model of conf/model with these sizes. A single expert of Wan 2.2 goes as the 2.1 model of its size."""
    return next((name for name in choices("model") if _published(name) == (architecture, num_experts)), None)


@cache
def _published(name: str) -> tuple[WanArchitecture, int]:
    """Sizes and number of experts of a model of conf/model."""
    model = OmegaConf.to_container(OmegaConf.load(conf_dir() / "model" / f"{name}.yaml"))
    assert isinstance(model, dict)
    return WanArchitecture(**model["architecture"]), model.get("num_experts", 1)


def compose_config(overrides: Sequence[str]) -> RunConfig:
    """What the command line would make of `overrides`; a Hydra program that calls this keeps its own state."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton
    from hydra.errors import HydraException

    from wanexp.compose_errors import explain

    state = Singleton.get_state()
    try:
        register()
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return to_run_config(compose("config", overrides=list(overrides)))
    except HydraException as error:
        raise UserError(explain(error) or str(error).split("\n")[0]) from error
    finally:
        Singleton.set_state(state)


def quoted(path: Path) -> str:
    """A path as the value of an override."""
    text = str(path)
    if re.fullmatch(r"[A-Za-z0-9_./-]+", text):
        return text
    return "'" + text.replace("'", r"\'") + "'"


def choices(group: str) -> list[str]:
    """The names in a group of conf/."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
