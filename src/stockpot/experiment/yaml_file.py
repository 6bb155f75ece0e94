"""A YAML file as plain values that remember the line each was written on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stockpot.errors import ConfigError
from stockpot.models import expand_model

__all__ = ["Lines", "apply_override", "read_yaml"]

Key = str | int
Lines = dict[tuple[Key, ...], str]
"""Where each value stands: ``file:line``, or the command line's own words."""


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """The file's values, and the place of each.

    Raises:
        ConfigError: if it cannot be read, is no YAML mapping, or gives a key twice.
    """
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
        raise ConfigError(
            f"{path} must hold 'stream:', 'model:', 'methods:' and so on, not "
            f"{type(value).__name__}; `stockpot run --help` shows an example"
        )
    try:
        return value, dict(_places(root, (), path))
    except RecursionError as error:
        raise ConfigError(f"{path} refers to itself by an alias") from error


def _places(node: Any, at: tuple[Key, ...], path: Path) -> Iterator[tuple[tuple[Key, ...], str]]:
    yield at, f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, child in node.value:
            where = f"{path}:{key.start_mark.line + 1}"
            if key.value in seen:
                raise ConfigError(f"{where}: {_dotted((*at, key.value))} is given twice")
            seen.add(key.value)
            yield from _places(child, (*at, key.value), path)
            yield (*at, key.value), where
    elif isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            yield from _places(child, (*at, number), path)


def _dotted(at: tuple[Key, ...]) -> str:
    return ".".join(str(key) for key in at)


def apply_override(values: dict[str, Any], places: Lines, override: str) -> None:
    """Set one value by its dotted path: ``training.epochs=1``, ``methods.sfa.p=[0.25,0.5]``.

    A method is named by its name or its number; a section written as one word (``stream: digits``)
    becomes a mapping when a part of it is set.

    Raises:
        ConfigError: if it is no ``key=value``, or the path leads through something with no parts.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{override!r} is no override: write key=value, as in training.epochs=1")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{override!r}: the value is no valid YAML: {error}") from error
    here: Any = values
    keys = path.split(".")
    resolved: list[Key] = []
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(here, list):
            index = _item(here, key, override)
            resolved.append(index)
            if last:
                here[index] = value
                break
            if isinstance(here[index], str):
                here[index] = {"name": here[index]}
            here = here[index]
        elif isinstance(here, dict):
            resolved.append(key)
            if last:
                here[key] = value
                break
            if isinstance(here.get(key), str):
                here[key] = expand_model(here[key]) if key == "model" else {"name": here[key]}
            if here.get(key) is None:
                here[key] = {}
            here = here[key]
        else:
            raise ConfigError(f"{override!r}: {'.'.join(keys[:position])} has no parts to set")
    at = tuple(resolved)
    for known in [place for place in places if place[: len(at)] == at]:
        del places[known]
    places[at] = f"command line, {override!r}"


def _item(items: list[Any], key: str, override: str) -> int:
    if key.isdigit() and int(key) < len(items):
        return int(key)
    names = [item.get("name") if isinstance(item, dict) else item for item in items]
    if names.count(key) == 1:
        return names.index(key)
    reason = "stands there more than once; use its number" if key in names else "is not there"
    raise ConfigError(
        f"{override!r}: {key!r} {reason} (there are "
        + ", ".join(f"{number}: {name}" for number, name in enumerate(names))
        + ")"
    )
