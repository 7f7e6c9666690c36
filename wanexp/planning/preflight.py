"""Before a run: settle parallelism=auto, predict, and say whether it can fit. After it: how good the prediction was.

Pure: the devices, with their free memory, come in as arguments.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wanexp.config import AUTO_MODE, DeviceProfile, ParallelismConfig, RunConfig
from wanexp.errors import LayoutError, UserError
from wanexp.hardware.devices import Device
from wanexp.planning.advice import nearest_that_fits
from wanexp.planning.candidates import Candidate, Planned
from wanexp.planning.memory import GIB
from wanexp.planning.planner import judge, plan_layouts

ProfileOf = Callable[[Device], DeviceProfile | None]


@dataclass(frozen=True)
class Preflight:
    """The judged layout of one run.

    advice: the nearest setting that would fit, where it does not. note: what to know of how `auto` chose.
    """

    config: RunConfig  # with parallelism=auto replaced by the choice
    candidate: Candidate
    advice: str = ""
    note: str = ""

    @property
    def message(self) -> str:
        """Why it cannot fit and what would; empty where it fits."""
        if not self.candidate.rejection:
            return ""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.candidate.rejection}{advice}; force=true runs it all the same"

    def summary(self) -> dict[str, Any]:
        """The prediction, for `record.plan`."""
        return {"prediction": self.candidate.summary()}

    def predicted_metrics(self) -> dict[str, float]:
        """The fullest device's peak, and the step time where the rates are known."""
        memory, time = self.candidate.memory, self.candidate.time
        metrics = {
            "plan/predicted_peak_gib": max(entry.allocated for entry in memory) / GIB,
            "plan/predicted_reserved_gib": max(entry.reserved for entry in memory) / GIB,
        }
        if time and time.is_known:
            metrics["plan/predicted_step_ms"] = time.step_s * 1000
        return metrics

    def error_metrics(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Predicted over measured, less one: of the device where it is furthest off, and of the step time.

        On the CPU no peak is measured (what a logical device shows is what it owns), so there is no error either.
        """
        metrics = {}
        if self.candidate.devices[0].type == "cuda":
            for name, key in (("peak_error", "allocated"), ("reserved_error", "reserved")):
                errors = [
                    getattr(entry, key) / GIB / peak - 1
                    for device, entry in zip(self.candidate.devices, self.candidate.memory, strict=True)
                    if (peak := measured.get(f"memory/{device.label}/peak_{key}_gib"))
                ]
                if errors:
                    metrics[f"plan/{name}"] = max(errors, key=abs)
        time, step_ms = self.candidate.time, measured.get("latency/step_ms")
        if time and time.is_known and step_ms:
            metrics["plan/step_error"] = time.step_s * 1000 / step_ms - 1
        return metrics


def preflight(
    config: RunConfig,
    devices: Sequence[Device],
    found: Sequence[Device],
    profile_of: ProfileOf,
    *,
    host_free_bytes: int | None = None,
) -> Preflight:
    """Judge the run on `devices`; `found` are all that advice may use. host_free_bytes: as of `plan_layouts`.

    Raises LayoutError where the mode does not suit these devices, this model or this batch, and UserError for degrees
    beside `auto`, which chooses them.
    """
    profiles, note, asked = [profile_of(device) for device in devices], "", config
    if config.parallelism.mode == AUTO_MODE:
        if written := written_settings(config.parallelism):
            raise UserError(
                f"parallelism=auto chooses the layout itself, and {written} would be lost; leave that out, or write "
                "parallelism=hybrid with the degrees"
            )
        planned = plan_layouts(config, devices, profiles, host_free_bytes=host_free_bytes)
        chosen, note = choose(planned), planned.note
        indices = [device.index for device in chosen.devices]
        config = dataclasses.replace(config, parallelism=chosen.parallelism, gpus=indices)
    else:
        chosen = judge(config, config.parallelism, devices, profiles, host_free_bytes=host_free_bytes)
        if chosen.plan is None:
            raise LayoutError(chosen.rejection)
    assert chosen.plan is not None
    if config.offload.blocks == "auto":
        offload = dataclasses.replace(config.offload, blocks=str(len(chosen.plan.swapped)))
        config = dataclasses.replace(config, offload=offload)
    advice = ""
    if chosen.rejection and not config.force:
        known = [profile_of(device) for device in found]
        advice = nearest_that_fits(asked, found, known, host_free_bytes=host_free_bytes)
    return Preflight(config, chosen, advice, note)


def written_settings(parallelism: ParallelismConfig) -> str:
    """What is not the default, the mode apart: such as `tp=2, pipeline=false`."""
    default = ParallelismConfig(mode=parallelism.mode)
    values = {
        field.name: getattr(parallelism, field.name)
        for field in dataclasses.fields(parallelism)
        if getattr(parallelism, field.name) != getattr(default, field.name)
    }
    return ", ".join(f"parallelism.{name}={str(value).lower()}" for name, value in values.items())


def choose(planned: Planned) -> Candidate:
    """The winner; where nothing fits, the layout that is shortest of memory by the least.

    Raises LayoutError where no layout makes sense at all.
    """
    if winner := planned.winner:
        return winner
    laid_out = [candidate for candidate in planned.candidates if candidate.plan]
    if not laid_out:
        raise LayoutError(planned.candidates[0].rejection)
    return min(laid_out, key=lambda candidate: candidate.excess_bytes)
