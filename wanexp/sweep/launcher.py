"""The launcher plugin of Hydra that sees all cells of a multirun, and runs them one after another.

Hydra's own launcher composes a job when its turn comes, and reports only the first that failed. This one composes,
checks and forecasts every cell first, puts them in order, leaves out what an earlier invocation has finished, then
runs each whatever becomes of the one before. Each is executed in processes of its own (wanexp/runner.py).

It goes on after anything that happens to a run. It stops where nothing more can be kept (a full disk, a folder that
cannot be written) and where somebody ends it; the same command with resume=true then runs what is missing.
"""

import functools
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, read_write

from wanexp.config import TrackingConfig
from wanexp.config_reading import check_sweep_name
from wanexp.errors import UserError
from wanexp.record import FILE_NAME, Record, read_record
from wanexp.sweep import files, resume
from wanexp.sweep.no_run import Skip, record_of_error
from wanexp.sweep.order import can_run, check_folders, schedule
from wanexp.sweep.run import SweepCell, SweepRun, new_sweep_id, outer_rank
from wanexp.tracking.location import without_password

if TYPE_CHECKING:
    from wanexp.sweep.compose import CellComposer
    from wanexp.sweep.live import LiveSweep


class SweepLauncher(Launcher):
    """Runs the cells of one multirun. `main` calls `finish` once Hydra has handed over all batches."""

    __module__ = "hydra_plugins.wanexp"  # Hydra instantiates plugins of this namespace only
    current: ClassVar["SweepLauncher | None"] = (
        None  # of this process: Hydra makes it, and hands main() nothing back
    )

    def __init__(self) -> None:
        self.runs: list[SweepRun] = []
        self.started = _now()
        self.state, self.reason = "running", ""
        self._owners: dict[Path, SweepRun] = {}  # of the folders, as composed
        self._earlier: list[resume.Earlier] = []
        self._superseded: list[str] = []
        self._lock: files.FolderLock | None = None
        self._compose: CellComposer | None = None
        self._live: LiveSweep | None = None
        self._stack = ExitStack()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take over a multirun, before its folder is made. Raises UserError where there can be no sweep."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self.folder = Path(str(config.hydra.sweep.dir)).absolute()
        self.existed = self.folder.exists()
        self.sweep_id = new_sweep_id(self.folder.name)
        if outer_rank() is not None:
            raise UserError(
                "a sweep starts processes of its own; run it without torchrun, or one run without -m"
            )
        name = OmegaConf.select(config, "sweep_name")
        check_sweep_name(name)
        if config.resume and name is None:
            raise UserError("resume=true continues a sweep by its name; add sweep_name=NAME")
        if files.holds_a_sweep(self.folder) and not config.resume:
            raise UserError(
                f"{self.folder} already holds a sweep; add resume=true to run what it lacks, write another "
                "sweep_name, or delete that folder"
            )
        SweepLauncher.current = self

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose all cells, then run each. Raises UserError, and runs nothing, where a mistake leaves none to run."""
        if self.state != "running":
            return []
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        if self._compose is None:
            from wanexp.sweep.compose import CellComposer  # the planner and its devices are slow to import

            self._compose = CellComposer(self.hydra_context, self.config, self.folder)
        cells = [
            self._compose(list(cell), initial_job_idx + number) for number, cell in enumerate(job_overrides)
        ]
        errors = [cell.error for cell in cells if cell.error is not None]
        if errors and not any(map(can_run, cells)) and not self.runs:
            raise UserError(errors[0] + (" (other cells: other errors)" if len(set(errors)) > 1 else ""))
        runs = schedule(cells, order=str(self.config.sweep_order), repeats=int(self.config.repeats))
        try:
            check_folders(runs, self.folder, self._owners)
        except UserError as error:
            if not self.runs:
                raise
            self.state, self.reason = "stopped", str(error)  # earlier batches have run
            return []
        results: list[JobReturn] = []
        try:
            self._open()
            self._take_over(runs)
            self.runs += runs
            self._write()
            for run in runs:
                if run.record is None and self.state == "running":
                    results += self._run(run)
                    self._write()
        except KeyboardInterrupt:  # between two runs
            self.state = "interrupted"
        except OSError as error:
            self._stop(error)
        except UserError:  # nothing was begun
            raise
        except Exception as error:  # our own mistake
            self.state, self.reason = "stopped", f"{type(error).__name__}: {error}"
            raise
        return results

    def finish(self) -> int:
        """Write `sweep.json` for the last time, print the end table, and return the sweep's exit code."""
        self._stack.close()
        if not self.runs:  # none was begun
            if self.state == "stopped":
                print(f"error: the sweep stopped: {self.reason}", file=sys.stderr)
            return {"stopped": 1, "interrupted": 130}.get(self.state, 0)
        if self.state == "running":
            self.state = "finished"
        try:
            self._write(ended=_now())
        except OSError as error:
            self._stop(error)
        if self._live is not None:
            self._live.end(self.state)
        if self._lock is not None:
            self._lock.release()
        records = [run.record for run in self.runs if run.record is not None]
        from wanexp.terminal.console import Console  # rich is slow to import

        Console().sweep_table(records)
        if records and self.config.sweep_report:
            from wanexp.report.finish import finish_sweep  # matplotlib and mlflow are slow to import

            settings = OmegaConf.to_container(self.config.tracking, resolve=True)
            print(*finish_sweep(self.folder, TrackingConfig(**settings)), sep="\n")  # type: ignore[arg-type]
        missing = sum(run.record is None or run.record.outcome == "interrupted" for run in self.runs)
        if self.state == "stopped":
            print(f"error: the sweep stopped: {self.reason}", file=sys.stderr)
        if missing:
            unnamed = OmegaConf.select(self.config, "sweep_name") is None
            how = f"sweep_name={self.folder.name} resume=true" if unnamed else "resume=true"
            print(f"{missing} of {len(self.runs)} runs are missing; repeat the command with {how}")
        if self.state == "interrupted":
            return 130
        code = sweep_exit_code(record.outcome for record in records)
        return code or (1 if self.state == "stopped" or missing else 0)

    def discard(self) -> None:
        """Remove the folder that Hydra made, where no cell was run in it, and nobody else has begun there since."""
        self._stack.close()
        if self.existed or self.runs:
            return
        if files.holds_a_sweep(self.folder) or (self.folder / files.LOCK_FILE).exists():
            return
        with suppress(OSError):  # not empty, or gone
            (self.folder / "multirun.yaml").unlink(missing_ok=True)
            self.folder.rmdir()

    def _open(self) -> None:
        """Before the first run: lock the folder, see what is in it, begin to show. Raises UserError, OSError."""
        if self._live is not None:
            return
        from wanexp.sweep.live import LiveSweep  # rich is slow to import

        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = files.FolderLock(self.folder)
        except UserError:  # another sweep began in it since `setup`
            self.existed = True
            raise
        notes: list[str] = []
        if files.holds_a_sweep(self.folder):
            self._earlier, document, notes = resume.find_earlier(self.folder)
            self._superseded = [str(run_id) for run_id in document.get("superseded") or []]
            self.sweep_id = resume.earlier_id(document, self._earlier) or self.sweep_id
        live = LiveSweep(self.folder, self.runs, sweep_id=self.sweep_id)
        for note in notes:
            live.note(f"note: {note}")
        self._live = self._stack.enter_context(live)

    def _take_over(self, runs: Sequence[SweepRun]) -> None:
        """Keep what an earlier invocation finished, put aside what is run again, mend MLflow. Raises OSError."""
        if not self._earlier and not self.config.resume:
            return
        taken = {run.folder for run in self.runs}  # by earlier batches
        replaced, self._earlier = resume.take_over(runs, self._earlier, taken)
        self._superseded += [old.run_id for old in replaced if old.run_id]
        self._write()  # with the ids, before the records that have them are out of the way
        for old in replaced:
            resume.set_aside(old)
        from wanexp.tracking import leftovers  # not every sweep needs it

        kept = [(run.record, run.folder) for run in runs if run.record is not None]
        lines = leftovers.complete(kept, self._tracking(runs))
        self._superseded, more = leftovers.remove(self._superseded, self._tracking(runs))
        assert self._live is not None
        for line in [*lines, *more]:
            self._live.note(line)
        self._live.note(f"resumed: {len(kept)} of {len(runs)} runs are finished already")

    def _tracking(self, runs: Sequence[SweepRun]) -> TrackingConfig:
        return next((run.settings.tracking for run in runs if run.settings), TrackingConfig(enabled=False))

    def _run(self, run: SweepRun) -> list[JobReturn]:
        """Run one cell in its folder, with the `.hydra` files that Hydra itself would write. Raises OSError."""
        assert self._live is not None
        run.notes += self._foreign_processes(run)
        run.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(run.folder / files.CELL_FILE, files.cell_document(run))
        with read_write(run.config.hydra.sweep):
            run.config.hydra.sweep.subdir = run.name
        begin = time.monotonic()
        with self._live.showing(run):
            result = run_job(
                hydra_context=self.hydra_context,
                task_function=functools.partial(self._execute, run),
                config=run.config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
            run.seconds = round(time.monotonic() - begin, 2)
        if run.record is None:  # not even the record of an error could be written
            raise result._return_value
        return [result]

    def _execute(self, run: SweepRun, config: DictConfig) -> Record:
        """The run's record, whatever happens: a sweep goes on after a run that fails, not after Ctrl-C."""
        sweep = SweepCell(self.sweep_id, run.index, len(self.runs), run.cell, run.repeat)
        begin = _now()
        try:
            if run.error is not None:
                raise UserError(run.error)
            if reason := run.skip or self._too_big(run):
                raise Skip(reason)
            record: Record = self.task_function(config, sweep=sweep)  # type: ignore[call-arg]
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt):
                self.state = "interrupted"
            if (run.folder / FILE_NAME).is_file():  # this came after it, while MLflow was written
                record = read_record(run.folder)
                assert self._live is not None
                self._live.note(f"note: {run.name}, after its record: {type(error).__name__} {error}".strip())
            else:
                record = record_of_error(error, run, sweep.sweep_id, begin)
                record.write(run.folder)
            if run.error is not None or isinstance(error, Skip):
                self._track(record, run)
        if record.outcome == "interrupted":
            self.state = "interrupted"
        run.record = record
        return record

    def _too_big(self, run: SweepRun) -> str:
        from wanexp.sweep.forecast import too_big

        if run.forecast is None or (run.settings and run.settings.force):
            return ""
        ran_out = [
            (other.name, other.cell, other.forecast)
            for other in self.runs
            if other.record and other.record.outcome == "oom" and other.forecast
        ]
        return too_big(run.cell, run.forecast, ran_out)

    def _track(self, record: Record, run: SweepRun) -> None:
        """A record that the runner has not seen, into MLflow."""
        tracking = self._tracking([run, *self.runs])
        if tracking.enabled:
            from wanexp.tracking.mlflow_store import track

            track(record, run.folder, tracking)

    def _foreign_processes(self, run: SweepRun) -> list[str]:
        """Who else is on the GPUs before the run; during it the runner's sampler looks (hardware/telemetry.py)."""
        devices = [device for device in run.forecast.devices if device.type == "cuda"] if run.forecast else []
        if not devices:
            return []
        from wanexp.hardware.telemetry import foreign_processes

        return [f"{process}; the timings may suffer" for process in foreign_processes(devices)]

    def _stop(self, error: OSError) -> None:
        place = f" ({error.filename})" if error.filename else ""
        self.state, self.reason = "stopped", f"{error.strerror or error}{place}"

    def _write(self, *, ended: str | None = None) -> None:
        entries = [
            files.run_entry(
                files.cell_document(run),
                run.name,
                run.record,
                kept=run.is_kept,
                seconds=run.seconds,
                predicted_s=run.forecast.seconds if run.forecast and run.forecast.needed else None,
            )
            for run in self.runs
        ]
        files.write_json(
            self.folder / files.SWEEP_FILE,
            {
                "schema_version": files.SCHEMA_VERSION,
                "sweep_id": self.sweep_id,
                "name": OmegaConf.select(self.config, "sweep_name"),
                "state": self.state,
                "reason": self.reason,
                "command": ["python", "-m", "wanexp", *map(without_password, sys.argv[1:])],
                "started": self.started,
                "ended": ended,
                "source": self._compose.source if self._compose else None,
                "order": str(self.config.sweep_order),
                "repeats": int(self.config.repeats),
                "superseded": self._superseded,
                "cells": entries + [resume.earlier_entry(old) for old in self._earlier],
            },
        )


def sweep_exit_code(outcomes: Iterable[str]) -> int:
    """0 if every cell is finished or skipped, 130 if one was interrupted, else 1."""
    found = set(outcomes)
    if "interrupted" in found:
        return 130
    return 0 if found <= {"finished", "skipped"} else 1


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
