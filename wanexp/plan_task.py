"""`task=plan`: print what every layout would need on these devices, and run nothing.

A named machine (hardware=4x_rtx3080) is planned from its profile, without a GPU; hardware=auto takes the devices at
hand with the memory that is free now.
"""

import json

import psutil

from wanexp.config import RunConfig, conf_dir
from wanexp.hardware.devices import Device, find_devices, select_devices
from wanexp.hardware.profiles import profile_for
from wanexp.planning.advice import nearest_that_fits
from wanexp.planning.planner import cap_memory, plan_layouts, profile_devices, with_asked
from wanexp.terminal.console import Console
from wanexp.terminal.plan_table import print_plan_table


def print_plan(config: RunConfig) -> None:
    """A table, or with plan_json=true a JSON document, on stdout. Raises UserError."""
    devices = devices_to_plan(config)
    if (config.attention, config.kernels) != ("auto", "auto"):
        from wanexp.wan.kernels import check_kernels  # imports torch, so only where it has something to say

        check_kernels(config, devices)
    profiles = [profile_for(config.hardware, device, conf_dir()) for device in devices]
    host_free = _host_free_bytes(config)
    planned = plan_layouts(config, devices, profiles, host_free_bytes=host_free)
    planned = with_asked(planned, config, devices, profiles, host_free_bytes=host_free)
    advice = "" if planned.winner else nearest_that_fits(config, devices, profiles, host_free_bytes=host_free)
    if config.plan_json:
        print(json.dumps(planned.summary() | {"advice": advice or None}, indent=1))
        return
    print_plan_table(Console(), config, devices, planned, advice)


def _is_named_machine(config: RunConfig) -> bool:
    return config.hardware.device_type == "cuda" and config.hardware.device is not None


def _host_free_bytes(config: RunConfig) -> int | None:
    """Of this machine; of a named one nobody knows."""
    return None if _is_named_machine(config) else psutil.virtual_memory().available


def devices_to_plan(config: RunConfig) -> tuple[Device, ...]:
    """All devices, or those that `gpus` names."""
    hardware = config.hardware
    named = _is_named_machine(config)
    found = profile_devices(hardware) if named else cap_memory(find_devices(hardware), hardware)
    return select_devices(found, config.gpus, "auto")
