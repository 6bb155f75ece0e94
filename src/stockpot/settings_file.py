"""Settings files: YAML as plain values that remember their lines, and errors as sentences."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockpot.errors import ConfigError, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["Key", "Lines", "dotted", "explain", "read_yaml"]

Key = str | int
Lines = dict[tuple[Key, ...], str]
"""Where each value stands: ``file:line``, or the command line's own words."""


def read_yaml(path: Path, expected: str) -> tuple[dict[str, Any], Lines]:
    """The file's values, and the place of each; ``expected`` tells what should stand in it.

    Raises:
        ConfigError: if it cannot be read, is no YAML mapping, or gives a key twice.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold {expected}, not {type(value).__name__}")
    try:
        return value, dict(_places(root, (), path))
    except RecursionError as error:
        raise ConfigError(f"{path} refers to itself by an alias") from error


def _places(node: Any, at: tuple[Key, ...], path: Path) -> Iterator[tuple[tuple[Key, ...], str]]:
    import yaml

    yield at, f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, child in node.value:
            where = f"{path}:{key.start_mark.line + 1}"
            if key.value in seen:
                raise ConfigError(f"{where}: {dotted((*at, key.value))} is given twice")
            seen.add(key.value)
            yield from _places(child, (*at, key.value), path)
            yield (*at, key.value), where
    elif isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            yield from _places(child, (*at, number), path)


def dotted(at: tuple[Key, ...]) -> str:
    """A place as it is written on the command line: ``training.epochs``."""
    return ".".join(str(key) for key in at)


def explain(kind: type[BaseModel], error: Any) -> str:
    """One of pydantic's errors in a sentence: what is wrong and what would be right."""
    given, limits = error["input"], error.get("ctx", {})
    owner, name = _owner(kind, error["loc"])
    if error["type"] == "extra_forbidden":
        key = error["loc"][-1]
        return f"unknown key {key!r}{nearest(str(key), owner.model_fields)}"
    if error["type"] == "literal_error":
        options = [
            option.strip("' ") for option in limits["expected"].replace(" or ", ", ").split(",")
        ]
        return f"{given!r} is not one of {', '.join(options)}{_only_close(str(given), options)}"
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "value_error":
        return str(limits["error"])
    field = owner.model_fields.get(name)
    about = f" ({field.description})" if field and field.description else ""
    units = {"too_short": "item", "string_too_short": "character"}
    if error["type"] in units:
        least, unit = limits["min_length"], units[error["type"]]
        return f"{given!r} is too short: at least {least} {unit}{'s' * (least > 1)}{about}"
    what: str = error["msg"].removeprefix("Input should be ").replace("valid tuple", "list")
    return f"{given!r} should be {what}{about}"


def _owner(kind: type[BaseModel], at: tuple[Key, ...]) -> tuple[type[BaseModel], str]:
    """The innermost settings that an error lies in, and the field of theirs that it is about."""
    owner, name = kind, ""
    for key in at:
        if not isinstance(key, str):
            continue
        inner = (
            _settings_in(owner.model_fields[name].annotation)
            if name in owner.model_fields
            else None
        )
        owner, name = (inner, key) if inner is not None else (owner, name or key)
    return owner, name


def _settings_in(annotation: Any) -> type[BaseModel] | None:
    """The settings that a field holds, by themselves or as the items of a list."""
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        return annotation
    found = (_settings_in(part) for part in typing.get_args(annotation))
    return next((part for part in found if part is not None), None)


def _only_close(name: str, options: list[str]) -> str:
    hint = nearest(name, options)
    return hint if "did you mean" in hint else ""
