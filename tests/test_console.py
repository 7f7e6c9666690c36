"""What a person sees, read as text at 80 and 120 columns."""

import dataclasses
import errno
import io
from typing import Any

import pytest
import rich.console

from tests.hardware.fake_nvml import GIB, gpu_device
from wanexp.config import (
    HardwareConfig,
    ModelConfig,
    ParallelismConfig,
    PrecisionConfig,
    RunConfig,
    VideoConfig,
    WorkloadConfig,
)
from wanexp.guide.configuration import compose_config
from wanexp.hardware.devices import Device
from wanexp.plan_task import devices_to_plan
from wanexp.planning.plan import make_plan
from wanexp.planning.planner import plan_layouts, with_asked
from wanexp.record import Record
from wanexp.terminal import progress as progress_module
from wanexp.terminal.console import Console
from wanexp.terminal.plan_table import print_plan_table
from wanexp.terminal.progress import show_progress
from wanexp.terminal.start_card import block_ranges

GPUS = tuple(gpu_device(index, peers=tuple({0, 1, 2, 3} - {index})) for index in range(4))
CPUS = tuple(Device("cpu", index, "logical CPU device of Xeon", 64 * GIB, 60 * GIB) for index in range(8))
WIDTHS = pytest.mark.parametrize("width", [80, 120])


def config(mode: str = "none", **parallelism: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name="tiny"),
        hardware=HardwareConfig(name="auto"),
        parallelism=ParallelismConfig(mode=mode, **parallelism),
        workload=WorkloadConfig(name="denoise"),
        video=VideoConfig(name="480p", width=832, height=480, num_frames=81),
        precision=PrecisionConfig(name="bf16", dtype="bfloat16", tolerance=0.01),
    )


def record(**fields: Any) -> Record:
    return Record(**{"run_id": "id", "name": "run", "started": "2026-11-22", "requested": {}, **fields})


TO_COPY = (
    "Best for ",
    "Ranked first",
    "Asked for",
    "Would fit",
    "Nothing fits",
)  # lines that are not wrapped


class Screen:
    """A console whose text can be read back; `text` checks what holds for all of them."""

    def __init__(self, width: int = 80) -> None:
        self._file, self._width = io.StringIO(), width
        self.console = Console(file=self._file, width=width)

    def text(self, *, longer: tuple[str, ...] = ()) -> str:
        text = self._file.getvalue()
        assert "\x1b" not in text
        assert "\r" not in text
        for line in text.splitlines():
            assert len(line) <= self._width or line.startswith((*TO_COPY, *longer)), line
        return text

    def rows(self) -> list[list[str]]:
        return [line.strip("\u2502 ").split() for line in self.text().splitlines()]


def card(config: RunConfig, devices: tuple[Device, ...], width: int = 80, **kwargs: Any) -> Screen:
    screen = Screen(width)
    screen.console.start_card(config, make_plan(config, devices), **{"weights": "random", **kwargs})
    return screen


@WIDTHS
def test_card_on_cpu_says_so(width):
    text = card(config(), CPUS[:1], width).text()
    assert "no GPU found: these are logical CPU devices" in text
    assert "29.7 M parameters" in text
    assert "random (seed 0)" in text
    assert "832 x 480, 81 frames (5.1 s at 16 fps), 32,760 tokens" in text
    assert "4 timed steps after 1 warm-up step" in text
    assert "CFG 5 (2 forwards a step)" in text


def test_card_on_cpu_as_asked():
    asked = config()
    asked.hardware.device_type = "cpu"
    text = card(asked, CPUS[:1]).text()
    assert "hardware=cpu: these are logical CPU devices" in text
    assert "no GPU found" not in text


@WIDTHS
def test_card_shows_which_device_holds_what(width):
    screen = card(config("block_distribution", blocks=4), GPUS, width, notes=["verify compares 4 blocks"])
    assert "4 x NVIDIA H200; P2P between all" in screen.text()
    assert "block_distribution: blocks=4, 1 process" in screen.text()
    assert "Note          verify compares 4 blocks" in screen.text()
    blocks = [row[2] for row in screen.rows() if row and row[0].startswith("gpu")]
    assert blocks == ["0-1", "2-3", "4-5", "6-7"]


def test_card_of_replicas():
    replicas = config("data_parallel", dp=2)
    replicas.workload.batch_size = 3
    replicas.workload.guidance_scale = [1.0]
    apart = (gpu_device(0), gpu_device(2, name="NVIDIA H100"))
    screen = card(replicas, apart, weights="models/wan.safetensors")
    text = screen.text()
    assert "3 samples, no CFG (1 forward a step)" in text
    assert "1 x NVIDIA H200, 1 x NVIDIA H100; no P2P between some of them" in text
    assert "models/wan.safetensors" in text
    rows = [row[:4] for row in screen.rows() if row and row[0].startswith("gpu")]
    assert rows == [["gpu0", "0", "0-7", "0-1"], ["gpu2", "1", "0-7", "2"]]


def test_card_of_training():
    training = config()
    training.workload = WorkloadConfig(name="train", num_steps=1)
    assert "train, 1 timed step after 1 warm-up step" in card(training, CPUS[:1]).text()
    assert "1 sample, learning rate 1e-05" in card(training, CPUS[:1]).text()


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ([], "none"),
        ([3], "3"),
        (range(10), "0-9"),
        ([0, 1, 2, 5, 6, 9], "0-2, 5-6, 9"),
        ([0, 4, 8, 12], "0, 4, 8, 12"),
        (range(1, 40, 4), "1, 5, ..., 37"),
    ],
)
def test_block_ranges(blocks, text):
    assert block_ranges(blocks) == text


METRICS = {
    "latency/step_ms": 412.34,
    "latency/step_ms_iqr": 3.14,
    "latency/forward_ms": 205.3,
    "throughput/videos_per_hour": 12.32,
    "throughput/tokens_per_second": 123456.7,
    "memory/peak_allocated_gib": 34.2,
    "memory/gpu0/peak_allocated_gib": 34.2,
    "memory/gpu1/peak_allocated_gib": 33.2,
    "memory/gpu0/peak_reserved_gib": 35.0,
    "memory/rank0/peak_rss_gib": 1.2,
    "telemetry/gpu0/utilization_percent": 51.4,
    "load/seconds": 12.3,
    "load/gib_per_second": 2.31,
    "parity/rel_l2": 0.0012,
    "energy/joules_per_step": 287.0,
    "mfu": 0.413,
    "communication/blocks_gib_per_forward": 0.03125,
}


@WIDTHS
def test_end_table(width):
    screen = Screen(width)
    finished = record(
        outcome="finished",
        effective={
            "attention": "sdpa_flash",
            "is_lossy": True,
            "verified": "flow, all 8 blocks",
            "tolerance": 0.01,
        },
        metrics=METRICS,
        samples={"step_ms": [412.0] * 4},
        warnings=["GPU 0 was throttled by heat in 12 % of the samples"],
        artifacts=["profile/kernels_rank0.txt", "profile/trace_rank0.json.gz", "profile/trace_rank1.json.gz"],
    )
    path = "multirun/runs/" + "x" * 120 + "/record.json"
    screen.console.end_table(finished, path)  # type: ignore[arg-type]
    text = screen.text(longer=("Record",))
    assert "Outcome       finished" in text
    assert "412.3 +- 3.1 ms (median +- IQR, n = 4)" in text
    assert "205.3 ms (median)" in text
    assert "12.3 videos/hour, 123,457 tokens/s" in text
    assert "12.3 s, 2.31 GiB/s" in text
    assert "287 J/step" in text
    assert "41.3 % of the dense peak" in text
    assert "Kernels       attention sdpa_flash" in text
    assert "Exchanged     blocks 32.0 MiB between devices a forward" in text
    assert "relative L2 error 1.2e-03 against mode none" in text
    assert "(lossy; flow, all 8 blocks; tolerance 0.01)" in " ".join(text.split())
    assert "Trace         profile/trace_rank0.json.gz and 1 more" in text
    assert "Warning       GPU 0 was throttled" in text
    assert f"Record        {path}\n" in text  # in one piece
    rows = [line.split() for line in text.splitlines()]
    assert ["gpu0", "34.20", "35.00", "51"] in rows
    assert ["gpu1", "33.20", "-", "-"] in rows
    assert "Hint" not in text


def test_random_weights_are_made_not_loaded():
    screen = Screen()
    screen.console.end_table(record(outcome="finished", metrics=METRICS | {"load/read_gib": 0.0}))
    assert "Loading       weights made in 12.3 s" in screen.text()
    assert "GiB/s" not in screen.text()


def test_end_table_shows_only_what_there_is():
    screen = Screen()
    screen.console.end_table(record(outcome="skipped", message="mode none uses one device"))
    assert screen.text().split() == ["Outcome", "skipped:", "mode", "none", "uses", "one", "device"]


def test_bit_equal_parity():
    screen = Screen()
    screen.console.end_table(
        record(outcome="finished", metrics={"parity/rel_l2": 0.0, "parity/bit_equal": 1.0})
    )
    assert "bit-equal against mode none" in screen.text()


def test_end_table_of_a_failure():
    screen = Screen()
    frames = "\n".join(f"  frame {index} [bold]{'y' * 100}" for index in range(40))
    error = {"rank": 1, "type": "OutOfMemoryError", "traceback": f"Traceback\n{frames}\nCUDA out of memory"}
    screen.console.end_table(record(outcome="oom", message="rank 1 ran out of memory", error=error))
    text = screen.text(longer=("    frame",))
    assert "oom: rank 1 ran out of memory" in text
    assert "Rank 1 failed first (OutOfMemoryError):" in text
    assert "frame 39 [bold]" in text
    assert "frame 10" not in text
    assert "CUDA out of memory" in text
    assert "Hint          spread the weights" in text


def test_a_failure_without_a_traceback_has_no_heading():
    screen = Screen()
    error = {"rank": 1, "type": "ProcessEnded", "traceback": ""}
    screen.console.end_table(record(outcome="crashed", message="rank 1 was killed", error=error))
    assert "rank 1 was killed" in screen.text() and "failed first" not in screen.text()


@pytest.mark.parametrize("outcome", ["infeasible", "oom"])
def test_on_logical_devices_nobody_is_told_to_take_more_of_them(outcome):
    screen = Screen()
    screen.console.end_table(record(outcome=outcome, effective={"device_type": "cpu"}))
    assert "Hint          take a smaller video, batch or model" in screen.text()


def plan_text(width: int, hardware: str, *overrides: str) -> str:
    asked = compose_config(
        ["model=wan2.1_t2v_14b", f"hardware={hardware}", "task=plan", "kernels=torch", *overrides]
    )
    devices = devices_to_plan(asked)
    profiles = [asked.hardware.device] * len(devices)
    planned = with_asked(plan_layouts(asked, devices, profiles), asked, devices, profiles)
    screen = Screen(width)
    print_plan_table(
        screen.console, asked, devices, planned, "" if planned.winner else "write a smaller video"
    )
    return screen.text()


@WIDTHS
def test_plan_table_of_8_gpus_is_a_row_a_mode_and_four_hybrids(width):
    text = plan_text(width, "8x_h100")
    rows = [line for line in text.splitlines() if line.rstrip().endswith(("fits", "best", "no"))]
    assert len(rows) == 12, "8 modes by name and 4 hybrids, each on one line"
    assert rows[0].startswith("hybrid x 8, cfg=2 x ulysses=4 ") and rows[0].rstrip().endswith("best")
    assert sum("x " in row and row.startswith("hybrid") for row in rows) == 4
    assert ("throughput, training" in text) == (width == 120), "what it buys, where there is room"
    assert "more layouts were weighed; plan_json=true has all." in " ".join(text.split())
    assert "Best for latency  kernels=torch parallelism=hybrid parallelism.ulysses=4" in text


@WIDTHS
def test_plan_table_says_why_each_mode_cannot_run(width):
    text = plan_text(width, "4x_rtx3080")
    assert "none: needs 30.2 GiB on gpu0, 10.0 free" in text
    assert "tensor_parallel x 4: needs" in text and "fsdp x 4: needs" in text
    assert "Would fit     write a smaller video" in text and "best" not in text.split("Shown:")[0]


@WIDTHS
def test_plan_table_marks_the_layout_asked_for(width):
    text = plan_text(width, "2x_rtx4090", "parallelism=block_distribution")
    (row,) = (line for line in text.splitlines() if "asked for" in line)
    assert row.startswith("block_distribution x 2  ") and row.rstrip().endswith("fits, asked for")
    assert "Asked for         kernels=torch parallelism=block_distribution 'gpus=[0,1]'" in text


@WIDTHS
def test_plan_table_of_logical_devices_counts_the_host_once_and_claims_no_speed(width, monkeypatch):
    devices = tuple(dataclasses.replace(device, free_bytes=40 * GIB) for device in CPUS)
    monkeypatch.setattr("wanexp.plan_task.find_devices", lambda _: devices)
    text = plan_text(width, "cpu", "parallelism=data_parallel")
    words = " ".join(text.split())
    assert "40.0 GiB free for all" in words and "GPU" not in words and "CUDA" not in words
    assert "needs GiB: predicted peak of all devices, which share this host's memory." in words
    assert "data_parallel x 2: needs 58.7 GiB of host memory, 40.0 free" in words
    (row,) = (line for line in text.splitlines() if "asked for" in line and "x 2" in line)
    assert row.split()[-6:] == ["58.7", "?", "?", "no,", "asked", "for"]
    assert "Ranked first  kernels=torch parallelism=none 'gpus=[0]'" in text and "Best" not in text
    assert "no rates are known for these devices" in words and "best" not in text.split("Shown:")[0]


def test_tracking_lines_stay_whole():
    screen = Screen()
    link = "http://localhost:5000/#/" + "a" * 100
    screen.console.tracking_lines([link, "scripts/mlflow_ui.sh [x]"])
    assert screen.text(longer=("http",)) == f"{link}\nscripts/mlflow_ui.sh [x]\n"


@WIDTHS
def test_sweep_table(width):
    def cell(mode: str, gpus: str, **fields: Any) -> Record:
        overrides = [f"parallelism={mode}", f"gpus={gpus}", "video=480p"]
        requested = {"parallelism": {"mode": mode}, "gpus": [int(gpu) for gpu in gpus[1:-1].split(",")]}
        effective = {"mode": mode, "device_type": "cuda"}
        return record(overrides=overrides, requested=requested, **{"effective": effective, **fields})

    screen = Screen(width)
    metrics = {"latency/step_ms": 8.2, "throughput/videos_per_hour": 1421.2}
    screen.console.sweep_table(
        [
            cell(
                "block_distribution", "[0,1]", outcome="finished", metrics=METRICS | {"parity/bit_equal": 1.0}
            ),
            cell("none", "[0,1]", outcome="skipped", message="mode none uses one device", effective={}),
            cell("data_parallel", "[0]", outcome="finished", metrics=metrics),
        ]
    )
    rows = screen.rows()
    assert ["block_distribution", "2", "finished", "412.34", "12.3", "34.20", "bit-equal"] in rows
    assert ["none", "2", "skipped"] in rows
    assert ["data_parallel", "1", "finished", "8.20", "1,421.2"] in rows
    assert "none, 2 devices: skipped: mode none uses one device" in screen.text()
    assert "video=480p" not in screen.text()  # the same in all cells


@WIDTHS
def test_sweep_table_says_over_how_many_blocks_an_answer_was_compared(width):
    cells = [
        record(
            overrides=[f"parallelism={mode}"],
            requested={"model": {"architecture": {"num_layers": 40}}},
            effective={"mode": mode},
            outcome="finished",
            metrics=METRICS | {"parity/bit_equal": 1.0, "parity/num_blocks": compared},
        )
        for mode, compared in (("block_distribution", 4.0), ("cfg_parallel", 40.0))
    ]
    screen = Screen(width)
    screen.console.sweep_table(cells)
    assert [row[-1] for row in screen.rows() if row and "finished" in row] == ["bit-equal*", "bit-equal"]
    assert "* over the first 4 of 40 blocks" in screen.text().splitlines()
    whole = Screen(width)
    whole.console.sweep_table(cells[1:])
    assert "*" not in whole.text()


def test_sweep_table_breaks_no_name_of_a_mode():
    screen = Screen(80)
    name = "block_distribution_interleaved"
    metrics = METRICS | {"parity/bit_equal": 1.0}
    cell = record(
        overrides=[f"parallelism={name}"],
        effective={"mode": "block_distribution"},
        outcome="finished",
        metrics=metrics,
    )
    screen.console.sweep_table([cell])
    assert name in [row[0] for row in screen.rows() if row]


def test_sweep_table_names_what_differs():
    screen = Screen()
    cells = [
        record(overrides=[f"video={video}"], effective={"mode": "none"}, outcome="finished")
        for video in ("tiny", "480p")
    ]
    screen.console.sweep_table(cells)
    assert "none video=tiny" in screen.text()
    assert "none video=480p" in screen.text()


def test_sweep_table_tells_variants_and_repeats_apart_and_not_how_the_sweep_was_resumed():
    screen = Screen()
    cells = [
        record(overrides=[f"parallelism={chosen}", *more], effective={"mode": "context_parallel"}, **fields)
        for chosen, more, fields in (
            ("context_parallel", [], {}),
            ("context_parallel_ring", ["resume=true", "limits.run_s=9"], {}),
            ("auto", ["resume=true"], {"repeat": 2}),
        )
    ]
    screen.console.sweep_table(cells)
    rows = [row[0] for row in screen.rows() if row and row[0].startswith("context_parallel")]
    assert rows == ["context_parallel", "context_parallel_ring", "context_parallel"]
    assert "repeat 2" in screen.text() and "resume" not in screen.text() and "limits" not in screen.text()


def test_sweep_table_of_nothing():
    empty = Screen()
    empty.console.sweep_table([])
    assert empty.text() == ""


def drive(reporter: progress_module.ProgressReporter) -> None:
    for launch in ("", "reference: "):
        reporter.update(f"{launch}start workers", 0, None)
        for done in range(4):
            reporter.update(f"{launch}load weights", done * GIB, 3 * GIB, 1.5)
            reporter.update(f"{launch}load weights", done * GIB, 3 * GIB, 1.5)
        reporter.update(f"{launch}measure", 1, 4)


def test_plain_progress_is_a_line_a_phase():
    screen = Screen()
    with screen.console.progress() as reporter:
        drive(reporter)
    phases = ["start workers ...", "load weights ...", "measure ..."]
    assert screen.text().splitlines() == [*phases, *(f"reference: {phase}" for phase in phases)]


def test_plain_progress_reports_now_and_then(monkeypatch):
    clock = iter([100.0, 104.0, 110.5, 115.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    screen = Screen()
    with show_progress(screen.console.rich) as reporter:
        for done in range(4):
            reporter.update("measure", done, 8, 7.25)
    assert screen.text().splitlines() == ["measure ...", "measure: 2/8, 10 s, about 32 s left, 7.25 GiB"]


def test_bars_in_a_terminal():
    file = io.StringIO()
    terminal = rich.console.Console(file=file, width=100, force_terminal=True, color_system=None)
    with show_progress(terminal) as reporter:
        drive(reporter)
    last = file.getvalue().rsplit("start workers", 1)[1]
    assert "load weights" in last
    assert "3.00/3.00 GiB" in last
    assert "1.50 GiB" in last
    assert "1/4" in last


def test_bars_survive_ctrl_c():
    file = io.StringIO()
    terminal = rich.console.Console(file=file, width=100, force_terminal=True)
    with pytest.raises(KeyboardInterrupt), show_progress(terminal) as reporter:
        reporter.update("measure", 1, 4)
        raise KeyboardInterrupt
    assert "\x1b[?25h" in file.getvalue()  # the cursor is back


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_reader_that_goes_away_and_a_full_disk_end_the_printing_alone(monkeypatch, error):
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise error

    monkeypatch.setattr("os.dup2", lambda *_: None)  # rich would take pytest's own stdout away
    console = Console(file=Gone(), width=80)
    console.tracking_lines(["a line", "another"])
    assert console.rich.quiet
