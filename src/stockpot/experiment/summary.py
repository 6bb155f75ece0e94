"""summary.json: one object a run, computed from the record alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from stockpot.errors import DamagedRecordError
from stockpot.evaluation.settings import EvaluationSettings
from stockpot.experiment.plan import Plan, Run
from stockpot.experiment.record import Record
from stockpot.files import write_json
from stockpot.metrics import all_metrics
from stockpot.streams.data import Stream

__all__ = ["summarise", "write_summary"]


def write_summary(record: Record, plan: Plan, stream: Stream) -> list[dict[str, Any]]:
    """Compute the summary of all finished runs and write it."""
    summary = summarise(record, plan, stream)
    write_json(record.folder / "summary.json", summary)
    return summary


def summarise(record: Record, plan: Plan, stream: Stream) -> list[dict[str, Any]]:
    """One object per finished run: method, settings, seed, R, b, metrics.

    R and b are None where nothing was to be scored (``evaluation.tasks``).
    """
    tasks = tuple(task.name for task in stream.tasks)
    scores: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in record.scores():
        scores.setdefault((line["run"], line["stage"]), []).append(line)
    return [
        {
            "stream": stream.name,
            "scenario": stream.scenario,
            **_one(record, run, plan.evaluation, tasks, scores),
        }
        for run in plan.runs
        if record.finished(run.id) == len(run.stages)
    ]


def _one(
    record: Record,
    run: Run,
    settings: EvaluationSettings,
    tasks: tuple[str, ...],
    scores: dict[tuple[str, int], list[dict[str, Any]]],
) -> dict[str, Any]:
    def row(stage: int, expected: Iterable[int]) -> list[float | None]:
        found: dict[str, list[float]] = {}
        for line in scores.get((run.id, stage), []):
            if line.get("headline", True):
                found.setdefault(line["task"], []).append(line["value"])
        missing = [tasks[task] for task in expected if tasks[task] not in found]
        if missing:
            raise DamagedRecordError(
                f"{record.folder / 'scores.jsonl'} lacks the score of run {run.id!r}, stage "
                f"{stage}, on task {missing[0]!r}"
            )
        means = {task: math.fsum(values) / len(values) for task, values in found.items()}
        return [means.get(task) for task in tasks]

    R: list[list[float | None] | None] = [None] * len(tasks)
    for stage in run.stages:
        scored = settings.tasks_after(stage.row, len(tasks), run.seed)
        R[stage.row] = row(stage.number, scored)
    b = row(-1, settings.tasks_at_start(len(tasks)))
    lines = [record.stages()[run.id, stage.number] for stage in run.stages]
    last = scores[run.id, run.stages[-1].number]
    headline = [line for line in last if line.get("headline", True)]
    names = {line["metric"] for line in headline}
    better = headline[0].get("better", "higher")
    return {
        "run": run.id,
        "method": run.method.name,
        "settings": run.method.settings(),
        "label": run.label,
        "seed": run.seed,
        "tasks": list(tasks),
        "metric": names.pop() if len(names) == 1 else "score",
        "better": better,
        "R": R,
        "b": b,
        "metrics": {
            **all_metrics(R, b, better),
            "l2_to_anchor": lines[-1]["l2_to_anchor"],
            "kl_from_anchor": lines[-1].get("kl_from_anchor"),
            "seconds": sum(line["seconds"] for line in lines),
            "peak_memory": max(line["peak_memory"] for line in lines),
            "steps": sum(line["steps"] for line in lines),
            **_costs(lines),
        },
        "scores": [
            {key: line[key] for key in ("task", "evaluation", "metric", "value", "n", "stderr")}
            for line in last
            if "evaluation" in line
        ],
    }


def _costs(lines: list[dict[str, Any]]) -> dict[str, int | None]:
    """What a method costs beside time and memory; None in a record that is older than these."""

    def each(key: str) -> list[Any] | None:
        values = [line.get(key) for line in lines]
        return None if None in values else values

    stored, extra, trained = map(each, ("stored", "extra_examples", "trained_examples"))
    return {
        "stored_bytes": None if stored is None else max(sum(kept.values()) for kept in stored),
        "extra_examples": None if extra is None else sum(extra),
        "trained_examples": None if trained is None else sum(trained),
    }
