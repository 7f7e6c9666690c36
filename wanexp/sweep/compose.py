"""From the overrides of a cell to a run that is checked, forecast and fingerprinted, but not started."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from wanexp.config import to_dict, to_run_config
from wanexp.errors import UserError
from wanexp.sweep import fingerprint
from wanexp.sweep.forecast import Forecaster
from wanexp.sweep.run import SweepRun


class CellComposer:
    """Composes the cells of one sweep in `folder`."""

    def __init__(self, hydra_context: HydraContext, config: DictConfig, folder: Path) -> None:
        self._loader, self._config, self._folder = hydra_context.config_loader, config, folder
        self._forecast = Forecaster()
        self.source = fingerprint.source_digest()  # once: a sweep runs the code that it began with

    def __call__(self, overrides: list[str], index: int) -> SweepRun:
        """The first repeat of cell `index`; what is wrong with its config is its `error`."""
        config = self._loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(index)
            config.hydra.job.num = index
        hydra_config = HydraConfig.instance()
        outer, error, settings = hydra_config.cfg, None, None
        hydra_config.set_config(config)  # for ${hydra:...}
        try:
            folder = self._folder / str(config.hydra.sweep.subdir)
            settings = to_run_config(_without_hydra(config))
        except UserError as invalid:
            error = str(invalid)
        finally:
            hydra_config.cfg = outer
        own = list(config.hydra.overrides.task)
        run = SweepRun(index, 1, own, config=config, settings=settings, error=error, folder=folder)
        if settings is not None:
            run.forecast = self._forecast(settings)
            hardware = fingerprint.hardware_identity(run.forecast.devices)
            run.cell = fingerprint.cell_fingerprint(to_dict(settings), self.source, hardware)
        return run


def _without_hydra(config: DictConfig) -> DictConfig:
    task_config = config.copy()
    with open_dict(task_config):
        del task_config["hydra"]
    return task_config
