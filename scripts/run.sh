#!/usr/bin/env bash
# The main job: sets .venv up if need be, then `python -m wanexp` with the arguments given.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
"$here/setup.sh"
exec "$here/../.venv/bin/python" -m wanexp "$@"
