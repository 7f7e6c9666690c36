#!/usr/bin/env bash
# Opens MLflow's UI on the table of runs: scripts/mlflow_ui.sh [--port N] [--no-open] (see --help). Ctrl-C stops it.
set -euo pipefail
python="$(command -v python || command -v python3)"
exec "$python" "$(dirname "${BASH_SOURCE[0]}")/own_python.py" wanexp.tracking.ui "$@"
