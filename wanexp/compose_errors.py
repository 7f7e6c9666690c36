"""What Hydra and OmegaConf say about a bad command line or YAML file, in one line that lists what is valid.

Pure: exceptions in, sentences out. The texts matched here are those of Hydra 1.3; one that is not recognised
becomes its own first line.
"""

import re
from collections.abc import Sequence
from types import NoneType
from typing import Any, get_args, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import ConfigTypeError, OmegaConfBaseException, ValidationError
from yaml import MarkedYAMLError, YAMLError

from wanexp.config import RunConfig, conf_dir
from wanexp.config_keys import (
    LIST_EXAMPLES,
    group_message,
    missing_message,
    omegaconf_message,
    unknown_choice_message,
    unknown_key_message,
)
from wanexp.errors import UserError

_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
}


def explain(error: BaseException, arguments: Sequence[str] = ()) -> str | None:
    """One line for an error the user caused, or None for any other. arguments: the command line it came of."""
    if isinstance(error, UserError):
        return _one_line(str(error))
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    if isinstance(error, OverrideParseException):
        return _bad_syntax(error)
    if isinstance(error, ConfigCompositionException):
        return _bad_composition(error, arguments)
    if isinstance(error, OmegaConfBaseException):
        if found := re.search(r"Missing mandatory value: (\S+)", str(error)):
            return missing_message([found[1]])
        return _one_line(omegaconf_message(error))
    if isinstance(error, YAMLError):
        where = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        place = f"{where.name}, line {where.line + 1}" if where else "a config file"
        return _one_line(f"{place} is not valid YAML: {getattr(error, 'problem', None) or error}")
    if isinstance(error, AssertionError | AttributeError) and "NoneType" in str(error):
        return _below_null(error)
    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        return _no_name_of_a_group(arguments)
    if isinstance(error, HydraException) and "does not support sweep type" in str(error):
        return _no_list(arguments)
    if isinstance(error, HydraException | ValueError):
        return _one_line(_first_line(error))
    return None


def _missing_config(error: MissingConfigException) -> str:
    path = error.missing_cfg_file or ""
    group, _, name = path.rpartition("/")
    if name.startswith("submitit"):
        return "hydra/launcher=slurm needs hydra-submitit-launcher; write pip install 'wanexp[slurm]'"
    if not group or not error.options:
        return _one_line(_first_line(error))
    where = _origin(error)
    return f"{where}{unknown_choice_message(group, name, sorted(error.options))}"


def _bad_syntax(error: OverrideParseException) -> str:
    override = error.override
    if "=" not in override and not override.startswith("~"):
        return f"'{override}' is not of the form key=value; write {override}=VALUE"
    reason = _first_line(error).removeprefix(f"Error parsing override '{override}'")
    reason = reason.split(" expecting {")[0]  # it goes on with names of the grammar
    reason = f" ({reason})" if reason else ""
    key, _, value = override.partition("=")
    if (
        value and not value.startswith(("[", "{")) and "'" not in value
    ):  # a path, say, with a space or a bracket
        return _one_line(
            f"{override} cannot be read{reason}; write it with quotes inside: \"{key}='{value}'\""
        )
    return _one_line(
        f"{override} cannot be read{reason}; write key=value, in quotes for a list: 'gpus=[0,1]'"
    )


def _no_name_of_a_group(arguments: Sequence[str]) -> str:
    """Hydra says neither which group nor what it found."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        group = conf_dir() / key.lstrip("+").partition("@")[0]
        if "=" in argument and key and not argument.startswith(("-", "~")) and group.is_dir():
            override = OverridesParser.create().parse_override(argument)
            if not override.is_sweep_override() and not isinstance(override.value(), str | list):
                options = sorted(path.stem for path in group.glob("*.yaml"))
                return unknown_choice_message(override.key_or_group, value, options)
    return "a config group is set to something else than a name; write the name of one of its options"


def _no_list(arguments: Sequence[str]) -> str:
    """Hydra's sweeper names only the kind of the sweep: an interval, which is for sweepers that search."""
    found = next((argument for argument in arguments if "interval(" in argument), "an interval")
    return _one_line(f"{found} does not say which values; write a list such as 1,2,3 or range(1,4)")


def _bad_composition(error: ConfigCompositionException, arguments: Sequence[str]) -> str:
    text, cause = str(error), error.__cause__
    if found := re.match(r"Could not override '(.+)'\. No match in the defaults list", text):
        wanted = _override_in(text) or f"{found[1]}=NAME"
        return f"{found[1]} is not in the defaults; choose it with a plus: +{wanted}"
    if found := re.match(r"Could not append .*'([^']+)'", text.splitlines()[0]):
        return f"{found[1]} exists already; write {found[1]}=VALUE without the plus"
    if found := re.match(r"(\S+) appears more than once", text):
        return f"{found[1]} is chosen already; write {found[1]}=NAME without the plus"
    if found := re.match(r"Multiple values for (\S+?)\. To override a value use 'override .*: (.*)'", text):
        key, name = found.groups()
        return f"{key} is chosen already; write {key}={name} without the plus (in a file: override /{key}: {name})"
    if found := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.+)'", text):
        key, _, value = found[1].partition("=")
        is_flat = key.lstrip("+") in LIST_EXAMPLES and not re.search(r"[\[(]", value)
        one = f"write a list: '{key}=[{value}]'" if is_flat else "write one of them"
        if "task=plan" in arguments:  # which takes no -m
            return f"{found[1]} names several values, and task=plan prints one plan; {one}"
        return f"{found[1]} names several values; add -m to sweep over them, or {one}"
    if found := re.match(r"Error merging override (.*)", text):
        key, _, value = found[1].partition("=")
        if isinstance(cause, ValidationError | ConfigTypeError):
            return _wrong_type(key.lstrip("+"), value, cause)
    if found := re.match(r"Could not override '([^']+)'", text):
        key = found[1]
        return f"{key} does not exist" if key.startswith("hydra.") else unknown_key_message(RunConfig, key)
    inner = [line for line in text.splitlines() if not line.startswith("In '")]
    if found := re.search(r"^\s*full_key: (\S+)", text, re.MULTILINE):
        key = found[1]
        if re.search(r"Key '.*' not in ", text):
            return _origin(error) + unknown_key_message(RunConfig, key)
        return _one_line(f"{_origin(error)}{key}: {inner[0] if inner else text}")
    return _one_line(_first_line(error))


def _wrong_type(key: str, value: str, cause: OmegaConfBaseException) -> str:
    if cause.full_key and key.startswith(f"{cause.full_key}."):
        return unknown_key_message(RunConfig, key)
    if group := group_message(RunConfig, key, value):
        return _one_line(group)
    expected = _expected(key)
    if expected is None:
        return _one_line(f"{key}={value}: {_first_line(cause)}")
    return _one_line(f"{key} is '{value}'; write {expected}")


def _below_null(error: BaseException) -> str | None:
    """OmegaConf fails to set a key inside a group that is null; only `hardware.device` can be."""
    if "Unexpected type for root: NoneType" in str(error) or "full_key: hardware.device" in str(error):
        return (
            "hardware.device is null here; write +hardware/device=NAME first (such as h100), "
            "then hardware.device.KEY=VALUE"
        )
    return None


def _expected(key: str) -> str | None:
    """What a value of this dotted key looks like, in words."""
    kind: Any = RunConfig
    for part in key.split("."):
        hints = get_type_hints(kind) if isinstance(kind, type) else {}
        if part not in hints:
            return None
        kind = hints[part]
    options = get_args(kind)
    or_null = ""
    if NoneType in options:
        kind = next(option for option in options if option is not NoneType)
        or_null = " or null"
    words = f"a list such as {LIST_EXAMPLES[key]}" if key in LIST_EXAMPLES else _EXPECTED.get(kind)
    return words + or_null if words else None


def _origin(error: Exception) -> str:
    """`in model/mine: ` where the error lies in a file other than the primary config."""
    found = re.match(r"In '(.+?)'", str(error))
    return f"in {found[1]}: " if found and found[1] != "config" else ""


def _override_in(text: str) -> str | None:
    found = re.search(r"use \+(\S+)", text)
    return found[1] if found else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())
