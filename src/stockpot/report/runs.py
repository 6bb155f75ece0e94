"""One run put together from the lines of its logs: its R, its metrics, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from stockpot.evaluation.settings import EvaluationSettings
from stockpot.metrics import all_metrics

__all__ = ["Line", "Logs", "asked_for", "fill", "not_measured"]

Line = dict[str, Any]
Logs = dict[str, list[Line]]
"""The lines of one log by run, or of one run by log."""

_COSTS = (
    "l2_to_anchor",
    "kl_from_anchor",
    "seconds",
    "peak_memory",
    "steps",
    "stored_bytes",
    "extra_examples",
    "trained_examples",
)


def fill(
    run: dict[str, Any],
    tasks: Sequence[str],
    own: Logs,
    held: Line | None,
    scored: bool,
    settings: EvaluationSettings,
) -> list[str]:
    """Give a run its scores, metrics and logs.

    Args:
        run: what is known of it; gets all else.
        tasks: the stream's.
        own: its lines of each log.
        held: what summary.json has of it.
        scored: whether scores.jsonl has anything at all.
        settings: which scores there should be.

    Returns:
        What is missing, in words.
    """
    scores = [line for line in own["scores"] if line.get("headline", True)]
    rows = _rows(scores, tasks)
    b = rows.pop(None, None)
    R: list[list[float | None] | None] = [rows.get(task) for task in tasks]
    gaps = _holes(run, R, b, tasks, settings)
    if held is not None and held["tasks"] == list(tasks) and _has_more(held, R, b):
        R, b = held["R"], held["b"]
        gaps = [f"run {run['run']}: scores that scores.jsonl lacks are taken from summary.json"]
        gaps = gaps if scored else []  # said once, of all of them
    stages = sorted(own["stages"], key=lambda line: line["stage"])
    metrics = {line.get("metric") for line in scores}
    better = next((line.get("better", "higher") for line in scores), (held or {}).get("better"))
    last = [line for line in own["scores"] if [line.get("trained")] == list(tasks[-1:])]
    run.update(
        {
            "tasks": list(tasks),
            "metric": _one_of(metrics or {(held or {}).get("metric")}),
            "better": "lower" if better == "lower" else "higher",
            "R": R,
            "b": b if b is not None and None not in b else None,
            "finished": bool(R) and R[-1] is not None and None not in R[-1],
            "planned_stages": run.pop("stages", None) or [],
            "scores": [line for line in last if "evaluation" in line and "metric" in line],
            "trained": stages,
            "merges": own["merges"],
            "curves": own["curves"],
            "lines": own["lines"],
        }
    )
    unknown = _without_a_line(R, stages, tasks)
    if unknown:
        gaps.append(
            f"run {run['run']}: stages.jsonl has no line for {_some(unknown)}, so its time, memory,"
            " distances and training losses are not known"
        )
    run["metrics"] = _metrics(run, stages, not unknown, held)
    return gaps


def asked_for(described: Mapping[str, Any]) -> EvaluationSettings:
    """Which scores a record should have, by its experiment.json; if that is lost, all."""
    held = described.get("evaluation")
    known = {"tasks", "tasks_limit", "every_tasks"}
    try:
        return EvaluationSettings(**{k: v for k, v in (held or {}).items() if k in known})
    except ValidationError:
        return EvaluationSettings()


def _one_of(metrics: set[str | None]) -> str:
    """The metric that all scores are of; tasks may have metrics of their own."""
    return (next(iter(metrics)) if len(metrics) == 1 else None) or "score"


def _rows(scores: Sequence[Line], tasks: Sequence[str]) -> dict[str | None, list[float | None]]:
    """The rows of R by the task trained last; None is the starting model's."""
    found: dict[tuple[str | None, str], list[float]] = {}
    for line in scores:
        trained = line["trained"] if line["stage"] >= 0 else None
        found.setdefault((trained, line["task"]), []).append(line["value"])
    rows: dict[str | None, list[float | None]] = {}
    for trained in dict.fromkeys(trained for trained, _ in found):
        cells = [found.get((trained, task)) for task in tasks]
        rows[trained] = [None if c is None else math.fsum(c) / len(c) for c in cells]
    return rows


def _holes(
    run: Mapping[str, Any],
    R: Sequence[Sequence[float | None] | None],
    b: Sequence[float | None] | None,
    tasks: Sequence[str],
    settings: EvaluationSettings,
) -> list[str]:
    """Scores that must have been there: of every stage up to the last that has one."""
    if not any(R):
        return []
    last = max(t for t, row in enumerate(R) if row)
    planned = [stage["row"] for stage in run.get("stages") or []]
    # Where no plan says it: joint training has no row but the last.
    expected = planned or ([last] if sum(map(bool, R)) == 1 else range(last + 1))
    count = len(tasks)
    looked_at = [("before training", b, settings.tasks_at_start(count))]
    looked_at += [
        (f"after {tasks[t]}", R[t], settings.tasks_after(t, count, run["seed"]))
        for t in expected
        if t <= last
    ]
    gaps = []
    for when, row, wanted in looked_at:
        missing = [tasks[n] for n in wanted if row is None or row[n] is None]
        if missing:
            gaps.append(f"run {run['run']}: no score {when} on {_some(missing)}")
    return gaps


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _has_more(
    held: Line, R: Sequence[Sequence[float | None] | None], b: Sequence[float | None] | None
) -> bool:
    """Whether summary.json has a score that the log has not."""
    pairs = [(held["b"], b), *zip(held["R"], R, strict=True)]
    return any(
        value is not None and (row is None or row[n] is None)
        for whole, row in pairs
        for n, value in enumerate(whole or ())
    )


def _without_a_line(
    R: Sequence[Sequence[float | None] | None], stages: Sequence[Line], tasks: Sequence[str]
) -> list[str]:
    """The tasks that have scores and no line of how they were trained."""
    trained = {line.get("row", line["stage"]) for line in stages}
    return [task for t, task in enumerate(tasks) if R[t] and t not in trained]


def _metrics(
    run: Mapping[str, Any], stages: Sequence[Line], complete: bool, held: Line | None
) -> dict[str, float | None]:
    """The metrics of a run that went through the stream; costs where every stage says them."""
    if not run["finished"]:
        return {}
    found = all_metrics(run["R"], run["b"], run["better"])
    if not complete:  # a part of the costs would look like all of them
        kept = (held or {}).get("metrics", {})
        return {**found, **{key: kept.get(key) for key in _COSTS}}

    def each(key: str) -> list[float] | None:
        values = [line.get(key) for line in stages]
        return None if None in values else [float(v) for v in values if v is not None]

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
    return None if stored is None else float(sum(stored.values()))


def not_measured(
    runs: Sequence[Mapping[str, Any]], described: Mapping[str, Any], tasks: Sequence[str]
) -> list[str]:
    """What was to be measured while a task trained, and no line of the record shows."""
    asked = described.get("evaluation", {})
    gaps = []
    for log, wanted in {
        "curves": bool(asked.get("every")),
        "lines": bool(asked.get("line")),
        "merges": True,
    }.items():
        without = [
            f"{run['run']} after {tasks[line.get('row', line['stage'])]}"
            for run in runs
            if wanted and (log != "merges" or _averages(run))
            for line in run["trained"]
            if (line["stage"] or log == "curves")
            and line["stage"] not in {other["stage"] for other in run[log]}
        ]
        if without:
            gaps.append(f"{log}.jsonl has no line of run {_some(without)}")
    return gaps


def _averages(run: Mapping[str, Any]) -> bool:
    """Whether every task after the first ends in an average at the latest."""
    if run["method"] == "sfa":
        return run["settings"].get("p") is not None
    return bool(run["method"] == "wise-ft")
