"""One run, from its config to its record: plan, launch, compare, write the record, track.

This is the parent process. It never creates a CUDA context, so nothing that happens to a worker can hurt it.
"""

import dataclasses
import math
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from wanexp.config import RunConfig, conf_dir, to_dict
from wanexp.errors import KernelError, LayoutError, UserError
from wanexp.events import Event
from wanexp.hardware.devices import find_devices, select_devices
from wanexp.hardware.profiles import profile_for
from wanexp.hardware.telemetry import TelemetrySampler
from wanexp.job import Job
from wanexp.measure.environment import host_environment
from wanexp.measure.results import host_warning, latency_metrics, run_metrics, step_seconds
from wanexp.measure.statistics import noise_warning, summarise_samples
from wanexp.planning.plan import LOSSY_ATTENTIONS, Plan, is_lossy_run, parity_tolerance, reference_plan
from wanexp.planning.planner import cap_memory
from wanexp.planning.preflight import Preflight, preflight
from wanexp.planning.sizes import has_wide_residual
from wanexp.record import FILE_NAME, Record
from wanexp.sweep import outer_rank
from wanexp.terminal.console import Console, ProgressReporter
from wanexp.tracking.mlflow_store import track
from wanexp.workloads.schedule import missed_expert_warning

if TYPE_CHECKING:
    from wanexp.launch import Launched
    from wanexp.meeting import Machines
    from wanexp.sweep import SweepCell

# What a rank raises where only trying shows that a named attention kernel cannot run (wan/flash_attention.py)
NO_KERNEL = "CannotRun"


def run(
    config: RunConfig, *, folder: Path, overrides: Sequence[str] = (), sweep: "SweepCell | None" = None
) -> Record:
    """Execute one run and leave its record in `folder`.

    What happens to the run is the record's outcome. Bad input raises UserError: it is no run and leaves no record,
    unless it showed only once ranks had begun. In a sweep it is the cell's outcome instead: `skipped` for a layout that
    makes no sense, or a kernel that the device lacks, else `failed`.
    """
    record = Record(
        run_id=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
        name=f"{config.parallelism.mode} {config.model.name}",
        started=_now(),
        requested=to_dict(config),
        command=["python", "-m", "wanexp", *overrides],
        overrides=list(overrides),
        sweep_id=sweep.sweep_id if sweep else None,
        cell=sweep.cell if sweep else None,
        repeat=sweep.repeat if sweep else None,
    )
    if outer_rank():  # under an outer torchrun rank 0 alone owns the folder, the record and MLflow
        return follow_rank_zero(config, record)
    folder = folder.resolve()
    if sweep is None and (folder / FILE_NAME).exists():
        raise UserError(f"{folder} already holds a run; write another folder, or delete that one")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    try:
        prepared = prepare(config, in_sweep=sweep is not None)
        config = prepared.preflight.config  # parallelism=auto is settled
        if prepared.preflight.note:
            record.warnings.append(f"parallelism=auto: {prepared.preflight.note}")
        console.start_card(config, prepared.plan, weights=config.checkpoint or "random", notes=prepared.notes)
        if prepared.preflight.message and not config.force:
            record.plan = plan_summary(prepared.plan) | prepared.preflight.summary()
            record.effective = effective_settings(config, prepared.plan)
            record.metrics = prepared.preflight.predicted_metrics()
            record.outcome, record.message = "infeasible", prepared.preflight.message
        else:
            execute(config, prepared, record, folder, console)
            if record.outcome == "finished":
                record.message = prepared.remark
    except UserError as error:
        has_begun = bool(record.effective) or outer_rank() is not None
        if not sweep and not has_begun:
            raise
        lacks_kernel = record.error is not None and record.error.get("type") == NO_KERNEL
        is_no_fault = isinstance(error, LayoutError | KernelError) or lacks_kernel
        record.outcome = "skipped" if sweep and is_no_fault else "failed"
        if record.outcome == "skipped":
            record.error = None  # a traceback would look like a fault
        record.message = str(error)
        if not sweep:
            record.ended = _now()
            with suppress(OSError):  # such as a full disk; what the user can mend is said
                record.write(folder)
                _track(record, folder, config, console)
            raise
    except KeyboardInterrupt:
        record.outcome, record.message = "interrupted", "interrupted by a signal"
    except Exception as error:  # our own mistake; what was measured before it stays
        record.outcome, record.message = "failed", f"{type(error).__name__}: {error}"
        record.error = {"rank": None, "type": type(error).__name__, "traceback": traceback.format_exc()}
    finally:
        (folder / "parity.safetensors").unlink(missing_ok=True)
    record.ended = _now()
    try:
        with _signals_ignored():
            path = record.write(folder)
    except OSError as error:  # such as a full disk
        console.end_table(record)
        with suppress(OSError):
            (folder / FILE_NAME).with_suffix(".json.partial").unlink(missing_ok=True)
        if sweep:
            raise  # the sweep says why it stops
        reason = f"cannot write {folder / FILE_NAME}: {error.strerror or error}"
        print(f"error: {reason}; the numbers above are not kept", file=sys.stderr)
        record.outcome, record.message = "failed", reason
        return record
    console.end_table(record, path)
    _track(record, folder, config, console)
    return record


def _track(record: Record, folder: Path, config: RunConfig, console: Console) -> None:
    if config.tracking.enabled:
        console.tracking_lines(track(record, folder, config.tracking).lines)


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """A second Ctrl-C does not cost the record."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that is not Python's


def follow_rank_zero(config: RunConfig, record: Record) -> Record:
    """The part of any other rank under an outer torchrun; what its record says becomes the exit code only."""
    from wanexp.outer_torchrun import follow  # imports torch, so late

    launched = follow(config)
    record.outcome, record.message = launched.outcome, launched.message
    return record


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is known before anything is launched."""

    plan: Plan
    preflight: Preflight
    peak_tflops: float | None  # dense peak of one device in the run's precision
    notes: list[str]
    remark: str = ""  # how less ran than was asked for
    machines: "Machines | None" = None  # under an outer torchrun


def prepare(config: RunConfig, *, in_sweep: bool) -> Prepared:
    """Devices, plan and checks that need no worker. Raises UserError."""
    found = cap_memory(find_devices(config.hardware), config.hardware)
    devices = select_devices(found, config.gpus, config.parallelism.mode, in_sweep=in_sweep)
    remark = ""
    if config.gpus is not None and len(devices) < len(config.gpus):
        remark = f"gpus names {len(config.gpus)} devices; mode none uses the first of them"
    machines = None
    if outer_rank() is not None:
        from wanexp.outer_torchrun import arrive  # imports torch, so late

        machines = arrive(config, devices)
        devices = machines.all_devices
    checked = preflight(
        config,
        devices,
        found,
        lambda device: profile_for(config.hardware, device, conf_dir()),
        host_free_bytes=None if machines else psutil.virtual_memory().available,
    )
    plan = checked.candidate.plan
    assert plan is not None
    if machines is not None:
        from wanexp.meeting import check_machines

        check_machines(plan.layout, machines)
    devices = plan.devices
    if (config.attention, config.kernels) != ("auto", "auto"):
        from wanexp.wan.kernels import check_kernels  # imports torch, so late

        check_kernels(config, devices)
    profile = profile_for(config.hardware, devices[0], conf_dir())
    notes = [remark] if remark else []
    if config.hardware.device and profile and profile.name != config.hardware.device.name:
        notes.append(
            f"hardware={config.hardware.name} describes {config.hardware.device.name}; "
            f"this machine has {devices[0].name}, and that is what is measured"
        )
    if config.checkpoint is not None:
        from wanexp.wan.weights import open_weights  # imports torch, so late

        open_weights(config.checkpoint, config.model.architecture, num_experts=config.model.num_experts)
    # Products of 8 bits have another peak; weights alone in 8 bits are widened, and multiplied in 16.
    in_8_bits = config.precision.linear == "fp8" or config.attention in LOSSY_ATTENTIONS
    in_16_bits = config.precision.dtype in ("bfloat16", "float16") and not in_8_bits
    peak_tflops = profile.bf16_tflops if profile and in_16_bits else None
    return Prepared(plan, checked, peak_tflops, notes, remark, machines)


def execute(config: RunConfig, prepared: Prepared, record: Record, folder: Path, console: Console) -> None:
    """Launch the run and its reference; fill `record` with what came of them."""
    plan = prepared.plan
    record.plan = plan_summary(plan) | prepared.preflight.summary()
    record.effective = effective_settings(config, plan)
    own_devices, nodes = plan.devices, None  # of this machine; the ranks of each, where there are several
    if prepared.machines is not None and len(prepared.machines.names) > 1:
        own_devices, nodes = prepared.machines.devices[0], prepared.machines.ranks
        record.environment["machines"] = dict(prepared.machines.environments)
        if plan.num_gpus:
            record.warnings.append(
                f"telemetry is of {own_devices[0].node} alone, where rank 0 is, and energy is left out"
            )
    record.environment |= host_environment(own_devices)
    job = Job(
        config=config,
        plan=plan,
        folder=folder / "ranks",
        run_folder=folder,
        num_threads=max(1, _usable_cores() // (len(nodes[0]) if nodes else plan.layout.num_ranks)),
        nodes=nodes,
    )
    torchrun = os.getppid() if prepared.machines is not None else None  # below it are the other ranks
    with TelemetrySampler(own_devices, root_pid=torchrun) as telemetry, console.progress() as progress:
        begin = time.time()
        phases: dict[str, float] = {}
        launched = _launch(job, progress, phases)
        record.telemetry = telemetry.series(begin)
        take_results(record, config, prepared, launched)
        if launched.user_error:
            raise UserError(launched.user_error)
        record.samples["phase_s"] = {phase: round(time - begin, 3) for phase, time in phases.items()}
        record.metrics |= prepared.preflight.predicted_metrics()
        record.metrics |= prepared.preflight.error_metrics(record.metrics)
        take_telemetry(record, config, telemetry, launched, has_all_devices=nodes is None)
        if record.outcome == "finished" and "parity_blocks" in launched.reports[0]:
            compare_with_reference(record, job, launched.reports[0]["parity_blocks"], progress)
    leave_out_what_is_not_finite(record)
    record.artifacts = sorted(str(path.relative_to(folder)) for path in folder.glob("profile/*"))


def _launch(job: Job, progress: ProgressReporter, phases: dict[str, float] | None = None) -> "Launched":
    """One launch with its progress shown: that of the rank that is behind. phases: takes when each began."""
    from wanexp.launch import launch  # imports torch, so late
    from wanexp.outer_torchrun import lead, without_outer_torchrun

    whose = "" if job.reference_of is None else "reference: "
    progress.update(f"{whose}start workers", 0, None)
    state: dict[str, dict[int, float]] = {}

    def on_event(event: Event) -> None:
        if event["kind"] == "progress":
            if phases is not None:
                phases.setdefault(event["phase"], event["time"])
            done = state.setdefault(event["phase"], {})
            done[event["rank"]] = event["done"]
            phase = whose + event["phase"]
            progress.update(phase, min(done.values()), event["total"], event.get("memory_gib"))

    if outer_rank() is None:
        return launch(job, on_event=on_event)
    if job.reference_of is None:
        return lead(job, on_event=on_event)
    with without_outer_torchrun():
        return launch(job, on_event=on_event)


def take_results(record: Record, config: RunConfig, prepared: Prepared, launched: "Launched") -> None:
    """Outcome, metrics and samples of the launch; of one that failed halfway, what was measured until then."""
    plan, reports = prepared.plan, launched.reports
    record.outcome, record.message, record.error = launched.outcome, launched.message, launched.error
    steps = step_seconds(launched.steps) if len(launched.steps) == plan.layout.num_ranks else []
    record.metrics = {
        "setup/num_gpus": float(plan.num_gpus),
        "setup/batch_size": float(plan.batch_size),
        **latency_metrics(config, plan, steps),
    }
    record.samples = {
        "step_ms": [seconds * 1000 for seconds in steps],
        "rank_step_ms": {str(rank): [s * 1000 for s in times] for rank, times in launched.steps.items()},
    }
    if len(reports) == plan.layout.num_ranks:
        if record.outcome == "finished" and not all(report["is_finite"] for report in reports.values()):
            what = "a loss is" if config.workload.name == "train" else "the latents are"
            record.outcome = "failed"
            record.message = (
                f"{what} not finite (nan or inf), so times and answers mean nothing; look at the checkpoint, or write "
                "precision=bf16 or precision=fp32"
            )
        record.metrics |= run_metrics(config, plan, reports, peak_tflops=prepared.peak_tflops)
        first = reports[0]
        record.samples["forward_ms"] = [seconds * 1000 for seconds in first["forward_s"]]
        record.samples["losses"] = first["losses"]
        record.effective |= first["effective"]
        record.warnings += first["warnings"]
        record.environment |= first["environment"]
        if warning := host_warning(config, plan, reports):
            record.warnings.append(warning)
    if steps and config.workload.num_warmup_steps == 0:
        record.warnings.append(
            "the first timed step has one-time set-up in it (workload.num_warmup_steps=0), such as the compilation of "
            "kernels"
        )
    if steps and (warning := missed_expert_warning(config)):
        record.warnings.append(warning)
    if steps and (warning := noise_warning(summarise_samples(steps), "the step time")):
        record.warnings.append(warning)


def compare_with_reference(record: Record, job: Job, num_blocks: int, progress: ProgressReporter) -> None:
    """Launch mode none on the first device, and put its distance to the run's answer into the record."""
    config, plan = job.config, job.plan
    total = config.model.architecture.num_layers
    exact = dataclasses.replace(
        config,
        precision=dataclasses.replace(config.precision, linear="dtype"),
        offload=dataclasses.replace(config.offload, blocks="0", load_device="main_device"),
    )
    reference = dataclasses.replace(
        job,
        config=exact,
        attention=exact_kernels(record.effective),
        plan=reference_plan(plan, num_blocks),
        folder=job.run_folder / "reference",
        reference_of=plan.forward_batches,
        num_blocks=None if num_blocks == total else num_blocks,
    )
    launched = _launch(reference, progress)
    if launched.outcome == "interrupted":
        record.outcome, record.message = launched.outcome, launched.message
        return
    if launched.outcome != "finished":
        record.warnings.append(f"the answer was not compared with mode none: {launched.message}")
        if config.verify == "always":
            record.outcome, record.message, record.error = launched.outcome, launched.message, launched.error
        return
    parity = launched.reports[0]
    record.metrics["parity/rel_l2"] = parity["rel_l2"]
    record.metrics["parity/bit_equal"] = float(parity["bit_equal"])
    record.metrics["parity/num_blocks"] = float(num_blocks)
    what = "gradients" if config.workload.name == "train" else "flow"
    share = "all" if num_blocks == total else f"the first {num_blocks} of"
    record.effective["verified"] = f"{what}, {share} {total} blocks"
    tolerance = parity_tolerance(config)
    if not parity["rel_l2"] <= tolerance:
        is_of_precision = tolerance == config.precision.tolerance
        allows = config.precision.name if is_of_precision else f"attention={config.attention}"
        record.outcome = "inexact"
        record.message = (
            f"the {what} differs from mode none by {parity['rel_l2']:.2g} relative L2; "
            f"{allows} allows {tolerance:g}"
        )
    elif plan.must_be_bit_equal(config) and not parity["bit_equal"]:
        record.warnings.append(
            "the answer is within tolerance of mode none but not bit-equal, as it should be here"
        )


def exact_kernels(effective: Mapping[str, Any]) -> tuple[str, str]:
    """The attention kernels of a run, for its reference; of a lossy one the exact twin."""
    own, cross = effective["attention"], effective["cross_attention"]
    return own.removesuffix("_fp8"), cross.removesuffix("_fp8")


def leave_out_what_is_not_finite(record: Record) -> None:
    """A loss or an error of NaN or infinity is no metric; it is said in words."""
    for name, value in sorted(record.metrics.items()):
        if not math.isfinite(value):
            del record.metrics[name]
            record.warnings.append(f"{name} is {value}, and left out of the metrics")


def plan_summary(plan: Plan) -> dict[str, Any]:
    """The plan as it goes into the record."""
    return {
        "layout": plan.layout.degrees(),
        "block_owner": list(plan.block_owner),
        "ranks": [dataclasses.asdict(rank) for rank in plan.ranks],
        "weight_gib": [number / 1024**3 for number in plan.weight_bytes],
    }


def effective_settings(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """What really runs, as far as the plan settles it; the workers add the kernel and the weights."""
    return {
        "mode": plan.mode,
        "layout": plan.layout.degrees(),
        "attention": None,
        "transport": None,
        "precision": config.precision.name,
        "is_lossy": is_lossy_run(config),
        "tolerance": parity_tolerance(config),
        "residual": "float32" if has_wide_residual(config) else config.precision.dtype,
        "device_type": plan.device_type,
        "devices": [{"label": device.label, **dataclasses.asdict(device)} for device in plan.devices],
        "num_gpus": plan.num_gpus,
        "batch_size": plan.batch_size,
        "weights": "random" if config.checkpoint is None else config.checkpoint,
    }


def take_telemetry(
    record: Record,
    config: RunConfig,
    telemetry: TelemetrySampler,
    launched: "Launched",
    *,
    has_all_devices: bool = True,
) -> None:
    """What the GPUs did during the timed steps into the record's metrics, if a rank got as far as these."""
    if window := _window(launched.reports):
        metrics, warnings = telemetry.summarise(*window)
        if not has_all_devices:  # a part would be taken for the run's total
            metrics = {name: value for name, value in metrics.items() if not name.startswith("energy/")}
        record.metrics |= metrics
        record.warnings += warnings
        if "energy/joules" in metrics:
            record.metrics["energy/joules_per_step"] = metrics["energy/joules"] / config.workload.num_steps


def _window(reports: Mapping[int, Mapping[str, Any]]) -> tuple[float, float] | None:
    """Wall-clock begin and end of the timed part over all ranks."""
    windows = [report["window"] for report in reports.values()]
    return (min(w[0] for w in windows), max(w[1] for w in windows)) if windows else None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
