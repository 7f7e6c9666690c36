#!/usr/bin/env python
"""Write the report on a sweep: scripts/report.py multirun/<sweep> (see --help)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation, too

try:
    from wanexp.report.command import main
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed for {sys.executable}; activate wanexp's environment first",
        file=sys.stderr,
    )
    sys.exit(2)  # 1 says that a cell got worse

if __name__ == "__main__":
    sys.exit(main())
