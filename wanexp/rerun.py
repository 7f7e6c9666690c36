"""Repeat a run from its record, with the same config but for what is written after it, and compare the step times."""

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import OverrideParseException

from wanexp.compose_errors import explain
from wanexp.config import RunConfig
from wanexp.config_keys import first_setting, group_message, unknown_key_message, unknown_keys
from wanexp.config_reading import run_config_from_dict
from wanexp.errors import UserError
from wanexp.record import Record, read_record
from wanexp.tracking.describe import metrics_of, milliseconds

CONFIG_GROUPS = ("model", "hardware", "parallelism", "workload", "video", "precision", "offload", "tracking")
NOT_OF_ONE_RUN = ("task", "repeats", "resume", "sweep_name")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the new run; 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path, help="a record.json, or its folder")
    parser.add_argument("overrides", nargs="*", help="what to change, such as workload.num_steps=1")
    parser.add_argument("--folder", type=Path, help="of the new run; default: a new one under multirun/runs")
    options = parser.parse_intermixed_args(arguments)
    try:
        old = read_record(options.record)
        config = run_config_from_dict(changed(old.requested, options.overrides))
        if old.sweep_id and config.gpus and config.parallelism.mode == "none":
            config.gpus = config.gpus[:1]  # as the sweep ran it
        from wanexp.runner import run  # late: it brings torch

        overrides = [*old.overrides, *options.overrides]
        new = run(config, folder=options.folder or new_folder(config), overrides=overrides)
    except (UserError, OSError) as error:  # a folder that cannot be written, too
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(comparison(old, new))
    return new.exit_code()


def changed(requested: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The config of a record with single keys set anew. Raises UserError."""
    values = copy.deepcopy(dict(requested))
    for text in overrides:
        try:
            [override] = OverridesParser.create().parse_overrides([text])
        except OverrideParseException as error:
            raise UserError(explain(error) or f"{text} cannot be read") from None
        key = override.key_or_group
        if override.type is not OverrideType.CHANGE or override.is_sweep_override():
            raise UserError(f"{text} is no change of a single value; write {key}=VALUE")
        value = override.value()
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        if unknown_keys(RunConfig, nested):
            raise UserError(unknown_key_message(RunConfig, key))
        if key in NOT_OF_ONE_RUN:
            raise UserError(f"rerun.py makes one run; {key} is not for it: write python -m wanexp {text}")
        if key.removesuffix(".name") in CONFIG_GROUPS:
            raise UserError(_named_group_message(key.removesuffix(".name"), value))
        if group := group_message(RunConfig, key, value):
            raise UserError(group)
        place = values
        *path, name = key.split(".")
        for part in path:
            if place.get(part) is None:  # or the record is older than the key
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                raise UserError(unknown_key_message(RunConfig, key))
        place[name] = value
    return values


def _named_group_message(group: str, value: object) -> str:
    """A new name alone would leave the settings as they are, and the record would lie."""
    name = value if isinstance(value, str) else "NAME"
    setting = first_setting(type(getattr(RunConfig(), group)))
    return (
        f"{group} is a group, chosen by python -m wanexp {group}={name}; "
        f"rerun takes single settings, such as {group}.{setting}=VALUE"
    )


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
