"""The program, `python -m wanexp` or `wanexp`: composes the config, runs it, exits with the outcome's code.

0 finished or skipped, 2 user error (one line on stderr), 130 interrupted, 1 any other. Only what composing
needs is imported here, so that --help and --cfg answer at once.
"""

import errno
import gc
import io
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from importlib.metadata import version
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from wanexp import __version__
from wanexp.compose_errors import explain
from wanexp.config import conf_dir, register
from wanexp.config_reading import to_run_config
from wanexp.errors import RunFailed, UserError
from wanexp.record import FILE_NAME, Record
from wanexp.sweep import SweepCell, outer_rank
from wanexp.sweep.launcher import SweepLauncher, sweep_exit_code
from wanexp.sweep.plugin import register_plugins

OPTIONS_WITH_VALUE = {
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
    "--experimental-rerun",
}
INFO_CHOICES = {"all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}  # of Hydra's --info

# What the system says of a folder that cannot be the run's
UNWRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EROFS,
    errno.ENAMETOOLONG,
}


def main() -> int:
    """Run the command line in `sys.argv` and return the exit code."""
    gc.set_threshold(50_000)  # at 700 it takes a fifth of the time: modules and configs are made, and kept
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: with a record
    sys.argv[1:] = options_first(sys.argv[1:])
    if "--version" in sys.argv[1:]:  # Hydra's would be its own
        print(f"wanexp {__version__}, torch {version('torch')}, hydra {hydra.__version__}")
        return 0
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    SweepLauncher.current = None
    try:
        _check_options(sys.argv[1:])
        with _hydra_raises(), _quiet_outer_ranks():
            code, failure = _run_hydra()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # of composing, or of a sweep that cannot start
        if SweepLauncher.current is not None:
            SweepLauncher.current.discard()
        message = None if wants_traceback else explain(error, sys.argv[1:])
        if message is None and isinstance(error, OSError) and not wants_traceback:  # such as a full disk
            return _system_error(error)
        return _user_error(error, message)
    if failure is not None:  # of the run, where any other error is our own mistake
        if isinstance(failure, OSError) and not wants_traceback:  # such as of a full disk below stdout
            return _system_error(failure)
        is_user_error = isinstance(failure, UserError) and not wants_traceback
        return _user_error(failure, str(failure) if is_user_error else None)
    return code


def options_first(arguments: Sequence[str]) -> list[str]:
    """The same command line with its options before its overrides, the only order that Hydra's parser takes."""
    options, overrides = [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            overrides.append(argument)
        elif argument in (
            "--info",
            "-i",
        ):  # its value may be left out: it would take the first override instead
            value = rest.pop(0) if rest and rest[0] in INFO_CHOICES else "all"
            options.append(f"--info={value}")
        else:
            options.append(argument)
            if argument in OPTIONS_WITH_VALUE and rest:
                options.append(rest.pop(0))
    return options + overrides


def _check_options(arguments: Sequence[str]) -> None:
    """Raise UserError for what Hydra's parser does not take: it would print its whole usage, and exit."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            get_args_parser().parse_args(arguments)
    except SystemExit:
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise UserError(f"{reason}; --help lists the options") from None


def _user_error(error: Exception, message: str | None) -> int:
    if message is None:
        raise error
    print(f"error: {message}", file=sys.stderr)
    return 2


def _system_error(error: OSError) -> int:
    """Print what the system refused: code 2 where another folder helps, 1 for any other, such as a full disk."""
    place, reason = error.filename or "the output", error.strerror or error
    if os.access(place, os.F_OK) and Path(place).is_file() and not os.access(place, os.R_OK):  # a config file
        print(f"error: cannot read {place}: {reason}; make it readable", file=sys.stderr)
        return 2
    if error.errno in UNWRITABLE:
        is_sweep = any(
            argument in ("-m", "--multirun") or argument.startswith("+sweep=") for argument in sys.argv
        )
        key = "hydra.sweep.dir" if is_sweep else "hydra.run.dir"
        advice = f"run where you may write, or set {key}=FOLDER"
        print(f"error: cannot write {place}: {reason}; {advice}", file=sys.stderr)
        return 2
    what = f"cannot write {place}: {reason}" if error.errno == errno.ENOSPC else error
    print(f"error: {what}", file=sys.stderr)
    return 1


def _run_hydra() -> tuple[int, Exception | None]:
    """Let Hydra compose and call `job`, or the sweep launcher do it; the exit code, and what a run raised."""
    records: list[Record] = []
    failures: list[Exception] = []
    own_process = os.getpid()

    def job(config: DictConfig, sweep: SweepCell | None = None) -> Record | None:
        if sweep is not None:  # the launcher takes what it returns or raises
            return _execute(config, sweep)
        if os.getpid() != own_process:  # another launcher's: only what is raised comes back
            record = _execute(config, None)
            if record is not None and record.exit_code():
                raise RunFailed(f"{' '.join(record.overrides)}: {record.outcome}: {record.message}")
            return record
        try:
            if (record := _execute(config, None)) is not None:
                records.append(record)
        except Exception as error:  # Hydra would add lines of its own
            failures.append(error)
        return None

    register()
    register_plugins()
    compose_and_call = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)
    sweep_code = 0
    try:
        compose_and_call()
    finally:
        if SweepLauncher.current is not None:
            sweep_code = SweepLauncher.current.finish()
    code = sweep_code or sweep_exit_code(record.outcome for record in records)
    return code, failures[0] if failures else None


def _execute(config: DictConfig, sweep: SweepCell | None) -> Record | None:
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    record = None
    try:
        run_config = to_run_config(config)
        if sweep is None and (run_config.resume or run_config.repeats > 1):
            raise UserError("resume and repeats need -m and wanexp's own launcher; add -m, or leave them out")
        if run_config.task == "plan":
            from wanexp.plan_task import print_plan  # rich is slow to import

            print_plan(run_config)
            sys.stdout.flush()  # what cannot be written is an error here, not at the interpreter's end
        else:
            from wanexp.runner import run  # torch and rich are slow to import

            overrides = list(hydra_config.overrides.task)
            record = run(run_config, folder=folder, overrides=overrides, sweep=sweep)
        return record
    finally:
        if sweep is None and record is None:
            _discard_empty_run(folder, hydra_config.output_subdir)


def _discard_empty_run(folder: Path, output_subdir: str | None) -> None:
    """Remove the files that Hydra wrote for what came to no run, and of its folders those that are empty then."""
    place = folder / (output_subdir or "")
    if output_subdir and not (folder / FILE_NAME).exists():  # of an earlier run
        for name in ("config.yaml", "hydra.yaml", "overrides.yaml"):
            (place / name).unlink(missing_ok=True)
    for path in (place, folder):
        if not Path.cwd().is_relative_to(path.resolve()):  # hydra.run.dir=.
            with suppress(OSError):  # not empty, or gone
                path.rmdir()


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Have Hydra raise its errors: it would print several lines of its own and exit."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


@contextmanager
def _quiet_outer_ranks() -> Iterator[None]:
    """Under an outer torchrun every process composes, but rank 0 alone owns the run's folder."""
    if not outer_rank():  # None: no torchrun
        yield
        return
    arguments = list(sys.argv)
    with tempfile.TemporaryDirectory(prefix="wanexp-rank-") as folder:
        sys.argv += [f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]
        try:
            yield
        finally:
            sys.argv = arguments


if __name__ == "__main__":
    sys.exit(main())
