#!/usr/bin/env bash
# The tests: sets .venv up if need be, then pytest with the arguments given. Three files at a time also on two cores, as
# many tests wait for processes of their own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test
export GOMP_SPINCOUNT=1000  # threads that wait leave the core to those that work
exec .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
