"""The sampler against a fake NVML."""

import os
import subprocess
import sys
import threading
import time
from itertools import count

import psutil
import pytest

from tests.hardware.fake_nvml import GIB, FakeGpu, FakeNvml, gpu_device, process
from wanexp.hardware import telemetry
from wanexp.hardware.devices import Device
from wanexp.hardware.telemetry import TelemetrySampler, foreign_processes, integrate, interpolate

CPU = Device("cpu", 0, "logical CPU device of x", 8 * GIB, 8 * GIB)


def filled(nvml: FakeNvml, num_samples: int = 11, interval_s: float = 0.25) -> TelemetrySampler:
    """A sampler of gpu0 whose series are those of seconds 100.0, 100.25, ... instead of the clock's."""
    sampler = TelemetrySampler([gpu_device(0)], interval_s, nvml=nvml)
    readers = telemetry._readers(nvml, nvml.gpus["GPU-0"])
    for name, read in readers.items():
        samples = [(100 + index * interval_s, read()) for index in range(num_samples)]
        sampler._series[f"gpu0/{name}"] = [(t, value) for t, value in samples if value is not None]
    sampler._series = {name: samples for name, samples in sampler._series.items() if samples}
    return sampler


def counting(start: int, step: int):
    numbers = count(start, step)
    return lambda: next(numbers)


def test_samples_in_a_thread():
    nvml = FakeNvml(FakeGpu("GPU-0", used=3 * GIB), FakeGpu("GPU-1"))
    start = time.time()
    with TelemetrySampler([gpu_device(0), gpu_device(1)], 0.01, nvml=nvml) as sampler:
        time.sleep(0.2)
    assert nvml.opened == 0
    assert not any(thread.name == "telemetry" for thread in threading.enumerate())
    series = sampler.series(start)
    assert len(series) == 16
    assert len(series["gpu0/power_w"]) >= 5
    seconds, watts = series["gpu0/power_w"][0]
    assert 0 <= seconds < 0.2
    assert watts == 500.0
    metrics, _ = sampler.summarise(start, time.time())
    assert metrics["memory/gpu0/nvml_used_gib"] == 3.0
    assert metrics["memory/gpu1/nvml_used_gib"] == 0.0
    assert metrics["telemetry/gpu1/utilization_percent"] == 80.0
    sampler.stop()  # a second time
    part = sampler.of([gpu_device(1)], start, time.time())
    assert {name.partition("/")[0] for name in part.series(start)} == {"gpu1"}
    assert {name.split("/")[1] for name in part.summarise(start, time.time())[0] if "/gpu" in name} == {
        "gpu1"
    }
    assert not any(sampler.of([gpu_device(1)], 0, start - 1).series(start).values()), "before it was started"
    assert len(sampler.series(start)) == 16


def test_window_by_hand():
    nvml = FakeNvml(
        FakeGpu(
            "GPU-0",
            energy_mj=counting(7_000_000, 100_000),
            temperature=counting(50, 1),
            used=counting(0, GIB),
        )
    )
    sampler = filled(nvml)  # 100 J and 1 C more every 0.25 s, from 100.0 to 102.5
    metrics, warnings = sampler.summarise(100.6, 101.9)
    assert metrics["energy/joules"] == pytest.approx(400 * 1.3)
    assert metrics["telemetry/gpu0/temperature_max_c"] == 57
    assert metrics["telemetry/gpu0/power_w"] == 500
    assert metrics["telemetry/gpu0/sm_clock_mhz"] == 1980
    assert metrics["memory/gpu0/nvml_used_gib"] == 10  # of the whole run
    assert not warnings
    assert sampler.series(100.0)["gpu0/energy_j"][:2] == [[0.0, 0.0], [0.25, 100.0]]


def test_energy_falls_back_to_power_and_is_not_guessed():
    sampler = filled(FakeNvml(FakeGpu("GPU-0", energy_mj=None)))
    assert sampler.summarise(100.6, 101.9)[0]["energy/joules"] == pytest.approx(500 * 1.3)
    assert "energy/joules" not in sampler.summarise(100.6, 100.9)[0]  # too short for samples 0.25 s apart
    assert "energy/joules" not in sampler.summarise(100.6, 110.0)[0]  # not covered
    assert (
        "energy/joules"
        not in filled(FakeNvml(FakeGpu("GPU-0", energy_mj=None, power_mw=None))).summarise(101, 102)[0]
    )


def test_what_the_gpu_cannot_tell_is_left_out():
    nothing = dict.fromkeys(
        ("utilization", "power_mw", "energy_mj", "clock", "temperature", "reasons", "used")
    )
    with TelemetrySampler([gpu_device(0)], 0.01, nvml=FakeNvml(FakeGpu("GPU-0", **nothing))) as sampler:
        time.sleep(0.05)
    assert sampler.series(0.0) == {}
    assert sampler.summarise(0.0, time.time()) == ({}, [])


def test_throttling_by_heat_warns_and_by_power_does_not():
    hot = iter([0x40 if index < 3 else 0x04 for index in range(22) for _ in range(1)])
    sampler = filled(FakeNvml(FakeGpu("GPU-0", reasons=0x04)))
    assert sampler.summarise(100.0, 102.5)[1] == []
    assert sampler.summarise(100.0, 102.5)[0]["telemetry/gpu0/power_cap_percent"] == 100
    metrics, warnings = filled(FakeNvml(FakeGpu("GPU-0", reasons=lambda: next(hot)))).summarise(100.0, 102.5)
    assert metrics["telemetry/gpu0/thermal_throttle_percent"] == pytest.approx(100 * 3 / 11)
    assert warnings == ["GPU 0 was throttled by heat in 27 % of the samples"]


def test_cpu_devices_and_no_nvml_are_harmless():
    with TelemetrySampler([CPU]) as sampler:
        pass
    assert sampler.series(0.0) == {}
    assert sampler.summarise(0.0, 1.0) == ({}, [])
    with TelemetrySampler([gpu_device(0)], nvml=FakeNvml(failing="Driver Not Loaded")) as sampler:
        pass
    assert sampler.summarise(0.0, 1.0) == ({}, ["no telemetry of the GPUs: NVML: Driver Not Loaded"])
    with TelemetrySampler([gpu_device(0)], nvml=FakeNvml(FakeGpu("GPU-7"))) as sampler:
        pass
    assert sampler.summarise(0.0, 1.0)[1] == ["no telemetry of gpu0: NVML does not know it"]


def test_a_broken_sampler_ends_quietly():
    def broken():
        raise OSError("gone")

    nvml = FakeNvml(FakeGpu("GPU-0", power_mw=broken))
    with TelemetrySampler([gpu_device(0)], 0.01, nvml=nvml) as sampler:
        time.sleep(0.05)
    assert sampler.summarise(0.0, 1.0)[1] == ["telemetry ended early: OSError: gone"]
    assert nvml.opened == 0


def test_foreign_processes_are_those_of_others():
    gpu = FakeGpu("GPU-0", processes=[process(os.getpid()), process(1, 5 * GIB)], used=6 * GIB)
    (found,) = foreign_processes([gpu_device(0)], {os.getpid()}, nvml=FakeNvml(gpu))
    assert (found.device, found.pid, found.used_gib) == ("gpu0", 1, 5.0)
    assert str(found).startswith("GPU 0 is also used by process 1 (")
    assert "5.0 GiB" in str(found)


def test_foreign_memory_tells_where_processes_are_hidden():
    (found,) = foreign_processes([gpu_device(0)], nvml=FakeNvml(FakeGpu("GPU-0", used=30 * GIB)))
    assert str(found) == "30.0 GiB of GPU 0 are in use by processes that this container cannot see"
    assert foreign_processes([gpu_device(0)], nvml=FakeNvml(FakeGpu("GPU-0", used=GIB // 2))) == []
    assert foreign_processes([gpu_device(0)], nvml=FakeNvml(failing="none")) == []
    assert foreign_processes([CPU], nvml=FakeNvml()) == []


def test_newcomers_count_but_workers_do_not(monkeypatch):
    monkeypatch.setattr(telemetry, "FOREIGN_INTERVAL_S", 0.02)
    gpu = FakeGpu("GPU-0")
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    worker = subprocess.Popen(command)
    outside = max(pid for pid in psutil.pids()) + 10_000  # a number that means nothing here
    try:
        with TelemetrySampler([gpu_device(0)], 0.01, nvml=FakeNvml(gpu)) as sampler:
            time.sleep(0.03)
            gpu.answers["processes"] = [process(worker.pid), process(outside), process(1)]
            time.sleep(0.15)
    finally:
        worker.kill()
        worker.wait()
    _, warnings = sampler.summarise(0.0, 1.0)
    assert len(warnings) == 1
    assert "process 1 (" in warnings[0]
    assert "may suffer" in warnings[0]


def test_interpolate_and_integrate_by_hand():
    samples = [(0.0, 0.0), (1.0, 10.0), (3.0, 30.0)]
    assert [interpolate(samples, t) for t in (-1, 0, 0.5, 2, 9)] == [0, 0, 5, 20, 30]
    assert integrate(samples, 0, 3) == pytest.approx(45)
    assert integrate(samples, 0.5, 2) == pytest.approx((5 + 10) / 2 * 0.5 + (10 + 20) / 2)
