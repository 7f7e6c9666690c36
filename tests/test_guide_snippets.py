"""Every Python snippet of the guide, word for word but for the import path, with the files that it names."""

import pytest
import torch

from wanexp.errors import CheckpointError
from wanexp.multi_gpu_utils import config_from_guide
from wanexp.parallel.block_distribution import distribute_blocks
from wanexp.wan import load_transformer
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.write_checkpoint import write_model

SETUP = """
from wanexp.multi_gpu_utils import setup_optimal_parallelism, validate_gpu_setup

# Get optimal configuration for your model
config = setup_optimal_parallelism("path/to/your/model.safetensors")
print(f"Recommended config: {config}")

# Validate your GPU setup
is_valid, message = validate_gpu_setup([0, 1, 2])
print(f"Setup valid: {is_valid}")
print(f"Message: {message}")
"""
MANUAL = """
# In your ComfyUI workflow
{
    "parallelism_type": "block_distribution",
    "gpu_ids": "0,1,2,3",
    "enable_block_distribution": True
}
"""
DEBUGGING = """
# Check GPU status
from wanexp.multi_gpu_utils import print_gpu_status
print_gpu_status()

# Validate GPU setup
from wanexp.multi_gpu_utils import validate_gpu_setup
is_valid, message = validate_gpu_setup([0, 1])
print(f"Valid: {is_valid}, Message: {message}")

# Get optimal configuration
from wanexp.multi_gpu_utils import setup_optimal_parallelism
config = setup_optimal_parallelism("model.safetensors")
print(config)
"""
CUSTOM_DISTRIBUTION = """
# Custom block distribution logic
def custom_block_distribution(model, gpu_ids):
    num_blocks = len(model.blocks)
    num_gpus = len(gpu_ids)
    
    # Custom distribution strategy
    for i, block in enumerate(model.blocks):
        target_gpu = gpu_ids[i % num_gpus]  # Round-robin distribution
        block.to(f'cuda:{target_gpu}')
"""  # noqa: W293
MONITORING = """
from wanexp.multi_gpu_utils import monitor_memory_usage

# Start monitoring
monitor_thread = monitor_memory_usage(model, interval=5.0, duration=60.0)

# Your inference code here
# ...

# Monitoring will automatically stop after duration
"""
BENCHMARK = """
from wanexp.multi_gpu_utils import benchmark_multi_gpu_performance

# Benchmark performance
results = benchmark_multi_gpu_performance(model, input_data, num_runs=5)
print(f"Benchmark results: {results}")
"""

SMALL = WanArchitecture(
    dim=128, ffn_dim=256, num_heads=2, num_layers=4, in_channels=16, out_channels=16, text_dim=64, freq_dim=64
)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A small transformer, loaded from the files that the snippets name; the test runs beside them."""
    monkeypatch.chdir(tmp_path)
    number = torch.get_num_threads()
    torch.set_num_threads(1)  # small operators on shared cores: more threads wait for each other
    for path in ("path/to/your/model.safetensors", "model.safetensors"):
        write_model(SMALL, path)
    yield load_transformer("model.safetensors")
    torch.set_num_threads(number)


@pytest.fixture
def input_data():
    generator = torch.Generator().manual_seed(0)
    return {
        "latent": torch.randn(1, 16, 2, 8, 8, generator=generator),
        "timestep": torch.tensor([500.0]),
        "text": torch.randn(1, 8, 64, generator=generator),
    }


def execute(snippet: str, **names: object) -> dict[str, object]:
    exec(compile(snippet, "guide.md", "exec"), names)
    return names


@pytest.mark.parametrize("snippet", [SETUP, DEBUGGING])
def test_setup_and_debugging(model, capsys, snippet):
    names = execute(snippet)
    config = names["config"]
    assert isinstance(config, dict) and config["parallelism_type"] in ("none", "data_parallel")
    assert isinstance(names["is_valid"], bool) and names["message"]
    assert "reason" in capsys.readouterr().out


def test_the_file_has_to_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        execute(SETUP)


def test_manual_configuration():
    execute(MANUAL)
    settings = eval(MANUAL.replace("# In your ComfyUI workflow", "").strip())
    assert config_from_guide(settings) == ["parallelism=block_distribution", "gpus=[0,1,2,3]"]


def test_monitoring(model):
    monitor = execute(MONITORING, model=model)["monitor_thread"]
    assert monitor.is_alive()  # type: ignore[attr-defined]
    monitor.stop()  # type: ignore[attr-defined]
    assert monitor.block_devices == dict.fromkeys(range(4), "cpu")  # type: ignore[attr-defined]


def test_benchmark(model, input_data, capsys):
    results = execute(BENCHMARK, model=model, input_data=input_data)["results"]
    assert isinstance(results, dict) and results["none"]["ran"]
    assert "Benchmark results: {'none'" in capsys.readouterr().out


def test_custom_distribution_is_python():
    assert callable(execute(CUSTOM_DISTRIBUTION)["custom_block_distribution"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_custom_distribution(model, input_data):
    """The snippet moves weights; wanexp's hooks then take the activations to them."""
    model = model.to("cuda:0")
    with torch.no_grad():
        expected = model(**input_data)
        gpu_ids = list(range(torch.cuda.device_count()))
        execute(CUSTOM_DISTRIBUTION)["custom_block_distribution"](model, gpu_ids)  # type: ignore[operator]
        owner = [index % len(gpu_ids) for index in range(len(model.blocks))]
        devices = [torch.device("cuda", index) for index in gpu_ids]
        assert [next(block.parameters()).device for block in model.blocks] == [devices[i] for i in owner]
        model.head.to(devices[owner[-1]])
        distribute_blocks(model, block_owner=owner, devices=devices)
        assert torch.equal(model(**input_data), expected)
