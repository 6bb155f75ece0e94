"""How far a task moved the model against what it made the model forget (the paper's Fig. 10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stockpot.report.table import Group

__all__ = ["movement"]

_KINDS = {
    "l2": ("l2_to_anchor", "L2 distance to the anchor", ""),
    "kl": ("kl_from_anchor", "forward KL from the anchor", "nats"),
}
_LEAST = 4
"""Fewer points than this have no rank correlation worth a number."""


def movement(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Per task trained: the distance to the weights before it, and what it cost earlier tasks.

    ``lost`` is ``mean_{i<t} (R[t-1][i] - R[t][i])`` (with the other sign where lower is better):
    positive is forgetting. A point is the mean over a setting's runs. Weights that were trained on
    all tasks at once have no point.
    """
    result = {}
    for kind, (key, title, unit) in _KINDS.items():
        points = [
            point for number, group in enumerate(groups) for point in _points(group, number, key)
        ]
        result[kind] = {"title": title, "unit": unit, "points": points, "note": _note(points)}
    return result


def _points(group: Group, number: int, key: str) -> list[dict[str, Any]]:
    found: dict[int, list[tuple[float, float]]] = {}
    for run in group.runs:
        for stage in run["trained"]:
            row, distance = stage.get("row"), stage.get(key)
            if not isinstance(row, int) or row < 1 or distance is None:
                continue
            lost = _lost(run, row)
            if lost is not None:
                found.setdefault(row, []).append((float(distance), lost))
    return [
        {
            "group": number,
            "row": row,
            "x": math.fsum(x for x, _ in pairs) / len(pairs),
            "lost": math.fsum(y for _, y in pairs) / len(pairs),
            "n": len(pairs),
        }
        for row, pairs in sorted(found.items())
    ]


def _lost(run: dict[str, Any], row: int) -> float | None:
    if row >= len(run["R"]):
        return None
    before, after = run["R"][row - 1], run["R"][row]
    if before is None or after is None:
        return None
    pairs = list(zip(before[:row], after[:row], strict=True))
    if any(old is None or new is None for old, new in pairs):
        return None
    sign = -1 if run["better"] == "lower" else 1
    return math.fsum(sign * (old - new) for old, new in pairs) / row


def _note(points: Sequence[dict[str, Any]]) -> str:
    text = "A point is one setting after one task, mean over runs; above 0 something was forgotten."
    x, y = [p["x"] for p in points], [p["lost"] for p in points]
    if len(points) < _LEAST or len(set(x)) < 2 or len(set(y)) < 2:
        return text
    from scipy.stats import spearmanr

    rho = float(spearmanr(x, y).statistic)
    return (
        f"{text} Rank correlation (Spearman) over the {len(points)} points: {rho:.2f}; they share "
        "tasks and methods, so it describes these points and is no test."
    )
