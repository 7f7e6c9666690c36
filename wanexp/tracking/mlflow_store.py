"""A record as one MLflow run.

MLflow is a view of records: whatever goes wrong here is a line to print, never an error, and an import later
mends it. Only the parent process comes here, after record.json was written. mlflow is imported late: it takes
seconds.
"""

import functools
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import yaml

from wanexp.config import TrackingConfig
from wanexp.errors import UserError
from wanexp.record import FILE_NAME, Record
from wanexp.tracking import describe
from wanexp.tracking.client import import_client, locked, one_line, open_experiment, page_lines, store_options
from wanexp.tracking.database import RunRows, can_write, has_tag, write_run
from wanexp.tracking.location import (
    is_http,
    resolve_uri,
    run_link,
    server_answers,
    sqlite_path,
    tool_command,
    without_password,
)
from wanexp.tracking.markdown import description
from wanexp.tracking.view import quoted

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

STATUS = {"finished": "FINISHED", "skipped": "FINISHED", "interrupted": "KILLED"}  # any other outcome: FAILED
RECORD_TAG = "wanexp.run_id"
COMPLETE_TAG = "wanexp.logged"  # set last: a run without it is half of one
METRICS_PER_CALL, PARAMS_PER_CALL = 899, 100  # MLflow's limits: 100 params, 1000 values of all kinds
LOGS = ("console.log", "ranks/*.log", "reference/*.log")  # with hydra.run.dir=. there are others
MAX_LOG_BYTES = 1 << 20  # larger logs of ranks stay in the run's folder
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast


@dataclass
class Tracked:
    """What became of a record.

    run_url: the run's page, None where nothing was stored or the store has no page. lines: to print.
    state: `logged`, `present` (it was there already), `off` (tracking.enabled=false) or `failed`.
    """

    run_url: str | None = None
    lines: list[str] = field(default_factory=list)
    state: str = "failed"


def track(record: Record, folder: Path, tracking: TrackingConfig, *, many: bool = False) -> Tracked:
    """Store `record`, whose files are in `folder`, as one MLflow run. Raises nothing.

    To be called once record.json exists. A record that is in the experiment already is left alone; half of
    one (after a crash, or when a server went away) is replaced. many: one of many; a database gets it as rows.
    """
    folder = folder.absolute()
    if not tracking.enabled:
        return Tracked(None, [f"MLflow: off. {_how_to_import(folder, tracking)}"], "off")
    try:
        return _track(record, folder, tracking, resolve_uri(tracking.uri), many)
    except ImportError as error:
        name = (error.name or "mlflow").partition(".")[0]
        problem = f"{name} is not installed; pip install mlflow"
    except UserError as error:
        problem = str(error)
    except Exception as error:  # of mlflow, its database, the network: the record is safe, so the run goes on
        problem = one_line(error)
    return Tracked(None, [f"MLflow has no copy of this run: {problem}", _how_to_import(folder, tracking)])


def _track(record: Record, folder: Path, tracking: TrackingConfig, uri: str, many: bool) -> Tracked:
    shown = without_password(uri)
    if is_http(uri) and (problem := server_answers(uri, tracking.timeout_s)):
        raise UserError(f"the server {shown} does not answer ({problem})")
    client_class = import_client()
    database = sqlite_path(uri)
    if database:
        import alembic  # noqa: F401  (mlflow-skinny comes without them, and its own message misleads)
        import sqlalchemy  # noqa: F401
    with locked(database) if database else nullcontext():
        client = client_class(tracking_uri=uri)
        experiment_id = open_experiment(client, tracking.experiment, database)
        as_rows = many and can_write(uri) and _local_artifacts(uri, experiment_id)
        if as_rows and not has_tag(uri, RECORD_TAG, record.run_id):
            present = None
        else:
            present = _find(client, experiment_id, record.run_id)
        if present:
            url = run_link(uri, experiment_id, present)
            return Tracked(
                url, [f"MLflow: this run is in {shown} already", *page_lines(uri, url, tracking)], "present"
            )
        if as_rows:
            run_id, lines = _write_rows(uri, experiment_id, as_rows, record, folder)
        else:
            run_id = client.create_run(
                experiment_id,
                start_time=_start_ms(record),
                tags=tags_with_note(record, folder),
                run_name=describe.run_name(record),
            ).info.run_id
            lines = _fill(client, run_id, record, folder, alive=lambda: _alive(uri, tracking.timeout_s))
    url = run_link(uri, experiment_id, run_id)
    head = f"MLflow: experiment {tracking.experiment} in {shown}"
    return Tracked(url, [head, *page_lines(uri, url, tracking), *lines], "logged")


def _fill(client: "MlflowClient", run_id: str, record: Record, folder: Path, *, alive: Any) -> list[str]:
    """Log everything into a fresh run and end it, whatever happens. Returns warnings."""
    end = describe.end_ms(record) or None
    try:
        lines = _log_files(client, run_id, record, folder)
        _log_values(client, run_id, record)
        client.set_terminated(run_id, _status(record), end)
    except BaseException as error:
        # A run that is left RUNNING stays so for ever. A server that went away would only cost time here.
        if alive():
            try:
                client.set_tag(run_id, "wanexp.tracking_error", one_line(error)[: describe.MAX_TAG])
                client.set_terminated(run_id, "FAILED", end)
            except Exception as second:
                logging.getLogger(__name__).debug("the run could not be ended: %s", second)
        raise
    return lines


def _write_rows(
    uri: str, experiment_id: str, location: str, record: Record, folder: Path
) -> tuple[str, list[str]]:
    """The run with its files, written past MLflow: its id, and warnings. location: of the experiment's artifacts."""
    run_id = uuid.uuid4().hex
    artifact_uri = f"{location.rstrip('/')}/{run_id}/artifacts"
    place = Path(unquote(urlsplit(artifact_uri).path))
    place.mkdir(parents=True)
    try:
        _write_record_files(record, place)
        files, lines = artifact_files(record, folder)
        for relative in files:
            (place / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / relative, place / relative)
        rows = RunRows(
            run_id,
            experiment_id,
            artifact_uri,
            name=describe.run_name(record),
            status=_status(record),
            start_ms=_start_ms(record),
            end_ms=describe.end_ms(record) or round(time.time() * 1000),
            tags={**tags_with_note(record, folder), COMPLETE_TAG: "complete"},
            params=describe.params_of(record),
            points=describe.points_of(record),
        )
        write_run(uri, rows)
    except BaseException:
        shutil.rmtree(place.parent, ignore_errors=True)
        raise
    return run_id, lines


@functools.cache  # an experiment never moves
def _local_artifacts(uri: str, experiment_id: str) -> str:
    """Where the experiment keeps its artifacts, if in a folder of this machine; else empty."""
    location = str(import_client()(tracking_uri=uri).get_experiment(experiment_id).artifact_location or "")
    return location if urlsplit(location).scheme in ("", "file") else ""


def _status(record: Record) -> str:
    return STATUS.get(record.outcome, "FAILED")


def _start_ms(record: Record) -> int:
    return describe.start_ms(record) or round(time.time() * 1000)


def tags_with_note(record: Record, folder: Path) -> dict[str, str]:
    """The record's tags and its description."""
    command = tool_command("rerun.py", "wanexp.rerun", folder / FILE_NAME)
    return {**describe.tags_of(record), "mlflow.note.content": description(record, rerun=command)}


def _log_values(client: "MlflowClient", run_id: str, record: Record) -> None:
    """Params and metrics, in as few calls as MLflow's limits allow (each is several commits); then the run is whole."""
    from mlflow.entities import Metric, Param, RunTag

    params = _chunks(
        (Param(key, value) for key, value in describe.params_of(record).items()), PARAMS_PER_CALL
    )
    metrics = _chunks((Metric(*point) for point in describe.points_of(record)), METRICS_PER_CALL)
    calls = list(zip_longest(params, metrics, fillvalue=())) or [((), ())]
    for place, (some_params, some_metrics) in enumerate(calls, 1):
        tags = [RunTag(COMPLETE_TAG, "complete")] if place == len(calls) else []
        client.log_batch(run_id, metrics=some_metrics, params=some_params, tags=tags)


def _log_files(client: "MlflowClient", run_id: str, record: Record, folder: Path) -> list[str]:
    """The record, the composed config, the record's artifacts, small logs. Returns a line a path refused."""
    with tempfile.TemporaryDirectory(prefix="wanexp-") as temporary:
        _write_record_files(record, Path(temporary))
        client.log_artifacts(run_id, temporary)
    files, lines = artifact_files(record, folder)
    for relative in files:
        parent = relative.parent.as_posix()
        client.log_artifact(run_id, str(folder / relative), None if parent == "." else parent)
    return lines


def _write_record_files(record: Record, place: Path) -> None:
    """record.json and config.yaml, by the record alone: a file beside it may be of another run, or hold a password."""
    record.write(place)
    (place / "config.yaml").write_text(yaml.dump(record.requested, Dumper=DUMPER, sort_keys=False))


def artifact_files(record: Record, folder: Path) -> tuple[list[Path], list[str]]:
    """Files to store beside record.json and config.yaml, relative to `folder`, and a line a path refused.

    A record can come from anywhere: what lies outside its folder, links included, is not read.
    """
    root = folder.resolve()
    found: dict[Path, None] = {}
    lines = []
    for name in record.artifacts:
        path = folder / name
        if not path.resolve().is_relative_to(root) or ".." in Path(name).parts:
            lines.append(f"MLflow: artifact {name} was left out; it lies outside {folder}")
            continue
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.resolve().is_relative_to(root):
                found[file.absolute().relative_to(folder)] = None
    logs = [file for pattern in LOGS for file in sorted(folder.glob(pattern))]
    for file in logs:
        is_inside = file.resolve().is_relative_to(root) and not file.is_symlink()
        if is_inside and file.is_file() and 0 < file.stat().st_size <= MAX_LOG_BYTES:
            found[file.relative_to(folder)] = None
    found.pop(Path(FILE_NAME), None)
    return list(found), lines


def _find(client: "MlflowClient", experiment_id: str, record_id: str) -> str | None:
    """The whole MLflow run of this record, if any; halves of one are deleted."""
    whole = None
    for run in client.search_runs([experiment_id], f"tags.`{RECORD_TAG}` = {quoted(record_id)}"):
        if run.data.tags.get(COMPLETE_TAG) and run.info.status != "RUNNING":
            whole = run.info.run_id
        else:
            client.delete_run(run.info.run_id)
    return whole


def _alive(uri: str, timeout_s: float) -> bool:
    return not is_http(uri) or server_answers(uri, timeout_s) is None


def _how_to_import(folder: Path, tracking: TrackingConfig) -> str:
    command = tool_command("import_records.py", "wanexp.import_records", *store_options(tracking), folder)
    return f"  the record is safe; to import it later: {command}"


def _chunks(values: Iterator[Any], size: int) -> Iterator[Sequence[Any]]:
    while batch := list(islice(values, size)):
        yield batch
