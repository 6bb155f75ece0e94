"""Settings of an experiment that the command line changes."""

from __future__ import annotations

from typing import Any

import yaml

from stockpot.errors import ConfigError
from stockpot.models import expand_model
from stockpot.settings_file import Key, Lines

__all__ = ["apply_override"]


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
