"""Repeat a run from its record, with the same config, and compare the step times."""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from wanexp.config import RunConfig
from wanexp.config_reading import run_config_from_dict
from wanexp.errors import UserError
from wanexp.record import Record, read_record
from wanexp.tracking.describe import metrics_of, milliseconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the new run; 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path, help="a record.json, or its folder")
    parser.add_argument("--folder", type=Path, help="of the new run; default: a new one under multirun/runs")
    options = parser.parse_args(arguments)
    try:
        old = read_record(options.record)
        config = run_config_from_dict(old.requested)
        if old.sweep_id and config.gpus and config.parallelism.mode == "none":
            config.gpus = config.gpus[:1]  # as the sweep ran it
        from wanexp.runner import run  # late: it brings torch

        new = run(config, folder=options.folder or new_folder(config), overrides=old.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(comparison(old, new))
    return new.exit_code()


def new_folder(config: RunConfig) -> Path:
    """A folder like those of other single runs, `multirun/runs/2026-11-22_19-27-00-123456_none_rerun`."""
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}_{config.parallelism.mode}_rerun"
    return Path("multirun") / "runs" / name


def comparison(old: Record, new: Record) -> str:
    """`step time: 812 ms before, 815 ms now (+0.4 %)`, or the outcomes where one has no time."""
    before, now = (metrics_of(record).get("latency/step_ms") for record in (old, new))
    if not before or not now:
        return f"outcome: {old.outcome} before, {new.outcome} now"
    change = f"{(now / before - 1) * 100:+.1f} %"
    return f"step time: {milliseconds(before)} before, {milliseconds(now)} now ({change})"


if __name__ == "__main__":
    sys.exit(main())
