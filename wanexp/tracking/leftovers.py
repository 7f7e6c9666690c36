"""After a sweep that was killed: what it left in MLflow is completed, or taken out where the run is made again.

Raises nothing: MLflow is a view of records, and the next resume tries again.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from wanexp.config import TrackingConfig
from wanexp.record import Record
from wanexp.tracking.client import import_client, locked, one_line
from wanexp.tracking.location import is_http, resolve_uri, server_answers, sqlite_path
from wanexp.tracking.mlflow_store import track


def complete(records: Sequence[tuple[Record, Path]], tracking: TrackingConfig) -> list[str]:
    """Have MLflow hold every record (with its folder) once, whole and ended. Returns lines on what went wrong."""
    if not tracking.enabled:
        return []
    for record, folder in records:
        tracked = track(record, folder, tracking)
        if tracked.state == "failed":  # so would the others, each after a time-out
            return tracked.lines
    return []


def remove(run_ids: Sequence[str], tracking: TrackingConfig) -> tuple[list[str], list[str]]:
    """Delete the MLflow runs of records that were replaced, those still RUNNING too.

    Returns the ids that may still be there, and lines on what went wrong.
    """
    if not run_ids or not tracking.enabled:
        return list(run_ids), []
    try:
        uri = resolve_uri(tracking.uri)
        database = sqlite_path(uri)
        if database and not database.exists():
            return [], []
        if is_http(uri) and (problem := server_answers(uri, tracking.timeout_s)):
            return list(run_ids), [f"MLflow still has {len(run_ids)} replaced runs: {problem}"]
        client_class = import_client()
        with locked(database) if database else nullcontext():
            client = client_class(tracking_uri=uri)
            experiment = client.get_experiment_by_name(tracking.experiment)
            if experiment is None:
                return [], []
            for record_id in run_ids:
                quoted = record_id.replace("'", "")
                for run in client.search_runs(
                    [experiment.experiment_id], f"tags.`wanexp.run_id` = '{quoted}'"
                ):
                    if run.info.status == "RUNNING":
                        client.set_terminated(run.info.run_id, "KILLED")
                    client.delete_run(run.info.run_id)
    except Exception as error:  # of mlflow, its database, the network
        return list(run_ids), [f"MLflow still has {len(run_ids)} replaced runs: {one_line(error)}"]
    return [], []
