"""The profile of a found device: its peak rates, looked up by name among `conf/hardware/device/*.yaml`."""

import functools
import re
from dataclasses import fields, replace
from pathlib import Path

from wanexp.config import DeviceProfile, HardwareConfig
from wanexp.errors import UserError
from wanexp.hardware.devices import Device


def profile_for(hardware: HardwareConfig, device: Device, conf_dir: Path) -> DeviceProfile | None:
    """What is known of `device`: the profile in `hardware` if it is of this device, else one of `conf_dir`.

    A profile without a name is the user's own word and taken as it is; one with another name than the
    device's is not used (its peak would falsify the MFU). None where nothing is known. Raises UserError for
    an unreadable file.
    """
    given = hardware.device
    if given is not None and given.name in ("", "???"):
        return given
    wanted = _normal(device.name)
    if given is not None and _normal(given.name) == wanted:
        return given
    return next((replace(known) for known in _profiles(conf_dir) if _normal(known.name) == wanted), None)


@functools.cache  # sweeps ask for each of their cells
def _profiles(conf_dir: Path) -> tuple[DeviceProfile, ...]:
    import yaml  # comes with omegaconf

    profiles: list[DeviceProfile] = []
    known = {field.name for field in fields(DeviceProfile)}
    for path in sorted((conf_dir / "hardware" / "device").glob("*.yaml")):
        try:
            document = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"{path} is not a readable device profile: {error}") from None
        if isinstance(document, dict) and "name" in document:
            profiles.append(DeviceProfile(**{key: value for key, value in document.items() if key in known}))
    return tuple(profiles)


def _normal(name: str) -> str:
    """Without vendor, family, case and punctuation: "NVIDIA GeForce RTX 4090" becomes "rtx4090"."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "".join(word for word in words if word not in ("nvidia", "geforce"))
