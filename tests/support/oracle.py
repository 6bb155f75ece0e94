"""What a record says, read straight from its files: the numbers that a report must show."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from support.records import read_lines


@functools.cache
def _lines(path: Path) -> tuple[dict[str, Any], ...]:
    return tuple(read_lines(path))


@dataclass(frozen=True)
class Setting:
    """One method at one setting, and its runs' ids in the order of the seeds."""

    method: str
    settings: dict[str, Any]
    label: str
    runs: tuple[str, ...]


class Oracle:
    """The scores of a finished record in one task order."""

    def __init__(self, folder: Path) -> None:
        plan = json.loads((folder / "plan.json").read_text())
        self.folder = folder
        self.tasks: list[str] = plan["tasks"]
        self.runs: dict[str, dict[str, Any]] = {run["run"]: run for run in plan["runs"]}
        size = len(self.tasks)
        self.R = {run: np.full((size, size), np.nan) for run in self.runs}
        self.b = {run: np.full(size, np.nan) for run in self.runs}
        self.better = "higher"
        for line in read_lines(folder / "scores.jsonl"):
            if not line["headline"]:
                continue
            self.better = line["better"]
            column = self.tasks.index(line["task"])
            if line["stage"] < 0:
                self.b[line["run"]][column] = line["value"]
            else:
                row = self.tasks.index(line["trained"])
                self.R[line["run"]][row, column] = line["value"]

    def lines(self, log: str) -> list[dict[str, Any]]:
        return list(_lines(self.folder / f"{log}.jsonl"))

    @property
    def settings(self) -> list[Setting]:
        found: dict[str, Setting] = {}
        for run in self.runs.values():
            key = json.dumps([run["method"], run["settings"]], sort_keys=True)
            held = found.get(key)
            runs = (*(held.runs if held else ()), run["run"])
            found[key] = Setting(run["method"], run["settings"], run["label"], runs)
        return list(found.values())

    def of(self, method: str) -> list[Setting]:
        return [setting for setting in self.settings if setting.method == method]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(setting.method for setting in self.settings))

    def averages(self, setting: Setting) -> list[float]:
        """Each run's average over the tasks at the end."""
        return [float(self.R[run][-1].mean()) for run in setting.runs]

    def finals(self, setting: Setting, tasks: Sequence[int]) -> list[float]:
        """Each run's mean over some tasks at the end."""
        return [float(self.R[run][-1, list(tasks)].mean()) for run in setting.runs]

    def best(self, method: str) -> Setting:
        """The setting with the best average; a model that never saw a task is no setting."""
        sign = 1 if self.better == "higher" else -1
        own = [s for s in self.of(method) if not s.settings.get("without")]
        return max(own, key=lambda s: sign * float(np.mean(self.averages(s))))


def students(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and half of its 95 % interval."""
    n = len(values)
    if n == 1:
        return float(values[0]), None
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)), float(stats.t.ppf(0.975, n - 1)) * error


def dominated_area(points: Sequence[tuple[float, float]]) -> float:
    """Area of the union of boxes from the origin to each point, cut at 1: cell by cell."""
    cut = [(min(max(x, 0), 1), min(max(y, 0), 1)) for x, y in points]
    xs = sorted({0.0, *(x for x, _ in cut)})
    ys = sorted({0.0, *(y for _, y in cut)})
    return sum(
        (right - left) * (high - low)
        for left, right in pairwise(xs)
        for low, high in pairwise(ys)
        if any(x >= right and y >= high for x, y in cut)
    )


def pareto_set(points: Sequence[tuple[float, float]]) -> set[int]:
    """Numbers of the points that no other is as good as in both ways and better than in one."""
    return {
        n
        for n, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    }
