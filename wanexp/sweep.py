"""Sweeps: a launcher plugin of Hydra that sees all cells of a multirun and runs them one after another.

Hydra's own launcher composes a job when its turn comes, and reports only the first that failed. This one
composes and checks every cell first, then runs each whatever becomes of the one before. It keeps `sweep.json`
in the sweep's folder up to date, so that a sweep that is killed leaves what it has. Each cell is executed in
processes of its own (wanexp/runner.py).
"""

import functools
import importlib
import json
import os
import shutil
import sys
import traceback
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from wanexp.config import check_sweep_name, to_run_config
from wanexp.errors import UserError
from wanexp.record import Record

FILE_NAME = "sweep.json"
TABLE_METRICS = (
    "latency/step_ms",
    "latency/forward_ms",
    "throughput/videos_per_hour",
    "memory/peak_allocated_gib",
    "load/seconds",
    "parity/rel_l2",
)


@dataclass(frozen=True)
class SweepCell:
    """Where a run stands in its sweep. `sweep_id` is the name of the sweep's folder."""

    sweep_id: str
    index: int
    count: int


@dataclass
class _Job:
    """A cell on its way: composed, then run. `error` is what makes its config invalid."""

    index: int
    overrides: list[str]
    config: DictConfig
    folder: Path
    error: str | None
    record: Record | None = None


class SweepLauncher(Launcher):
    """Runs the cells of one multirun. `main` calls `finish` once Hydra has handed over all batches."""

    __module__ = "hydra_plugins.wanexp"  # Hydra instantiates plugins of this namespace only
    current: ClassVar["SweepLauncher | None"] = (
        None  # of this process: Hydra makes it, and hands main() nothing back
    )

    def __init__(self) -> None:
        self.jobs: list[_Job] = []
        self.started = _now()
        self.interrupted = False

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take over a multirun, before its folder is made. Raises UserError where there can be no sweep."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self.folder = Path(str(config.hydra.sweep.dir)).absolute()
        self.existed = self.folder.exists()
        if outer_rank() is not None:
            raise UserError(
                "a sweep starts processes of its own; run it without torchrun, or one run without -m"
            )
        check_sweep_name(OmegaConf.select(config, "sweep_name"))
        if (self.folder / FILE_NAME).exists():
            raise UserError(
                f"{self.folder} already holds a sweep; write another sweep_name, or delete that folder"
            )
        SweepLauncher.current = self

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose all cells, then run each. Raises UserError, and runs nothing, where none is valid."""
        if self.interrupted:
            return []
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = [
            self._compose(list(cell), initial_job_idx + number) for number, cell in enumerate(job_overrides)
        ]
        errors = [job.error for job in jobs if job.error is not None]
        if errors and len(errors) == len(jobs) and not self.jobs:
            raise UserError(errors[0] + (" (other cells: other errors)" if len(set(errors)) > 1 else ""))
        self.jobs += jobs
        self._write()
        results = []
        for job in jobs:
            results.append(self._run(job))
            self._write()
            if self.interrupted:
                break
        return results

    def finish(self) -> int:
        """Write `sweep.json` for the last time, print the end table, and return the sweep's exit code."""
        if not self.jobs:
            return 0
        self._write(ended=_now())
        records = [job.record for job in self.jobs if job.record is not None]
        from wanexp.console import Console  # rich is slow to import

        Console().sweep_table(records)
        return 130 if self.interrupted else sweep_exit_code(record.outcome for record in records)

    def discard(self) -> None:
        """Remove the folder that Hydra made, where no cell was run in it."""
        if not self.existed and not self.jobs:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _compose(self, overrides: list[str], index: int) -> _Job:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(index)
            config.hydra.job.num = index
        task_config = _without_hydra(config)
        hydra_config = HydraConfig.instance()
        outer, error = hydra_config.cfg, None
        hydra_config.set_config(config)  # for ${hydra:...}
        try:
            folder = self.folder / str(config.hydra.sweep.subdir)
            to_run_config(task_config)
        except UserError as invalid:
            error = str(invalid)
        finally:
            hydra_config.cfg = outer
        own = list(config.hydra.overrides.task)
        return _Job(index=index, overrides=own, config=config, folder=folder, error=error)

    def _run(self, job: _Job) -> JobReturn:
        """Run one cell in its folder, with the `.hydra` files that Hydra itself would write."""
        return run_job(
            hydra_context=self.hydra_context,
            task_function=functools.partial(self._execute, job),
            config=job.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _execute(self, job: _Job, config: DictConfig) -> Record:
        """The cell's record, whatever happens: a sweep goes on after a cell that fails, not after Ctrl-C."""
        cell = SweepCell(self.folder.name, job.index, len(self.jobs))
        begin = _now()
        try:
            if job.error is not None:
                raise UserError(job.error)
            record: Record = self.task_function(config, sweep=cell)  # type: ignore[call-arg]
        except (Exception, KeyboardInterrupt) as error:
            record = _record_of_error(error, job, config, cell, begin)
            record.write(job.folder)
        self.interrupted |= record.outcome == "interrupted"
        job.record = record
        return record

    def _write(self, *, ended: str | None = None) -> None:
        write_sweep(
            self.folder,
            {
                "sweep_id": self.folder.name,
                "name": OmegaConf.select(self.config, "sweep_name"),
                "started": self.started,
                "ended": ended,
                "cells": [_cell_entry(job, self.folder) for job in self.jobs],
            },
        )


def register_launcher() -> None:
    """Make the launcher known to Hydra, under the name in `conf/hydra/launcher/wanexp.yaml`.

    Hydra finds a plugin's class by importing its name, which must lie in the namespace `hydra_plugins`. So a
    module of that name is made here; a folder of that name would be loaded by every Hydra program around.
    """
    Plugins.instance().register(SweepLauncher)
    try:
        namespace = importlib.import_module("hydra_plugins")
    except ImportError:
        namespace = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        namespace.__path__ = []
    module = ModuleType(SweepLauncher.__module__)
    vars(module)["SweepLauncher"] = SweepLauncher
    vars(namespace)["wanexp"] = sys.modules[module.__name__] = module


def outer_rank() -> int | None:
    """This process's rank where a torchrun started it, else None."""
    if "RANK" in os.environ and ("WORLD_SIZE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ):
        return int(os.environ["RANK"])
    return None


def sweep_exit_code(outcomes: Iterable[str]) -> int:
    """0 if every cell is finished or skipped, 130 if one was interrupted, else 1."""
    found = set(outcomes)
    if "interrupted" in found:
        return 130
    return 0 if found <= {"finished", "skipped"} else 1


def write_sweep(folder: Path, document: dict[str, Any]) -> None:
    """Write `sweep.json`, whole or not at all."""
    path = folder / FILE_NAME
    draft = path.with_suffix(".json.partial")
    draft.write_text(json.dumps(document, indent=1) + "\n")
    draft.replace(path)


def _cell_entry(job: _Job, sweep_folder: Path) -> dict[str, Any]:
    """A cell in `sweep.json`; outcome null: not run yet."""
    record = job.record
    return {
        "index": job.index,
        "overrides": job.overrides,
        "folder": os.path.relpath(job.folder, sweep_folder),
        "outcome": record.outcome if record else None,
        "name": record.name if record else None,
        "message": record.message if record else "",
        "metrics": {key: record.metrics[key] for key in TABLE_METRICS if key in record.metrics}
        if record
        else {},
    }


def _record_of_error(
    error: BaseException, job: _Job, config: DictConfig, cell: SweepCell, begin: str
) -> Record:
    """The record of a cell that never became a run."""
    requested = OmegaConf.to_container(config, resolve=False)
    model, mode = (OmegaConf.select(config, key) for key in ("model.name", "parallelism.mode"))
    record = Record(
        run_id=uuid.uuid4().hex,
        name=f"{model} {mode}",
        started=begin,
        ended=_now(),
        requested=json.loads(json.dumps(requested), parse_constant=str),  # "Infinity": JSON has none
        overrides=job.overrides,
        sweep_id=cell.sweep_id,
        message=str(error),
    )
    if isinstance(error, KeyboardInterrupt):
        record.outcome, record.message = "interrupted", "interrupted by Ctrl-C"
    elif not isinstance(error, UserError):  # our own mistake, so keep where it happened
        record.message = f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
        record.error = {"rank": None, "type": type(error).__name__, "traceback": trace}
    return record


def _without_hydra(config: DictConfig) -> DictConfig:
    task_config = config.copy()
    with open_dict(task_config):
        del task_config["hydra"]
    return task_config


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
