"""What a killed sweep left in MLflow is completed or taken out; nothing else is touched."""

from tests.tracking.records import make_record, write_run
from tests.tracking.test_mlflow_store import client_of, runs_in
from wanexp.config import TrackingConfig
from wanexp.tracking import leftovers
from wanexp.tracking.mlflow_store import track


def test_half_runs_are_completed_and_replaced_ones_removed(sqlite_uri, tmp_path):
    tracking = TrackingConfig(uri=sqlite_uri)
    kept, missing, replaced = (make_record(name) for name in ("kept", "missing", "replaced"))
    for record in (kept, missing, replaced):
        write_run(tmp_path / record.run_id, record)
    for record in (kept, replaced):
        track(record, tmp_path / record.run_id, tracking)
    client = client_of(sqlite_uri)
    experiment = client.get_experiment_by_name("wanexp").experiment_id
    client.create_run(experiment, tags={"wanexp.run_id": "killed"})  # RUNNING for ever
    records = [(record, tmp_path / record.run_id) for record in (kept, missing)]
    assert leftovers.complete(records, tracking) == []
    assert leftovers.remove(["replaced", "killed", "never there"], tracking) == ([], [])
    left = {run.data.tags["wanexp.run_id"]: run.info.status for run in runs_in(sqlite_uri)}
    assert left == {"kept": "FINISHED", "missing": "FINISHED"}


def test_without_a_store_the_ids_are_kept_for_the_next_time(tmp_path):
    dead = TrackingConfig(uri="http://127.0.0.1:9", timeout_s=0.5)
    ids, lines = leftovers.remove(["a", "b"], dead)
    assert ids == ["a", "b"] and "2 replaced runs" in lines[0]
    record = make_record("c")
    write_run(tmp_path / "c", record)
    lines = leftovers.complete([(record, tmp_path / "c")] * 3, dead)
    assert "does not answer" in lines[0]
    assert leftovers.remove(["a"], TrackingConfig(enabled=False)) == (["a"], [])
    assert leftovers.remove(["a"], TrackingConfig(uri=f"sqlite:///{tmp_path}/none.db")) == ([], [])
    assert not (tmp_path / "none.db").exists()
