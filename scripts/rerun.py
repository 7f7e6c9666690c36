#!/usr/bin/env python3
"""Repeat a run from its record: scripts/rerun.py multirun/runs/<run>/record.json [key=value ...] (see --help)."""

import sys

from own_python import use_own_python

use_own_python()

from wanexp.rerun import main

if __name__ == "__main__":
    sys.exit(main())
