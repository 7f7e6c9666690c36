"""What the planner says of a cell before it runs: its seconds, its devices, its peak. Pure but for `Forecaster`."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from wanexp.config import HardwareConfig, RunConfig, conf_dir
from wanexp.errors import LayoutError
from wanexp.hardware.devices import Device, find_devices, select_devices
from wanexp.hardware.profiles import profile_for
from wanexp.planning.plan import Plan
from wanexp.planning.planner import cap_memory
from wanexp.planning.preflight import preflight

GIB = 1024**3


@dataclass(frozen=True)
class Forecast:
    """Of one cell. seconds: of all its steps; from generic rates where the device's are unknown, good for ranking.

    needed: predicted peak of each device in bytes. scope: the model and what is done with it; peaks compare within one.
    plan: None for a layout that makes no sense.
    """

    devices: tuple[Device, ...]
    scope: tuple[str, ...] = ()
    seconds: float = 0.0
    needed: tuple[int, ...] = ()
    plan: Plan | None = None

    @property
    def cost(self) -> float:
        """GPU seconds; 0 where nothing will run."""
        return self.seconds * len(self.needed)

    @property
    def fullest(self) -> int:
        """Bytes on the fullest device; logical CPU devices share the host's memory."""
        return (sum if self.devices[0].type == "cpu" else max)(self.needed) if self.needed else 0


class Forecaster:
    """Forecasts the cells of one sweep; devices are looked for once a hardware setting."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Device, ...]] = {}

    def devices(self, hardware: HardwareConfig) -> tuple[Device, ...]:
        """All devices of a hardware setting. Raises UserError."""
        key = json.dumps(dataclasses.asdict(hardware), sort_keys=True)
        if key not in self._found:
            self._found[key] = cap_memory(find_devices(hardware), hardware)
        return self._found[key]

    def __call__(self, config: RunConfig) -> Forecast:
        """Of a layout that makes no sense only the devices: the run itself says what is wrong with it.

        Raises UserError for any other mistake.
        """
        found = self.devices(config.hardware)
        devices = select_devices(found, config.gpus, config.parallelism.mode, in_sweep=True)
        asked = dataclasses.replace(config, force=True)  # no advice, which costs a search
        try:
            judged = preflight(
                asked, devices, found, lambda device: profile_for(config.hardware, device, conf_dir())
            ).candidate
        except LayoutError:
            return Forecast(devices)
        steps = config.workload.num_steps + config.workload.num_warmup_steps
        return Forecast(
            judged.devices,
            scope=(config.model.name, config.workload.name, judged.devices[0].name),
            seconds=judged.time.step_s * steps if judged.time else 0.0,
            needed=tuple(entry.needed for entry in judged.memory),
            plan=judged.plan,
        )


def is_bigger(forecast: Forecast, other: Forecast) -> bool:
    """Whether a cell must run out of memory where `other` did: by the planner's peaks of the same model."""
    if not forecast.needed or not other.needed or forecast.scope != other.scope:
        return False
    capacity, other_capacity = (min(device.total_bytes for device in f.devices) for f in (forecast, other))
    return forecast.fullest > other.fullest and capacity <= other_capacity


def too_big(cell: str, forecast: Forecast, ran_out: Sequence[tuple[str, str, Forecast]]) -> str:
    """Why a run of `cell` is skipped after others (name, cell, forecast) ran out of memory; empty where it may run."""
    for name, other_cell, other in ran_out:
        if cell == other_cell:
            return f"{name}, the same cell, ran out of memory; force=true runs it all the same"
        if is_bigger(forecast, other):
            return (
                f"would need {forecast.fullest / GIB:.3g} GiB on its fullest device by the plan, and {name} ran out "
                f"of memory with {other.fullest / GIB:.3g}; force=true runs it all the same"
            )
    return ""
