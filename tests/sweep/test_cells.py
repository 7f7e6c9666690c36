"""Fingerprints, forecasts and order: what decides in a sweep. No process, no device."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from tests.conftest import compose_run, cpu_devices
from wanexp import config as config_module
from wanexp.config import to_dict
from wanexp.errors import UserError
from wanexp.hardware.devices import Device
from wanexp.sweep import fingerprint
from wanexp.sweep.forecast import Forecast, Forecaster, is_bigger, too_big
from wanexp.sweep.order import schedule
from wanexp.sweep.run import SweepRun

GIB = 1024**3


def print_of(*overrides: str, source: str = "s", hardware=("h",)) -> str:
    return fingerprint.cell_fingerprint(to_dict(compose_run(*overrides)), source, hardware)


def test_a_fingerprint_is_of_config_code_and_hardware():
    base = print_of()
    assert base == print_of() and len(base) == 16
    different = [
        print_of("seed=1"), print_of("workload.num_steps=9"), print_of("parallelism=data_parallel"),
        print_of(source="other"), print_of(hardware=("other",)),
    ]  # fmt: skip
    assert len({base, *different}) == 6
    same = [
        "sweep_name=x",
        "repeats=3",
        "resume=true",
        "limits.stall_s=9",
        "tracking=mlflow",
        "sweep_order=given",
    ]
    assert print_of(*same) == base, "these change no result"


def test_another_gpu_of_the_same_kind_is_the_same_hardware():
    gpu = Device("cuda", 0, "H200", 100, free_bytes=90, uuid="GPU-1", compute_capability=(9, 0), peers=(1,))
    other = dataclasses.replace(gpu, uuid="GPU-2", free_bytes=10, index=1, peers=(0,))
    identity = fingerprint.hardware_identity
    assert identity([gpu]) == identity([other])
    for change in ({"name": "H100"}, {"total_bytes": 101}, {"peers": ()}):
        assert identity([gpu]) != identity([dataclasses.replace(gpu, **change)])


def test_the_source_counts_by_content(tmp_path, monkeypatch):
    package, conf = tmp_path / "wanexp", tmp_path / "conf"
    for folder, name in ((package, "a.py"), (conf, "b.yaml"), (conf, "note.txt")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    monkeypatch.setattr(fingerprint.wanexp, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(fingerprint, "conf_dir", lambda: conf)
    base = fingerprint.source_digest()
    (conf / "note.txt").write_text("y")
    assert fingerprint.source_digest() == base
    (conf / "b.yaml").write_text("y")
    changed = fingerprint.source_digest()
    (package / "a.py").rename(package / "c.py")
    assert len({base, changed, fingerprint.source_digest()}) == 3


def test_a_checkpoint_counts_by_size_and_time(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345")
    one = fingerprint.checkpoint_identity(str(path))
    path.write_bytes(b"123456")
    assert fingerprint.checkpoint_identity(str(path)) != one
    assert fingerprint.checkpoint_identity(str(tmp_path)) == fingerprint.checkpoint_identity(str(path))
    assert (
        fingerprint.checkpoint_identity(None) == fingerprint.checkpoint_identity(str(tmp_path / "none")) == []
    )


@pytest.mark.parametrize("asked", ["", "transformer", "transformer/model.safetensors.index.json"])
def test_every_file_of_a_checkpoint_counts(tmp_path, asked):
    shard = tmp_path / "transformer" / "model-00001-of-00001.safetensors"
    shard.parent.mkdir()
    shard.write_bytes(b"12345")
    (shard.parent / "model.safetensors.index.json").write_text("{}")
    one = fingerprint.checkpoint_identity(str(tmp_path / asked))
    shard.write_bytes(b"123456")
    assert fingerprint.checkpoint_identity(str(tmp_path / asked)) != one


def test_a_forecast_is_of_the_planner():
    forecast = Forecaster()
    small, large = forecast(compose_run()), forecast(compose_run("video.num_frames=81"))
    assert 0 < small.cost < large.cost and 0 < small.fullest < large.fullest
    two = forecast(compose_run("parallelism=data_parallel", "gpus=[0,1]"))
    assert len(two.devices) == len(two.needed) == 2 and two.cost > small.cost
    first = forecast(compose_run("gpus=[1,0]"))
    assert [device.index for device in first.devices] == [1], "mode none takes the first of several"
    nothing = forecast(compose_run("parallelism=cfg_parallel", "gpus=[0]"))
    assert (nothing.cost, nothing.needed, nothing.plan) == (0.0, (), None)
    with pytest.raises(UserError, match="no device 99"):
        forecast(compose_run("gpus=[0,99]"))


def gpu_forecast(
    needed: int, *, model: str = "m", total: int = 80, seconds: float = 1.0, count: int = 1
) -> Forecast:
    device = Device("cuda", 0, "a GPU", total * GIB, total * GIB)
    return Forecast((device,) * count, (model, "denoise", "a GPU"), seconds, (needed * GIB,) * count)


def test_bigger_is_the_peak_of_the_fullest_device_of_the_same_model():
    oom = gpu_forecast(70)
    assert is_bigger(gpu_forecast(71), oom) and is_bigger(gpu_forecast(71, count=4), oom)
    assert not is_bigger(gpu_forecast(70), oom) and not is_bigger(gpu_forecast(40, count=4), oom)
    assert not is_bigger(gpu_forecast(71, model="other"), oom), "predictions of two models err differently"
    assert not is_bigger(gpu_forecast(71, total=141), oom), "a larger device"
    assert not is_bigger(Forecast(()), oom) and not is_bigger(oom, Forecast(()))
    assert too_big("b", gpu_forecast(71), [("000_none", "a", oom)]).startswith("would need 71 GiB")
    assert too_big("b", gpu_forecast(69), [("000_none", "a", oom)]) == ""
    assert "the same cell" in too_big("a", oom, [("000_none", "a", oom)])


def test_on_the_cpu_all_devices_share_the_memory():
    devices = cpu_devices(2)
    two = Forecast(devices, ("m",), 1.0, (3 * GIB, 3 * GIB))
    assert two.fullest == 6 * GIB and is_bigger(two, Forecast(devices[:1], ("m",), 1.0, (4 * GIB,)))


def cells(tmp_path, *forecasts: Forecast | None) -> list[SweepRun]:
    return [
        SweepRun(n, 1, [], OmegaConf.create({}), None, None, tmp_path / f"{n}", str(n), forecast)
        for n, forecast in enumerate(forecasts)
    ]


@pytest.mark.parametrize(("order", "expected"), [("cheap", [3, 2, 1, 0]), ("given", [0, 1, 2, 3])])
def test_order(tmp_path, order, expected):
    made = cells(
        tmp_path,
        gpu_forecast(9, seconds=5, count=2),
        gpu_forecast(9, seconds=9),
        gpu_forecast(9, seconds=2),
        None,
    )
    runs = schedule(made, order=order, repeats=2)
    assert [run.index for run in runs] == expected + [n for n in expected if n != 3], "A B C D A B C"
    assert [run.repeat for run in runs] == [1] * 4 + [2] * 3, "what cannot run says so once"
    assert len({run.folder for run in runs}) == 7
    assert runs[4].folder.name == f"{runs[4].index}_repeat2"


def test_a_cell_that_comes_to_the_same_as_an_earlier_one_is_not_run(tmp_path):
    made = cells(tmp_path, *(gpu_forecast(9) for _ in range(4)))
    for cell, work in zip(made, ("a", "b", "a", ""), strict=True):
        cell.work = work
    runs = schedule(made, order="given", repeats=2)
    assert [run.skip for run in made] == ["", "", "same layout as 0", ""]
    assert [run.index for run in runs] == [0, 1, 2, 3, 0, 1, 3], "and says so once"


def test_the_orders_are_those_of_the_config():
    assert config_module.SWEEP_ORDERS == ("cheap", "given")
