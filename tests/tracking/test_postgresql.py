"""A MLflow server on a real PostgreSQL, which Debian's package provides: tracking, import, report.

The packages `postgresql` and psycopg are needed; where they are not there, this installs the first with apt as root,
and skips with the reason where it cannot.
"""

import importlib.util
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.made_up import record_of, write_sweep
from tests.tracking.conftest import free_port, serve
from tests.tracking.test_mlflow_store import client_of, runs_in
from wanexp import import_records
from wanexp.config import TrackingConfig
from wanexp.report import command
from wanexp.tracking.mlflow_store import track

pytestmark = pytest.mark.slow


def postgresql_tools() -> Path:
    """The folder of initdb and pg_ctl; installs the package where that is possible, else skips."""
    for _ in range(2):
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if found:
            return found[-1].parent
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip("PostgreSQL is not installed, and this is not root on Debian")
        command_line = ["apt-get", "install", "-y", "--no-install-recommends", "postgresql"]
        done = subprocess.run(command_line, capture_output=True, text=True, timeout=240)
        if done.returncode:
            pytest.skip(f"apt-get could not install postgresql: {done.stderr.strip()[-200:]}")
    pytest.skip("the package postgresql has no initdb")


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """URI of an empty database of a cluster of its own; PostgreSQL refuses to run as root."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed; pip install -e '.[test]'")
    tools, port = postgresql_tools(), free_port()
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    data = Path("/tmp") / f"wanexp-postgresql-{port}"  # pytest's folders are closed to other users

    def run(*words: str | Path) -> None:
        as_user = {"user": user, "group": user, "extra_groups": []} if os.geteuid() == 0 else {}
        done = subprocess.run(
            list(map(str, words)), cwd="/tmp", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **as_user
        )  # type: ignore[call-overload]
        assert done.returncode == 0, done.stdout.decode()

    try:
        run(tools / "initdb", "-D", data, "-A", "trust", "-U", "wanexp", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={data} -c fsync=off"
        run(tools / "pg_ctl", "-D", data, "-w", "-l", data / "log", "-o", options, "start")
        try:
            run(tools / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "wanexp", "mlflow")
            yield f"postgresql://wanexp@127.0.0.1:{port}/mlflow"
        finally:
            run(tools / "pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(data, ignore_errors=True)


def test_a_server_on_postgresql(
    postgresql: str, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record_of("none", 1, repeat=r, sweep_id="s") for r in range(2)] + [
        record_of("fsdp", 2, sweep_id="s")
    ]
    write_sweep(working_folder / "multirun" / "s", records)
    with serve(postgresql, working_folder / "server") as uri:
        for count in (1, 2):  # the second time nothing is added but a new summary for the old
            assert import_records.main(["multirun", "--uri", uri]) == 0
            assert len(runs_in(uri)) == 4, count
        (run,) = [r for r in runs_in(uri) if r.data.tags.get("wanexp.run_id") == records[0].run_id]
        assert run.info.status == "FINISHED"
        power = client_of(uri).get_metric_history(run.info.run_id, "system/gpu0/memory_used_gib")
        assert len(power) == 180
        assert command.main(["--mlflow", "s", "--uri", uri]) == 0
    assert "Fastest: none, 1 GPU" in capsys.readouterr().out


def test_postgresql_without_a_server(postgresql: str, working_folder: Path) -> None:
    """A store URI works as well: artifacts then lie under the working folder."""
    tracking = TrackingConfig(uri=postgresql, experiment="direct")
    tracked = track(record_of("none", 1), working_folder, tracking)
    assert tracked.state == "logged", tracked.lines
    assert "wanexp@" not in " ".join(tracked.lines)
    assert len(runs_in(postgresql, "direct")) == 1
