"""What to merge: the recipe, from YAML, the command line or Python, checked before a file is read.

A recipe names the method and its settings, the models with their weights, and what is to be done
where the inputs differ. mergekit's YAML is understood too (`stockpot.merging.mergekit`). No torch.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from stockpot.errors import ConfigError, nearest
from stockpot.merging.dtypes import FLOATING
from stockpot.merging.settings import METHODS, MergeMethod
from stockpot.merging.shares import Shares
from stockpot.settings_file import Key, Lines, explain, read_yaml

__all__ = ["Input", "MergeRecipe", "Point", "load_recipe", "make_recipe", "parse_model"]

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
}
assert set(DTYPES.values()) == set(FLOATING)

_T = TypeVar("_T")


class Input(BaseModel):
    """One model of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="folder, safetensors file or hub id")
    weight: float | None = Field(None, allow_inf_nan=False, description="how much it counts")
    fisher: str | None = Field(None, description="safetensors file with its Fisher values")
    sha256: str | dict[str, str] | None = Field(
        None, description="stated hash of its one file, or of each file by name"
    )

    @field_validator("sha256")
    @classmethod
    def _sha256(cls, value: str | dict[str, str] | None) -> str | dict[str, str] | None:
        for text in [value] if isinstance(value, str) else (value or {}).values():
            if not re.fullmatch("[0-9a-fA-F]{64}", text):
                raise ValueError(f"{text!r} is no SHA-256: 64 hexadecimal digits")
        return value


class MergeRecipe(BaseModel):
    """A merge, but for the place of its output."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(description=f"one of {', '.join(METHODS)}")
    base: Input | None = Field(None, description="the model that the others were tuned from")
    models: tuple[Input, ...] = Field(min_length=1, description="the models to merge")
    parameters: dict[str, Any] = Field(default_factory=dict, description="the method's settings")
    weights: dict[str, list[float]] = Field(
        default_factory=dict,
        description="for tensors whose names match a pattern, one weight per model",
    )
    sweep: dict[str, list[Any]] = Field(
        default_factory=dict, description="settings to give several values, one output each"
    )
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = Field(
        None, description="of the output; default: as in the base, or in the first model"
    )
    missing: Literal["error", "base", "skip"] = Field(
        "error",
        description="tensors that some inputs lack: refuse; take the base's where a model lacks "
        "it; or leave it out of the output",
    )
    tokenizers: Literal["same", "any"] = Field(
        "same", description="refuse models whose vocabularies differ, or merge them all the same"
    )

    @field_validator("base", mode="before")
    @classmethod
    def _base(cls, value: Any) -> Any:
        return _as_input(value)

    @field_validator("models", mode="before")
    @classmethod
    def _models(cls, value: Any) -> Any:
        return tuple(map(_as_input, value)) if isinstance(value, list | tuple) else value

    def points(self) -> list[Point]:
        """The method at every point of the sweep; one point without a sweep.

        Raises:
            ConfigError: if settings do not fit the method or each other.
        """
        kind = METHODS[self.method]
        shares = self.shares()
        result = []
        for values in itertools.product(*self.sweep.values()):
            chosen = dict(zip(self.sweep, values, strict=True))
            name = ",".join(f"{key}={_plain(value)}" for key, value in chosen.items())
            try:
                method = kind.model_validate({**self.parameters, **chosen})
            except ValidationError as error:
                raise ConfigError(
                    "; ".join(_sentence(kind, item) for item in error.errors())
                ) from error
            _checked(functools.partial(method.check, shares))
            result.append(Point(name, method))
        names = [point.name for point in result]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"sweep: {', '.join(sorted(twice))} is given twice")
        return result

    def shares(self) -> Shares:
        """The models' weights.

        Raises:
            ConfigError: if their number or values are wrong.
        """
        given = [model.weight for model in self.models]
        if METHODS[self.method].weighted:
            row = [1.0 if weight is None else weight for weight in given]
            return _checked(lambda: Shares.make(row, len(row), self.weights))
        if self.weights or any(weight is not None for weight in given):
            raise ConfigError(f"weights: method {self.method!r} takes none")
        return Shares.make(None, len(given))


@dataclass(frozen=True)
class Point:
    """One output of a recipe."""

    name: str
    """``beta=0.1``; empty without a sweep."""
    method: MergeMethod = field(repr=False)


def _checked(compute: Callable[[], _T]) -> _T:
    try:
        return compute()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _sentence(kind: type[BaseModel], item: Any) -> str:
    at = ".".join(str(key) for key in item["loc"])
    return f"{at}: {explain(kind, item)}"


def _plain(value: Any) -> str:
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


def _as_input(value: Any) -> Any:
    return parse_model(value) if isinstance(value, str) else value


def parse_model(text: str) -> dict[str, Any]:
    """``MODEL`` or ``MODEL:weight``; what follows the last colon counts if it is a number.

    A path that exists as it stands is taken as it stands.
    """
    head, colon, tail = text.rpartition(":")
    if colon and head and not Path(text).exists():
        try:
            return {"model": head, "weight": float(tail)}
        except ValueError:
            pass
    return {"model": text}


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """``beta=0:1:0.1`` (start, stop, step; both ends included) or ``trim=global,per-tensor``.

    Raises:
        ConfigError: if it is neither.
    """
    key, equals, values = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals or not key or not values.strip():
        raise ConfigError(f"--sweep {text!r}: write a setting and its values, as in beta=0:1:0.1")
    if values.count(":") == 0:
        return key, [_number(value.strip()) for value in values.split(",")]
    try:
        start, stop, step = map(Decimal, values.split(":"))
        count = int((stop - start) / step) if step else -1
    except (ValueError, InvalidOperation, ArithmeticError) as error:
        raise ConfigError(f"--sweep {text!r}: write start:stop:step, as in beta=0:1:0.1") from error
    if not 0 <= count < 1000:
        raise ConfigError(f"--sweep {text!r}: start, stop and step must give 1 to 1,000 values")
    return key, [float(start + number * step) for number in range(count + 1)]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def load_recipe(path: Path) -> tuple[MergeRecipe, list[str]]:
    """A recipe file, ours or mergekit's, and notes on what will differ from mergekit.

    Raises:
        ConfigError: if it cannot be used; with the line and the nearest valid name.
    """
    values, places = read_yaml(path, "'method:', 'models:' and so on")
    notes: list[str] = []
    if "merge_method" in values:
        from stockpot.merging.mergekit import translate

        try:
            values, notes = translate(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path}: this recipe of mergekit is not understood: {error!r}"
            ) from error
        places = {}
    # Relative paths of a file are meant from where the command runs, as on the command line.
    return make_recipe(values, places, str(path)), notes


def make_recipe(
    values: Mapping[str, Any], places: Lines | None = None, source: str = ""
) -> MergeRecipe:
    """A checked recipe from plain values.

    Raises:
        ConfigError: with everything that is wrong, each with its line where there is one.
    """
    try:
        recipe = MergeRecipe.model_validate(dict(values))
    except ValidationError as error:
        messages = []
        for item in error.errors():
            at = tuple(key for key in item["loc"])
            kind: type[BaseModel] = Input if {"base", "models"} & set(at[:1]) else MergeRecipe
            messages.append(f"{_where(at, places, source)}{_sentence(kind, item)}")
        raise ConfigError("\n".join(messages)) from error
    problems = _problems(recipe)
    if problems:
        raise ConfigError("\n".join(f"{_where(at, places, source)}{text}" for at, text in problems))
    try:
        recipe.points()
    except ConfigError as error:
        raise ConfigError(f"{_where(('parameters',), places, source)}{error}") from error
    return recipe


def _where(at: Sequence[Key], places: Lines | None, source: str) -> str:
    for length in range(len(at), 0, -1):
        if places and (place := places.get(tuple(at[:length]))):
            return f"{place}: "
    return f"{source}: " if source else ""


def _problems(recipe: MergeRecipe) -> list[tuple[tuple[Key, ...], str]]:
    """What the schema cannot say: methods, their settings, and the models they take."""
    if recipe.method not in METHODS:
        hint = nearest(recipe.method, METHODS)
        return [(("method",), f"unknown method {recipe.method!r}{hint}")]
    kind = METHODS[recipe.method]
    found: list[tuple[tuple[Key, ...], str]] = []
    for section, given in (("parameters", recipe.parameters), ("sweep", recipe.sweep)):
        for key in given:
            if key not in kind.model_fields:
                hint = nearest(key, kind.model_fields) if kind.model_fields else " (it has none)"
                text = f"method {recipe.method!r} has no setting {key!r}{hint}"
                found.append(((section, key), text))
    for key in recipe.sweep:
        if not recipe.sweep[key]:
            found.append((("sweep", key), f"{key!r} has no values"))
        if key in recipe.parameters:
            found.append((("sweep", key), f"{key!r} is swept and has a single value as well"))
    count = len(recipe.models)
    fewest, most = kind.fewest, kind.most
    if recipe.method == "slerp" and recipe.base is not None:
        fewest = most = 1  # the base is the first of the two
    if count < fewest or (most is not None and count > most):
        wanted = f"{fewest}" if fewest == most else f"at least {fewest}"
        found.append((("models",), f"method {recipe.method!r} takes {wanted}, not {count}"))
    if kind.needs_base and recipe.base is None:
        text = f"method {recipe.method!r} needs the model that the others were tuned from (--base)"
        found.append(((), text))
    if recipe.base is not None and not kind.takes_base:
        text = f"method {recipe.method!r} uses no base; to merge it, name it as a model"
        found.append((("base",), text))
    if recipe.method == "lora":
        found += _lora_problems(recipe)
    if recipe.missing == "base" and recipe.base is None:
        found.append((("missing",), "'base' needs a base"))
    found += _fisher_problems(recipe, kind)
    for pattern, name in _named_twice(recipe):
        found.append((("models",), f"{name} is given twice{pattern}"))
    return found


def _lora_problems(recipe: MergeRecipe) -> list[tuple[tuple[Key, ...], str]]:
    if recipe.base is not None:
        if {"rank"} & (recipe.parameters.keys() | recipe.sweep.keys()):
            return [(("parameters", "rank"), "'rank' is of averages without a base")]
        return []
    try:
        recipe.shares().check_totals()
    except ValueError as error:
        return [(("models",), str(error))]
    return []


def _fisher_problems(
    recipe: MergeRecipe, kind: type[MergeMethod]
) -> list[tuple[tuple[Key, ...], str]]:
    found: list[tuple[tuple[Key, ...], str]] = []
    for number, model in enumerate(recipe.models):
        at: tuple[Key, ...] = ("models", number)
        if kind.needs_fishers and model.fisher is None:
            text = f"{model.model} needs its Fisher values (`stockpot fisher` writes them)"
            found.append((at, text))
        if model.fisher is not None and not kind.needs_fishers:
            found.append((at, f"method {recipe.method!r} uses no Fisher values"))
    if recipe.base is not None and (recipe.base.weight is not None or recipe.base.fisher):
        found.append((("base",), "the base has no weight and no Fisher values"))
    return found


def _named_twice(recipe: MergeRecipe) -> list[tuple[str, str]]:
    """Random draws are keyed by a model's name: two of one name would draw the same."""
    names = [os.path.abspath(model.model) for model in recipe.models]
    if not recipe.method.startswith("dare"):
        return []
    return [
        ("; its draws would be the same", name)
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
