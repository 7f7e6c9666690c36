"""Finding and selecting devices without a GPU: NVML is fake, the probe is a small program of the test."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.hardware.fake_nvml import GIB, FakeGpu, FakeNvml, gpu_device
from wanexp.config import HardwareConfig
from wanexp.errors import UserError
from wanexp.hardware import devices
from wanexp.hardware.devices import find_devices, select_devices

TWO_GPUS = [
    {
        "name": "NVIDIA H200",
        "uuid": uuid,
        "total_bytes": 140 * GIB,
        "compute_capability": [9, 0],
        "peers": [1 - index],
    }
    for index, uuid in enumerate(("bbb", "aaa"))  # torch's order is not NVML's
]


@pytest.fixture(autouse=True)
def no_cuda_visible_devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def probe_with(monkeypatch):
    """Replaces the probing program by `code`."""

    def replace(code: str) -> None:
        devices._probe.cache_clear()
        monkeypatch.setattr(devices, "PROBE_COMMAND", (sys.executable, "-c", code))

    yield replace
    devices._probe.cache_clear()


def two_gpus() -> FakeNvml:
    return FakeNvml(FakeGpu("GPU-aaa", used=10 * GIB), FakeGpu("GPU-bbb", used=50 * GIB))


def prints(**answer: object) -> str:
    document = {"devices": TWO_GPUS, "torch": "2.13.0", "cuda": "13.0"} | answer
    return f"print('noise'); print({json.dumps(json.dumps(document))})"


def auto(**changes: Any) -> HardwareConfig:
    return HardwareConfig(**{"name": "auto", **changes})


def test_no_driver_means_logical_cpu_devices():
    found = find_devices(auto(), nvml=FakeNvml(failing="Driver Not Loaded"))
    assert [device.label for device in found] == [f"cpu{index}" for index in range(8)]
    assert all(device.name.startswith("logical CPU device of ") for device in found)
    assert 0 < found[0].free_bytes <= found[0].total_bytes
    assert len(find_devices(auto(device_type="cpu", num_devices=3))) == 3


def test_cpu_machine_does_not_import_torch():
    code = (
        "import sys; from wanexp.config import HardwareConfig\n"
        "from wanexp.hardware.devices import find_devices\n"
        "find_devices(HardwareConfig(name='cpu', device_type='cpu')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gpus_are_matched_by_uuid(probe_with):
    probe_with(prints())
    nvml = two_gpus()
    first, second = find_devices(auto(), nvml=nvml)
    assert (first.label, first.uuid, first.free_bytes) == ("gpu0", "GPU-bbb", 90 * GIB)
    assert (second.label, second.uuid, second.free_bytes) == ("gpu1", "GPU-aaa", 130 * GIB)
    assert first.peers == (1,)
    assert first.compute_capability == (9, 0)
    assert nvml.opened == 0


def test_mig_slice_keeps_its_own_uuid(probe_with):
    probe_with(prints(devices=[TWO_GPUS[0]]))
    (device,) = find_devices(auto(), nvml=FakeNvml(FakeGpu("MIG-bbb")))
    assert device.uuid == "MIG-bbb"


def test_num_devices_limits_and_must_exist(probe_with):
    probe_with(prints())
    assert len(find_devices(auto(num_devices=1), nvml=two_gpus())) == 1
    with pytest.raises(UserError, match=r"4x_rtx3080 has 4 GPUs, this machine has 2 GPUs.*hardware=auto"):
        find_devices(auto(name="4x_rtx3080", device_type="cuda", num_devices=4), nvml=two_gpus())


def test_cuda_without_gpu_names_the_fix():
    with pytest.raises(UserError, match=r"needs a GPU.*Driver Not Loaded.*hardware=cpu"):
        find_devices(auto(name="1x_h100", device_type="cuda"), nvml=FakeNvml(failing="Driver Not Loaded"))
    with pytest.raises(UserError, match="NVML finds no GPU"):
        find_devices(auto(device_type="cuda"), nvml=FakeNvml())


def test_torch_that_cannot_use_the_gpus_is_not_silent(probe_with, caplog):
    probe_with(prints(devices=[], cuda=None, torch="2.13.0+cpu"))
    assert find_devices(auto(), nvml=two_gpus())[0].type == "cpu"
    assert "2 GPUs that NVML finds are not used: torch 2.13.0+cpu is built without CUDA" in caplog.text


def test_wrong_visible_devices_are_named(probe_with, caplog, monkeypatch):
    probe_with(prints(devices=[]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert find_devices(auto(), nvml=two_gpus())[0].type == "cpu"
    assert "torch 2.13.0 cannot use them with CUDA_VISIBLE_DEVICES='7'" in caplog.text


def test_hidden_gpus_are_meant_to_be(probe_with, caplog, monkeypatch):
    probe_with(prints(devices=[]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_devices(auto(), nvml=two_gpus())[0].type == "cpu"
    assert not caplog.text
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES is ''"):
        find_devices(auto(device_type="cuda"), nvml=two_gpus())


def test_probe_that_crashes_or_hangs(probe_with, monkeypatch):
    probe_with("raise RuntimeError('CUDA driver is broken')")
    with pytest.raises(UserError, match=r"crashed.*RuntimeError: CUDA driver is broken.*hardware=cpu"):
        find_devices(auto(), nvml=two_gpus())
    probe_with("import os; os.abort()")
    with pytest.raises(UserError, match=r"crashed.*exit code -6"):
        find_devices(auto(), nvml=two_gpus())
    probe_with("print('nothing useful')")
    with pytest.raises(UserError, match="crashed"):
        find_devices(auto(), nvml=two_gpus())
    probe_with("import time; time.sleep(60)")
    monkeypatch.setattr(devices, "PROBE_TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match=r"did not answer.*0.2 s"):
        find_devices(auto(), nvml=two_gpus())


def test_the_real_probe_answers():
    devices._probe.cache_clear()
    answer = devices._probe(devices.PROBE_COMMAND, None)
    assert {"devices", "torch", "cuda"} <= answer.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_type": "tpu"}, r"'tpu' does not exist; write one of auto, cuda, cpu"),
        ({"device_type": "cpu", "num_devices": 0}, r"num_devices is 0; write 1 or more"),
    ],
)
def test_bad_hardware(changes, message):
    with pytest.raises(UserError, match=message):
        find_devices(auto(**changes))


def test_select_without_gpus():
    gpus = tuple(gpu_device(index) for index in range(4))
    cpus = find_devices(auto(device_type="cpu"))
    assert select_devices(gpus, None, "none") == gpus[:1]
    assert select_devices(gpus, None, "data_parallel") == gpus
    assert select_devices(cpus, None, "none") == cpus[:1]
    assert select_devices(cpus, None, "block_distribution") == cpus[:2]


def test_select_keeps_the_order_given():
    gpus = tuple(gpu_device(index) for index in range(4))
    assert [device.index for device in select_devices(gpus, [3, 1], "data_parallel")] == [3, 1]


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (
            [0, 2],
            r"gpus=\[0,2\]: there is no device 2; found: 2 GPUs, 0 to 1 \(NVIDIA H200\); write .*0 to 1",
        ),
        ([-1], "there is no device -1"),
        ([0, 1, 0], r"gpus=\[0,1,0\] names device 0 more than once; write gpus=\[0,1\]"),
        ([], r"empty.*write gpus=\[0\]"),
    ],
)
def test_select_errors(gpus, message):
    with pytest.raises(UserError, match=message) as caught:
        select_devices((gpu_device(0), gpu_device(1)), gpus, "data_parallel")
    assert "\n" not in str(caught.value)


def test_select_error_on_cpu_says_how_to_get_more():
    found = find_devices(auto(device_type="cpu", num_devices=2))
    with pytest.raises(
        UserError, match=r"found: 2 logical CPU devices, 0 to 1; .*raise hardware.num_devices"
    ):
        select_devices(found, [2], "none")
