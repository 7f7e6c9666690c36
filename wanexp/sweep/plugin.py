"""How Hydra gets to know sweeper and launcher, and what its sweep files may ask for."""

import importlib
import sys
from types import ModuleType

from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from wanexp.sweep.launcher import SweepLauncher


def register_plugins() -> None:
    """Make sweeper and launcher known to Hydra, under the names in `conf/hydra/{sweeper,launcher}/wanexp.yaml`.

    Hydra finds a plugin's class by importing its name, which must lie in the namespace `hydra_plugins`. So a
    module of that name is made here; a folder of that name would be loaded by every Hydra program around.
    """
    known = Plugins.instance()
    from wanexp.sweep.sweeper import SweepSweeper  # after the scan, which loads its base class anew

    plugins = (SweepSweeper, SweepLauncher)
    for plugin in plugins:
        known.register(plugin)
    try:
        namespace = importlib.import_module("hydra_plugins")
    except ImportError:
        namespace = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        namespace.__path__ = []
    module = ModuleType(SweepLauncher.__module__)
    vars(module).update({plugin.__name__: plugin for plugin in plugins})
    vars(namespace)["wanexp"] = sys.modules[module.__name__] = module
    OmegaConf.register_new_resolver("wanexp.gpu_lists", gpu_lists, replace=True)


def gpu_lists(device_type: str, num_devices: int | None) -> str:
    """For `conf/sweep/scaling.yaml`: the first 1, 2, 4, ... and all devices there are, `[0],[0,1],[0,1,2,3]`."""
    from wanexp.config import HardwareConfig
    from wanexp.hardware.devices import find_devices

    found = find_devices(HardwareConfig("scaling", device_type, num_devices))
    return ",".join(f"[{','.join(map(str, range(count)))}]" for count in gpu_counts(len(found)))


def gpu_counts(available: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return sorted({available, *(2**power for power in range(available.bit_length()))} - {0})
