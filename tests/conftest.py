"""What tests of the engine share: a run config small enough for a second a run."""

import functools
import gc
import inspect
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from wanexp.config import RunConfig, conf_dir, register
from wanexp.config_reading import to_run_config
from wanexp.hardware.devices import Device

# 32 video tokens, 4 blocks, 1.3 M parameters. As overrides, for the command line takes the same ones.
TINY = (
    "hardware=cpu",
    "tracking=none",
    "sweep_report=false",
    "precision=fp32",
    "model.architecture.dim=128",
    "model.architecture.ffn_dim=256",
    "model.architecture.num_heads=2",
    "model.architecture.num_layers=4",
    "model.architecture.text_dim=64",
    "video.width=64",
    "video.height=64",
    "video.num_frames=5",
    "limits.run_s=120",
    "limits.stall_s=60",
)
TWO_EXPERTS = (
    "model.num_experts=2",
    "model.expert_boundary=0.9",
    "model.guidance_scale=[4,3]",
)
IMAGE = ("model.architecture.in_channels=36",)
CLIP = (*IMAGE, "model.architecture.clip_tokens=257", "model.architecture.clip_dim=80")
PER_TOKEN = (
    "model.per_token_timestep=true",
    "model.architecture.in_channels=48",
    "model.architecture.out_channels=48",
    "model.vae_stride=[4,16,16]",
    "video.width=128",
    "video.height=128",
)

Composer = Callable[..., RunConfig]

gc.set_threshold(50_000)  # as the program has it


def pytest_collection_finish() -> None:
    """What is loaded by now stays: nobody looks through it for garbage."""
    gc.freeze()


def compose_run(*overrides: str) -> RunConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_run_config(compose("config", overrides=[*TINY, *overrides]))


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """The server that workers are forked from, with wanexp loaded wherever a test's working folder is.

    It imports without the sys.path of its parent (up to Python 3.13), and in silence not at all where it cannot.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
        multiprocessing.set_forkserver_preload(["wanexp.preload", "torch._dynamo", "hypothesis", "pytest"])
        forkserver.ensure_running()


@pytest.fixture(scope="session", autouse=True)
def stacks_without_source() -> Iterator[None]:
    """torch's agent takes its own stack thirty times a launch; below pytest, with source lines, for 2 s in all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "stack", functools.partial(inspect.stack, 0))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the ranks have: more of them wait for each other, and on some processors add up in another order."""
    import torch  # tests that decide without it start sooner

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Composer:
    """Composes a tiny run without tracking; the test runs in an empty folder and under no outer torchrun.

    One thread a rank: several spin against each other where the machine has other work.
    """
    monkeypatch.setattr("wanexp.runner._usable_cores", lambda: 1)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    return compose_run


def cpu_devices(number: int, free_bytes: tuple[int, ...] | None = None) -> tuple[Device, ...]:
    """Logical devices of 8 GiB."""
    return tuple(
        Device("cpu", index, "a CPU", 8 * 2**30, free_bytes[index] if free_bytes else 8 * 2**30)
        for index in range(number)
    )
