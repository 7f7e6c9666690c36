"""For scripts that a person may call outside of wanexp's environment: goes on in the Python that has its packages.

That is the running one, or else .venv at the top of the source tree, which scripts/setup.sh makes. From a shell script:
own_python.py MODULE ARGUMENTS...
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = str(ROOT / ".venv" / "bin" / "python")


def use_own_python(*packages: str) -> None:
    """Return where the running Python has hydra, torch and `packages`; else start the script again in .venv, or end."""
    sys.path.insert(0, str(ROOT))  # works without an installation, too
    missing = [name for name in ("hydra", "torch", *packages) if importlib.util.find_spec(name) is None]
    if not missing:
        return
    if os.access(PYTHON, os.X_OK) and sys.executable != PYTHON:
        os.execv(PYTHON, [PYTHON, *sys.argv])
    print(
        f"error: {missing[0]} is not installed for {sys.executable}; run scripts/setup.sh, or activate wanexp's "
        "environment",
        file=sys.stderr,
    )
    sys.exit(2)


if __name__ == "__main__":
    use_own_python("mlflow")
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
