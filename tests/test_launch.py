"""Launches that go wrong, with real processes: each ends soon, says who and why, and leaves nobody behind."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests import faults
from tests.conftest import TINY, Composer, cpu_devices
from tests.warm_program import WarmProgram
from wanexp import launch as launch_module
from wanexp import worker
from wanexp.events import EventLog, EventTail, event_path, log_path
from wanexp.job import Job
from wanexp.launch import Launched, launch
from wanexp.planning.plan import make_plan
from wanexp.record import read_record

ROOT = Path(__file__).resolve().parents[1]
OUTER_VARIABLES = ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "HYDRA_FULL_ERROR")


def test_the_agent_meets_in_a_private_folder(monkeypatch: pytest.MonkeyPatch):
    """What it meets through it unpickles: no port."""
    seen = []

    def elastic_launch(config, entry):
        store = Path(config.rdzv_endpoint)
        seen.append((config.rdzv_configs, store.parent, store.parent.stat().st_mode & 0o777))
        return lambda argument: entry(argument)

    monkeypatch.setattr(launch_module, "elastic_launch", elastic_launch)
    launch_module.launch_ranks(2, seen.append, "argument")
    (configs, folder, mode), argument = seen
    assert (configs["store_type"], mode, argument) == ("file", 0o700, "argument")
    assert not folder.exists()


@pytest.fixture
def job(run_config: Composer, tmp_path: Path) -> Job:
    """Two replicas, six steps."""
    return make_job(run_config("parallelism=data_parallel", "gpus=[0,1]", "workload.num_steps=6"), tmp_path)


def make_job(config, folder: Path) -> Job:
    plan = make_plan(config, cpu_devices(len(config.gpus or [0])))
    return Job(config=config, plan=plan, folder=folder / "ranks", run_folder=folder, num_threads=1)


@pytest.fixture
def launch_as(monkeypatch: pytest.MonkeyPatch):
    """Launches a job whose workers have a fault; checks that none of them is left, and how long it took."""

    def call(fault, job: Job, *, within_s: float = 30.0) -> Launched:
        monkeypatch.setattr(launch_module.worker, "main", fault)
        pids: list[int] = []

        def on_event(event) -> None:
            if event["kind"] == "start":
                pids.append(event["pid"])

        begin = time.monotonic()
        launched = launch(job, on_event=on_event)
        assert time.monotonic() - begin < within_s
        assert_gone(pids)
        return launched

    return call


def assert_gone(pids: list[int], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"workers {alive} are left"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def limited(job: Job, **limits: float) -> Job:
    return replace(job, config=replace(job.config, limits=replace(job.config.limits, **limits)))


def test_ranks_do_without_torchs_compiler_where_they_can(run_config, tmp_path):
    """It takes a second or two to import, when a run begins."""
    code = """
import sys
import torch
import wanexp.preload
from wanexp.offload.quantize import quantize_linears
from wanexp.wan.architecture import WanArchitecture
from wanexp.wan.transformer import WanTransformer
with torch.device("meta"):
    model = WanTransformer(WanArchitecture(num_layers=1))
quantize_linears(model, "fp8")
sys.exit(len({"torch._dynamo", "torch.distributed.fsdp", "sympy"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    for overrides, uses_it in (
        (["parallelism=context_parallel", "gpus=[0,1]"], False),
        (["parallelism=distributed", "gpus=[0,1]"], True),
        (["parallelism=fsdp", "gpus=[0,1]"], True),
        (["workload=train"], True),
    ):
        job = make_job(run_config(*overrides), tmp_path)
        assert ("torch._dynamo" in job.modules) is uses_it, overrides


def test_a_launch_that_works_hands_back_every_rank_and_leaves_the_process_as_it_was(job, launch_as):
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in signals]
    launched = launch_as(worker.main, job)
    assert [signal.getsignal(number) for number in signals] == before
    assert (launched.outcome, launched.message, launched.error) == ("finished", "", None)
    assert sorted(launched.reports) == [0, 1]
    for rank in (0, 1):
        assert launched.steps[rank] == launched.reports[rank]["step_s"]
        assert len(launched.steps[rank]) == 6


def test_a_rank_that_raises_is_named_with_its_traceback(job, launch_as):
    launched = launch_as(faults.raises, job)
    assert "ValueError: a fault of the test" in log_path(job.folder, 1).read_text()
    assert "a fault of the test" not in log_path(job.folder, 0).read_text()
    assert launched.outcome == "failed"
    assert launched.message == "rank 1: ValueError: a fault of the test"
    assert launched.error is not None
    assert (launched.error["rank"], launched.error["type"]) == (1, "ValueError")
    assert "faults.py" in launched.error["traceback"] and "second line" in launched.error["traceback"]
    assert len(launched.steps[1]) == 2 and len(launched.steps[0]) in (2, 3), "what was measured is kept"
    assert launched.reports == {}


@pytest.mark.parametrize(
    ("fault", "words"), [(faults.is_killed, "killed by SIGKILL"), (faults.exits, "ended with exit code 3")]
)
def test_a_rank_that_dies_without_a_word_is_named_not_those_that_miss_it(job, launch_as, fault, words):
    launched = launch_as(fault, job)
    assert launched.outcome == "failed"
    assert launched.message.startswith("rank 1 ") and words in launched.message
    assert launched.error is not None and launched.error["rank"] == 1
    assert str(log_path(job.folder, 1)) in launched.message
    assert len(launched.steps[1]) == 2


@pytest.mark.parametrize("fault", [faults.runs_out_of_gpu_memory, faults.runs_out_of_host_memory])
def test_out_of_memory_is_an_outcome_of_its_own(job, launch_as, fault):
    launched = launch_as(fault, job)
    assert launched.outcome == "oom"
    assert launched.error is not None
    assert launched.error["rank"] == (1 if fault is faults.runs_out_of_gpu_memory else 0)


def test_a_stuck_rank_is_named_by_the_stall_limit_though_others_wait_in_a_collective(job, launch_as):
    launched = launch_as(faults.hangs, limited(job, stall_s=2.0))
    assert launched.outcome == "timeout"
    assert "rank 1 fell silent first" in launched.message and "phase 'measure'" in launched.message
    assert "limits.stall_s" in launched.message
    assert {rank: len(steps) for rank, steps in launched.steps.items()} in ({0: 3, 1: 2}, {0: 2, 1: 2})
    for rank, frame in ((0, "barrier"), (1, "faults.py")):
        stacks = log_path(job.folder, rank).read_text()
        assert "Current thread" in stacks and frame in stacks, stacks


def test_limits_hold_where_nobody_reads_the_output(job, monkeypatch):
    def reader_is_gone(_event) -> None:
        raise SystemExit(1)  # as rich does

    monkeypatch.setattr(launch_module.worker, "main", faults.hangs)
    launched = launch(limited(job, stall_s=2.0), on_event=reader_is_gone)
    assert launched.outcome == "timeout" and "rank 1 fell silent first" in launched.message


def test_a_rank_that_hangs_while_loading(job, launch_as):
    launched = launch_as(faults.hangs_while_loading, limited(job, stall_s=2.0))
    assert launched.outcome == "timeout"
    assert "rank 1 fell silent first" in launched.message and "phase 'check links'" in launched.message


def test_workers_that_never_start_end_too(job, launch_as, monkeypatch):
    monkeypatch.setattr(launch_module, "START_LIMIT_S", 2.0)
    launched = launch_as(faults.never_starts, limited(job, stall_s=2.0))
    assert launched.outcome == "timeout"
    assert "in phase 'start'" in launched.message


def test_the_total_limit(job, launch_as):
    launched = launch_as(faults.hangs, limited(job, run_s=5.0))
    assert launched.outcome == "timeout"
    assert re.match(
        r"not done after 5 s \(limits.run_s\); rank \d has shown no sign of life for longest, in phase '",
        launched.message,
    )


def test_events_of_an_earlier_launch_in_the_same_folder_do_not_count(job, launch_as):
    job.folder.mkdir()
    earlier = EventLog(job.folder, 1)
    earlier.emit("start", pid=os.getpid(), host="")  # which nobody may kill
    earlier.emit("step", index=0, seconds=1.0)
    earlier.emit("report", report={})
    launched = launch_as(faults.raises, job)
    assert launched.outcome == "failed" and launched.reports == {}
    assert len(launched.steps[1]) == 2
    assert event_path(job.folder, 1).read_text().count('"start"') == 1


def test_one_rank_alone_that_dies(run_config, tmp_path, launch_as):
    job = make_job(run_config("workload.num_steps=6"), tmp_path)
    launched = launch_as(faults.is_killed_without_peers, job)
    assert (launched.outcome, len(launched.steps[0])) == ("failed", 2)
    assert launched.message.startswith("rank 0 was killed by SIGKILL; was the host out of memory?")


class Command:
    """`python -m wanexp` with too many steps to end by itself, in a process group of its own."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        environment = {key: os.environ[key] for key in os.environ if key not in OUTER_VARIABLES}
        self.folder = folder / "run"
        self.stdout = folder / "output"
        self.process = WarmProgram(
            ["wanexp", *TINY, "workload.num_steps=100000", f"hydra.run.dir={self.folder}", *overrides],
            cwd=folder,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=self.stdout,
            stderr=self.stdout,
        )

    def wait_for_steps(self, number: int = 3) -> list[int]:
        """Process ids of the ranks, once each of the two has done some steps."""
        deadline = time.monotonic() + 60
        while True:
            events = EventTail(self.folder / "ranks", range(2)).poll()
            steps = [event["rank"] for event in events if event["kind"] == "step"]
            if min(steps.count(0), steps.count(1)) >= number:
                return [event["pid"] for event in events if event["kind"] == "start"]
            assert self.process.returncode is None, self.output()
            assert time.monotonic() < deadline, events[-3:]
            time.sleep(0.05)

    def descendants(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]

    def output(self) -> str:
        self.process.wait(timeout=30)
        return self.stdout.read_text()


@pytest.fixture
def command(tmp_path: Path):
    started: list[Command] = []

    def start(*overrides: str) -> Command:
        started.append(Command(tmp_path, *overrides))
        return started[-1]

    yield start
    for one in started:
        if one.process.returncode is None:
            os.killpg(one.process.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_and_keeps_what_was_measured(command, number):
    running = command("parallelism=data_parallel", "gpus=[0,1]")
    ranks = running.wait_for_steps()
    everyone = ranks + running.descendants()
    if number == signal.SIGINT:
        os.killpg(running.process.pid, number)  # as a terminal does: to the workers as well
    else:
        os.kill(running.process.pid, number)
    output = running.output()
    assert running.process.returncode == 130, output
    assert "Traceback" not in output
    record = read_record(running.folder)
    assert (record.outcome, record.message) == ("interrupted", f"interrupted by {number.name}")
    assert record.ended is not None and record.exit_code() == 130
    steps = len(record.samples["step_ms"])
    assert steps >= 3 and record.metrics["latency/num_samples"] == steps
    assert set(record.samples["rank_step_ms"]) == {"0", "1"}
    assert_gone(everyone)


def test_workers_do_not_survive_a_parent_that_is_killed(command):
    running = command("parallelism=data_parallel", "gpus=[0,1]")
    ranks = running.wait_for_steps()
    everyone = ranks + running.descendants()
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait(timeout=30)
    assert_gone(everyone)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_spin_briefly_unless_the_user_says_how(
    given, expected, run_config, tmp_path, monkeypatch
):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    make_job(run_config(), tmp_path).preload()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
