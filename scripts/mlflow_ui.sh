#!/usr/bin/env bash
# Opens MLflow's UI on the table of runs: scripts/mlflow_ui.sh [--port N] [--no-open] (see --help). Ctrl-C stops it.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # works without an installation, too
python="$(command -v python || command -v python3)"
if ! "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('hydra', 'mlflow'))))"; then
    echo "error: hydra or mlflow is not installed for $python; activate wanexp's environment first" >&2
    exit 2
fi
exec "$python" -m wanexp.tracking.ui "$@"
