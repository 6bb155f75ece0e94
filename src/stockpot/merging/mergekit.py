"""mergekit's YAML, for the methods both have, with notes on where the numbers will differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stockpot.errors import ConfigError, nearest

__all__ = ["translate"]

_METHODS = {
    "linear": "linear",
    "slerp": "slerp",
    "task_arithmetic": "task-arithmetic",
    "ties": "ties",
    "dare_linear": "dare-linear",
    "dare_ties": "dare-ties",
    "breadcrumbs": "breadcrumbs",
    "model_stock": "model-stock",
}
_KEYS = {
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "slices",
    "name",
}
_SETTINGS = {"weight", "density", "lambda", "normalize", "t", "gamma", "int8_mask", "rescale"}
_NOTES = {
    "ties": "mergekit keeps exactly int(density n) entries of each tensor, cutting ties by chance, "
    "and counts a zero vote as +1; here all entries that equal the smallest kept are kept, and a "
    "zero vote takes the sign of the majority (trim: per-tensor, as there)",
    "dare-linear": "mergekit rescales to the L1 norm from before the drop; here entries are "
    "divided by 1 - p as in the paper. The random draws differ",
    "dare-ties": "mergekit rescales to the L1 norm from before the drop; here entries are divided "
    "by 1 - p as in the paper. The random draws differ",
    "breadcrumbs": "entries that equal a threshold are kept here",
    "model-stock": "mergekit does not stop at t = 0 where the cosine is negative",
}


def translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe's values from mergekit's, and notes on what differs.

    Raises:
        ConfigError: if it uses what is not known here, with what that is.
    """
    for key in values:
        if key not in _KEYS:
            raise ConfigError(f"unknown key {key!r}{nearest(key, _KEYS)}")
    name = values["merge_method"]
    if name not in _METHODS:
        raise ConfigError(
            f"merge_method {name!r} is not one of those that stockpot has too "
            f"({', '.join(_METHODS)})"
        )
    if "slices" in values:
        raise ConfigError("slices assemble models from layers, which stockpot does not do")
    for key in ("tokenizer_source", "tokenizer"):
        if values.get(key) not in (None, "base"):
            raise ConfigError(f"{key}: only 'base' is known here, not {values[key]!r}")
    method = _METHODS[name]
    base = _path(values.get("base_model"))
    models, rows = _models(values, base)
    recipe: dict[str, Any] = {"method": method, "models": models}
    if base is not None and method != "linear":
        recipe["base"] = base
    if patterns := _patterns(rows, len(models)):
        recipe["weights"] = patterns
    recipe["parameters"] = _parameters(method, rows)
    dtype = values.get("out_dtype") or values.get("dtype")
    if dtype not in (None, "auto"):
        recipe["dtype"] = dtype
    notes = [
        "read as mergekit's: sums are taken in float32 and rounded once, where mergekit computes "
        "in the models' own dtype unless dtype says otherwise"
    ]
    if method in _NOTES:
        notes.append(_NOTES[method])
    return recipe, notes


def _path(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("path", value)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"base_model: {value!r} is no path")
    return value


def _models(
    values: Mapping[str, Any], base: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The models but the base, and the settings of each over the common ones."""
    items = values.get("models")
    if not isinstance(items, list) or not items:
        raise ConfigError("models: a list of models is needed")
    common = values.get("parameters") or {}
    models, rows = [], []
    for number, item in enumerate(items):
        entry = {"model": item} if isinstance(item, str) else item
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            raise ConfigError(f"models.{number}: {item!r} has no model")
        for key in entry:
            if key not in ("model", "parameters"):
                hint = nearest(key, ("model", "parameters"))
                raise ConfigError(f"models.{number}: unknown key {key!r}{hint}")
        settings = {**common, **(entry.get("parameters") or {})}
        for key in settings:
            if key not in _SETTINGS:
                raise ConfigError(f"models.{number}: unknown key {key!r}{nearest(key, _SETTINGS)}")
        if entry["model"] == base and values["merge_method"] != "linear":
            continue
        models.append({"model": entry["model"]})
        rows.append(settings)
    for model, settings in zip(models, rows, strict=True):
        weight = settings.get("weight")
        if isinstance(weight, int | float) and values["merge_method"] not in (
            "slerp",
            "model_stock",
        ):
            model["weight"] = float(weight)
    return models, rows


def _patterns(rows: list[dict[str, Any]], count: int) -> dict[str, list[float]]:
    """Weights by filter: mergekit's ``filter: mlp`` matches names that contain ``mlp``."""
    filters: dict[str, list[float]] = {}
    for position, row in enumerate(rows):
        weight = row.get("weight")
        if weight is None or isinstance(weight, int | float):
            continue
        entries = weight if isinstance(weight, list) else [weight]
        for entry in entries:
            if not isinstance(entry, dict) or not isinstance(entry.get("value"), int | float):
                raise ConfigError(
                    f"weight {weight!r}: gradients over layers are not known here; give numbers "
                    "by 'filter' and 'value'"
                )
            pattern = f"*{entry['filter']}*" if "filter" in entry else "*"
            filters.setdefault(pattern, [_default(each) for each in rows])
            filters[pattern][position] = float(entry["value"])
    ordered = sorted(filters, key=lambda pattern: pattern == "*")
    assert all(len(filters[pattern]) == count for pattern in ordered)
    return {pattern: filters[pattern] for pattern in ordered}


def _default(row: Mapping[str, Any]) -> float:
    weight = row.get("weight", 1.0)
    if isinstance(weight, int | float):
        return float(weight)
    for entry in weight if isinstance(weight, list) else [weight]:
        if isinstance(entry, dict) and "filter" not in entry:
            return float(entry.get("value", 1.0))
    return 1.0


def _parameters(method: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    def one(key: str, default: Any) -> Any:
        found = {str(row.get(key, default)): row.get(key, default) for row in rows}
        if len(found) != 1 or isinstance(next(iter(found.values())), list | dict):
            raise ConfigError(
                f"{key}: one number for all models and layers is known here, not {', '.join(found)}"
            )
        return next(iter(found.values()))

    scale = one("lambda", 1.0)
    if method == "linear":
        return {"normalize": bool(one("normalize", True))}
    if method == "slerp":
        return {"t": one("t", None)}
    if method == "model-stock":
        return {}
    if method == "task-arithmetic":
        return {"scale": scale, "normalize": bool(one("normalize", False))}
    if method == "breadcrumbs":
        return {"scale": scale, "density": one("density", 1.0), "gamma": one("gamma", 0.01)}
    density = one("density", 1.0)
    if method == "ties":
        if not one("normalize", True):
            raise ConfigError("normalize: false sums what agrees; here it is always averaged")
        return {"scale": scale, "density": density, "trim": "per-tensor"}
    drop = {"scale": scale, "drop_rate": float(1 - density)}
    if method == "dare-linear":
        drop["normalize"] = bool(one("normalize", False))
    return drop
