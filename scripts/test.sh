#!/usr/bin/env bash
# The tests: sets .venv up if need be, then pytest with the arguments given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test
exec .venv/bin/python -m pytest "$@"
