"""What is shown of a sweep: states, counts, time left, the table in a terminal, progress.json."""

import io
import json
import os
from pathlib import Path

import rich.console
from omegaconf import OmegaConf

from tests.conftest import cpu_devices
from tests.hardware.fake_nvml import GIB, FakeGpu, FakeNvml, gpu_device
from wanexp.events import EventLog
from wanexp.record import Record
from wanexp.sweep.forecast import Forecast
from wanexp.sweep.live import LiveSweep, _Gpus, counts, labels, sweep_table, time_left
from wanexp.sweep.run import SweepRun


def make_run(folder: Path, index: int, outcome: str = "", *, cell: str = "", seconds: float | None = None):
    run = SweepRun(
        index, 1, [f"seed={index}"], OmegaConf.create({}), None, None, folder / f"00{index}_none_1gpu"
    )
    run.cell, run.seconds = cell or str(index), seconds
    run.forecast = Forecast(cpu_devices(2), needed=(1, 1))
    if outcome:
        run.record = Record(
            "id", "none tiny", "now", {}, outcome=outcome, message="why" * (outcome != "finished")
        )
        run.record.metrics = {"latency/step_ms": 12.5, "memory/peak_allocated_gib": 1.25}
    return run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_counts_put_every_run_in_one_place():
    states = ["finished", "skipped", "oom", "timeout", "running", "waiting", "waiting"]
    assert counts(states) == {"finished": 1, "skipped": 1, "failed": 2, "running": 1, "waiting": 2}


def test_time_left_knows_earlier_repeats_and_the_mean(tmp_path):
    runs = [
        make_run(tmp_path, 0, "finished", cell="a", seconds=10),
        make_run(tmp_path, 1, "finished", cell="b", seconds=30),
        make_run(tmp_path, 2, "skipped", cell="x", seconds=0),
        make_run(tmp_path, 3, cell="a"),
        make_run(tmp_path, 4, cell="c"),
    ]
    assert time_left(runs, None, 0.0) == 10 + 20
    assert time_left(runs, runs[3], 4.0) == 6 + 20
    assert time_left(runs, runs[3], 40.0) == 20, "late, not early"
    assert time_left(runs[2:], None, 0.0) is None
    runs[4].forecast = Forecast(cpu_devices(2))
    assert time_left(runs, None, 0.0) == 10, "a cell that cannot run takes no time"


def test_the_name_of_a_run_says_what_the_sweep_varies(tmp_path):
    runs = [make_run(tmp_path, index) for index in range(2)]
    for run, kernel in zip(runs, ("sdpa_flash", "fa3"), strict=True):
        run.overrides = ["model=tiny", "parallelism=none", f"attention={kernel}"]
    assert list(labels(runs).values()) == [
        "000_none_1gpu attention=sdpa_flash",
        "001_none_1gpu attention=fa3",
    ]


def test_progress_json_tells_the_phase_of_the_run_under_way(tmp_path):
    runs = [make_run(tmp_path, 0, "finished", seconds=2.0), make_run(tmp_path, 1), make_run(tmp_path, 2)]
    out = io.StringIO()
    (runs[1].folder / "ranks").mkdir(parents=True)
    with LiveSweep(tmp_path, runs, sweep_id="s-3f9a1c", stdout=out) as live:
        with live.showing(runs[1]):
            EventLog(runs[1].folder / "ranks", 0).progress("measure", 3, 4)
            live._keep_progress()
            progress = json.loads((tmp_path / "progress.json").read_text())
            runs[1].record, runs[1].seconds = make_run(tmp_path, 1, "oom").record, 3.0
        live.end("interrupted")
    assert progress["counts"] == {"finished": 1, "skipped": 0, "failed": 0, "running": 1, "waiting": 1}
    current = progress["current"]
    assert (current["folder"], current["phase"], current["done"], current["total"]) == (
        "001_none_1gpu", "measure", 3, 4
    )  # fmt: skip
    assert (progress["sweep_id"], progress["pid"]) == ("s-3f9a1c", os.getpid())
    assert 2 < progress["eta_s"] <= 4 and progress["memory_gib"] == {}
    after = json.loads((tmp_path / "progress.json").read_text())
    assert (after["state"], after["current"], after["counts"]["failed"]) == ("interrupted", None, 1)
    text = out.getvalue()
    assert (
        "run 2 of 3: 001_none_1gpu seed=1, about 4 s left" in text
        and "001_none_1gpu: oom after 3 s: why" in text
    )
    assert "\x1b" not in text, "no control codes where there is no terminal"


def test_a_terminal_gets_one_table_and_the_runs_own_words_go_to_a_file(tmp_path, capsys):
    runs = [make_run(tmp_path, 0, "finished", seconds=2.0), make_run(tmp_path, 1)]
    out = Terminal()
    with LiveSweep(tmp_path, runs, sweep_id="s", stdout=out) as live, live.showing(runs[1]):
        print("what the run says")
    assert "what the run says" in (runs[1].folder / "console.log").read_text()
    assert "what the run says" not in out.getvalue() + capsys.readouterr().out
    assert "001_none_1gpu" in out.getvalue() and "waiting" in out.getvalue()


def test_the_table_shows_states_figures_and_memory(tmp_path):
    runs = [
        make_run(tmp_path, 0, "finished", seconds=65),
        make_run(tmp_path, 1, "oom"),
        make_run(tmp_path, 2),
    ]
    runs[0].is_kept = True
    snapshot = {
        "counts": counts(["finished", "oom", "running"]),
        "eta_s": 7330.0,
        "current": {"phase": "warm-up", "done": 1, "total": 2, "seconds": 9.0},
        "memory_gib": {"gpu0": 71.25},
        "notes": ["GPU 0 is also used by process 7 (python, 3.0 GiB); the timings may suffer"],
    }
    console = rich.console.Console(file=io.StringIO(), width=100)
    console.print(sweep_table(runs, runs[2], snapshot))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "finished earlier",
        "1:05 min",
        "oom",
        "running: warm-up",
        "50 %",
        "12.5",
        "1.25",
        "about 2:02 h left",
    ):
        assert words in text, words
    assert "gpu0 71.2 GiB in use" in text and "used by process 7" in text


def test_80_columns_hold_the_longest_name_and_every_number(tmp_path):
    runs = [make_run(tmp_path, 0, "finished", seconds=65), make_run(tmp_path, 1)]
    runs[1].folder = tmp_path / "001_block_distribution_interleaved_2gpus"
    runs[0].overrides = runs[1].overrides = []
    runs[0].record.metrics["latency/step_ms"] = 18260.4
    current = {"phase": "probe attention", "done": 1, "total": 2, "seconds": 90.0}
    snapshot = {"counts": counts([]), "eta_s": None, "current": current, "memory_gib": {}, "notes": []}
    console = rich.console.Console(file=io.StringIO(), width=80)
    console.print(sweep_table(runs, runs[1], snapshot))
    rows = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["000_none_1gpu", "finished", "18,260", "1.25", "1:05", "min"] in rows
    assert ["001_block_distribution_interleaved_2gpus", "running:", "probe", "1:30", "min"] in rows


def test_a_large_sweep_shows_the_rows_around_the_run_under_way(tmp_path):
    runs = [make_run(tmp_path, index) for index in range(100)]
    snapshot = {"counts": counts([]), "eta_s": None, "current": None, "memory_gib": {}, "notes": []}
    console = rich.console.Console(file=io.StringIO(), width=100)
    console.print(sweep_table(runs, runs[50], snapshot | {"current": {
        "phase": "start", "done": None, "total": None, "seconds": 0.0}}))  # fmt: skip
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0050_none" in text and "0010_none" not in text and "0090_none" not in text


def test_memory_in_use_comes_from_nvml():
    nvml = FakeNvml(FakeGpu("GPU-0", used=3 * GIB))
    gpus = _Gpus(nvml)
    gpus.watch([gpu_device(0), *cpu_devices(1)])
    assert gpus.used_gib() == {"gpu0": 3.0}
    gpus.close()
    assert gpus.used_gib() == {} and nvml.opened == 0
    missing = _Gpus(FakeNvml(failing="no driver"))
    missing.watch([gpu_device(0)])
    assert missing.used_gib() == {}
