"""Rows written past MLflow read back as what its own calls leave."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.tracking.records import make_record, write_run
from tests.tracking.test_mlflow_store import artifacts_of, client_of
from wanexp.config import TrackingConfig
from wanexp.record import Record
from wanexp.tracking import database, mlflow_store
from wanexp.tracking.mlflow_store import track


def everything_of(uri: str, experiment: str) -> dict[str, Any]:
    """Of the only run of an experiment, as MLflow's client tells it; without what must differ."""
    client = client_of(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    info = dict(run.info)
    for name in ("run_id", "run_uuid", "experiment_id", "artifact_uri"):
        info.pop(name, None)
    return {
        "info": info,
        "tags": run.data.tags,
        "params": run.data.params,
        "metrics": run.data.metrics,
        "history": {
            key: [(m.value, m.timestamp, m.step) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        },
        "files": {
            name: Path(client.download_artifacts(run.info.run_id, name)).read_bytes()
            for name in artifacts_of(client, run.info.run_id)
        },
    }


def odd_record() -> Record:
    """Values that a table could mind: repeated points, a series out of order, odd names."""
    record = make_record()
    record.telemetry["gpu0/power_w"] = [[1.0, 5.0], [1.0, 5.0], [0.5, 7.0]]
    record.metrics["load (s)"] = 1e300
    record.requested["odd [key]"] = "ä" * 7000
    return record


@pytest.mark.parametrize("make", [make_record, odd_record])
def test_both_ways_leave_the_same_run(
    make: Any, sqlite_uri: str, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make()
    folder = working_folder / "run"
    write_run(folder, record)
    assert track(record, folder, TrackingConfig(experiment="calls")).state == "logged"
    monkeypatch.setattr(mlflow_store, "_fill", None)  # the calls are not used
    tracked = track(record, folder, TrackingConfig(experiment="rows"), many=True)
    assert tracked.state == "logged", tracked.lines
    assert everything_of(sqlite_uri, "rows") == everything_of(sqlite_uri, "calls")
    assert track(record, folder, TrackingConfig(experiment="rows"), many=True).state == "present"


def test_tables_of_another_mlflow_are_left_to_it(sqlite_uri: str, working_folder: Path) -> None:
    folder = working_folder / "run"
    write_run(folder)
    assert track(make_record(), folder, TrackingConfig(experiment="first")).state == "logged"
    with sqlite3.connect(sqlite_uri.removeprefix("sqlite:///")) as connection:
        connection.execute("ALTER TABLE tags ADD COLUMN new TEXT")
    database.can_write.cache_clear()
    assert not database.can_write(sqlite_uri)
    assert track(make_record(), folder, TrackingConfig(experiment="second"), many=True).state == "logged"
    database.can_write.cache_clear()


def test_a_run_is_written_as_a_whole_or_not_at_all(
    sqlite_uri: str, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_record()
    folder = working_folder / "run"
    write_run(folder, record)
    assert track(record, folder, TrackingConfig(experiment="other")).state == "logged"
    monkeypatch.setitem(database.COLUMNS, "latest_metrics", "run_uuid key no_such_column")
    monkeypatch.setattr(mlflow_store, "can_write", lambda _: True)
    assert track(record, folder, TrackingConfig(), many=True).state == "failed"
    client = client_of(sqlite_uri)
    experiment = client.get_experiment_by_name("wanexp")
    assert list(client.search_runs([experiment.experiment_id])) == []
    assert list(Path(experiment.artifact_location.removeprefix("file://")).iterdir()) == []
