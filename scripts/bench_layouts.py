#!/usr/bin/env python
"""Every layout of some GPUs, on several models and sizes, with processes started once for each layout.

A run of the main job starts its processes anew, which is right for one run and dear for fifty. Here each layout starts
once and takes all cases in turn, through the same code (`RankRun`) and into the same records, which import into MLflow
and reports as any other. Mode none runs first, alone on each GPU at the same time: its mean is the base of all ratios,
and its answers are what the others' are compared with.

    python scripts/bench_layouts.py --gpus 0,1 --out docs/results/layouts_2gpus.md
    python scripts/bench_layouts.py --gpus 0,1 --case wan2.1_t2v_1.3b:480p:3 --layout cfg_parallel --out /tmp/one.md
    python scripts/bench_layouts.py --counts 2,4,8 --layout all --budget-s 540 --out docs/results/scaling.md
    python scripts/bench_layouts.py --layout 'block_distribution_interleaved workload.batch_size=2' --out /tmp/two.md

--layout all takes every layout that the planner lists and that fits, hybrids included (weights whole or in shards over
all ranks): what is predicted fastest, then each mode by name, then the products. Layouts of few GPUs run side by side,
each on GPUs of its own. The predictions of all cells are written before anything runs (predictions.json in the folder).
What --budget-s leaves no time for, and cases whose step is predicted longer than --max-step-s, are left out and listed.
--dry-run says what would run, and for how long.

The folder imports (scripts/import_records.py) and reports (scripts/report.py) as a sweep.

A case is model:video:steps[:blocks that are compared[:more overrides]]. Beside each case stands what bf16 itself costs:
the distance between mode none in bf16 and in fp32 over the first blocks (--fp32-blocks). The last line of the output is
the table as JSON.
"""

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from datetime import UTC, datetime
from itertools import repeat
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works without an installation, too
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

from layouts_study import (
    Case,
    Cell,
    batches,
    choose_cells,
    choose_devices,
    parse_case,
    predictions,
    write_sweep,
)
from layouts_table import table_rows, write_table

from wanexp.compose_errors import explain
from wanexp.config import conf_dir, to_dict
from wanexp.errors import LayoutError
from wanexp.hardware.devices import Device
from wanexp.hardware.profiles import profile_for
from wanexp.hardware.telemetry import TelemetrySampler
from wanexp.job import Job
from wanexp.launch import Heard, Launched, launch_ranks, quiet_agent, verdict
from wanexp.measure.environment import host_environment
from wanexp.record import Record
from wanexp.runner import (
    Prepared,
    effective_settings,
    exact_kernels,
    leave_out_what_is_not_finite,
    plan_summary,
    take_results,
    take_telemetry,
)

LAYOUTS = (
    "cfg_parallel",
    "context_parallel",
    "context_parallel_ring",
    "tensor_parallel",
    "block_distribution_interleaved",
    "block_distribution",
    "fsdp",
    "data_parallel",
    "distributed",
)
CASES = (
    "wan2.1_t2v_1.3b:480p:3",
    "wan2.1_t2v_14b:480p:2",
    "wan2.1_t2v_14b:720p:1:4:workload.num_warmup_steps=0",
)


Measured = tuple[str, Path, Record]
"""The name of its case, its folder, and the record, of one run."""


@dataclasses.dataclass
class Told:
    """What the ranks of one job told from `begin` to `end` (wall clock). exit_codes: of its launch, where it failed."""

    heard: Heard
    begin: float
    end: float
    exit_codes: dict[int, int]


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process does of one case. kind: `run`, or `reference` in bf16 or fp32 (leaves an answer only)."""

    job: Job
    rank: int
    kind: str = "run"
    blocks: int | None = None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", help="such as 0,1; default: all (two logical devices on the CPU)")
    parser.add_argument("--case", action="append", help=f"default: {' '.join(CASES)}")
    parser.add_argument(
        "--layout", action="append", help=f"overrides of parallelism, or all; default: {LAYOUTS}"
    )
    parser.add_argument("--counts", help="numbers of GPUs, such as 2,4,8; default: all of --gpus at once")
    parser.add_argument(
        "--budget-s", type=float, default=float("inf"), help="start nothing that would end past this"
    )
    parser.add_argument("--max-step-s", type=float, default=float("inf"), help="leave longer steps out")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and run nothing")
    parser.add_argument(
        "--override", action="append", default=[], help="for every run, such as attention=fa3"
    )
    parser.add_argument("--fp32-blocks", type=int, default=2, help="0: leave the fp32 reference out")
    parser.add_argument("--folder", type=Path, help="where records go; default: multirun/layouts_<time>")
    parser.add_argument(
        "--out", type=Path, required=True, help="Markdown table; a .json is written beside it"
    )
    options = parser.parse_args()

    began = time.time()
    folder = (options.folder or ROOT / "multirun" / f"layouts_{time.strftime('%Y-%m-%d_%H-%M-%S')}").resolve()
    try:
        cases = [parse_case(text, options.override) for text in options.case or CASES]
        devices, counts = choose_devices(cases[0], options.gpus, options.counts)
        cells, too_long = choose_cells(cases, options.layout or LAYOUTS, devices, counts, options.max_step_s)
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    planned = batches(cells, devices)
    if options.dry_run:
        for batch in planned:
            print(f"{max(cell.seconds for cell in batch):4.0f} s  {'; '.join(cell.words for cell in batch)}")
        print(
            f"{sum(max(cell.seconds for cell in batch) for batch in planned):4.0f} s expected beside mode none"
        )
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.json").write_text(json.dumps(predictions(cells), indent=1) + "\n")
    left = [(cell, case, f"its steps take more than {options.max_step_s:g} s") for cell, case in too_long]

    print(f"{len(devices)} devices, {len(cells)} layouts, records in {folder}", flush=True)
    prepare_process()
    most, spawn = max(map(len, planned), default=1), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(most, spawn, initializer=prepare_process) as pool:
        wait([pool.submit(start_server) for _ in range(most)])  # at once: loading torch takes a while
        runs = measure_none(cases, devices, folder, options.fp32_blocks)
        print(f"none: {time.time() - began:.0f} s", flush=True)
        spare = 1.0  # how much longer layouts take than expected
        for number, batch in enumerate(planned):
            begin, expected = time.time(), max(cell.seconds for cell in batch)
            if begin - began + spare * expected > options.budget_s:
                left += [(cell, case, "no time was left") for cell in batch for case in cell.cases]
                continue
            places = [f"{number}{'abcdefgh'[place]}" for place in range(len(batch))]
            for cell, found in zip(
                batch, pool.map(measure_layout, batch, repeat(folder), places), strict=True
            ):
                runs += found
                if not found:
                    left += [(cell, case, "this layout does not suit this case") for case in cell.cases]
            spare = max(0.8 * spare, (time.time() - begin) / expected)
            words = "; ".join(cell.words for cell in batch)
            print(f"{words}: {time.time() - begin:.0f} s, expected {expected:.0f}", flush=True)
            write_results(runs, left, folder, options.out)
    write_results(runs, left, folder, options.out)
    print(options.out.read_text())
    for cell, case, reason in left:
        print(f"left out: {case.name}, {cell.words}: {reason}")
    print(json.dumps(table_rows(runs)))
    return 0 if all(record.outcome == "finished" for *_, record in runs) else 1


def write_results(
    runs: Sequence[Measured], left: Sequence[tuple[Cell, Case, str]], folder: Path, out: Path
) -> None:
    """Table and sweep.json: after every layout, for a call can be cut short."""
    write_table(runs, out)
    command = ["python", "scripts/bench_layouts.py", *sys.argv[1:]]
    write_sweep(folder, command, [(run_folder, record) for _, run_folder, record in runs], left)


def prepare_process() -> None:
    """Of a process that launches: its ranks are forked from one that has torch loaded."""
    multiprocessing.set_forkserver_preload(["wanexp.preload"])
    forkserver.ensure_running()


def start_server() -> None:
    """Returns when the process that ranks are forked from has torch loaded."""
    process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    process.start()
    process.join()


def measure_none(
    cases: Sequence[Case], devices: Sequence[Device], folder: Path, fp32_blocks: int
) -> list[Measured]:
    """Mode none on each device at the same time; each also computes the reference for the sample of its number."""
    from wanexp.planning.plan import RankPlan, is_lossy_run, make_plan

    tasks: list[list[Task]] = [[] for _ in devices]
    runs = []
    for case in cases:
        for number, device in enumerate(devices):
            config = case.config("parallelism=none")  # not which GPU: they are repeats of one cell
            plan = make_plan(config, [device])
            where = folder / f"{case.name} none {device.label}".replace(" ", "_")
            job = Job(config, plan, where / "ranks", where, num_threads=1)
            tasks[number].append(Task(job, 0, blocks=case.blocks))
            runs.append((case, job, number))
            sample = dataclasses.replace(plan, ranks=(RankPlan(0, (0,), number, 1),))
            total = config.model.architecture.num_layers
            for kind, dtype, blocks in (
                ("reference", None, case.blocks or total),
                *(
                    [("bf16", None, fp32_blocks), ("fp32", "fp32", fp32_blocks)]
                    if number == 0 and fp32_blocks
                    else []
                ),
            ):
                # A lossy run is compared with what it stands for; fp32 takes a kernel that can.
                exact = ("parallelism=none", f"precision={dtype or 'bf16'}", "attention=auto")
                asked = case.config(*exact) if dtype or is_lossy_run(config) else config
                place = answer_folder(folder, case, kind, number)
                task_job = Job(
                    asked, sample, place / "ranks", place, num_threads=1, reference_of=(1,), num_blocks=blocks
                )
                tasks[number].append(Task(task_job, 0, "reference"))
    told, telemetry = launch_tasks(tasks, devices)
    return [
        (case.name, job.run_folder, finish_record(case, job, told.get(job.folder), telemetry, [], number))
        for case, job, number in runs
    ]


def measure_layout(cell: Cell, folder: Path, number: str) -> list[Measured]:
    """One layout, all its cases in the same processes; nothing where it suits none of them."""
    from wanexp.planning.plan import make_plan

    tasks: list[list[Task]] = []
    jobs: list[tuple[Case, Job]] = []
    overrides = [*cell.asked.split(), f"gpus=[{','.join(str(device.index) for device in cell.devices)}]"]
    for case in cell.cases:
        config = case.config(*overrides)
        try:
            plan = make_plan(config, cell.devices)
        except LayoutError as error:
            print(f"{case.name}, {cell.words}: {error}")
            continue
        place = folder / f"{case.name} {config.parallelism.mode} {number}".replace(" ", "_")
        job = Job(config, plan, place / "ranks", place, num_threads=1)
        jobs.append((case, job))
        tasks = tasks or [[] for _ in plan.ranks]
        for rank in range(len(plan.ranks)):
            tasks[rank].append(Task(job, rank, blocks=case.blocks))
    if not jobs:
        return []
    told, telemetry = launch_tasks(tasks, cell.devices)
    return [
        (
            case.name,
            job.run_folder,
            finish_record(case, job, told.get(job.folder), telemetry, overrides, None),
        )
        for case, job in jobs
    ]


def launch_tasks(
    tasks: list[list[Task]], devices: Sequence[Device]
) -> tuple[dict[Path, Told], TelemetrySampler]:
    """Run the tasks of each rank; what they told, by the folder of their job, of those that began."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from wanexp.events import EventTail

    for task in (task for of_rank in tasks for task in of_rank):
        task.job.folder.mkdir(parents=True, exist_ok=True)
    exit_codes: dict[int, int] = {}
    with TelemetrySampler(devices) as telemetry, quiet_agent():
        try:
            launch_ranks(len(tasks), run_tasks, tasks)
        except ChildFailedError as error:
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            print("a launch failed:", exit_codes)
    told: dict[Path, Told] = {}
    for job in {task.job.folder: task.job for of_rank in tasks for task in of_rank}.values():
        if events := EventTail(job.folder, range(job.plan.layout.num_ranks)).poll():
            heard = Heard()
            for event in events:
                heard.take(event)
            is_whole = len(heard.reports) == job.plan.layout.num_ranks
            times = [event["time"] for event in events]
            told[job.folder] = Told(heard, min(times), max(times), {} if is_whole else exit_codes)
    return told, telemetry


def run_tasks(tasks_of_ranks: list[list[Task]]) -> None:
    """Entry of a process."""
    import torch

    from wanexp.events import EventLog, log_path
    from wanexp.measure.parity import write_answer
    from wanexp.parallel.groups import Groups
    from wanexp.parallel.peer_memory import release_all
    from wanexp.rank_run import RankRun
    from wanexp.worker import describe_error, prepare_allocator, process_group, torch_device

    class BenchRun(RankRun):
        blocks: int | None = None

        def blocks_to_verify(self) -> int:
            return self.blocks or self.config.model.architecture.num_layers

    tasks = tasks_of_ranks[int(os.environ["RANK"])]
    first = tasks[0]
    log = os.open(log_path(first.job.folder, first.rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)

    def devices_of(task: Task) -> tuple[list[Device], list[torch.device]]:
        owned = [task.job.plan.devices[position] for position in task.job.plan.ranks[task.rank].devices]
        return owned, [torch_device(device) for device in owned]

    prepare_allocator(first.job, *devices_of(first))
    with process_group(first.job.plan, first.rank, devices_of(first)[1][0], timeout_s=120):
        for task in tasks:
            owned, devices = devices_of(task)
            events = EventLog(task.job.folder, task.rank)
            run = BenchRun(task.job, task.rank, owned, devices, events)
            run.blocks = task.blocks
            try:
                if task.kind == "run":
                    events.emit("report", report=run.run())
                else:
                    loaded = run.load(Groups())
                    write_answer(task.job.run_folder, run.reference_answer(loaded.models))
                    kernels_file(task.job.run_folder).write_text(json.dumps(exact_kernels(loaded.effective)))
                    del loaded
            except Exception as error:
                traceback.print_exc()
                sys.stdout.flush()
                events.emit("error", **describe_error(error))
                os._exit(1)
            del run
            gc.collect()
            release_all()
            if devices[0].type == "cuda":
                torch.cuda.empty_cache()


def finish_record(
    case: Case,
    job: Job,
    told: Told | None,
    telemetry: TelemetrySampler,
    overrides: Sequence[str],
    none_number: int | None,
) -> Record:
    """The record of one case, as the main job would write it; `told` is None if it never began."""
    begin, end = (told.begin, told.end) if told else (time.time(),) * 2
    record = Record(
        run_id=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(3).hex()}",
        name=f"{job.config.parallelism.mode} {job.config.model.name}",
        started=datetime.fromtimestamp(begin, UTC).isoformat(timespec="milliseconds"),
        requested=to_dict(job.config),
        command=["python", "scripts/bench_layouts.py"],
        overrides=[f"model={case.model}", f"video={case.video}", *case.overrides, *overrides],
        sweep_id=job.run_folder.parent.name,
        ended=datetime.fromtimestamp(end, UTC).isoformat(timespec="milliseconds"),
    )
    profile = profile_of(job)
    record.plan = plan_summary(job.plan)
    record.effective = effective_settings(job.config, job.plan)
    record.environment = host_environment(job.plan.devices)
    if told:
        launched = verdict(job, told.heard, exit_codes=told.exit_codes)
    else:
        launched = Launched("failed", "not begun: a case before it ended the processes of this layout")
    peak = profile.bf16_tflops if profile else None
    take_results(record, job.config, Prepared(job.plan, judged(job), peak, []), launched)
    if launched.reports:
        preflight = judged(job)
        record.metrics |= preflight.predicted_metrics() | preflight.error_metrics(record.metrics)
        own = telemetry.of(job.plan.devices, begin, end)  # cases share a launch, mode none on each GPU too
        take_telemetry(record, job.config, own, launched)
        record.telemetry = own.series(begin)
        if record.outcome == "finished":
            compare(record, case, job, none_number)
    leave_out_what_is_not_finite(record)
    record.write(job.run_folder)
    return record


def profile_of(job: Job) -> Any:
    return profile_for(job.config.hardware, job.plan.devices[0], conf_dir())


def judged(job: Job) -> Any:
    """The planner's prediction."""
    from wanexp.planning.planner import judge
    from wanexp.planning.preflight import Preflight

    devices = job.plan.devices
    return Preflight(
        job.config, judge(job.config, job.config.parallelism, devices, [profile_of(job)] * len(devices))
    )


def answer_folder(folder: Path, case: Case, kind: str, sample: int) -> Path:
    return folder / "answers" / f"{case.name} {kind} sample{sample}".replace(" ", "_")


def kernels_file(folder: Path) -> Path:
    """The attention kernels that an answer was computed with."""
    return folder / "kernels.json"


def compare(record: Record, case: Case, job: Job, none_number: int | None) -> None:
    """The distance of the run's answer to mode none's, forward by forward; of mode none itself there is none."""
    import torch

    from wanexp.measure.parity import FLOWS, compare_answers, read_answer
    from wanexp.planning.plan import parity_tolerance

    folder = job.run_folder.parent
    if none_number is not None:
        if none_number == 0 and answer_folder(folder, case, "fp32", 0).exists():
            exact, rounded = (read_answer(answer_folder(folder, case, kind, 0)) for kind in ("fp32", "bf16"))
            record.metrics["parity/bf16_to_fp32"] = compare_answers(rounded, exact).rel_l2
        return
    places = [answer_folder(folder, case, "reference", sample) for sample in range(job.plan.batch_size)]
    if missing := [place.name for place in places if not kernels_file(place).exists()]:
        record.warnings.append(f"not compared with mode none: it left no answer in {', '.join(missing)}")
        return
    flows = torch.cat([read_answer(place)[FLOWS] for place in places])
    parity = compare_answers(read_answer(job.run_folder), {FLOWS: flows})
    own = list(exact_kernels(record.effective))
    alike = all(json.loads(kernels_file(place).read_text()) == own for place in places)
    record.metrics["parity/same_kernels"] = float(alike)
    record.metrics["parity/rel_l2"] = parity.rel_l2
    record.metrics["parity/bit_equal"] = float(parity.bit_equal)
    record.metrics["parity/num_blocks"] = float(case.blocks or job.config.model.architecture.num_layers)
    if parity.rel_l2 > parity_tolerance(job.config):
        record.outcome = "inexact"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SignalException as error:  # torch's agent makes it of SIGTERM, and leaves its handlers
        print(f"error: ended by {signal.Signals(error.sigval).name}", file=sys.stderr)
        sys.exit(128 + error.sigval)
