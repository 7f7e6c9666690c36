"""The guide's API: what it recommends and why, what it refuses, and figures that are measured."""

import copy
import gc
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.conftest import cpu_devices
from tests.hardware.fake_nvml import FakeGpu, FakeNvml, gpu_device
from wanexp import multi_gpu_utils as api
from wanexp.errors import CheckpointError, UserError
from wanexp.guide import benchmark_runs, gpus
from wanexp.guide.configuration import compose_config
from wanexp.plan_task import devices_to_plan
from wanexp.planning.planner import cap_memory, judge
from wanexp.wan import load_transformer
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.safetensors_format import encode_header
from wanexp.wan.write_checkpoint import write_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = WanArchitecture(
    dim=128, ffn_dim=256, num_heads=2, num_layers=4, in_channels=16, out_channels=16, text_dim=64, freq_dim=64
)
T2V_14B = WanArchitecture(
    dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_channels=16, out_channels=16
)
T2V_1_3B = WanArchitecture(
    dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_channels=16, out_channels=16
)
GUIDE_KEYS = {"parallelism_type", "gpu_ids", "enable_block_distribution", "reason", "plan"}


def write_hollow(architecture: WanArchitecture, path: Path, dtype: str = "BF16") -> Path:
    """A checkpoint of full size that takes no room: a true header, and a hole where the data would be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = [
        (name, dtype if name.startswith("blocks.") and len(shape) == 2 else "BF16", shape)
        for name, shape in architecture.tensor_shapes()
    ]
    header, _ = encode_header(stored, {"num_heads": str(architecture.num_heads)})
    size = {"BF16": 2, "F8_E4M3": 1}
    num_bytes = sum(torch.Size(shape).numel() * size[kind] for _, kind, shape in stored)
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + num_bytes)
    return path


@pytest.fixture(scope="module")
def model_14b(tmp_path_factory) -> Path:
    return write_hollow(T2V_14B, tmp_path_factory.mktemp("14b") / "wan 14b.safetensors")


@pytest.fixture(scope="module")
def model_1_3b(tmp_path_factory) -> Path:
    return write_hollow(T2V_1_3B, tmp_path_factory.mktemp("1.3b") / "wan.safetensors")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_model(SMALL, tmp_path_factory.mktemp("small") / "model.safetensors", dtype=torch.float32)[0]


@pytest.fixture
def found(monkeypatch):
    """Has wanexp find these devices."""

    def find(*devices):
        def find_devices(hardware):
            if hardware.device_type == "cuda" and devices[0].type == "cpu":
                raise UserError(
                    "hardware=auto needs a GPU, none can be used (NVML finds no GPU); write hardware=cpu"
                )
            return devices

        for module in ("recommend", "gpus", "benchmark"):
            monkeypatch.setattr(f"wanexp.guide.{module}.find_devices", find_devices)

    monkeypatch.setattr("wanexp.guide.benchmark.NUM_WARMUP_RUNS", 1)
    return find


def test_importing_it_imports_no_torch():
    code = "import sys, wanexp.multi_gpu_utils; sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode
        == 0
    )


# setup_optimal_parallelism


@pytest.mark.parametrize(
    ("model", "vram", "mode", "gpu_ids", "words"),
    [
        # 26.6 weights + 1.6 activations + 0.9 = 29.2: the guide's example 1 was data_parallel, each card has 24
        ("model_14b", [24, 24], "block_distribution", [0, 1], "29.2 of 24.0 free: does not fit"),
        ("model_14b", [40, 40], "data_parallel", [0, 1], "29.6 of 40.0 free: fits"),  # + 0.4 of NCCL
        ("model_14b", 40, "none", [0], "29.2 of 40.0 free: fits"),
        # 7.0 + 1.9 + 0.9 = 9.8, on the first
        ("model_14b", [10] * 4, "block_distribution", [0, 1, 2, 3], "together they do"),
        ("model_14b", [8] * 4, "block_distribution", [0, 1, 2, 3], "Nothing fits"),
        ("model_14b", [24], "none", [0], "block_distribution over 2 such GPUs would hold all of it"),
        ("model_14b", [48, 8], "none", [0], "fits"),  # the small card cannot hold a replica
        ("model_1_3b", [24], "none", [0], "2.6 GiB of weights as bf16"),
        ("model_1_3b", (24, 24), "data_parallel", [0, 1], "each of these GPUs holds all of it"),
    ],
)
def test_the_recommendation_is_the_planners(request, model, vram, mode, gpu_ids, words):
    answer = api.setup_optimal_parallelism(str(request.getfixturevalue(model)), available_vram=vram)
    assert set(answer) == GUIDE_KEYS
    assert (answer["parallelism_type"], answer["gpu_ids"]) == (mode, gpu_ids)
    assert answer["enable_block_distribution"] == (mode == "block_distribution")
    assert words in answer["reason"]
    fits = "Nothing fits" not in answer["reason"]
    assert (answer["plan"]["winner"] is not None) == fits
    assert (answer["plan"]["advice"] is None) == (answer["plan"]["command"] is not None) == fits
    json.dumps(answer)


def test_the_command_runs_what_was_planned(model_14b):
    import shlex

    command = api.setup_optimal_parallelism(model_14b, [24, 24])["plan"]["command"]
    overrides = shlex.split(command.removeprefix("python -m wanexp "))
    config = compose_config(overrides)
    assert config.checkpoint == str(model_14b) and config.model.name == "wan2.1_t2v_14b"
    assert (config.parallelism.mode, config.gpus) == ("block_distribution", [0, 1])


def test_a_model_by_name_needs_no_checkpoint(model_14b):
    named, read = (api.setup_optimal_parallelism(it, [24, 24]) for it in ("wan2.1_t2v_14b", model_14b))
    assert named["plan"]["layouts"] == read["plan"]["layouts"] and named["plan"]["checkpoint_gib"] is None
    assert "on disk" in read["reason"] and "on disk" not in named["reason"]
    assert (
        "model=wan2.1_t2v_14b" in named["plan"]["command"] and "checkpoint=" not in named["plan"]["command"]
    )


def test_the_pages_first_example_runs(capsys):
    page = (Path(__file__).parents[1] / "docs" / "choosing.md").read_text()
    exec(page.split("```python")[1].split("```")[0], {})
    assert "block_distribution x 2" in capsys.readouterr().out


def test_no_gpu_is_an_answer(model_1_3b, found):
    found(*cpu_devices(8))
    answer = api.setup_optimal_parallelism(model_1_3b)
    assert (answer["parallelism_type"], answer["gpu_ids"]) == ("none", [])
    assert "No GPU can be used here" in answer["reason"] and "CUDA" not in answer["reason"]


def test_free_memory_of_the_gpus_found_counts(model_14b, found):
    free = 20 * 2**30
    found(*(gpu_device(index, free_bytes=free, peers=(1 - index,)) for index in range(2)))
    answer = api.setup_optimal_parallelism(model_14b)
    assert answer["parallelism_type"] == "block_distribution"
    assert "29.0 of 20.0 free" in answer["reason"]
    assert answer["plan"]["layouts"][0]["step_ms"]  # an H200's rates are known


def test_gpus_without_bf16_are_planned_in_fp16(model_1_3b, found):
    found(gpu_device(0, name="NVIDIA TITAN RTX", compute_capability=(7, 5), free_bytes=24 * 2**30))
    assert api.setup_optimal_parallelism(model_1_3b)["plan"]["precision"] == "fp16"


def test_fp8_files_two_experts_and_folders(tmp_path):
    fp8 = write_hollow(T2V_14B, tmp_path / "fp8.safetensors", dtype="F8_E4M3")
    reason = api.setup_optimal_parallelism(fp8, 24)["reason"]  # 26.6 in memory whatever the file is
    assert "as fp8_e4m3fn on disk, 26.6 GiB of weights as bf16, so bf16 is what the GPUs hold" in reason
    for folder in ("high_noise_model", "low_noise_model"):
        write_hollow(T2V_14B, tmp_path / "a14b" / folder / "model.safetensors")
    answer = api.setup_optimal_parallelism(tmp_path / "a14b", 80)
    assert answer["plan"]["model"] == "wan2.2_t2v_a14b"
    assert "2 experts, together 28.6 B parameters" in answer["reason"]


@pytest.mark.parametrize("vram", [0, -1, "24", [], [24, None], True, float("nan"), 24576])
def test_a_memory_size_that_is_none(small, vram):
    with pytest.raises(UserError, match="write the GiB of one GPU such as 24"):
        api.setup_optimal_parallelism(small, vram)


def test_a_missing_checkpoint_is_an_error():
    with pytest.raises(CheckpointError, match=r"no checkpoint at path/to/your/model\.safetensors"):
        api.setup_optimal_parallelism("path/to/your/model.safetensors")
    with pytest.raises(UserError, match="path is a NoneType; write that of a checkpoint"):
        api.setup_optimal_parallelism(None)


# validate_gpu_setup and print_gpu_status


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "gpu_ids is empty"),
        ([-1], "gpu_ids has -1"),
        ([0, 0], "names GPU 0 2 times"),
        ([True], "gpu_ids has True"),
        (["0"], "gpu_ids has '0'"),
        ("0,1", "write a list of device numbers"),
        (0, "write a list of device numbers"),
        ([0, 7], "there is no GPU 7; found 2 GPUs, 0 to 1 (NVIDIA H200)"),
    ],
)
def test_ids_that_are_none(found, ids, words):
    found(gpu_device(0), gpu_device(1))
    is_valid, message = api.validate_gpu_setup(ids)
    assert is_valid is False and words in message


def test_no_gpu_is_no_valid_setup(found):
    found(*cpu_devices(2))
    assert api.validate_gpu_setup([0]) == (False, "no GPU can be used: NVML finds no GPU")


@pytest.mark.parametrize(
    ("capability", "settings", "words"),
    [
        ((7, 5), {}, "bf16 needs sm_80; write one of: fp16, fp32"),
        ((5, 2), {"precision": "fp16", "attention": "sdpa_math"}, "fp16 needs sm_53; write one of: fp32"),
        ((8, 6), {"precision": "fp8"}, "fp8 needs sm_89"),
        ((7, 5), {"precision": "fp16", "attention": "sdpa_cudnn"}, "sdpa_cudnn needs sm_80"),
        ((8, 6), {}, ""),
        ((9, 0), {"precision": "fp8", "attention": "sdpa_cudnn"}, ""),
    ],
)
def test_compute_capability(found, capability, settings, words):
    found(gpu_device(0, name="A GPU", compute_capability=capability))
    is_valid, message = api.validate_gpu_setup([0], **settings)
    assert is_valid == (not words) and words in message, message


def test_precisions_and_kernels_that_do_not_exist():
    with pytest.raises(UserError, match="precision 'bf61' does not exist"):
        api.validate_gpu_setup([0], precision="bf61")
    with pytest.raises(UserError, match="attention 'flash' does not exist"):
        api.validate_gpu_setup([0], attention="flash")


def test_what_only_costs_speed_is_a_warning(found):
    found(gpu_device(0, peers=(1,)), gpu_device(1, peers=(0,)))
    is_valid, message = api.validate_gpu_setup([0, 1])
    assert is_valid and "warning" not in message
    found(gpu_device(0), gpu_device(1, name="NVIDIA H100"))
    is_valid, message = api.validate_gpu_setup([1, 0])
    assert is_valid
    assert "warning: different models (NVIDIA H100, NVIDIA H200)" in message
    assert "warning: no P2P between gpu1 and gpu0" in message


def test_a_driver_older_than_torchs_cuda(found, monkeypatch):
    found(gpu_device(0))
    fake = FakeNvml(FakeGpu("GPU-0"))
    monkeypatch.setattr(gpus.nvml_tools, "open_nvml", lambda: fake)
    monkeypatch.setattr("torch.version.cuda", "14.0")  # the fake driver serves 13.0
    is_valid, message = api.validate_gpu_setup([0])
    assert not is_valid and "driver 580.65.06 serves CUDA 13.0" in message
    monkeypatch.setattr("torch.version.cuda", "13.2")
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_100", "sm_90a"])
    assert api.validate_gpu_setup([0])[0]
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_100"])
    assert "is built for sm_100 and above" in api.validate_gpu_setup([0])[1]


def test_status_by_torchs_numbers(found, monkeypatch, capsys):
    found(gpu_device(0, "GPU-b"), gpu_device(1, "GPU-a"))
    fake = FakeNvml(
        FakeGpu("GPU-a", temperature=88, reasons=0x40), FakeGpu("GPU-b", used=2**30, power_mw=None)
    )
    fake.nvmlInit()
    monkeypatch.setattr(gpus.nvml_tools, "open_nvml", lambda: fake)
    api.print_gpu_status()
    header, first, second, note = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["GPU", "name"]
    assert first.split()[0] == "0" and "1.0 of 140.0 GiB" in first and first.split()[-2:] == ["-", "GPU-b"]
    assert "80 %" in second and "88 C" in second and "500 of 700 W" in second and second.endswith("GPU-a")
    assert note == "GPU 1 is throttled by heat right now" and fake.opened == 0


def test_status_without_a_gpu(found, capsys):
    found(*cpu_devices(2))
    api.print_gpu_status()
    assert "No GPU can be used here. CPU: " in capsys.readouterr().out


# monitor_memory_usage


def test_a_monitor_is_a_thread_that_ends_and_can_be_read():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(2, 2, device=device) for device in ("cpu", "meta"))
    monitor = api.monitor_memory_usage(model, interval=0.02, duration=0.1)
    assert isinstance(monitor, threading.Thread) and monitor.daemon
    assert monitor.block_devices == {0: "cpu", 1: "meta"}
    monitor.join(timeout=10)
    assert not monitor.is_alive() and len(monitor.samples) >= 2
    times = [sample.time_s for sample in monitor.samples]
    assert times == sorted(times) and times[-1] >= 0.1
    assert monitor.peaks()["cpu"]["rss"] >= monitor.samples[0].rss_bytes > 0


def test_a_monitor_can_be_stopped_and_lets_the_model_go():
    model = nn.Linear(2, 2)
    monitor = api.monitor_memory_usage(model)
    del model
    gc.collect()
    assert monitor._model() is None
    monitor.stop()
    monitor.stop()
    assert not monitor.is_alive() and monitor.block_devices == {0: "cpu"}


def test_a_monitor_samples_the_gpus_that_torch_uses(monkeypatch):
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ab"[index]))
    monkeypatch.setattr(cuda, "memory_allocated", lambda index: 10 + index)
    monkeypatch.setattr(cuda, "memory_reserved", lambda index: 20 + index)
    fake = FakeNvml(FakeGpu("GPU-b", used=99))
    monkeypatch.setattr("wanexp.guide.monitor.nvml_tools.open_nvml", lambda: fake)
    monitor = api.monitor_memory_usage(nn.Linear(2, 2), duration=0)
    monitor.join(timeout=10)
    assert monitor.samples[0].devices == {
        "gpu0": {"allocated": 10, "reserved": 20},
        "gpu1": {"allocated": 11, "reserved": 21, "nvml_used": 99},
    }


@pytest.mark.parametrize("times", [(0, 1), (-1, 1), (float("nan"), 1), (1, -1), ("a", 1), (1, None)])
def test_times_that_make_no_sense(times):
    with pytest.raises(UserError, match="number of seconds"):
        api.monitor_memory_usage(nn.Linear(1, 1), *times)


def test_a_monitor_of_no_model():
    with pytest.raises(UserError, match=r"model is a NoneType; give a torch\.nn\.Module"):
        api.monitor_memory_usage(None)


# benchmark_multi_gpu_performance


def inputs(device: str = "cpu") -> dict[str, torch.Tensor]:
    return {
        "latent": torch.randn(1, 16, 2, 8, 8, device=device),
        "timestep": torch.tensor([500.0], device=device),
        "text": torch.randn(1, 8, 64, device=device),
    }


def test_every_mode_is_measured_and_the_model_stays_as_it_was(small, found):
    found(*cpu_devices(8))
    model = load_transformer(small).train()
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    results = api.benchmark_multi_gpu_performance(model, inputs(), num_runs=3)
    assert set(results) == {"none", "data_parallel", "block_distribution", "distributed"}
    for mode, figures in results.items():
        assert figures["ran"] and figures["median_ms"] > 0 and len(figures["samples_ms"]) == 3
        assert figures["devices"] == (["cpu0"] if mode == "none" else ["cpu0", "cpu1"])
        assert figures["samples_per_run"] == (2 if mode in ("data_parallel", "distributed") else 1)
        assert mode == "none" or figures["bit_equal"]
    whole, parts = results["none"]["peak_gib"]["cpu0"], results["block_distribution"]["peak_gib"]
    assert sum(parts.values()) == pytest.approx(whole) and parts["cpu0"] < whole
    assert results["data_parallel"]["peak_gib"] == pytest.approx({"cpu0": whole, "cpu1": whole})
    assert results["data_parallel"]["throughput_ratio"] > 0 and results["block_distribution"]["speedup"] > 0
    assert model.training and not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    for name, parameter in model.named_parameters():
        was, pointer, values = before[name]
        assert parameter is was and parameter.data_ptr() == pointer and torch.equal(parameter, values)
    json.dumps(results)


def test_what_cannot_run_says_why(small, found):
    found(*cpu_devices(1))
    results = api.benchmark_multi_gpu_performance(
        load_transformer(small), tuple(inputs().values()), num_runs=1
    )
    assert results["none"]["ran"]
    assert "data_parallel needs two devices; found 1" in results["data_parallel"]["reason"]
    found(*cpu_devices(2))
    results = api.benchmark_multi_gpu_performance(nn.Linear(2, 2), torch.ones(3, 2), num_runs=1)
    assert results["distributed"]["samples_per_run"] == 6
    assert "this is a Linear" in results["block_distribution"]["reason"]


def test_out_of_memory_is_a_reason(found):
    class Hungry(nn.Linear):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more words")

    found(*cpu_devices(2))
    results = api.benchmark_multi_gpu_performance(Hungry(1, 1), torch.ones(1, 1), num_runs=1)
    assert results["none"] == {
        "ran": False,
        "reason": "out of memory: CUDA out of memory. Tried to allocate 1 GiB",
    }


@pytest.mark.parametrize(
    ("data", "num_runs", "words"),
    [(None, 1, "input_data is NoneType"), ({}, 1, "holds no tensor"), (torch.ones(1), 0, "num_runs is 0")],
)
def test_inputs_that_are_none(data, num_runs, words):
    with pytest.raises(UserError, match=words):
        api.benchmark_multi_gpu_performance(nn.Linear(1, 1), data, num_runs)


def test_a_distributed_model_is_not_benchmarked(small):
    model = copy.deepcopy(load_transformer(small))
    model.blocks[1].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(UserError, match="have hooks"):
        api.benchmark_multi_gpu_performance(model, inputs())


def test_a_checkpoint_is_benchmarked_by_real_runs(small, monkeypatch, tmp_path):
    """With one run in place of four: data_parallel; the others answer as a program that fails."""
    monkeypatch.chdir(tmp_path)
    run, commands = subprocess.run, []

    def only_data_parallel(command, **kwargs):
        commands.append(command)
        wanted = "parallelism=data_parallel" in command
        return run(command if wanted else [sys.executable, "-c", "exit('error: not today')"], **kwargs)

    monkeypatch.setattr(benchmark_runs.subprocess, "run", only_data_parallel)
    results = api.benchmark_multi_gpu_performance(small, inputs(), num_runs=2)
    assert results["none"] == {"ran": False, "reason": "not today"}
    figures = results["data_parallel"]
    assert figures["ran"] and figures["samples_per_run"] == 2 and len(figures["samples_ms"]) == 2
    assert figures["bit_equal"] and set(figures["peak_gib"]) == {"cpu0", "cpu1"}
    assert (Path(figures["record"]) / "record.json").is_file()
    assert "video.height=64" in commands[0] and "video.num_frames=5" in commands[0] and len(commands) == 4


# config_from_guide

EXAMPLE_1 = {
    "model": "wanvideo_14b.safetensors",
    "base_precision": "bf16",
    "load_device": "main_device",
    "parallelism_type": "data_parallel",
    "gpu_ids": "0,1",
    "enable_block_distribution": False,
}
EXAMPLE_2 = EXAMPLE_1 | {
    "parallelism_type": "block_distribution",
    "gpu_ids": "0,1,2,3",
    "enable_block_distribution": True,
}
EXAMPLE_3 = EXAMPLE_1 | {"model": "wanvideo_1_3b.safetensors", "parallelism_type": "none", "gpu_ids": "0"}


@pytest.mark.parametrize(
    ("example", "hardware", "model", "gpus", "rejection"),
    [
        (
            EXAMPLE_1,
            "2x_rtx4090",
            "wan2.1_t2v_14b",
            [0, 1],
            "needs 29.5 GiB on each GPU, 24.0 free",
        ),  # 26.6 + 3.0
        (EXAMPLE_2, "4x_rtx3080", "wan2.1_t2v_14b", [0, 1, 2, 3], ""),  # 7.0 + 2.9 of 10
        (EXAMPLE_3, "1x_rtx4090", "wan2.1_t2v_1.3b", [0], ""),
    ],
)
def test_the_guides_examples_compose_and_are_judged(example, hardware, model, gpus, rejection):
    overrides = api.config_from_guide(example)
    assert f"checkpoint={example['model']}" in overrides
    config = compose_config([*overrides, f"hardware={hardware}"])
    assert config.model.name == model and config.gpus == gpus and config.precision.name == "bf16"
    assert config.parallelism.mode == example["parallelism_type"]
    devices = devices_to_plan(config)
    candidate = judge(config, config.parallelism, devices, [config.hardware.device] * len(devices))
    assert candidate.rejection.startswith(rejection) and bool(candidate.rejection) == bool(rejection)


def test_a_checkpoint_that_is_there_is_asked(small, model_14b, tmp_path):
    config = compose_config(api.config_from_guide({"model": str(small)}))
    assert config.model.architecture == SMALL and config.checkpoint == str(small)
    odd = write_hollow(T2V_1_3B, tmp_path / "it's {a}, 14b = $x.safetensors")  # its name lies
    config = compose_config(api.config_from_guide({"model": str(odd)}))
    assert config.model.name == "wan2.1_t2v_1.3b" and config.checkpoint == str(odd)
    assert api.config_from_guide({"model": "wan2.2_ti2v_5b"}) == ["model=wan2.2_ti2v_5b"]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("wan2.1_flf2v_720p_14B_fp16.safetensors", "wan2.1_flf2v_14b"),
        ("wan2.1_i2v_720p_14B_bf16.safetensors", "wan2.1_i2v_14b_720p"),
        ("wan2.1_i2v_480p_14B_bf16.safetensors", "wan2.1_i2v_14b_480p"),
        ("wan2.2_i2v_a14b_720p.safetensors", "wan2.2_i2v_a14b"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_known_by_its_name(name, model):
    assert f"model={model}" in api.config_from_guide({"model": name})


def test_settings_that_are_left_out_are_left_alone():
    assert api.config_from_guide({}) == []
    assert api.config_from_guide({"enable_block_distribution": True, "gpu_ids": [2, 0]}) == [
        "parallelism=block_distribution",
        "gpus=[2,0]",
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"enable_block_distribution": True, "parallelism_type": "data_parallel"},
            "keeps the model whole on each",
        ),
        (
            {"enable_block_distribution": False, "parallelism_type": "block_distribution"},
            "is false; write true",
        ),
        ({"enable_block_distribution": "yes"}, "write true or false"),
        ({"parallelism_type": "none", "gpu_ids": "0,1"}, "'none' uses one GPU and gpu_ids names 2"),
        ({"parallelism_type": "dataparallel"}, "did you mean data_parallel"),
        ({"load_device": "cuda"}, "load_device 'cuda' does not exist"),
        ({"base_precision": "fp16_fast"}, "base_precision 'fp16_fast' does not exist"),
        ({"gpu_ids": "0,x"}, "gpu_ids is '0,x'"),
        ({"gpu_ids": "0,0"}, "names GPU 0 2 times"),
        ({"gpu_ids": []}, "gpu_ids is empty"),
        ({"gpu_ids": ""}, "gpu_ids is ''"),
        ({"model": "mystery.safetensors"}, "its name does not say which model"),
        ({"model": None}, "model is None"),
        (
            {"gpus": "0", "quantization": 1},
            "unknown settings: gpus .did you mean gpu_ids.., quantization; write only",
        ),
    ],
)
def test_contradictions_and_what_does_not_exist(settings, words):
    with pytest.raises(UserError, match=words):
        api.config_from_guide(settings)


def test_composing_leaves_a_hydra_program_alone():
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from wanexp.config import conf_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        compose_config(["model=tiny"])
        assert GlobalHydra.instance().is_initialized()
    with pytest.raises(UserError, match="does not exist"):
        compose_config(["model=tinny"])


# The guide's examples as experiments


@pytest.mark.parametrize(
    ("name", "mode", "num_gpus", "needed_gib"),
    [
        # 20 blocks of 13.08 + 0.42 of embeddings = 13.5; + 1.6 of activations, 0.3 of the second forward + 0.9
        ("two_rtx4090_14b", "block_distribution", 2, 16.4),
        # 10 blocks of 6.54 + 0.42 = 7.0; + 1.2 (20,280 of 32,760 tokens) + 0.9
        ("four_rtx3080_14b", "block_distribution", 4, 9.1),
        ("one_rtx4090_1.3b", "none", 1, 4.4),  # 2.6 + 0.8 + 0.9
    ],
)
def test_the_experiments_fit_their_machines(name, mode, num_gpus, needed_gib):
    config = compose_config([f"+experiment={name}", "task=plan"])
    assert config.parallelism.mode == mode and config.gpus == list(range(num_gpus))
    devices = cap_memory(devices_to_plan(config), config.hardware)
    candidate = judge(config, config.parallelism, devices, [config.hardware.device] * num_gpus)
    assert candidate.rejection == ""
    assert max(entry.needed for entry in candidate.memory) / 2**30 == pytest.approx(needed_gib, abs=0.1)
