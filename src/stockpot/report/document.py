"""What the page shows, as plain data: computed here, drawn there.

Numbers are those of the record, with six significant digits; everything that is a statement (the
answer, the tables, the curves' settings) is made here, so that the page only draws.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from stockpot.methods import METHODS
from stockpot.report.figures import curves
from stockpot.report.findings import headline
from stockpot.report.latex import to_latex
from stockpot.report.movement import movement
from stockpot.report.pooling import Pool
from stockpot.report.style import colour, dark_colour, symbol, title
from stockpot.report.table import (
    Column,
    Group,
    benchmark_columns,
    group_runs,
    measure_of,
    method_title,
    result_columns,
    t_quantile,
    task_columns,
    to_csv,
    to_markdown,
)

__all__ = ["describe_pool", "single_task_scores"]

_DIGITS = 6
_CURVE_DIGITS = 5
_MOST_CURVE_VALUES = 300_000
"""Scores during training that a page holds; more are thinned, and the page says so."""
_MOMENTS = {"step": "s", "before merge": "b", "after merge": "a"}


def describe_pool(pool: Pool) -> dict[str, Any]:
    """One experiment, ready for the page."""
    groups = group_runs(pool.runs)  # of runs that are not finished too
    number = {id(run): n for n, group in enumerate(groups) for run in group.runs}
    done = [finished for group in groups if (finished := _finished(group)) is not None]
    columns = (*task_columns(done, pool.tasks), *result_columns(done)) if done else ()
    thin, thinned = _thinning(pool.runs)
    notes = list(pool.gaps)
    if thinned:
        notes.append(thinned)
    return {
        "name": pool.name,
        "tasks": pool.tasks,
        "orders": [[pool.tasks.index(task) for task in order] for order in pool.orders],
        "planned": pool.planned,
        "finished": len(pool.finished),
        "failed": len(pool.failed),
        "seeds": sorted({run["seed"] for run in pool.runs}),
        "gaps": notes,
        "about": _about(pool),
        "measure": _measure(pool),
        "answer": _answer(pool, done),
        "t": _quantiles(pool),
        "methods": _methods(groups),
        "groups": [_group(group, columns) for group in groups],
        "curves": _curves(done, groups),
        "runs": [_run(run, number[id(run)], thin) for run in pool.runs],
        "columns": [_column(column) for column in columns],
        "tables": _tables(done, pool.tasks, columns),
        "single": single_task_scores(pool),
        "movement": _movement(groups),
        "how": [_how(record) for record in pool.records],
    }


def _finished(group: Group) -> Group | None:
    runs = tuple(run for run in group.runs if run["finished"])
    return Group(group.method, group.label, group.settings, runs) if runs else None


def _about(pool: Pool) -> dict[str, Any]:
    described = pool.records[0].described

    def part(key: str) -> dict[str, Any]:
        value = described.get(key)
        return value if isinstance(value, dict) else {}

    model = part("model")
    first = pool.runs[0]
    return {
        "stream": first["stream"],
        "scenario": first["scenario"],
        "model": str(
            model.get("id") or model.get("factory") or model.get("name") or "unknown model"
        ),
    }


def _measure(pool: Pool) -> dict[str, Any]:
    measure = measure_of(pool.finished or pool.runs or [{}])
    keys = ("name", "unit", "difference", "scale", "digits", "better")
    return {key: getattr(measure, key) for key in keys}


def _answer(pool: Pool, done: Sequence[Group]) -> str:
    if not done:
        return "No run is finished yet: what there is of the running ones is below."
    text = headline(done)
    if text and pool.left > 0:
        text += f" {pool.left} of {pool.planned} runs are not finished, so this may change."
    if text and pool.failed:
        text += f" {len(pool.failed)} of {pool.planned} runs failed and are in none of this."
    return text


def _quantiles(pool: Pool) -> dict[int, float]:
    """t(0.975, n - 1) by n, for the intervals of what the reader chooses."""
    return {n: t_quantile(n) for n in range(2, max(3, len(pool.runs) + 1))}


def _methods(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(group.method for group in groups)
    # Yardsticks first: what is drawn later lies on top.
    known = list(METHODS)
    order = sorted(names, key=lambda name: known.index(name) if name in known else len(known))
    return {
        name: {
            "title": title(name),
            "colour": [colour(name), dark_colour(name)],
            "symbol": symbol(name),
        }
        for name in order
    }


def _group(group: Group, columns: Iterable[Column]) -> dict[str, Any]:
    done = _finished(group)
    cells = [] if done is None else [_cell(column, done) for column in columns]
    return {
        "method": group.method,
        "title": method_title(group),
        "label": group.label,
        "settings": {k: _plain(v) for k, v in group.settings.items() if v is not None},
        "cells": cells,
        "n": 0 if done is None else len(done.runs),
        "left out": str(group.settings.get("without") or ""),
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _cell(column: Column, group: Group) -> list[float | None] | None:
    interval = column.value(group)
    if interval is None:
        return None
    return [_short(interval.mean), _short(interval.half_width), interval.n]


def _curves(done: Sequence[Group], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Which groups are joined, along which setting; each group is in one curve or more."""
    if not done:
        return []
    numbers = {_key(group): n for n, group in enumerate(groups)}
    return [
        {
            "label": curve.label,
            "method": curve.method,
            "along": curve.along,
            "groups": [numbers[_key(point.group)] for point in curve.points],
            "values": [
                None if curve.along is None else point.group.settings[curve.along]
                for point in curve.points
            ],
        }
        for curve in curves(done)
    ]


def _key(group: Group) -> str:
    return f"{group.method} {sorted(group.settings.items())}"


def _run(run: dict[str, Any], group: int, thin: int) -> dict[str, Any]:
    return {
        "id": run["run"],
        "group": group,
        "seed": run["seed"],
        "order": run["order"],
        "finished": run["finished"],
        "failed": run["failed"],
        "R": [None if row is None else [_short(v) for v in row] for row in run["R"]],
        "b": None if run["b"] is None else [_short(value) for value in run["b"]],
        "metrics": {key: _short(value) for key, value in run["metrics"].items()},
        "stages": _stages(run),
        "merges": [
            [int(m["stage"]), int(m["step"]), *(_short(m[k], 4) for k in _MERGE)]
            for m in run["merges"]
        ],
        "during": _during(run, thin),
        "line": _line(run),
    }


_MERGE = ("beta", "distance_before", "distance_after")


def _stages(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Each training of the run, as planned and as far as it went."""
    trained = {line["stage"]: line for line in run["trained"]}
    planned = run["planned_stages"]
    found = []
    for number in range(max(len(planned), max(trained, default=-1) + 1)):
        plan = planned[number] if number < len(planned) else {}
        line = trained.get(number, {})
        names = line.get("tasks", plan.get("tasks", []))
        stage = {
            "row": line.get("row", plan.get("row", number)),
            "steps": line.get("steps", plan.get("steps", 0)),
            "tasks": [run["tasks"].index(t) for t in names if t in run["tasks"]],
        }
        if line:
            stage |= {
                "seconds": _short(line.get("seconds"), 4),
                "l2": _short(line.get("l2_to_anchor")),
                "kl": _short(line.get("kl_from_anchor")),
                "losses": [[s, _short(v, _CURVE_DIGITS)] for s, v in line.get("losses", ())],
            }
        found.append(stage)
    return found


def _thinning(runs: Sequence[dict[str, Any]]) -> tuple[int, str]:
    """Of how many scores during training one is kept, and what to say of it."""
    count = sum(len(run["curves"]) for run in runs)
    thin = math.ceil(count / _MOST_CURVE_VALUES)
    if thin <= 1:
        return 1, ""
    return thin, (
        f"Of the {count:,} scores taken during training this page shows one in {thin} (and all "
        "around merge events and at a task's ends); curves.jsonl has all"
    )


def _during(run: dict[str, Any], thin: int) -> list[list[Any]]:
    """Scores during training: [stage, step, moment, one value a task] in the order taken."""
    tasks = {task: n for n, task in enumerate(run["tasks"])}
    found: dict[tuple[int, int, str], list[float | None]] = {}
    for line in run["curves"]:
        moment = _MOMENTS.get(line.get("moment", "step"), "s")
        key = (int(line["stage"]), int(line["step"]), moment)
        row = found.setdefault(key, [None] * len(tasks))
        if line["task"] in tasks:
            row[tasks[line["task"]]] = _short(line["value"], _CURVE_DIGITS)
    order = {"b": 0, "a": 1, "s": 2}
    points = [[*key, found[key]] for key in sorted(found, key=lambda k: (*k[:2], order[k[2]]))]
    if thin > 1:
        ends = {(stage["stage"], stage["steps"]) for stage in run["trained"] if "steps" in stage}
        points = [
            point
            for n, point in enumerate(points)
            if n % thin == 0 or point[2] != "s" or not point[1] or tuple(point[:2]) in ends
        ]
    return points


def _line(run: dict[str, Any]) -> list[list[Any]]:
    """The loss along the line from the anchor: [stage, task, metric, [[alpha, value], ...]]."""
    tasks = {task: n for n, task in enumerate(run["tasks"])}
    found: dict[tuple[int, int, str], list[list[float | None]]] = {}
    for line in run["lines"]:
        if line["task"] in tasks:
            key = (int(line["stage"]), tasks[line["task"]], str(line["metric"]))
            point = [_short(line["alpha"]), _short(line["value"], _CURVE_DIGITS)]
            found.setdefault(key, []).append(point)
    return [
        [*key, sorted(points, key=lambda p: p[0] or 0)] for key, points in sorted(found.items())
    ]


def _column(column: Column) -> dict[str, Any]:
    keys = ("key", "title", "unit", "scale", "digits", "better")
    return {key: getattr(column, key) for key in keys}


def _tables(
    done: Sequence[Group], tasks: Sequence[str], columns: Sequence[Column]
) -> list[dict[str, Any]]:
    """The tables as the reader takes them away, and the cells of the second one."""
    if not done:
        return []
    tables: list[dict[str, Any]] = [
        {
            "name": "results",
            "csv": to_csv(done, tasks),
            "tex": to_latex(done, columns, tasks),
            "md": to_markdown(done, tasks),
        }
    ]
    benchmarks = benchmark_columns(done)
    if benchmarks:
        tables.append(
            {
                "name": "benchmarks",
                "columns": [_column(column) for column in benchmarks],
                "rows": [
                    [method_title(group), group.method, [_cell(c, group) for c in benchmarks]]
                    for group in done
                ],
                "csv": to_csv(done, tasks, benchmarks),
                "tex": to_latex(done, benchmarks, tasks),
                "md": to_markdown(done, tasks, benchmarks),
            }
        )
    return tables


def single_task_scores(pool: Pool) -> dict[str, dict[str, Any]]:
    """Each task's score after training on it alone from the starting model, where a run shows it.

    The first task is trained alone by whatever begins as plain fine-tuning does; another one by
    ``multitask`` without all others, and by ``task-arithmetic`` with a weight of one for it alone.
    """
    found: dict[str, list[float]] = {}
    for run in pool.runs:
        if not run["tasks"]:
            continue
        for task in _alone(run):
            at = run["tasks"].index(task)
            row = run["R"][0] if at == 0 and run["method"] == "sequential" else run["R"][-1]
            if row is not None and row[at] is not None:
                found.setdefault(task, []).append(row[at])
    return {
        task: {"value": _short(math.fsum(values) / len(values)), "n": len(values)}
        for task, values in found.items()
    }


def _alone(run: dict[str, Any]) -> list[str]:
    """The tasks that a row of this run's R shows trained alone."""
    tasks: list[str] = run["tasks"]
    settings: dict[str, Any] = run["settings"]
    if run["method"] == "sequential":
        return tasks[:1]
    if run["method"] == "multitask":
        out = {name.strip() for name in str(settings.get("without") or "").split(",")}
        left = [task for task in tasks if task not in out]
        return left if len(left) == 1 < len(tasks) else []
    weights: Any = settings.get("weights")
    if run["method"] != "task-arithmetic" or not isinstance(weights, list):
        return []
    one_hot = weights.count(1) == 1 and weights.count(0) == len(tasks) - 1 == len(weights) - 1
    return [tasks[weights.index(1)]] if one_hot else []


def _movement(groups: Sequence[Group]) -> dict[str, Any]:
    found = movement(groups)
    for kind in found.values():
        for point in kind["points"]:
            point["x"], point["lost"] = _short(point["x"]), _short(point["lost"])
    return found


def _how(record: Any) -> dict[str, Any]:
    environment = dict(record.environment)
    return {
        "folder": str(record.folder),
        "command": environment.pop("command", ""),
        "notes": environment.pop("notes on the data", []),
        "environment": environment,
        "experiment": record.yaml,
        "left out": record.described.get("left out") or [],
    }


def _short(value: Any, digits: int = _DIGITS) -> float | None:
    """A number with so many significant digits: a page needs no more."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
