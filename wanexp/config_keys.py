"""Keys and choices of a schema of dataclasses: which there are, which are unknown, and the line that says so."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints

from omegaconf.errors import OmegaConfBaseException

LIST_EXAMPLES = {  # every key that takes a list, and a value that it takes
    "gpus": "[0,1]",
    "parallelism.block_split": "[4,4]",
    "model.vae_stride": "[4,8,8]",
    "model.guidance_scale": "[5.0]",
    "workload.guidance_scale": "[5.0]",
}


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


def missing_message(missing: Sequence[str]) -> str:
    """The line for keys without a value: where that of a whole group is not chosen, the group is what to write."""
    group, _, name = missing[0].partition(".")
    is_whole_group = not {f"{group}.name", f"{group}.mode"}.isdisjoint(missing)
    wanted = f"{group}=NAME" if name and is_whole_group else f"{missing[0]}=VALUE"
    return f"{missing[0]} has no value; write {wanted}"


def group_message(schema: type, key: str, found: object) -> str | None:
    """The line for a value in the place of a group of keys; None where `key` is no such group."""
    group = schema
    for part in key.split("."):
        nested = _dataclass_of(group, part) if part in [item.name for item in fields(group)] else None
        if nested is None:
            return None
        group = nested
    names = [item.name for item in fields(group)]
    keys = ", ".join(names)
    return (
        f"{key} is '{found}' and holds several keys; write {key}.{first_setting(group)}=VALUE (keys: {keys})"
    )


def first_setting(group: type) -> str:
    """The first key of a group that sets something: a name says only which file the others came from."""
    return next(item.name for item in fields(group) if item.name not in ("name", "mode"))


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


def nested_list(values: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The first key of LIST_EXAMPLES with a list or a table inside of its list, and its value."""
    for key in LIST_EXAMPLES:
        value: Any = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        items = value if isinstance(value, list | tuple) else ()
        if any(isinstance(item, list | tuple | Mapping) for item in items):
            return key, value
    return None


def leaves(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item, path)
    else:
        yield path, value
