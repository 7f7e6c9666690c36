#!/usr/bin/env bash
# Makes .venv at the top of the source tree and installs wanexp in it; does nothing where that is done already.
#   usage: scripts/setup.sh [EXTRA]        EXTRA: test or dev
# PYTHON names the interpreter (default python3, 3.11 to 3.13). Prints nothing but what pip has to say.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-}
stamp=.venv/wanexp-installed${extra:+-$extra}
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
if [ ! "$stamp" -nt pyproject.toml ] || [ ! "$stamp" -nt constraints.txt ]; then
    echo "installing wanexp and what it needs into .venv (a few minutes the first time) ..." >&2
    # A recent pip takes half the time of the one that Python 3.11 brings. It byte-compiles on one core: left to the last line.
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
    .venv/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".${extra:+[$extra]}"
    # Importing torch, mlflow and hydra takes 10 s without byte code and 4 s with it.
    env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -m compileall -q -j 0 -x /tests/ .venv/lib wanexp > /dev/null || true
    touch "$stamp"
fi
