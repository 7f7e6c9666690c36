"""Open MLflow's UI on the table of runs: start a server here for a store that is a file, or find the page on
the server that is there already. Ctrl-C stops the server that was started.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence

from wanexp.config import TrackingConfig
from wanexp.errors import UserError
from wanexp.tracking.location import (
    UI_HOST,
    UI_PORT,
    VIEW_KEY,
    is_http,
    resolve_uri,
    runs_link,
    server_answers,
    sqlite_path,
    without_password,
)
from wanexp.tracking.view import VIEW_TAG

START_S = 90.0  # a server is up after about 8 s; a cold disk takes longer
SERVER_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # with it four more processes and 2.5 GiB
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 after Ctrl-C or when there is nothing to wait for, 2 where there is nothing to show."""
    parser = argparse.ArgumentParser(prog="mlflow_ui.sh", description=__doc__)
    parser.add_argument("--uri", help="MLflow store; default: MLFLOW_TRACKING_URI, else mlflow.db here")
    parser.add_argument("--experiment", default=TrackingConfig.experiment, help="default: %(default)s")
    parser.add_argument("--port", type=int, help=f"default: {UI_PORT}, or the next one that is free")
    parser.add_argument("--no-open", action="store_true", help="print the address, open no browser")
    options = parser.parse_args(arguments)
    try:
        uri = resolve_uri(options.uri)
        if is_http(uri):
            if problem := server_answers(uri, TrackingConfig.timeout_s):
                raise UserError(f"the server {without_password(uri)} does not answer ({problem})")
            show(experiment_page(without_password(uri), options.experiment), open_browser=not options.no_open)
            return 0
        return serve(uri, options.experiment, options.port, open_browser=not options.no_open)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def serve(uri: str, experiment: str, port: int | None, *, open_browser: bool) -> int:
    """Run a server for the store `uri` until Ctrl-C. Raises UserError when that cannot be."""
    database = sqlite_path(uri)
    if database and not database.is_file():
        raise UserError(
            f"there is no MLflow store at {database} yet; run python -m wanexp first, or add --uri"
        )
    for module, package in (("mlflow", "mlflow"), ("flask", "the whole of mlflow (mlflow-skinny has no UI)")):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"the UI needs {package}; pip install mlflow")
    port = free_port(port)
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", UI_HOST, "--port", str(port), "--workers", "1"]
    store = {"MLFLOW_BACKEND_STORE_URI": uri}  # `ps` shows everybody the arguments
    base = f"http://{UI_HOST}:{port}"
    print(f"starting MLflow on {base} for {without_password(uri)} ...", flush=True)
    numbers = [signal.SIGINT, signal.SIGTERM]  # the server must not outlive this process
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, _interrupt)
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command,
            env=os.environ | SERVER_ENVIRONMENT | store,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if not _wait_for(server, base):
                log.seek(0)
                print("".join(log.readlines()[-20:]), file=sys.stderr)
                raise UserError("the MLflow server did not start; its last lines are above")
            show(experiment_page(base, experiment), open_browser=open_browser)
            print("Ctrl-C stops the server", flush=True)
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            _stop(server)


def experiment_page(base: str, experiment: str) -> str:
    """Address of the experiment's table of runs; of all experiments where it does not exist yet."""
    query = urllib.parse.urlencode({"experiment_name": experiment})
    url = f"{base}/api/2.0/mlflow/experiments/get-by-name?{query}"
    try:
        with urllib.request.urlopen(url, timeout=TrackingConfig.timeout_s) as answer:
            found = json.load(answer)["experiment"]
    except (OSError, ValueError, KeyError) as error:
        reason = f"HTTP status {error.code}" if isinstance(error, urllib.error.HTTPError) else error
        print(f"the experiment {experiment} was not found ({reason})")
        return f"{base}/#/experiments"
    tags = {tag["key"] for tag in found.get("tags", [])}
    return runs_link(base, found["experiment_id"], view=VIEW_KEY if VIEW_TAG in tags else None)


def show(url: str, *, open_browser: bool) -> None:
    """Print the address, and open it where there is a screen."""
    print(url, flush=True)
    opener = shutil.which("xdg-open") or shutil.which("open")
    if open_browser and opener and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        subprocess.Popen([opener, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def free_port(wanted: int | None) -> int:
    """`wanted` if it is free, else UserError; without a wish the first free port from the default on."""
    for port in [wanted] if wanted else range(UI_PORT, UI_PORT + 50):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((UI_HOST, port))
                return port
            except (OSError, OverflowError):
                continue
    raise UserError(f"port {wanted or UI_PORT} is taken or not allowed; write --port with another one")


def _wait_for(server: "subprocess.Popen[bytes]", base: str) -> bool:
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{base}/health", timeout=2):
            return True
        time.sleep(0.2)
    return False


def _stop(server: "subprocess.Popen[bytes]") -> None:
    """End the server and its workers, which are a process group of their own."""
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience)
            return


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
