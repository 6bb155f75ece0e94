"""Settings files: YAML as plain values that remember their lines, and errors as sentences."""

from __future__ import annotations

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
    if error["type"] == "extra_forbidden":
        key = error["loc"][-1]
        return f"unknown key {key!r}{nearest(str(key), kind.model_fields)}"
    if error["type"] == "literal_error":
        options = [
            option.strip("' ") for option in limits["expected"].replace(" or ", ", ").split(",")
        ]
        return f"{given!r} is not one of {', '.join(options)}{_only_close(str(given), options)}"
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "value_error":
        return str(limits["error"])
    what: str = error["msg"].removeprefix("Input should be ")
    field = kind.model_fields.get(str(error["loc"][0])) if error["loc"] else None
    about = f" ({field.description})" if field and field.description else ""
    return f"{given!r} should be {what}{about}"


def _only_close(name: str, options: list[str]) -> str:
    hint = nearest(name, options)
    return hint if "did you mean" in hint else ""
