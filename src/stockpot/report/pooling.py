"""Run folders that belong together, as one experiment: more seeds, methods or task orders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stockpot.report.reading import Recorded
from stockpot.report.table import Group, group_runs

__all__ = ["Pool", "pool_records"]

_FREE = {"device", "threads", "checkpoint_seconds", "report_to"}
"""Training settings that do not change what is measured."""
_SCORING = {
    "precision",
    "max_new_tokens",
    "shots",
    "samples",
    "pass_at",
    "temperature",
    "lm_eval_limit",
    "lm_eval_shots",
}
"""Evaluation settings that do."""


@dataclass
class Pool:
    """One experiment as it is reported."""

    records: list[Recorded]
    runs: list[dict[str, Any]]
    """Of all folders; ``order`` is the number of the run's task order."""
    orders: list[list[str]]
    """The task orders, the first folder's first."""
    gaps: list[str]
    doubles: int = 0
    """Runs that are in two folders; they count once."""

    @property
    def name(self) -> str:
        """The first folder's name for it."""
        return self.records[0].name

    @property
    def tasks(self) -> list[str]:
        """In the first folder's order."""
        return self.orders[0]

    @property
    def planned(self) -> int:
        """How many runs there will be."""
        return max(len(self.runs), sum(record.planned for record in self.records) - self.doubles)

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The runs that stopped on an error."""
        return [run for run in self.runs if run["failed"] and not run["finished"]]

    @property
    def left(self) -> int:
        """How many runs are still to come."""
        return self.planned - len(self.finished) - len(self.failed)

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The runs that went through the whole stream."""
        return [run for run in self.runs if run["finished"]]

    @property
    def groups(self) -> list[Group]:
        """Finished runs by method and setting."""
        return group_runs(self.finished)


def pool_records(records: Sequence[Recorded]) -> list[Pool]:
    """Put together the folders that differ in nothing but methods, seeds and task order.

    A run that two folders have (the same method, settings, seed and order) is counted once.
    """
    bundles: list[tuple[str, list[Recorded]]] = []
    for record in records:
        identity = _identity(record)
        for known, bundle in bundles:
            if known == identity and all(_same_data(record, other) for other in bundle):
                bundle.append(record)
                break
        else:
            bundles.append((identity, [record]))
    return [_pool(bundle) for _, bundle in bundles]


def _same_data(one: Recorded, other: Recorded) -> bool:
    """Whether two folders may have the same examples; the fingerprint goes with the order."""
    return one.tasks != other.tasks or one.described.get("data") == other.described.get("data")


def _identity(record: Recorded) -> str:
    """What must be the same for scores to be averages of one thing."""
    described = record.described
    if not described:
        return str(record.folder.resolve())  # nothing says that it belongs to another
    stream = {k: v for k, v in _mapping(described, "stream").items() if k != "order"}
    if isinstance(stream.get("tasks"), list):
        stream["tasks"] = sorted(map(str, stream["tasks"]))
    training = {k: v for k, v in _mapping(described, "training").items() if k not in _FREE}
    scoring = {k: v for k, v in _mapping(described, "evaluation").items() if k in _SCORING}
    left_out = described.get("left out")
    model = _mapping(described, "model")
    parts = [stream, model, training, scoring, left_out, sorted(record.tasks)]
    return json.dumps(parts, sort_keys=True, default=str)


def _mapping(described: dict[str, Any], key: str) -> dict[str, Any]:
    value = described.get(key)
    return value if isinstance(value, dict) else {}


def _pool(records: list[Recorded]) -> Pool:
    pool = Pool(records, [], [], [])
    at: dict[str, int] = {}
    for record in records:
        where = str(record.folder)
        pool.gaps += [f"{where}: {gap}" if len(records) > 1 else gap for gap in record.gaps]
        if record.tasks not in pool.orders:
            pool.orders.append(record.tasks)
        order = pool.orders.index(record.tasks)
        doubles = 0
        for run in record.runs:
            parts = [run["method"], run["settings"], run["seed"], order]
            key = json.dumps(parts, sort_keys=True, default=str)
            held = pool.runs[at[key]] if key in at else None
            own = {**run, "order": order, "folder": where}
            if held is None or held["folder"] == where:
                at[key] = len(pool.runs)
                pool.runs.append(own)
                continue
            doubles += 1
            if run["finished"] and not held["finished"]:
                pool.runs[at[key]] = own
        pool.doubles += doubles
        if doubles:
            said = "run is" if doubles == 1 else "runs are"
            pool.gaps.append(
                f"{where}: {doubles} {said} in an earlier folder too; each counts once"
            )
    return pool
