"""Keys and choices of a schema of dataclasses: which there are, which are unknown, and the line that says so."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints

from omegaconf.errors import OmegaConfBaseException


def did_you_mean(found: object, valid: Iterable[str]) -> str:
    """` (did you mean X?)` where one of the valid words is close to the one found, else nothing."""
    close = difflib.get_close_matches(str(found), list(valid), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def unknown_choice_message(key: str, found: object, valid: Sequence[str]) -> str:
    """The line for a name that is not among the valid ones."""
    return f"{key} '{found}' does not exist{did_you_mean(found, valid)}; write one of: {', '.join(valid)}"


def unknown_key_message(schema: type, key: str) -> str:
    """The line for a dotted key that the schema does not have; it lists the keys of the nearest group."""
    group = schema
    parts = key.split(".")
    for depth, part in enumerate(parts):
        names = [item.name for item in fields(group)]
        path = ".".join(parts[:depth])
        if part not in names:
            found = ".".join(parts[: depth + 1])
            listed = f"keys of {path}: {', '.join(names)}" if path else f"keys: {', '.join(names)}"
            return f"{found} does not exist{did_you_mean(part, names)}; {listed}"
        nested = _dataclass_of(group, part)
        if nested is None:
            return f"{key} does not exist; {'.'.join(parts[: depth + 1])} is a single value"
        group = nested
    return f"{key} does not exist"


def omegaconf_message(error: OmegaConfBaseException) -> str:
    """OmegaConf's first line, with the key that it speaks of."""
    key = f"{error.full_key}: " if error.full_key else ""
    return key + str(error).strip().split("\n")[0]


def _dataclass_of(group: type, key: str) -> type | None:
    """The dataclass that `key` of `group` holds (also where it may be None), or None for a plain value."""
    annotation = get_type_hints(group)[key]
    for candidate in (annotation, *(kind for kind in get_args(annotation) if kind is not NoneType)):
        if isinstance(candidate, type) and is_dataclass(candidate):
            return candidate
    return None


def known_items(group: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without the keys that `group` and the dataclasses in it do not have."""
    known = {}
    for item in fields(group):
        if item.name not in values:
            continue
        value, nested = values[item.name], _dataclass_of(group, item.name)
        known[item.name] = known_items(nested, value) if nested and isinstance(value, Mapping) else value
    return known


def unknown_keys(group: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = [item.name for item in fields(group)]
    unknown = []
    for key, value in values.items():
        nested = _dataclass_of(group, key) if key in names else None
        if key not in names:
            unknown.append(prefix + key)
        elif nested and isinstance(value, Mapping):
            unknown += unknown_keys(nested, value, f"{prefix}{key}.")
    return unknown


def leaves(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item, path)
    else:
        yield path, value
