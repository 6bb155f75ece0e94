"""One row per method and setting: mean over seeds, with a 95 % interval."""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stockpot.report.style import title

__all__ = [
    "Column",
    "Group",
    "Interval",
    "Measure",
    "benchmark_columns",
    "group_runs",
    "measure_of",
    "result_columns",
    "t_quantile",
    "task_columns",
    "to_csv",
    "to_markdown",
]


@functools.cache
def t_quantile(n: int) -> float:
    """t(0.975, n - 1): with it a mean of n has a 95 % interval."""
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95 % interval; None with a single seed."""

    mean: float
    half_width: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Interval | None:
        """Student's t: ``mean +- t(0.975, n - 1) * s / sqrt(n)``; None if a value is missing."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        n = len(known)
        mean = math.fsum(known) / n
        if n == 1:
            return cls(mean, None, 1)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (n - 1))
        return cls(mean, t_quantile(n) * deviation / math.sqrt(n), n)


@dataclass(frozen=True)
class Group:
    """The runs of one method and setting, one per seed."""

    method: str
    label: str
    settings: dict[str, Any]
    runs: tuple[dict[str, Any], ...]

    def metric(self, name: str) -> Interval | None:
        """A metric over the seeds."""
        return Interval.of([run["metrics"].get(name) for run in self.runs])

    def final(self, task: str) -> Interval | None:
        """The last score on a task over the seeds and task orders."""
        return Interval.of([run["R"][-1][run["tasks"].index(task)] for run in self.runs])

    def matrix(self) -> list[list[float | None]]:
        """R, averaged over the seeds of the first run's task order.

        A cell is the mean over the runs that have it, as on the page: seeds that score samples of
        the tasks (``evaluation.tasks``) score different ones.
        """
        size = range(len(self.runs[0]["R"]))
        alike = [run["R"] for run in self.runs if run["tasks"] == self.runs[0]["tasks"]]
        rows: list[list[float | None]] = []
        for t in size:
            found = [R[t] for R in alike if R[t] is not None]
            cells = [[row[i] for row in found if row[i] is not None] for i in size]
            rows.append([math.fsum(cell) / len(cell) if cell else None for cell in cells])
        return rows


def group_runs(summary: Sequence[dict[str, Any]]) -> list[Group]:
    """The runs of a summary by method and setting, in the order they first appear."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in summary:
        key = f"{run['method']} {sorted(run['settings'].items())}"
        found.setdefault(key, []).append(run)
    return [
        Group(runs[0]["method"], runs[0]["label"], runs[0]["settings"], tuple(runs))
        for runs in found.values()
    ]


def method_title(group: Group) -> str:
    """``SFA p=0.25 beta=0.5``: the label with the method's name as a reader would write it."""
    return title(group.method) + group.label.removeprefix(group.method)


@dataclass(frozen=True)
class Measure:
    """What the scores of R are, and how they are written."""

    name: str
    unit: str
    difference: str
    """The unit of a difference of two."""
    scale: float
    digits: int
    better: str
    """``higher`` or ``lower``."""

    @property
    def sign(self) -> int:
        """1 if higher is better, else -1."""
        return 1 if self.better == "higher" else -1

    def text(self, interval: Interval) -> str:
        """``81.2 % ± 2.0``."""
        value = f"{interval.mean * self.scale:.{self.digits}f} {self.unit}"
        if interval.half_width is None:
            return value
        return f"{value} ± {interval.half_width * self.scale:.{self.digits}f}"


def measure_of(runs: Sequence[Mapping[str, Any]]) -> Measure:
    """What the runs of an experiment were scored by."""
    name = runs[0].get("metric", "accuracy")
    if name == "loss":
        return Measure("held-out loss", "nats", "nats", 1.0, 3, "lower")
    return Measure(name, "%", "% points", 100.0, 1, runs[0].get("better", "higher"))


@dataclass(frozen=True)
class Column:
    """A column of the results: where its numbers come from and how they are written."""

    key: str
    title: str
    unit: str
    value: Callable[[Group], Interval | None]
    scale: float = 1.0
    digits: int = 1
    better: str = ""
    """``higher``, ``lower``, or nothing where neither is."""

    def text(self, group: Group) -> str:
        """``81.2 ±2.0``, or a hyphen where there is no such number."""
        interval = self.value(group)
        if interval is None:
            return "-"
        mean = f"{interval.mean * self.scale:.{self.digits}f}"
        if float(mean) == 0:
            mean = mean.lstrip("-")
        if interval.half_width is None:
            return mean
        return f"{mean} ±{interval.half_width * self.scale:.{self.digits}f}"


def _metric(
    key: str, title: str, unit: str, scale: float = 1.0, digits: int = 1, better: str = "lower"
) -> Column:
    return Column(key, title, unit, lambda group: group.metric(key), scale, digits, better)


def result_columns(groups: Sequence[Group]) -> tuple[Column, ...]:
    """The columns after those of the single tasks."""
    m = measure_of(groups[0].runs)
    gains = (m.difference, m.scale, m.digits)
    columns = (
        _metric("average", "average", m.unit, m.scale, m.digits, m.better),
        _metric("forgetting", "forgotten since learned", *gains),
        _metric("forgetting_vs_best", "forgotten since best", *gains),
        _metric("bwt", "BWT", *gains, "higher"),
        _metric("fwt", "FWT", *gains, "higher"),
        _metric("l2_to_anchor", "L2 to anchor", "", 1, 2, ""),
        _metric("kl_from_anchor", "KL from anchor", "nats", 1, 3, ""),
        _metric("seconds", "time", "s", 1, 1),
        _metric("peak_memory", "peak memory", "MB", 1e-6, 0),
    )
    # Records of earlier versions do not say what a method stores and passes through once more.
    return columns + tuple(
        column
        for column in (
            _metric("stored_bytes", "stored", "MB", 1e-6, 2),
            Column("extra_share", "extra passes", "%", _extra_share, 100.0, 1, "lower"),
        )
        if any(column.value(group) is not None for group in groups)
    )


def _extra_share(group: Group) -> Interval | None:
    """Examples passed forward and backward beyond training, as a share of those trained on."""
    shares = []
    for run in group.runs:
        extra = run["metrics"].get("extra_examples")
        trained = run["metrics"].get("trained_examples")
        shares.append(extra / trained if extra is not None and trained else None)
    return Interval.of(shares)


def benchmark_columns(groups: Sequence[Group]) -> tuple[Column, ...]:
    """One column per task and metric of the last scores, as the paper's tables have them.

    None where each task has one score alone, which the table of results shows.
    """
    lines = [line for group in groups for run in group.runs for line in run.get("scores", ())]
    keys = dict.fromkeys((s["task"], s["evaluation"], s["metric"]) for s in lines)
    if len(keys) <= len({task for task, _, _ in keys}):
        return ()
    better = {(s["task"], s["evaluation"], s["metric"]): s.get("better", "") for s in lines}
    return tuple(_benchmark(*key, better[key]) for key in keys)


def _benchmark(task: str, evaluation: str, metric: str, better: str) -> Column:
    def value(group: Group) -> Interval | None:
        return Interval.of(
            [
                next(
                    (
                        line["value"]
                        for line in run.get("scores", ())
                        if (line["task"], line["evaluation"], line["metric"])
                        == (task, evaluation, metric)
                    ),
                    None,
                )
                for run in group.runs
            ]
        )

    own = metric if evaluation == "test" else f"{evaluation} {metric}"
    nats = metric in ("loss", "bits_per_byte", "perplexity") or better == "lower"
    unit, scale, digits = ("nats" if metric == "loss" else "", 1.0, 3) if nats else ("%", 100.0, 1)
    key = f"{task}.{evaluation}.{metric}"
    return Column(key, f"{task}: {own}", unit, value, scale, digits, better)


def task_columns(groups: Sequence[Group], tasks: Sequence[str]) -> tuple[Column, ...]:
    """One column per task: its score at the end of the stream."""
    m = measure_of(groups[0].runs)

    def final_of(task: str) -> Callable[[Group], Interval | None]:
        return lambda group: group.final(task)

    return tuple(
        Column(f"final.{task}", task, m.unit, final_of(task), m.scale, m.digits, m.better)
        for task in tasks
    )


def to_markdown(
    groups: Sequence[Group], tasks: Sequence[str], columns: Sequence[Column] = ()
) -> str:
    """The whole table in Markdown, or some of its columns."""
    columns = columns or (*task_columns(groups, tasks), *result_columns(groups))
    head = ["method", *(f"{c.title} ({c.unit})" if c.unit else c.title for c in columns)]
    rows = [[group.label, *(c.text(group) for c in columns)] for group in groups]
    lines = [_row(head), "|---|" + "---:|" * len(columns), *map(_row, rows)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    plain = [" ".join(cell.replace("|", r"\|").splitlines()) for cell in cells]
    return "| " + " | ".join(plain) + " |"


def to_csv(groups: Sequence[Group], tasks: Sequence[str], columns: Sequence[Column] = ()) -> str:
    """The whole table with plain numbers, a mean and a half width per column."""
    columns = columns or (*task_columns(groups, tasks), *result_columns(groups))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["method", "setting", "seeds"]
        + [f"{c.key}{suffix}" for c in columns for suffix in ("", ".half_width_95")]
    )
    for group in groups:
        row: list[Any] = [group.method, group.label, len(group.runs)]
        for column in columns:
            interval = column.value(group)
            row += ["", ""] if interval is None else [interval.mean, _blank(interval.half_width)]
        writer.writerow(row)
    return out.getvalue()


def _blank(value: float | None) -> float | str:
    return "" if value is None else value
