"""MLflow's client, and what all that comes to a store needs: the experiment, a lock, links, errors in one line.

mlflow is imported late: it takes seconds.
"""

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from wanexp.config import TrackingConfig
from wanexp.errors import UserError
from wanexp.tracking.location import sqlite_path, tool_command, without_password
from wanexp.tracking.view import VIEW_TAG, view_state

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # else the UI opens on a GenAI page
    VIEW_TAG: view_state(),
}
LOCK_S = 60.0  # how long another process may hold the database
ENVIRONMENT = {  # MLflow's settings where the user has none
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # its 7 block for four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def import_client() -> "type[MlflowClient]":
    """mlflow's client, with telemetry off, few retries and no chatter."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Only one of our processes is in the database: two that create it crash in MLflow's migration."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("a") as lock:
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"another process has held {lock.name} for {LOCK_S:g} s") from None
                time.sleep(0.05)
        yield  # closing the file gives the lock back


def open_experiment(client: "MlflowClient", name: str, database: Path | None) -> str:
    """Id of the experiment: created, or restored from deletion, and with our tags as need be."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # MLflow's default is relative to the working folder of whoever comes first.
        folder = re.sub(r"/|^\.\.?$", "_", name)  # one below mlruns, whatever the name
        location = (database.parent / "mlruns" / folder).as_uri() if database else None
        try:
            return client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
        except MlflowException:  # another process was faster
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    for key, value in EXPERIMENT_TAGS.items():
        if key not in experiment.tags or (key == VIEW_TAG and experiment.tags[key] != value):
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return experiment.experiment_id


def page_lines(uri: str, url: str | None, tracking: TrackingConfig) -> list[str]:
    """The page of the run, and for a file the command that serves it."""
    if sqlite_path(uri) is None:
        return [f"  {url}"] if url else []
    command = tool_command("mlflow_ui.sh", "wanexp.tracking.ui", *store_options(tracking))
    return [f"  to look at it: {command}", f"  then open: {url}"]


def store_options(tracking: TrackingConfig) -> list[str]:
    """What our other tools must be told to find the same experiment."""
    options = ["--uri", without_password(tracking.uri)] if tracking.uri else []
    if tracking.experiment != TrackingConfig.experiment:
        options += ["--experiment", tracking.experiment]
    return options


def one_line(error: BaseException) -> str:
    text = without_password(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__
