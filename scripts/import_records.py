#!/usr/bin/env python3
"""Import records into MLflow: scripts/import_records.py multirun (see --help)."""

import sys

from own_python import use_own_python

use_own_python("mlflow")

from wanexp.import_records import main

if __name__ == "__main__":
    sys.exit(main())
