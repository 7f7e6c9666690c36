from pathlib import Path

import pytest

from tests.hardware.fake_nvml import gpu_device
from wanexp.config import DeviceProfile, HardwareConfig
from wanexp.errors import UserError
from wanexp.hardware.profiles import profile_for

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("nvidia rtx-3080", 59.5),
    ],
)
def test_lookup_by_name(name, tflops):
    profile = profile_for(HardwareConfig(name="auto"), gpu_device(0, name=name), CONF)
    assert profile is not None
    assert profile.bf16_tflops == tflops


@pytest.mark.parametrize("name", ["NVIDIA H2000", "NVIDIA GeForce RTX 4080 SUPER", "logical CPU device of x"])
def test_unknown_devices_have_no_profile(name):
    assert profile_for(HardwareConfig(name="auto"), gpu_device(0, name=name), CONF) is None


def test_given_profile_wins_if_it_is_of_this_device():
    given = DeviceProfile(name="NVIDIA H200", bf16_tflops=800.0)
    hardware = HardwareConfig(name="mine", device=given)
    assert profile_for(hardware, gpu_device(0), CONF) is given
    other = profile_for(hardware, gpu_device(0, name="NVIDIA GeForce RTX 4090"), CONF)
    assert other is not None
    assert other.name == "NVIDIA GeForce RTX 4090"


def test_given_profile_without_a_name_is_taken():
    given = DeviceProfile(bf16_tflops=10.0)
    assert profile_for(HardwareConfig(name="mine", device=given), gpu_device(0), CONF) is given


def test_unreadable_profile(tmp_path):
    folder = tmp_path / "hardware" / "device"
    folder.mkdir(parents=True)
    (folder / "broken.yaml").write_text("name: [")
    with pytest.raises(UserError, match=r"broken.yaml is not a readable device profile"):
        profile_for(HardwareConfig(name="auto"), gpu_device(0), tmp_path)
