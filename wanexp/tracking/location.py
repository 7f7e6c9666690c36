"""Where the MLflow store is, and how the tools beside the main job are called. Needs no mlflow."""

import http.client
import json
import os
import re
import shlex
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from wanexp.errors import UserError

SQLITE = "sqlite:///"
DEFAULT_URI = "sqlite:///mlflow.db"
# What MLflow takes before the colon; not file: for it refuses folders, unless MLFLOW_ALLOW_FILE_STORE is set.
STORES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https")
WITHOUT_COLON = ("databricks", "databricks-uc", "uc")
CREDENTIALS = re.compile(r'(?<=://)[^\s/?#"]*@')  # user:password@ of an address
SECRETS = re.compile(r"""([?&]\w*(?:password|passwd|pwd|token)=)[^\s&#"'\\]*""", re.IGNORECASE)  # of a query
UI_HOST = "127.0.0.1"
UI_PORT = 5000
WORKFLOW = "workflowType=machine_learning"  # without it MLflow's UI opens on an empty GenAI page
VIEW_KEY = "wanexp"  # of the shared view in tracking/view.py
SCRIPTS = Path(__file__).parents[2] / "scripts"  # in a source tree; a wheel has the modules only


def resolve_uri(uri: str | None) -> str:
    """The store: `uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` in the working folder; absolute.

    Raises UserError for what MLflow cannot take, such as a bare name.
    """
    source = "tracking.uri" if uri else "MLFLOW_TRACKING_URI"
    uri = (uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI).strip()
    try:
        urlsplit(uri).port  # noqa: B018  # asking is the check
    except ValueError as error:  # such as a bracket that is not closed
        raise UserError(f"{source} is no address ({error}); write http://{UI_HOST}:{UI_PORT}") from None
    kind, colon, _ = uri.partition(":")
    if kind not in WITHOUT_COLON and not (colon and kind.partition("+")[0] in STORES):
        raise UserError(
            f"{source} is '{without_password(uri)}'; write sqlite:///mlflow.db or http://{UI_HOST}:{UI_PORT}"
        )
    if not uri.startswith("sqlite:"):
        return uri.rstrip("/") if is_http(uri) else uri
    path = uri.removeprefix(SQLITE)
    if not uri.startswith(SQLITE) or not path or path.startswith(":memory:"):
        raise UserError(
            f"the tracking URI {uri} names no file; write sqlite:///mlflow.db or http://HOST:PORT"
        )
    return SQLITE + str(Path(path).absolute())


def is_http(uri: str) -> bool:
    """Whether a server is behind this URI."""
    return urlsplit(uri).scheme in ("http", "https")


def sqlite_path(uri: str) -> Path | None:
    """The database file of a resolved sqlite URI; None for any other store."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def without_password(text: str) -> str:
    """`text` without the user, password and token of any address in it, fit for printing and keeping."""
    return SECRETS.sub(r"\1", CREDENTIALS.sub("", text))


def run_link(uri: str, experiment_id: str, run_id: str) -> str | None:
    """The page of one run: on the server, or on the one that the UI script starts; None for other stores."""
    base = _ui_base(uri)
    return base and f"{base}/#/experiments/{experiment_id}/runs/{run_id}?{WORKFLOW}"


def sweep_link(uri: str, experiment_id: str, view: str) -> str | None:
    """The table of runs on a shared view: the key of a sweep's."""
    base = _ui_base(uri)
    return base and runs_link(base, experiment_id, view=view)


def charts_link(uri: str, experiment_id: str, view: str) -> str | None:
    """The charts of a shared view."""
    link = sweep_link(uri, experiment_id, view)
    return link and f"{link}&compareRunsMode=CHART"


def compare_link(uri: str, experiment_id: str, run_ids: Sequence[str]) -> str | None:
    """The page that shows runs side by side."""
    base = _ui_base(uri)
    query = {"runs": json.dumps(list(run_ids)), "experiments": json.dumps([experiment_id])}
    return base and f"{base}/#/compare-runs?{urlencode(query, quote_via=quote)}&{WORKFLOW}"


def runs_link(base: str, experiment_id: str, *, view: str | None = None) -> str:
    """The table of runs of an experiment; view: key of a shared view of its columns."""
    query = WORKFLOW + (f"&viewStateShareKey={view}" if view else "")
    return f"{base}/#/experiments/{experiment_id}/runs?{query}"


def tool_command(script: str, module: str, *arguments: str | Path) -> str:
    """How to call one of our tools from here: the script of a source tree, or the module of a wheel."""
    path = SCRIPTS / script
    if not path.exists():
        words = ["python", "-m", module]
    elif path.is_relative_to(Path.cwd()):
        words = [str(path.relative_to(Path.cwd()))]
    else:
        words = [str(path)]
    return shlex.join([*words, *map(_short, arguments)])


def server_answers(uri: str, timeout_s: float) -> str | None:
    """None when an HTTP server answers at `uri` within the time, else what is wrong.

    Any answer but a gateway's error counts: servers that are not MLflow's own have no /health. It is
    asked in a thread, because no timeout of the standard library covers name resolution.
    """
    problem = [f"no answer within {timeout_s:g} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{without_password(uri)}/health", timeout=timeout_s):
                problem[0] = ""
        except urllib.error.HTTPError as error:
            problem[0] = f"HTTP status {error.code}" if error.code in (502, 503, 504) else ""
        except urllib.error.URLError as error:
            # A bad certificate is an answer: MLflow has settings for it and a message of its own.
            problem[0] = "" if "CERTIFICATE" in str(error.reason) else str(error.reason)
        except (OSError, ValueError, http.client.HTTPException) as error:
            problem[0] = str(error) or type(error).__name__

    thread = threading.Thread(target=ask, name="mlflow-preflight", daemon=True)
    thread.start()
    thread.join(timeout_s + 0.5)
    return problem[0] or None


def _ui_base(uri: str) -> str | None:
    if is_http(uri):
        return without_password(uri)
    return f"http://{UI_HOST}:{UI_PORT}" if uri.startswith(SQLITE) else None


def _short(argument: str | Path) -> str:
    """Relative to the working folder where it lies below it."""
    if isinstance(argument, Path) and argument.is_absolute() and argument.is_relative_to(Path.cwd()):
        return str(argument.relative_to(Path.cwd()))
    return str(argument)
