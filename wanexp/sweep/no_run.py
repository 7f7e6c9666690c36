"""The records of runs that never were: a cell that is invalid, skipped, or failed outside of the runner."""

import json
import secrets
import traceback
from datetime import UTC, datetime

from omegaconf import OmegaConf

from wanexp.config import to_dict
from wanexp.errors import LayoutError, UserError
from wanexp.record import Record
from wanexp.sweep.run import SweepRun


class Skip(LayoutError):
    """A run that the sweep decides against; the message says why."""


def record_of_error(error: BaseException, run: SweepRun, sweep_id: str, begin: str) -> Record:
    """What `error` makes of a run. Of a mistake of our own it keeps where it happened."""
    if run.settings is not None:
        requested = to_dict(run.settings)
    else:
        raw = OmegaConf.to_container(run.config, resolve=False)
        assert isinstance(raw, dict)
        raw.pop("hydra", None)
        requested = json.loads(json.dumps(raw), parse_constant=str)  # "Infinity": JSON has none
    model, mode = (OmegaConf.select(run.config, key) for key in ("model.name", "parallelism.mode"))
    now = datetime.now(UTC)
    record = Record(
        run_id=f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
        name=f"{mode} {model}",
        started=begin,
        ended=now.isoformat(timespec="milliseconds"),
        requested=requested,
        command=["python", "-m", "wanexp", *run.overrides],
        overrides=list(run.overrides),
        sweep_id=sweep_id,
        cell=run.cell,
        repeat=run.repeat,
        message=str(error),
    )
    if isinstance(error, LayoutError):
        record.outcome = "skipped"
    elif isinstance(error, KeyboardInterrupt):
        record.outcome, record.message = "interrupted", "interrupted by a signal"
    elif not isinstance(error, UserError):
        record.message = f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
        record.error = {"rank": None, "type": type(error).__name__, "traceback": trace}
    return record
