"""A run folder as it is: finished, still running, half written or damaged.

Whoever goes on with a record must refuse a damaged one; whoever looks at it wants to see what is
there. Nothing here raises for damage: what cannot be read is left out and said in ``gaps``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from stockpot.errors import StockpotError
from stockpot.report.runs import Line, asked_for, fill, not_measured
from stockpot.report.shapes import (
    DESCRIBED,
    ENVIRONMENT,
    LINES,
    PLAN,
    PLANNED_RUN,
    SUMMARY_RUN,
    fits,
    fitting,
)

__all__ = ["Recorded", "experiment_folders", "read_record"]

_MOST_ALIKE = 3
"""Runs that lack the same and are named one by one."""
_MOST_SAID = 12
"""Lines that are named one by one."""
_SAME_LINE = {
    "scores": ("run", "stage", "task", "evaluation", "metric"),
    "stages": ("run", "stage"),
    "merges": ("run", "stage", "step"),
    "curves": ("run", "stage", "step", "moment", "task", "metric"),
    "lines": ("run", "stage", "alpha", "task", "metric"),
}
"""What no two lines of a log share."""


@dataclass
class Recorded:
    """What a run folder holds."""

    folder: Path
    described: dict[str, Any]
    """experiment.json: name, stream, model, training, evaluation."""
    yaml: str
    environment: dict[str, Any]
    tasks: list[str]
    """In the order they are trained."""
    runs: list[dict[str, Any]]
    """As in summary.json, with ``finished`` and the lines of the logs; R may have holes (None)."""
    planned: int
    gaps: list[str] = field(default_factory=list)
    """What is missing or damaged, in words."""

    @property
    def name(self) -> str:
        """The experiment's name; the folder's where that is lost."""
        return str(self.described.get("name") or self.folder.resolve().name)

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The runs that went through the whole stream."""
        return [run for run in self.runs if run["finished"]]


def experiment_folders(paths: Sequence[Path]) -> list[Path]:
    """The run folders among ``paths``, or directly below them, each once, in order.

    Raises:
        StockpotError: if a path is no folder, or no run folder and holds none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_file():
            raise StockpotError(f"{path} is a file; give the run folder that it is in")
        if not path.is_dir():
            raise StockpotError(
                f"{path} is no run folder: there is no such folder. Give one that `stockpot run` "
                "wrote"
            )
        inside = [path] if _is_record(path) else sorted(p for p in path.iterdir() if _is_record(p))
        if not inside:
            raise StockpotError(
                f"{path} is no run folder (it has neither experiment.json nor scores.jsonl), and "
                "no folder in it is one"
            )
        for folder in inside:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _is_record(path: Path) -> bool:
    names = ("experiment.json", "plan.json", "scores.jsonl", "summary.json")
    return path.is_dir() and any((path / name).is_file() for name in names)


def read_record(folder: Path) -> Recorded:
    """Everything of a run folder that can be read."""
    reader = _Reader(folder)
    described = reader.mapping("experiment.json", DESCRIBED)
    environment = reader.mapping("environment.json", ENVIRONMENT)
    plan = reader.plan()
    summary = reader.summary()
    logs = {name: reader.log(name) for name in LINES}
    tasks, runs = _layout(plan, summary, logs)
    by_run = {name: reader.by_run(name, logs[name], runs, tasks) for name in LINES}
    about, settings = _about(plan, summary, described), asked_for(described)
    if not logs["scores"] and summary:
        reader.gaps.append("scores.jsonl has no scores; R is taken from summary.json")
    for run in runs:
        own = {name: lines.get(run["run"], []) for name, lines in by_run.items()}
        run.update(about)
        held = summary.get(run["run"])
        reader.gaps += fill(run, tasks, own, held, bool(logs["scores"]), settings)
    reader.gaps += not_measured(runs, described, tasks)
    failures = reader.failures()
    for run in runs:
        run["failed"] = failures.get(run["run"], "")
    yaml = reader.yaml()
    planned = max(len(runs), described.get("planned", 0))
    gaps = _together(reader.gaps)
    whole = {run["run"] for run in runs if run["finished"]}
    gaps += [f"run {name} failed: {why}" for name, why in failures.items() if name not in whole]
    return Recorded(folder, described, yaml, environment, tasks, runs, planned, gaps)


def _together(gaps: Sequence[str]) -> list[str]:
    """What is said of many runs alike, said once."""
    found: dict[str, list[str]] = {}
    for gap in gaps:
        named = re.fullmatch(r"run (\S+?): (.*)", gap, re.S)
        run, text = named.groups() if named else ("", gap)
        found.setdefault(text, []).append(run)
    lines = []
    for text, runs in found.items():
        if len(runs) > _MOST_ALIKE:
            lines.append(f"{len(runs)} runs ({runs[0]}, {runs[1]}, ...): {text}")
        else:
            lines += [f"run {run}: {text}" if run else text for run in runs]
    return lines


class _Reader:
    """Reads files and keeps a list of what was not as it should be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gaps: list[str] = []

    def _bytes(self, name: str, needed: bool) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            if needed:
                self.gaps.append(f"{name} is missing")
        except OSError as error:
            self.gaps.append(f"{name} cannot be read: {error.strerror or error}")
        return b""

    def failures(self) -> dict[str, str]:
        """Runs that stopped on an error, and why."""
        value = self._json("failures.json", needed=False)
        if value is not None and not isinstance(value, dict):
            self.gaps.append("failures.json is damaged: it holds no mapping")
        found = value if isinstance(value, dict) else {}
        traces = sorted(path.parent.name for path in self.folder.glob("runs/*/error.txt"))
        held = {run: f"see runs/{run}/error.txt" for run in traces}
        return {**held, **{run: str(reason) for run, reason in found.items()}}

    def yaml(self) -> str:
        """The experiment's file, which is only shown."""
        data = self._bytes("experiment.yaml", needed=True)
        text = data.decode("utf-8", errors="replace")
        if "\ufffd" in text or "\0" in text:
            self.gaps.append("experiment.yaml is damaged: it is no text")
            return ""
        if data == b"" and (self.folder / "experiment.yaml").exists():
            self.gaps.append("experiment.yaml is empty")
        return text

    def _json(self, name: str, needed: bool) -> Any:
        data = self._bytes(name, needed)
        if not data.strip():
            if data or (self.folder / name).is_file():
                self.gaps.append(f"{name} is empty")
            return None
        try:
            value = from_json(data, allow_inf_nan=False)
            json.dumps(value, allow_nan=False)  # 1e999 is read as infinity
        except ValueError as error:
            self.gaps.append(f"{name} is damaged: {error}")
            return None
        if value is None:
            self.gaps.append(f"{name} is damaged: it holds null")
        return value

    def mapping(self, name: str, shapes: Mapping[str, TypeAdapter[Any]]) -> dict[str, Any]:
        """A file that holds one mapping; what is damaged in it is left out."""
        value = self._json(name, needed=True)
        if not isinstance(value, dict):
            if value is not None:
                self.gaps.append(f"{name} is damaged: it holds no mapping")
            return {}
        whole, bad = fitting(value, shapes)
        self.gaps += [f"{name}: {key!r} is damaged and is left out" for key in bad]
        return whole

    def plan(self) -> dict[str, Any]:
        """plan.json without the runs that are damaged; records of older versions have none."""
        plan = self._json("plan.json", needed=False)
        if plan is None:
            return {}
        runs = plan["runs"] if fits(PLAN, plan) else []
        whole = [fits(PLANNED_RUN, run) and _has_rows(run, plan["tasks"]) for run in runs]
        if not any(whole):
            self.gaps.append("plan.json is damaged: it does not say which tasks and runs there are")
            return {}
        for number, fine in enumerate(whole, 1):
            if not fine:
                self.gaps.append(f"plan.json: run {number} is damaged and is left out")
        known = [run for run, fine in zip(runs, whole, strict=True) if fine]
        return {**plan, "runs": known, "whole": all(whole)}

    def summary(self) -> dict[str, Line]:
        """summary.json by run id; there is none before the first run is finished."""
        value = self._json("summary.json", needed=False)
        if value is None:
            return {}
        if not isinstance(value, list):
            self.gaps.append("summary.json is damaged: it holds no list of runs")
            return {}
        whole = [run for run in value if fits(SUMMARY_RUN, run)]
        if len(whole) < len(value):
            count = len(value) - len(whole)
            self.gaps.append(
                f"summary.json: {count} {'run is' if count == 1 else 'runs are'} damaged"
            )
        return {run.get("run") or f"{run['label']} seed {run['seed']}": run for run in whole}

    def log(self, name: str) -> dict[int, Line]:
        """The lines of a log that can be used, by number.

        The last may be half written while a run goes on.
        """
        data = self._bytes(f"{name}.jsonl", needed=name in ("scores", "stages"))
        shape = LINES[name]
        lines: dict[int, Line] = {}
        bad: list[int] = []
        for number, row in enumerate(data.split(b"\n"), 1):
            if not row.strip():
                continue
            try:
                lines[number] = shape.validate_json(row, strict=True)
            except ValidationError:
                bad.append(number)
        if bad:
            self.gaps.append(f"{_lines(name, bad)} cannot be read and {_is_left_out(bad)}")
        return lines

    def by_run(
        self,
        name: str,
        lines: Mapping[int, Line],
        runs: Sequence[Mapping[str, Any]],
        tasks: Sequence[str],
    ) -> dict[str, list[Line]]:
        """Each run's lines, without those that do not belong, and each once: the last counts."""
        known = {run["run"]: [stage["row"] for stage in run["stages"]] for run in runs}
        found: dict[str, dict[tuple[Any, ...], Line]] = {run: {} for run in known}
        strange, doubles = [], []
        for number, line in lines.items():
            rows = known.get(line["run"])
            if rows is None or not _belongs(line, rows or range(len(tasks)), tasks, bool(rows)):
                strange.append(number)
                continue
            key = tuple(line.get(part) for part in _SAME_LINE[name])
            if key in found[line["run"]]:
                doubles.append(number)
            found[line["run"]][key] = line
        if strange:
            said = "does" if len(strange) == 1 else "do"
            self.gaps.append(
                f"{_lines(name, strange)} {said} not fit the experiment's runs, stages and tasks "
                f"and {_is_left_out(strange)}"
            )
        if doubles:
            said = "repeats an earlier one" if len(doubles) == 1 else "repeat earlier ones"
            self.gaps.append(f"{_lines(name, doubles)} {said}; each counts once")
        return {run: list(own.values()) for run, own in found.items()}


def _belongs(line: Line, rows: Sequence[int], tasks: Sequence[str], planned: bool) -> bool:
    """Whether a line is of a stage and tasks that its run has; ``rows`` are its stages' in R."""
    stage = line["stage"]
    if stage >= len(rows) or line.get("row", 0) >= len(tasks):
        return False
    if not {line.get("task", tasks[0]), line.get("trained") or tasks[0]} <= set(tasks):
        return False
    if stage < 0 or not planned:
        return True
    row = rows[stage]
    return bool(line.get("row", row) == row and line.get("trained", tasks[row]) == tasks[row])


def _has_rows(run: Mapping[str, Any], tasks: Sequence[str]) -> bool:
    return all(stage["row"] < len(tasks) for stage in run["stages"])


def _lines(log: str, numbers: Sequence[int]) -> str:
    """``scores.jsonl: lines 3, 7``."""
    shown = ", ".join(map(str, numbers[:_MOST_SAID])) + (", ..." if numbers[_MOST_SAID:] else "")
    return f"{log}.jsonl: {'line' if len(numbers) == 1 else 'lines'} {shown}"


def _is_left_out(numbers: Sequence[int]) -> str:
    return "is left out" if len(numbers) == 1 else "are left out"


def _layout(
    plan: Mapping[str, Any], summary: Mapping[str, Line], logs: Mapping[str, Mapping[int, Line]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """The tasks, and each run without its scores: from the plan, else from what is there."""
    runs: list[dict[str, Any]] = [dict(run) for run in plan.get("runs", [])]
    if plan.get("whole"):
        return plan["tasks"], runs
    planned = {run["run"] for run in runs}
    keys = ("method", "settings", "label", "seed")
    for name, run in summary.items():
        if name not in planned:
            runs.append({"run": name, **{key: run[key] for key in keys}, "stages": []})
    seen = dict.fromkeys(line["run"] for log in ("stages", "scores") for line in logs[log].values())
    runs += [_guessed(name) for name in seen if name not in summary and name not in planned]
    names: list[str] | None = plan.get("tasks")
    if names is None:
        names = next((run["tasks"] for run in summary.values()), None)
    if names is None:
        names = list(dict.fromkeys(line["task"] for line in logs["scores"].values()))
    return names, runs


def _about(
    plan: Mapping[str, Any], summary: Mapping[str, Line], described: Mapping[str, Any]
) -> dict[str, str]:
    """The stream's name and scenario."""
    stream = described.get("stream")
    told = stream if isinstance(stream, dict) else {}
    sources: list[Mapping[str, Any]] = [
        plan,
        *summary.values(),
        {"stream": told.get("name"), **told},
    ]
    return {
        key: next((str(s[key]) for s in sources if isinstance(s.get(key), str)), "unknown " + key)
        for key in ("stream", "scenario")
    }


def _guessed(name: str) -> dict[str, Any]:
    """What the folder's name of a run says of it, where nothing else does."""
    from stockpot.methods import METHODS

    parts = re.fullmatch(r"(.+)-seed([0-9]{1,18})", name, re.DOTALL)
    label, seed = (parts[1], int(parts[2])) if parts else (name, 0)
    known = [method for method in METHODS if label.startswith(method)]
    return {
        "run": name,
        "method": max(known, key=len, default=label),
        "settings": {"as named": label} if label not in METHODS else {},
        "label": label,
        "seed": seed,
        "stages": [],
    }
