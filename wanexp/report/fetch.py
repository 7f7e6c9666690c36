"""A sweep back out of MLflow: the records of its runs, and what its summary run kept of `sweep.json`."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanexp.config import TrackingConfig
from wanexp.errors import UserError
from wanexp.record import FILE_NAME, Record, read_record
from wanexp.report.cells import Run, Sweep
from wanexp.report.collect import SWEEP_FILE, entries_of, lighten, make_cells, without_runs
from wanexp.sweep import sweep_name_of
from wanexp.tracking.location import is_http, resolve_uri, server_answers, sqlite_path, without_password
from wanexp.tracking.mlflow_store import import_client
from wanexp.tracking.view import quoted

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

SUMMARY_TAG = "wanexp.summary_of"  # on the summary run of a sweep: the sweep's id
PAGE = 200  # runs a request


def fetch_sweep(name: str, tracking: TrackingConfig) -> Sweep:
    """The sweep of this id, else of this name, from the records that MLflow keeps as artifacts. Raises UserError."""
    uri = resolve_uri(tracking.uri)
    if is_http(uri) and (problem := server_answers(uri, tracking.timeout_s)):
        raise UserError(f"the server {without_password(uri)} does not answer ({problem})")
    database = sqlite_path(uri)
    if database and not database.is_file():  # asking would create it
        raise UserError(f"{name} is no folder here, and there is no MLflow store at {database}")
    client = import_client()(tracking_uri=uri)
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        raise UserError(f"there is no experiment {tracking.experiment} in {without_password(uri)}")
    like = f"tags.sweep_id LIKE {quoted(name + '%')}"  # of which _ is any character
    by_id: dict[str, list[MlflowRun]] = {}
    for found in runs_of(client, experiment.experiment_id, like):
        by_id.setdefault(found.data.tags["sweep_id"], []).append(found)
    ids = [name] if name in by_id else sorted(one for one in by_id if sweep_name_of(one) == name)
    if len(ids) > 1:
        raise UserError(f"{len(ids)} sweeps are called {name}; write the id of one: {', '.join(ids)}")
    sweep_id = ids[0] if ids else name
    runs: list[Run] = []
    document: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="wanexp-") as folder:
        for run in by_id.get(sweep_id, []):
            if SUMMARY_TAG in run.data.tags:
                document = _sweep_document(client, run, folder)
            else:
                runs.append(Run(_record_of(client, run, folder)))
    if not runs:
        raise UserError(
            f"{name} is no folder here, and no run of experiment {tracking.experiment} has the tag "
            f"sweep_id={sweep_id}"
        )
    entries = entries_of(document)
    place = {entry.get("run_id"): number for number, entry in enumerate(entries)}
    runs.sort(key=lambda run: (place.get(run.record.run_id, len(entries)), run.record.started))
    ran = {run.record.run_id for run in runs}
    absent = without_runs(entries, [entry.get("run_id") in ran for entry in entries])
    return Sweep(sweep_id, make_cells(runs, absent), document=document)


def runs_of(client: "MlflowClient", experiment_id: str, query: str) -> Iterator["MlflowRun"]:
    """All runs of a query, page by page."""
    token = None
    while True:
        page = client.search_runs([experiment_id], query, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _record_of(client: "MlflowClient", run: "MlflowRun", folder: str) -> Record:
    path = Path(_download(client, run, FILE_NAME, folder))
    record = lighten(read_record(path))
    path.unlink()
    return record


def _sweep_document(client: "MlflowClient", run: "MlflowRun", folder: str) -> dict[str, Any]:
    if not any(artifact.path == SWEEP_FILE for artifact in client.list_artifacts(run.info.run_id)):
        return {}
    document = json.loads(without_password(Path(_download(client, run, SWEEP_FILE, folder)).read_text()))
    return document if isinstance(document, dict) else {}


def _download(client: "MlflowClient", run: "MlflowRun", name: str, folder: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.download_artifacts(run.info.run_id, name, folder))
    except (MlflowException, OSError) as error:
        raise UserError(f"MLflow's run {run.info.run_id} has no readable {name}: {error}") from None
