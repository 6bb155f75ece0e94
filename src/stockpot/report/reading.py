"""A run folder as it is: finished, still running, half written or damaged.

Whoever goes on with a record must refuse a damaged one; whoever looks at it wants to see what is
there. Nothing here raises for damage: what cannot be read is left out and said in ``gaps``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stockpot.errors import StockpotError
from stockpot.metrics import all_metrics

__all__ = ["Recorded", "experiment_folders", "read_record"]

_LOGS = ("scores", "stages", "merges", "curves", "lines")
_NEEDED = {
    "scores": ("run", "stage", "task", "value"),
    "stages": ("run", "stage"),
    "merges": ("run", "stage", "step", "beta", "distance_before", "distance_after"),
    "curves": ("run", "stage", "step", "task", "value"),
    "lines": ("run", "stage", "alpha", "task", "metric", "value"),
}
"""What a line must have to be of use."""
_MOST_SAID = 12
"""Gaps of one kind that are named one by one."""

Line = dict[str, Any]


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
        if not path.is_dir():
            raise StockpotError(f"{path} is no folder; give a run folder that `stockpot run` wrote")
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
    described = reader.mapping("experiment.json")
    environment = reader.mapping("environment.json")
    logs = {name: reader.log(name) for name in _LOGS}
    plan = reader.mapping("plan.json", needed=False)
    summary = reader.summary()
    tasks, runs = _layout(plan, summary, logs)
    about = _about(plan, summary, described)
    by_run = {name: _by_run(lines) for name, lines in logs.items()}
    for run in runs:
        own = {name: lines.get(run["run"], []) for name, lines in by_run.items()}
        run.update(about)
        _fill(run, tasks, own, summary.get(run["run"]), reader.gaps)
    if not logs["scores"] and any(run["finished"] for run in runs):
        reader.gaps.append("scores.jsonl has no scores; R is taken from summary.json")
    errors = sorted(path.parent.name for path in folder.glob("runs/*/error.txt"))
    reader.gaps += [f"run {run} stopped on an error (runs/{run}/error.txt)" for run in errors]
    return Recorded(
        folder,
        described,
        reader.text("experiment.yaml"),
        environment,
        tasks,
        runs,
        max(len(runs), _count(described.get("planned"))) if not plan else len(runs),
        reader.gaps,
    )


class _Reader:
    """Reads files and keeps a list of what was not as it should be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gaps: list[str] = []

    def text(self, name: str, needed: bool = True) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            if needed:
                self.gaps.append(f"{name} is missing")
        except OSError as error:
            self.gaps.append(f"{name} cannot be read: {error.strerror or error}")
        return ""

    def mapping(self, name: str, needed: bool = True) -> dict[str, Any]:
        value = self._json(name, needed)
        if value is None or isinstance(value, dict):
            return value or {}
        self.gaps.append(f"{name} is damaged: it holds no mapping")
        return {}

    def summary(self) -> dict[str, dict[str, Any]]:
        """summary.json by run id; there is none before the first run is finished."""
        value = self._json("summary.json", needed=False)
        if value is None:
            return {}
        if not isinstance(value, list):
            self.gaps.append("summary.json is damaged: it holds no list of runs")
            return {}
        runs = [run for run in value if _is_run(run)]
        if len(runs) < len(value):
            self.gaps.append(f"summary.json: {len(value) - len(runs)} runs are damaged")
        return {run.get("run") or f"{run['label']} seed {run['seed']}": run for run in runs}

    def _json(self, name: str, needed: bool) -> Any:
        text = self.text(name, needed)
        if not text.strip():
            if text or (needed and (self.folder / name).exists()):
                self.gaps.append(f"{name} is empty")
            return None
        try:
            return json.loads(text)
        except ValueError as error:
            self.gaps.append(f"{name} is damaged: {error}")
            return None

    def log(self, name: str) -> list[Line]:
        """The lines of a log that can be used; the last may be half written while a run goes on."""
        text = self.text(f"{name}.jsonl", needed=name in ("scores", "stages"))
        lines: list[Line] = []
        bad: list[int] = []
        for number, row in enumerate(text.split("\n"), 1):
            if not row.strip():
                continue
            line = _line(row, name)
            if line is None:
                bad.append(number)
            else:
                lines.append(line)
        if bad:
            shown = ", ".join(map(str, bad[:_MOST_SAID])) + (", ..." if bad[_MOST_SAID:] else "")
            words = "line" if len(bad) == 1 else "lines"
            self.gaps.append(f"{name}.jsonl: {words} {shown} cannot be read and is left out")
        return lines


def _line(row: str, log: str) -> Line | None:
    try:
        line = json.loads(row)
    except ValueError:
        return None
    if not isinstance(line, dict) or any(key not in line for key in _NEEDED[log]):
        return None
    if not isinstance(line["run"], str) or not _is_number(line["stage"]):
        return None
    numbers = (key for key in _NEEDED[log] if key not in ("run", "stage", "task", "metric"))
    return line if all(_is_number(line[key]) for key in numbers) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _is_run(run: Any) -> bool:
    if not isinstance(run, dict):
        return False
    kinds = {"method": str, "label": str, "settings": dict, "seed": int, "tasks": list}
    if any(not isinstance(run.get(key), kind) for key, kind in kinds.items()):
        return False
    R, size = run.get("R"), len(run["tasks"])
    return (
        size > 0
        and isinstance(R, list)
        and len(R) == size
        and all(row is None or _is_row(row, size) for row in R)
        and _is_row(run.get("b"), size)
        and isinstance(run.get("metrics"), dict)
    )


def _is_row(row: Any, size: int) -> bool:
    return isinstance(row, list) and len(row) == size and all(map(_is_number, row))


def _layout(
    plan: dict[str, Any], summary: dict[str, Line], logs: dict[str, list[Line]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """The tasks, and each run without its scores: from the plan, else from what is there."""
    runs: list[dict[str, Any]] = []
    tasks = plan.get("tasks")
    planned = plan.get("runs")
    if isinstance(tasks, list) and isinstance(planned, list):
        for entry in planned:
            known = isinstance(entry, dict) and {"run", "method", "label", "seed"} <= entry.keys()
            if known:
                runs.append({"settings": {}, "stages": [], **entry})
        return [str(task) for task in tasks], runs
    keys = ("method", "settings", "label", "seed")
    for name, run in summary.items():
        runs.append({"run": name, **{key: run[key] for key in keys}, "stages": []})
    names = next((list(map(str, run["tasks"])) for run in summary.values()), None)
    seen = dict.fromkeys(line["run"] for log in ("stages", "scores") for line in logs[log])
    runs += [_guessed(name) for name in seen if name not in summary]
    if names is None:
        names = list(dict.fromkeys(str(line["task"]) for line in logs["scores"]))
    return names, runs


def _about(
    plan: dict[str, Any], summary: dict[str, Line], described: dict[str, Any]
) -> dict[str, str]:
    """The stream's name and scenario."""
    stream = described.get("stream")
    told = stream if isinstance(stream, dict) else {}
    sources: list[dict[str, Any]] = [plan, *summary.values(), {"stream": told.get("name"), **told}]
    return {
        key: next((str(s[key]) for s in sources if isinstance(s.get(key), str)), "unknown " + key)
        for key in ("stream", "scenario")
    }


def _guessed(name: str) -> dict[str, Any]:
    """What the folder's name of a run says of it, where nothing else does."""
    from stockpot.methods import METHODS

    label, _, seed = name.rpartition("-seed")
    known = [method for method in METHODS if (label or name).startswith(method)]
    return {
        "run": name,
        "method": max(known, key=len, default=label or name),
        "settings": {"as named": label} if label not in METHODS else {},
        "label": label or name,
        "seed": int(seed) if seed.isdigit() and label else 0,
        "stages": [],
    }


def _fill(
    run: dict[str, Any],
    tasks: Sequence[str],
    own: dict[str, list[Line]],
    held: Line | None,
    gaps: list[str],
) -> None:
    """Give a run its scores, metrics and logs; ``held`` is what summary.json has of it."""
    scores = [line for line in own["scores"] if line.get("headline", True)]
    rows = _rows(scores, tasks, run["run"], gaps)
    b = rows.pop(None, None)
    R: list[list[float | None] | None] = [rows.get(task) for task in tasks]
    if held is not None and (not R or R[-1] is None) and len(held["R"]) == len(tasks):
        R, b = held["R"], held["b"]
    stages = sorted(own["stages"], key=lambda line: line["stage"])
    metrics = {line.get("metric") for line in scores}
    better = next((line.get("better", "higher") for line in scores), (held or {}).get("better"))
    last = [line for line in own["scores"] if [line.get("trained")] == list(tasks[-1:])]
    run.update(
        {
            "tasks": list(tasks),
            "metric": metrics.pop() if len(metrics) == 1 else (held or {}).get("metric", "score"),
            "better": "lower" if better == "lower" else "higher",
            "R": R,
            "b": b if b is not None and None not in b else None,
            "finished": bool(R) and R[-1] is not None and None not in R[-1],
            "planned_stages": run.pop("stages", None) or [],
            "scores": [line for line in last if "evaluation" in line],
            "trained": stages,
            "merges": own["merges"],
            "curves": own["curves"],
            "lines": own["lines"],
        }
    )
    run["metrics"] = _metrics(run, stages, held)


def _by_run(lines: Sequence[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["run"], []).append(line)
    return found


def _rows(
    scores: Sequence[Line], tasks: Sequence[str], run: str, gaps: list[str]
) -> dict[str | None, list[float | None]]:
    """The rows of R by the task trained last; None is the starting model's."""
    found: dict[tuple[str | None, str], list[float]] = {}
    for line in scores:
        trained = line.get("trained") if line["stage"] >= 0 else None
        found.setdefault((trained, str(line["task"])), []).append(float(line["value"]))
    trained_tasks = dict.fromkeys(trained for trained, _ in found)
    rows: dict[str | None, list[float | None]] = {}
    for trained in trained_tasks:
        cells = [found.get((trained, task)) for task in tasks]
        rows[trained] = [None if c is None else math.fsum(c) / len(c) for c in cells]
        missing = [task for task, cell in zip(tasks, cells, strict=True) if cell is None]
        if missing:
            when = "before training" if trained is None else f"after {trained}"
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            gaps.append(f"run {run}: no score {when} on {missing[0]}{more}")
    return rows


def _metrics(
    run: dict[str, Any], stages: Sequence[Line], held: Line | None
) -> dict[str, float | None]:
    """The metrics of a run that went through the stream; costs where every stage says them."""
    if not run["finished"]:
        return {}
    R = [row if row is not None and None not in row else None for row in run["R"]]
    b = run["b"]
    found: dict[str, float | None] = dict(
        all_metrics(R, b if b is not None else [0.0] * len(R), run["better"])
    )
    if b is None:
        found["fwt"] = None
    if not stages:
        kept = (held or {}).get("metrics", {})
        return {**{k: v for k, v in kept.items() if v is None or _is_number(v)}, **found}

    def each(key: str) -> list[float] | None:
        values = [line.get(key) for line in stages]
        return [float(v) for v in values if v is not None] if all(map(_is_number, values)) else None

    seconds, peaks, steps = each("seconds"), each("peak_memory"), each("steps")
    stored = [_stored(line) for line in stages]
    extra, examples = each("extra_examples"), each("trained_examples")
    last = stages[-1]
    return {
        **found,
        "l2_to_anchor": last.get("l2_to_anchor"),
        "kl_from_anchor": last.get("kl_from_anchor"),
        "seconds": math.fsum(seconds) if seconds else None,
        "peak_memory": max(peaks) if peaks else None,
        "steps": sum(steps) if steps else None,
        "stored_bytes": max((s for s in stored if s is not None), default=None),
        "extra_examples": sum(extra) if extra else None,
        "trained_examples": sum(examples) if examples else None,
    }


def _stored(line: Line) -> float | None:
    """Bytes that the method keeps from the tasks so far."""
    stored = line.get("stored")
    if not isinstance(stored, dict) or not all(map(_is_number, stored.values())):
        return None
    return float(sum(stored.values()))
