"""Records in MLflow, read back through its client: sqlite and a real server, dead servers, crashes midway."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tracking.conftest import free_port
from tests.tracking.records import make_record, write_run
from wanexp.config import TrackingConfig
from wanexp.record import OUTCOMES, read_record
from wanexp.tracking import mlflow_store
from wanexp.tracking.client import import_client, one_line, store_options
from wanexp.tracking.mlflow_store import Tracked, artifact_files, track


def client_of(uri: str) -> Any:
    return import_client()(tracking_uri=uri)


def runs_in(uri: str, experiment: str = "wanexp") -> list[Any]:
    client = client_of(uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def artifacts_of(client: Any, run_id: str, path: str | None = None) -> set[str]:
    found: set[str] = set()
    for entry in client.list_artifacts(run_id, path):
        found |= artifacts_of(client, run_id, entry.path) if entry.is_dir else {entry.path}
    return found


def check_read_back(uri: str, tracked: Tracked, folder: Path) -> None:
    """Everything of `make_record()` is in the one run of the experiment."""
    assert tracked.state == "logged", tracked.lines
    (run,) = runs_in(uri)
    client = client_of(uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "block_distribution 2 GPUs - 812 ms/step - 7.1 GiB - tiny"
    assert run.info.end_time - run.info.start_time == 90_500
    assert tracked.run_url is not None
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    page = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"
    assert tracked.run_url.endswith(page)
    assert run.data.metrics["latency/step_ms"] == 812.4
    assert run.data.metrics["setup/num_gpus"] == 2
    assert run.data.params["effective.attention"] == "sdpa_flash"
    assert run.data.tags["wanexp.run_id"] == make_record().run_id
    assert run.data.tags["mlflow.note.content"].startswith("**block_distribution on 2 x NVIDIA H200")
    steps = client.get_metric_history(run.info.run_id, "steps/step_ms")
    assert [(point.step, point.value) for point in steps] == [(0, 810.0), (1, 812.4), (2, 815.1), (3, 811.0)]
    assert len(client.get_metric_history(run.info.run_id, "system/gpu0/power_w")) == 20
    files = artifacts_of(client, run.info.run_id)
    assert files == {"record.json", "config.yaml", "ranks/rank0.log", "trace/kernels.txt"}
    local = Path(client.download_artifacts(run.info.run_id, "record.json", str(folder.parent)))
    assert read_record(local) == make_record()


def test_sqlite_end_to_end(sqlite_uri: str, working_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = working_folder / "run"
    tracked = track(write_run(folder), folder, TrackingConfig())
    assert capfd.readouterr() == ("", "")  # MLflow says nothing of its own
    check_read_back(sqlite_uri, tracked, folder)
    assert "mlflow_ui.sh" in tracked.lines[1]
    assert (working_folder / "mlruns" / "wanexp").is_dir()


def test_server_end_to_end(server: str, working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server + "/")
    folder = working_folder / "run"
    tracked = track(write_run(folder), folder, TrackingConfig())
    check_read_back(server, tracked, folder)
    assert tracked.run_url is not None and tracked.run_url.startswith(f"{server}/#/")
    assert not (working_folder / "mlflow.db").exists()


def test_thousands_of_points_are_quick_over_http(server: str, working_folder: Path) -> None:
    series = {f"gpu{i}/power_w": [[0.25 * j, 400.0 + j] for j in range(500)] for i in range(4)}
    record = make_record("many-points", telemetry=series)
    tracking = TrackingConfig(uri=server, experiment="points")
    client_of(server).search_experiments()
    begin = time.monotonic()
    tracked = track(write_run(working_folder / "run", record), working_folder / "run", tracking)
    assert time.monotonic() - begin < 5
    assert tracked.state == "logged", tracked.lines
    (run,) = runs_in(server, "points")
    assert len(client_of(server).get_metric_history(run.info.run_id, "system/gpu3/power_w")) == 500


def test_import_is_idempotent_and_mends_halves(sqlite_uri: str, working_folder: Path) -> None:
    record = make_record()
    assert track(record, working_folder, TrackingConfig()).state == "logged"
    again = track(record, working_folder, TrackingConfig())
    assert again.state == "present"
    (run,) = runs_in(sqlite_uri)
    assert again.run_url is not None and run.info.run_id in again.run_url
    client_of(sqlite_uri).delete_tag(run.info.run_id, mlflow_store.COMPLETE_TAG)
    assert track(record, working_folder, TrackingConfig()).state == "logged"
    (mended,) = runs_in(sqlite_uri)
    assert mended.info.run_id != run.info.run_id


def test_a_deleted_experiment_comes_back(sqlite_uri: str, working_folder: Path) -> None:
    track(make_record("first"), working_folder, TrackingConfig())
    client = client_of(sqlite_uri)
    client.delete_experiment(client.get_experiment_by_name("wanexp").experiment_id)
    assert track(make_record("second"), working_folder, TrackingConfig()).state == "logged"
    assert "second" in {run.data.tags["wanexp.run_id"] for run in runs_in(sqlite_uri)}


def test_an_experiment_of_someone_else_gets_our_tags(sqlite_uri: str, working_folder: Path) -> None:
    client_of(sqlite_uri).create_experiment("mine", tags={"mlflow.experimentKind": "genai_development"})
    client_of(sqlite_uri).create_experiment("plain")
    for name in ("mine", "plain"):
        track(make_record(), working_folder, TrackingConfig(experiment=name))
    kinds = [client_of(sqlite_uri).get_experiment_by_name(name).tags for name in ("mine", "plain")]
    found = [tags["mlflow.experimentKind"] for tags in kinds]
    assert found == ["genai_development", "custom_model_development"]


def test_status_of_every_outcome(sqlite_uri: str, working_folder: Path) -> None:
    for outcome in OUTCOMES:
        tracked = track(make_record(outcome, outcome=outcome, metrics={}), working_folder, TrackingConfig())
        assert tracked.state == "logged", tracked.lines
    found = {run.data.tags["outcome"]: run.info.status for run in runs_in(sqlite_uri)}
    expected = dict.fromkeys(OUTCOMES, "FAILED")
    assert found == expected | {"finished": "FINISHED", "skipped": "FINISHED", "interrupted": "KILLED"}


def test_strange_values(sqlite_uri: str, working_folder: Path) -> None:
    record = make_record(
        metrics={"a[0]": 1.0, "inf": math.inf, "nan": math.nan, "../up": 2.0, "x" * 300: 3.0},
        message='quote " and | and \u00fc',
        warnings=["w" * 5000] * 5,
        run_id='it\'s "odd"',
    )
    record.requested |= {"checkpoint": "p" * 9000, "odd [key]": "", "many": {f"k{i}": i for i in range(250)}}
    tracked = track(record, working_folder, TrackingConfig())
    assert tracked.state == "logged", tracked.lines
    (run,) = runs_in(sqlite_uri)
    assert {"a_0_", "up", "x" * 250} <= set(run.data.metrics)
    assert not {"inf", "nan"} & set(run.data.metrics)
    assert len(run.data.params["checkpoint"]) == 6000
    assert run.data.params["many.k249"] == "249"
    assert run.data.params["odd _key_"] == ""


def test_a_crash_midway_ends_the_run(
    sqlite_uri: str, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> list[str]:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_store, "_log_files", fail)
        tracked = track(make_record(), working_folder, TrackingConfig())
    assert tracked.state == "failed"
    assert "the disk is full" in tracked.lines[0]
    assert "import_records.py" in tracked.lines[1]
    (run,) = runs_in(sqlite_uri)
    assert run.info.status == "FAILED"
    assert "the disk is full" in run.data.tags["wanexp.tracking_error"]
    assert track(make_record(), working_folder, TrackingConfig()).state == "logged"
    assert [run.info.status for run in runs_in(sqlite_uri)] == ["FINISHED"]


def test_ctrl_c_midway_ends_the_run(
    sqlite_uri: str, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow_store, "_log_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        track(make_record(), working_folder, TrackingConfig())
    assert [run.info.status for run in runs_in(sqlite_uri)] == ["FAILED"]


@pytest.fixture
def black_hole() -> Iterator[str]:
    """Address that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["refused", "black hole", "no such host"])
def test_a_dead_server_costs_seconds_and_loses_nothing(
    kind: str, black_hole: str, sqlite_uri: str, working_folder: Path
) -> None:
    uri = {
        "refused": f"http://127.0.0.1:{free_port()}",
        "black hole": black_hole.replace("//", "//ada:secret@"),
        "no such host": "http://no-such-host.invalid:5000",
    }[kind]
    folder = working_folder / "run"
    record = write_run(folder)
    begin = time.monotonic()
    tracked = track(record, folder, TrackingConfig(uri=uri, timeout_s=1.0))
    assert time.monotonic() - begin < 3
    assert tracked.state == "failed" and tracked.run_url is None
    assert "does not answer" in tracked.lines[0]
    assert "secret" not in tracked.lines[0]
    assert "import_records.py" in tracked.lines[1] and tracked.lines[1].endswith(" run")
    assert track(read_record(folder), folder, TrackingConfig(uri=sqlite_uri)).state == "logged"


def test_a_server_that_goes_away_midway_costs_seconds(
    server: str, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logging fails and the server is gone: no attempt to end the run on it."""

    def fail(*_: Any) -> list[str]:
        raise ConnectionError("gone")

    monkeypatch.setattr(mlflow_store, "_log_files", fail)
    answers = iter([None, "gone"])
    monkeypatch.setattr(mlflow_store, "server_answers", lambda *_: next(answers))
    tracked = track(make_record("gone"), working_folder, TrackingConfig(uri=server, experiment="gone"))
    assert tracked.state == "failed"
    assert [run.info.status for run in runs_in(server, "gone")] == ["RUNNING"]
    monkeypatch.undo()
    assert (
        track(make_record("gone"), working_folder, TrackingConfig(uri=server, experiment="gone")).state
        == "logged"
    )
    assert [run.info.status for run in runs_in(server, "gone")] == ["FINISHED"]


def test_several_processes_may_create_the_database(working_folder: Path) -> None:
    root = Path(__file__).parents[2]
    code = (
        "import sys; from pathlib import Path; from tests.tracking.records import make_record;"
        "from wanexp.config import TrackingConfig; from wanexp.tracking.mlflow_store import track;"
        "tracked = track(make_record(sys.argv[1]), Path('.'), TrackingConfig());"
        "print(tracked.lines); sys.exit(tracked.state != 'logged')"
    )
    environment = os.environ | {"PYTHONPATH": str(root)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, f"run-{i}"], env=environment, stdout=subprocess.PIPE)
        for i in range(3)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert len(runs_in(f"sqlite:///{working_folder}/mlflow.db")) == 3


def test_artifacts_stay_inside_the_folder(sqlite_uri: str, working_folder: Path) -> None:
    (working_folder / "secret.txt").write_text("secret")
    folder = working_folder / "run"
    inside = ["trace", "trace/kernels.txt", "missing.txt"]
    escapes = ["../secret.txt", str(working_folder / "secret.txt"), "link.txt"]
    write_run(folder)
    (folder / "link.txt").symlink_to(working_folder / "secret.txt")
    (folder / "ranks" / "link.log").symlink_to(working_folder / "secret.txt")
    record = make_record(artifacts=[*inside, *escapes])
    files, lines = artifact_files(record, folder)
    assert set(files) == {Path("trace/kernels.txt"), Path("ranks/rank0.log")}
    assert len(lines) == 3
    tracked = track(record, folder, TrackingConfig())
    assert tracked.state == "logged"
    assert len([line for line in tracked.lines if "left out" in line]) == 3


def test_large_logs_stay_behind(working_folder: Path) -> None:
    write_run(working_folder)
    (working_folder / "ranks" / "rank1.log").write_bytes(b"x" * (mlflow_store.MAX_LOG_BYTES + 1))
    assert Path("ranks/rank1.log") not in artifact_files(make_record(), working_folder)[0]


def test_logs_that_are_not_of_the_run_stay_behind(working_folder: Path) -> None:
    write_run(working_folder)  # as with hydra.run.dir=.
    for name in ("console.log", "reference/rank0.log", "build.log", "other/ranks/rank0.log"):
        (working_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (working_folder / name).write_text("a line\n")
    files, _ = artifact_files(make_record(), working_folder)
    own = {Path("console.log"), Path("ranks/rank0.log"), Path("reference/rank0.log")}
    assert set(files) == {*own, Path("trace/kernels.txt")}


def test_a_lone_record_gets_its_files(sqlite_uri: str, working_folder: Path) -> None:
    folder = working_folder / "nothing here"
    assert track(make_record(), folder, TrackingConfig()).state == "logged"
    (run,) = runs_in(sqlite_uri)
    client = client_of(sqlite_uri)
    assert artifacts_of(client, run.info.run_id) == {"record.json", "config.yaml"}
    local = client.download_artifacts(run.info.run_id, "record.json", str(working_folder))
    assert json.loads(Path(local).read_text())["run_id"] == make_record().run_id
    config = client.download_artifacts(run.info.run_id, "config.yaml", str(working_folder))
    assert yaml.safe_load(Path(config).read_text()) == make_record().requested


@pytest.mark.parametrize("many", [False, True])
def test_no_password_is_uploaded(sqlite_uri: str, working_folder: Path, many: bool) -> None:
    """Not even of what Hydra and older versions wrote."""
    folder, uri = working_folder / "run", "http://bob:s3cret@host"
    command = ["python", "-m", "wanexp", f"tracking.uri={uri}"]
    record = write_run(folder, make_record(command=command, overrides=command[3:]))
    (folder / ".hydra" / "config.yaml").write_text(f"tracking:\n  uri: {uri}\n")
    text = (folder / "record.json").read_text()
    (folder / "record.json").write_text(text.replace("uri=http://host", f"uri={uri}"))
    client_of(sqlite_uri).search_experiments()
    assert track(record, folder, TrackingConfig(), many=many).state == "logged"
    (run,) = runs_in(sqlite_uri)
    assert "tracking.uri=http://host" in run.data.tags["mlflow.note.content"]
    files = [path for path in (working_folder / "mlruns").rglob("*") if path.is_file()]
    assert {"record.json", "config.yaml"} <= {path.name for path in files}
    for said in (str(run.data.to_dictionary()), *(path.read_text() for path in files)):
        assert "s3cret" not in said
    assert read_record(next(path for path in files if path.name == "record.json")) == record


def test_commands_and_errors_have_no_password() -> None:
    tracking = TrackingConfig(uri="http://bob:s3cret@host", experiment="other")
    assert store_options(tracking) == ["--uri", "http://host", "--experiment", "other"]
    error = ConnectionError("API request to http://bob:s3cret@host/api failed")
    assert one_line(error) == "ConnectionError: API request to http://host/api failed"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("wanexp", "wanexp"),
        ("two words, 100 %", "two words, 100 %"),
        ("../../up", ".._.._up"),
        ("/up", "_up"),
        ("..", "_"),
    ],
)
def test_artifacts_lie_below_mlruns_whatever_the_experiment(
    sqlite_uri: str, working_folder: Path, name: str, folder: str
) -> None:
    tracked = track(make_record(), working_folder, TrackingConfig(experiment=name))
    assert tracked.state == "logged", tracked.lines
    assert [path.name for path in (working_folder / "mlruns").iterdir()] == [folder]
    assert len(list((working_folder / "mlruns" / folder).glob("*/artifacts/record.json"))) == 1


def test_a_config_outside_of_the_folder_is_not_read(sqlite_uri: str, working_folder: Path) -> None:
    secret = working_folder / "secret"
    secret.write_text("secret: 1\n")
    folder = working_folder / "foreign"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").symlink_to(secret)
    assert track(make_record(), folder, TrackingConfig()).state == "logged"
    (run,) = runs_in(sqlite_uri)
    config = client_of(sqlite_uri).download_artifacts(run.info.run_id, "config.yaml", str(working_folder))
    assert yaml.safe_load(Path(config).read_text()) == make_record().requested


class Without(MetaPathFinder):
    """Makes a package look as if it were not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


@pytest.mark.parametrize("package", ["mlflow", "sqlalchemy"])
def test_without_mlflow(package: str, working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(package), *sys.meta_path])
    tracked = track(make_record(), working_folder / "run", TrackingConfig())
    assert (tracked.state, tracked.run_url) == ("failed", None)
    assert f"{package} is not installed; pip install mlflow" in tracked.lines[0]
    assert tracked.lines[1].endswith("import_records.py run")


def test_tracking_can_be_off(working_folder: Path) -> None:
    tracked = track(make_record(), working_folder, TrackingConfig(enabled=False))
    assert (tracked.state, tracked.run_url) == ("off", None)
    assert list(working_folder.iterdir()) == []


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "file:///tmp/mlruns", "nonsense://x"])
def test_a_store_that_cannot_be_is_a_line(uri: str, working_folder: Path) -> None:
    tracked = track(make_record(), working_folder, TrackingConfig(uri=uri))
    assert tracked.state == "failed"
    assert all("\n" not in line for line in tracked.lines)


def test_a_database_in_an_odd_folder(empty_database: Path, working_folder: Path) -> None:
    path = working_folder / "a folder, really" / "my runs.db"
    path.parent.mkdir()
    path.write_bytes(empty_database.read_bytes())
    uri = f"sqlite:///{path}"
    assert track(make_record(), working_folder, TrackingConfig(uri=uri)).state == "logged"
    (run,) = runs_in(uri)
    assert artifacts_of(client_of(uri), run.info.run_id) == {"record.json", "config.yaml"}
