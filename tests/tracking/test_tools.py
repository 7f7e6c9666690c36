"""The tools beside the main job: importing records, repeating a run, opening the UI."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import compose_run
from tests.tracking.conftest import free_port
from tests.tracking.records import make_record, write_run
from tests.tracking.test_mlflow_store import runs_in
from wanexp import import_records, rerun
from wanexp.config import RunConfig, TrackingConfig, to_dict
from wanexp.errors import UserError
from wanexp.record import Record
from wanexp.tracking import location, ui
from wanexp.tracking.mlflow_store import track

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_import_of_a_tree(sqlite_uri: str, working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(working_folder / "multirun" / "runs" / "a", make_record("a"))
    write_run(working_folder / "multirun" / "sweep" / "001_none", make_record("b", outcome="oom"))
    assert import_records.main(["multirun"]) == 0
    assert "2 logged, 0 already there, 0 failed" in capsys.readouterr().out
    assert import_records.main(["multirun/runs/a/record.json", "multirun"]) == 0
    assert "0 logged, 2 already there, 0 failed" in capsys.readouterr().out
    assert len(runs_in(sqlite_uri)) == 2


def test_import_goes_on_after_a_bad_record(
    sqlite_uri: str, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("a", "{"), ("b", '{"schema_version": 99}'), ("c", '{"schema_version": 1}')):
        (working_folder / "runs" / name).mkdir(parents=True)
        (working_folder / "runs" / name / "record.json").write_text(text)
    write_run(working_folder / "runs" / "z")
    assert import_records.main(["runs", "--experiment", "other"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["failed", "failed", "failed", "logged", "1"]
    assert len(runs_in(sqlite_uri, "other")) == 1


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["."], ["--port", "1"]])
def test_import_bad_usage(arguments: list[str], working_folder: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        import_records.main(arguments)
    assert caught.value.code == 2


def test_import_into_what_is_no_store(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(working_folder / "runs" / "a")
    assert import_records.main(["runs", "--uri", "foo"]) == 2
    assert capsys.readouterr().err.startswith("error: tracking.uri is 'foo'; write sqlite:///mlflow.db")


@pytest.mark.parametrize("script", ["import_records.py", "report.py", "rerun.py", "mlflow_ui.sh"])
def test_scripts_run_from_any_folder(script: str, working_folder: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([SCRIPTS / script, "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


SCRIPT_CALLS = [  # script, and how the Python of .venv is called for it
    ("rerun.py", "scripts/rerun.py record.json"),
    ("report.py", "scripts/report.py record.json"),
    ("import_records.py", "scripts/import_records.py record.json"),
    ("mlflow_ui.sh", "scripts/own_python.py wanexp.tracking.ui record.json"),
]


@pytest.mark.parametrize(("script", "call"), SCRIPT_CALLS)
def test_a_script_outside_of_the_environment_goes_on_in_that_of_the_source_tree(
    script: str, call: str, tmp_path: Path
) -> None:
    tree, bare = tmp_path / "tree", tmp_path / "bin"
    shutil.copytree(SCRIPTS, tree / "scripts")
    bare.mkdir()
    for name in ("python", "python3"):  # without the packages
        write_program(bare / name, f'exec "{sys.executable}" -S "$@"')
    path = {"PATH": f"{bare}:/usr/bin:/bin"}
    done = subprocess.run(
        [tree / "scripts" / script, "record.json"], env=path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: hydra is not installed") and "scripts/setup.sh" in done.stderr
    (tree / ".venv" / "bin").mkdir(parents=True)
    write_program(tree / ".venv" / "bin" / "python", 'echo "$@"')
    done = subprocess.run(
        [tree / "scripts" / script, "record.json"], env=path, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"{tree}/{call}", done.stderr


def write_program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def test_rerun_user_errors(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rerun.main(["nowhere"]) == 2
    write_run(working_folder)  # its config is only a piece of one
    assert rerun.main(["record.json"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)


def test_rerun_of_mode_none_takes_the_gpu_that_it_ran_on(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sweep that names two."""
    seen = []

    def run(config: RunConfig, **_: object) -> Record:
        seen.append(config.gpus)
        return make_record()

    monkeypatch.setattr("wanexp.runner.run", run)
    requested = to_dict(compose_run("gpus=[1,0]"))
    for sweep_id in ("s", None):
        make_record(requested=requested, sweep_id=sweep_id).write(working_folder)
        assert rerun.main(["record.json"]) == 0
    assert seen == [[1], [1, 0]]


def test_rerun_takes_changes_and_records_them(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(config: RunConfig, *, overrides: list[str], **_: object) -> Record:
        seen.append((config.workload.num_steps, config.gpus, config.checkpoint, overrides))
        return make_record()

    monkeypatch.setattr("wanexp.runner.run", run)
    requested = to_dict(compose_run("seed=3"))
    make_record(requested=requested, overrides=["seed=3"]).write(working_folder)
    changes = ["workload.num_steps=1", "gpus=[1]", "checkpoint=null"]
    assert rerun.main(["record.json", "--folder", "again", *changes]) == 0
    assert seen == [(1, [1], None, ["seed=3", *changes])]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            "workload.num_step=1",
            "workload.num_step does not exist (did you mean num_steps?); keys of workload",
        ),
        ("workload.num_steps=x", "workload.num_steps: Value 'x'"),
        ("workload.num_steps=0", "workload.num_steps is 0; write 1 or more"),
        (
            "model=tiny",
            "model is a group, chosen by python -m wanexp model=tiny; rerun takes single settings",
        ),
        (
            "precision.name=fp8",
            "precision is a group, chosen by python -m wanexp precision=fp8; rerun takes single settings, such as "
            "precision.dtype=VALUE",
        ),
        ("tracking=null", "tracking is a group, chosen by python -m wanexp tracking=NAME; rerun takes"),
        ("limits=5", "limits is '5' and holds several keys; write limits.run_s=VALUE"),
        ("task=plan", "rerun.py makes one run; task is not for it: write python -m wanexp task=plan"),
        ("repeats=3", "rerun.py makes one run; repeats is not for it"),
        ("seed=1,2", "seed=1,2 is no change of a single value; write seed=VALUE"),
        ("~seed", "~seed is no change of a single value; write seed=VALUE"),
        ("seed", "'seed' is not of the form key=value; write seed=VALUE"),
        ("seed.x=1", "seed.x does not exist; seed is a single value"),
    ],
)
def test_rerun_refuses_what_is_no_change_of_a_key(
    working_folder: Path, capsys: pytest.CaptureFixture[str], change: str, line: str
) -> None:
    make_record(requested=to_dict(compose_run())).write(working_folder)
    assert rerun.main(["record.json", change]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}") and err.count("\n") == 1


def test_rerun_compares() -> None:
    now = make_record(metrics={"latency/step_ms": 893.64})
    assert rerun.comparison(make_record(), now) == "step time: 812 ms before, 894 ms now (+10.0 %)"
    failed = make_record(outcome="oom", metrics={})
    assert rerun.comparison(make_record(), failed) == "outcome: finished before, oom now"


def test_uri(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = f"sqlite:///{working_folder}/mlflow.db"
    assert location.resolve_uri(None) == default
    assert location.resolve_uri("sqlite:///mlflow.db") == default
    assert location.resolve_uri("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000/")
    assert location.resolve_uri(None) == "http://server:5000"
    assert location.resolve_uri("sqlite:///mlflow.db") == default
    with pytest.raises(UserError):
        location.resolve_uri("sqlite:///:memory:")
    for uri in ("sqlite+pysqlite:///x.db", "postgresql+psycopg://host/db", "databricks"):
        assert location.resolve_uri(uri) == uri
    with pytest.raises(UserError, match=r"tracking\.uri is 'foo'; write sqlite:///mlflow\.db or http://127"):
        location.resolve_uri("foo")
    with pytest.raises(UserError, match=r"tracking\.uri is 'file:///runs'; write sqlite"):
        location.resolve_uri("file:///runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is 'mlruns'; write"):
        location.resolve_uri(None)


def test_a_port_that_is_none_is_an_answer_not_a_traceback() -> None:
    with pytest.raises(UserError, match=r"tracking\.uri is no address \(Port could not be cast"):
        location.resolve_uri("http://127.0.0.1:50x0")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        problem = location.server_answers(f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=5)
        thread.join()
    assert problem is not None
    assert "SSH-2.0" in problem


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://bob:s3cret@host/db", "postgresql://host/db"),
        ("postgresql://host/db?user=bob&password=s3cret&x=1", "postgresql://host/db?user=bob&password=&x=1"),
        ("mssql+pyodbc://host/db?PWD=s3cret", "mssql+pyodbc://host/db?PWD="),
        ("https://host/x?access_token=s3cret#y", "https://host/x?access_token=#y"),
        (r'{"said": "no \"http://host?token=s3cret\" here"}', r'{"said": "no \"http://host?token=\" here"}'),
        ("tracking.uri='http://host?password=s3cret'", "tracking.uri='http://host?password='"),
        ("the token=word of a sentence", "the token=word of a sentence"),
    ],
)
def test_addresses_lose_their_secrets(text: str, shown: str) -> None:
    assert location.without_password(text) == shown


def test_links_hide_passwords() -> None:
    link = location.run_link("https://ada:secret@host/mlflow", "1", "r")
    assert link == "https://host/mlflow/#/experiments/1/runs/r?workflowType=machine_learning"
    assert location.run_link("postgresql://host/db", "1", "r") is None


def test_tools_of_a_wheel_are_modules(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "SCRIPTS", working_folder / "scripts")
    command = location.tool_command("rerun.py", "wanexp.rerun", working_folder / "a b" / "record.json")
    assert command == "python -m wanexp.rerun 'a b/record.json'"
    (working_folder / "scripts").mkdir()
    (working_folder / "scripts" / "rerun.py").touch()
    assert location.tool_command("rerun.py", "wanexp.rerun", "x") == "scripts/rerun.py x"


def test_ui_without_a_store_is_one_line(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ui.main(["--no-open"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no MLflow store" in line and "python -m wanexp" in line


def test_ui_of_a_server_prints_the_runs_table(
    server: str, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    track(make_record("for the ui"), working_folder, TrackingConfig(uri=server, experiment="ui"))
    assert ui.main(["--uri", server, "--experiment", "ui", "--no-open"]) == 0
    out = capsys.readouterr().out.strip()
    assert re.fullmatch(
        rf"{server}/#/experiments/\d+/runs\?workflowType=machine_learning&viewStateShareKey=wanexp", out
    )
    assert ui.main(["--uri", f"http://127.0.0.1:{free_port()}", "--no-open"]) == 2


def test_ui_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="--port"):
            ui.free_port(taken.getsockname()[1])
    assert ui.free_port(None) >= location.UI_PORT
    with pytest.raises(UserError):
        ui.free_port(99999)


def test_ui_hands_the_password_of_a_store_to_the_server_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def popen(command: list[str], *, env: dict[str, str], **_: object) -> None:
        assert "s3cret" not in " ".join(command)
        assert env["MLFLOW_BACKEND_STORE_URI"] == uri
        raise UserError("as far as this goes")

    handled = []
    monkeypatch.setattr(ui.signal, "signal", lambda number, _: handled.append(number))
    monkeypatch.setattr(ui.subprocess, "Popen", popen)
    monkeypatch.setattr(ui.signal, "getsignal", lambda _: signal.SIG_DFL)
    uri = "postgresql://bob:s3cret@host/db"
    with pytest.raises(UserError, match="as far as this goes"):
        ui.serve(uri, "wanexp", None, open_browser=False)
    assert handled == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    assert "s3cret" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ui_serves_until_it_is_stopped(number: int, sqlite_uri: str, working_folder: Path) -> None:
    track(make_record(), working_folder, TrackingConfig())
    port = free_port()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [SCRIPTS / "mlflow_ui.sh", "--no-open", "--port", str(port)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        link = f"http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning"
        assert lines[1].startswith(link)
        assert "Ctrl-C" in lines[2]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
            assert b"MLflow" in page.read()
    finally:
        process.send_signal(number)
    assert process.wait(20) == 0
    time.sleep(0.2)
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
