"""A stand-in for pynvml: GPUs whose answers are attributes, and functions that may fail as NVML's do."""

from types import SimpleNamespace
from typing import Any

from wanexp.hardware.devices import Device

GIB = 1024**3


class FakeGpu:
    """Answers of one GPU; an answer of None is NotSupported."""

    def __init__(self, uuid: str, **answers: Any) -> None:
        self.uuid = uuid
        self.answers: dict[str, Any] = {
            "total": 140 * GIB,
            "used": 0,
            "utilization": 80,
            "power_mw": 500_000,
            "energy_mj": 1_000_000,
            "clock": 1980,
            "temperature": 60,
            "reasons": 0,
            "processes": [],
        } | answers


class FakeNvml:
    """The functions of pynvml that wanexp calls. `failing`: why nvmlInit fails."""

    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    NVML_FEATURE_ENABLED = 1
    NVML_P2P_STATUS_OK = 0
    NVML_TOPOLOGY_INTERNAL = 0
    NVML_TOPOLOGY_SINGLE = 10
    NVML_TOPOLOGY_MULTIPLE = 20
    NVML_TOPOLOGY_HOSTBRIDGE = 30
    NVML_TOPOLOGY_NODE = 40
    NVML_TOPOLOGY_SYSTEM = 50
    nvmlMemory_v2 = 2

    class NVMLError(Exception):
        pass

    def __init__(self, *gpus: FakeGpu, failing: str | None = None) -> None:
        self.gpus = {gpu.uuid: gpu for gpu in gpus}
        self.failing = failing
        self.opened = 0

    def nvmlInit(self) -> None:
        if self.failing:
            raise self.NVMLError(self.failing)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def _answer(self, gpu: FakeGpu, name: str) -> Any:
        value = gpu.answers[name]
        if value is None:
            raise self.NVMLError("Not Supported")
        return value() if callable(value) else value

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        if uuid not in self.gpus:
            raise self.NVMLError("Not Found")
        return self.gpus[uuid]

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu, version: int | None = None) -> SimpleNamespace:
        total, used = gpu.answers["total"], self._answer(gpu, "used")
        return SimpleNamespace(total=total, used=used, free=total - used)

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> SimpleNamespace:
        return SimpleNamespace(gpu=self._answer(gpu, "utilization"))

    def nvmlDeviceGetPowerUsage(self, gpu: FakeGpu) -> int:
        return self._answer(gpu, "power_mw")

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: FakeGpu) -> int:
        return self._answer(gpu, "energy_mj")

    def nvmlDeviceGetClockInfo(self, gpu: FakeGpu, _clock: int) -> int:
        return self._answer(gpu, "clock")

    nvmlDeviceGetMaxClockInfo = nvmlDeviceGetClockInfo

    def nvmlDeviceGetTemperature(self, gpu: FakeGpu, _sensor: int) -> int:
        return self._answer(gpu, "temperature")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: FakeGpu) -> int:
        return self._answer(gpu, "reasons")

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[SimpleNamespace]:
        return self._answer(gpu, "processes")

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13000

    def nvmlDeviceGetEnforcedPowerLimit(self, _gpu: FakeGpu) -> int:
        return 700_000

    def nvmlDeviceGetNvLinkState(self, _gpu: FakeGpu, link: int) -> int:
        if link > 3:
            raise self.NVMLError("Invalid Argument")
        return 1

    def nvmlDeviceGetCurrPcieLinkGeneration(self, _gpu: FakeGpu) -> int:
        return 5

    def nvmlDeviceGetMaxPcieLinkGeneration(self, _gpu: FakeGpu) -> int:
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetCurrPcieLinkWidth(self, _gpu: FakeGpu) -> int:
        return 16

    nvmlDeviceGetMaxPcieLinkWidth = nvmlDeviceGetCurrPcieLinkWidth

    def nvmlDeviceGetTopologyCommonAncestor(self, _first: FakeGpu, _second: FakeGpu) -> int:
        return self.NVML_TOPOLOGY_SYSTEM

    def nvmlDeviceGetP2PStatus(self, _first: FakeGpu, _second: FakeGpu, capability: int) -> int:
        assert isinstance(capability, int)
        return 0 if capability == 2 else 5


def gpu_device(index: int, uuid: str | None = None, **changes: Any) -> Device:
    """A Device as find_devices makes it; its UUID is GPU-<index>."""
    fields: dict[str, Any] = {
        "type": "cuda",
        "index": index,
        "name": "NVIDIA H200",
        "total_bytes": 140 * GIB,
        "free_bytes": 139 * GIB,
        "uuid": uuid or f"GPU-{index}",
        "compute_capability": (9, 0),
    }
    return Device(**fields | changes)


def process(pid: int, used: int | None = GIB) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)
