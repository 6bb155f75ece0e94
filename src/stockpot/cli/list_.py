"""``stockpot list``: streams, models and methods, with their settings and defaults."""

from __future__ import annotations

import json
import types
import typing
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

__all__ = ["list_"]


class Kind(StrEnum):
    """What there is to list."""

    streams = "streams"
    models = "models"
    methods = "methods"
    training = "training"
    evaluation = "evaluation"
    record = "record"
    resources = "resources"


def list_(
    kind: Annotated[
        Kind | None, typer.Argument(help="What to list; everything if it is not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
) -> None:
    """Show the streams, models and methods, each with its settings and their defaults."""
    sections = {key: value for key, value in _sections().items() if kind in (None, key)}
    if as_json:
        document = {
            section: {name: _as_json(kind_) for name, kind_ in kinds.items()}
            for section, kinds in sections.items()
        }
        typer.echo(json.dumps(document, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for section, kinds in sections.items():
        console.print(Text(section, style="bold underline"))
        for name, settings in kinds.items():
            reference = getattr(settings, "reference", "")
            console.print(
                Text.assemble("\n  ", (name, "bold cyan"), "  ", _first(settings), style="")
                + Text(f"  [{reference}]" if reference else "", style="dim")
            )
            table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
            for field, info in _fields(settings):
                table.add_row(
                    "   ",
                    Text(field, style="green"),
                    Text(_default(info)),
                    Text(f"{_kind(info.annotation)}. {info.description or ''}", style="dim"),
                )
            if table.row_count:
                console.print(table)
        console.print()


def _sections() -> dict[str, dict[str, type[BaseModel]]]:
    from stockpot.evaluation.settings import EvaluationSettings
    from stockpot.experiment.config import RecordSettings
    from stockpot.experiment.resources import ResourceSettings
    from stockpot.methods import METHODS
    from stockpot.models import MODELS
    from stockpot.streams import STREAMS
    from stockpot.training import TrainingSettings

    return {
        "streams": dict(STREAMS),
        "models": dict(MODELS),
        "methods": dict(METHODS),
        "training": {"training": TrainingSettings},
        "evaluation": {"evaluation": EvaluationSettings},
        "record": {"record": RecordSettings},
        "resources": {"resources": ResourceSettings},
    }


def _first(settings: type[BaseModel]) -> str:
    """The first paragraph of a docstring on one line."""
    paragraph = (settings.__doc__ or "").strip().split("\n\n")[0]
    return " ".join(paragraph.split())


def _fields(settings: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    return [(name, info) for name, info in settings.model_fields.items() if name != "name"]


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        value = list(value)
    return "null" if value is None else json.dumps(value)


def _kind(annotation: Any) -> str:
    """A type in words."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_kind(argument) for argument in arguments)
    if origin is tuple:
        if typing.get_origin(arguments[0]) is typing.Literal:
            return _kind(arguments[0]).replace("one of", "list of any of", 1)
        return f"list of {_kind(arguments[0])}s"
    words = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true or false",
        types.NoneType: "null",
    }
    return words.get(annotation, "mapping")


def _as_json(settings: type[BaseModel]) -> dict[str, Any]:
    return {
        "about": _first(settings),
        "settings": {
            name: {
                "type": _kind(info.annotation),
                "required": info.is_required(),
                "default": None
                if info.is_required()
                else json.loads(json.dumps(info.get_default(call_default_factory=True))),
                "about": info.description or "",
            }
            for name, info in _fields(settings)
        },
    }
