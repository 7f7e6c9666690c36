import json
import subprocess
import sys

import pytest

from tests.hardware.fake_nvml import FakeGpu, FakeNvml, gpu_device
from wanexp.hardware.devices import Device
from wanexp.measure import environment
from wanexp.measure.environment import (
    git_state,
    host_environment,
    p2p_state,
    relevant_variables,
    torch_environment,
)

CPU = Device("cpu", 0, "logical CPU device of x", 1, 1)


def test_host_environment_on_cpu_is_json_without_torch():
    found = host_environment([CPU])
    assert json.loads(json.dumps(found)) == found
    assert {"wanexp", "git", "python", "packages", "host", "variables"} <= found.keys()
    assert found["packages"]["torch"]
    assert found["packages"]["triton"] is None or found["packages"]["triton"][0].isdigit()
    assert found["host"]["memory_gib"] > 0
    assert "gpus" not in found
    code = (
        "import sys; from wanexp.measure.environment import host_environment; host_environment([]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_host_environment_of_gpus():
    nvml = FakeNvml(FakeGpu("GPU-0"), FakeGpu("GPU-1"))
    found = host_environment([gpu_device(0, peers=(1,)), gpu_device(1), gpu_device(5)], nvml=nvml)
    assert nvml.opened == 0
    assert json.loads(json.dumps(found)) == found
    assert (found["driver"], found["driver_cuda"]) == ("580.65.06", "13.0")
    first = found["gpus"]["gpu0"]
    assert (first["uuid"], first["power_limit_w"], first["nvlinks_active"]) == ("GPU-0", 700.0, 4)
    assert (first["pcie_generation"], first["pcie_max_generation"], first["peers"]) == (5, None, [1])
    assert first["compute_capability"] == "9.0"
    link = {"ancestor": "between NUMA nodes", "p2p_read": False, "p2p_nvlink": True}
    assert found["topology"] == {"gpu0-gpu1": link}
    assert "power_limit_w" not in found["gpus"]["gpu5"]  # NVML does not know it


def test_host_environment_without_nvml():
    found = host_environment([gpu_device(0)], nvml=FakeNvml(failing="Driver Not Loaded"))
    assert found["nvml_error"] == "NVML: Driver Not Loaded"
    assert found["gpus"]["gpu0"]["name"] == "NVIDIA H200"


def test_torch_environment():
    found = torch_environment()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"]["version"]
    assert {"cuda", "cudnn", "nccl", "num_threads"} <= found["torch"].keys()
    assert found.keys().isdisjoint(host_environment([gpu_device(0)], nvml=FakeNvml(FakeGpu("GPU-0"))))


def test_variables_without_secrets():
    variables = {
        "NCCL_DEBUG": "INFO",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_HOME": "https://ada:pass@host/x",
        "TORCH_API_TOKEN": "hunter2",
        "NCCL_secret_x": "hunter2",
        "OMP_NUM_THREADS": "1",
        "OMP_NUM_THREADS_X": "1",
        "HF_TOKEN": "hunter2",
        "MY_NCCL_X": "1",
        "HOME": "/root",
    }
    found = relevant_variables(variables)
    assert "hunter2" not in str(found)
    assert "pass" not in str(found)
    assert found["TORCH_HOME"] == "https://host/x"
    assert found["TORCH_API_TOKEN"] == "***"
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert found.keys().isdisjoint({"HF_TOKEN", "MY_NCCL_X", "HOME", "OMP_NUM_THREADS_X"})


def test_git_state(tmp_path, monkeypatch):
    assert git_state(tmp_path) is None

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(("git", "-C", tmp_path, *identity, *arguments), check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first", "--no-verify")
    state = git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "new").write_text("1")
    assert git_state(tmp_path) == state
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == state | {"dirty": True}
    assert git_state(tmp_path / "new") is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert git_state(tmp_path) is None


def test_package_versions(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("rich", "no-such-package"))
    packages = host_environment([])["packages"]
    assert packages["rich"]
    assert packages["no-such-package"] is None


@pytest.mark.parametrize(
    ("peers", "variables", "state"),
    [
        (((1,), (0,)), {}, "on"),
        (((1,), (0,)), {"NCCL_P2P_DISABLE": "0"}, "on"),
        (((1,), (0,)), {"NCCL_P2P_DISABLE": "1"}, "off between processes: NCCL_P2P_DISABLE=1"),
        (((1,), (0,)), {"NCCL_P2P_LEVEL": "LOC"}, "off between processes: NCCL_P2P_LEVEL=LOC"),
        (((), ()), {}, "off between gpu0-gpu1"),
        (((),), {"NCCL_P2P_DISABLE": "1"}, None),
    ],
)
def test_peer_to_peer_that_is_switched_off_is_recorded(peers, variables, state):
    gpus = [Device("cuda", index, "a GPU", 0, 0, peers=others) for index, others in enumerate(peers)]
    assert p2p_state(gpus, variables) == state
