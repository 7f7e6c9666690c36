"""From the overrides of a cell to a run that is checked, forecast and fingerprinted, but not started."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from wanexp.config import RunConfig, to_dict
from wanexp.config_reading import to_run_config
from wanexp.errors import UserError
from wanexp.parallel.layout import REPLICA_MODES
from wanexp.planning.plan import Plan
from wanexp.sweep import fingerprint
from wanexp.sweep.forecast import Forecaster
from wanexp.sweep.run import SweepRun
from wanexp.tracking.location import without_password


class CellComposer:
    """Composes the cells of one sweep in `folder`."""

    def __init__(self, hydra_context: HydraContext, config: DictConfig, folder: Path) -> None:
        self._loader, self._config, self._folder = hydra_context.config_loader, config, folder
        self._forecast = Forecaster()
        self.source = fingerprint.source_digest()  # once: a sweep runs the code that it began with

    def __call__(self, overrides: list[str], index: int) -> SweepRun:
        """The first repeat of cell `index`; a mistake in it is its `error`."""
        config = self._loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(index)
            config.hydra.job.num = index
        hydra_config = HydraConfig.instance()
        outer = hydra_config.cfg
        hydra_config.set_config(config)  # for ${hydra:...}
        try:
            folder = self._folder / os.path.normpath(str(config.hydra.sweep.subdir))
            own = [without_password(word) for word in config.hydra.overrides.task]
            run = SweepRun(index, 1, own, config=config, settings=None, error=None, folder=folder)
            run.settings = to_run_config(_without_hydra(config))
            self._look_ahead(run, run.settings)
        except UserError as mistake:
            run.error = str(mistake)
        finally:
            hydra_config.cfg = outer
        return run

    def _look_ahead(self, run: SweepRun, settings: RunConfig) -> None:
        """Forecast and fingerprint `run`. Raises UserError for what could only fail, here and not halfway."""
        # Hydra leaves what is swept over out of the sweep's own config
        if settings.sweep_name != self._config.sweep_name:
            raise UserError(
                "sweep_name has several values (of several +sweep, too); a sweep has one folder: write one +sweep, "
                "or sweep_name=NAME"
            )
        if settings.task == "plan":
            raise UserError("task=plan prints one plan and runs nothing; leave out -m and +sweep")
        run.forecast = self._forecast(settings)
        hardware = fingerprint.hardware_identity(run.forecast.devices)
        run.cell = fingerprint.cell_fingerprint(to_dict(settings), self.source, hardware)
        if (plan := run.forecast.plan) is None:
            return
        run.work = fingerprint.cell_fingerprint(_laid_out(settings, plan), self.source, hardware)
        if settings.checkpoint is not None:
            from wanexp.wan.weights import open_weights  # imports torch, so late

            model = settings.model
            open_weights(settings.checkpoint, model.architecture, num_experts=model.num_experts)


def _laid_out(settings: RunConfig, plan: Plan) -> dict[str, Any]:
    """The config with what its parallelism comes to on these devices. Only replicas do other work by their mode."""
    mode = plan.mode if plan.mode in REPLICA_MODES else None
    return to_dict(settings) | {"gpus": None, "parallelism": dataclasses.asdict(plan) | {"mode": mode}}


def _without_hydra(config: DictConfig) -> DictConfig:
    task_config = config.copy()
    with open_dict(task_config):
        del task_config["hydra"]
    return task_config
