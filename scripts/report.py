#!/usr/bin/env python3
"""Write the report on a sweep: scripts/report.py multirun/<sweep> (see --help)."""

import sys

from own_python import use_own_python

use_own_python("matplotlib")

from wanexp.report.command import main

if __name__ == "__main__":
    sys.exit(main())
