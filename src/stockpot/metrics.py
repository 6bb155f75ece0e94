"""Metrics of continual learning: pure functions of the accuracy matrix R and the baseline b.

R[t][i] is the score on task i after training through task t, both 0-based, T tasks; b[i] is the
score of the starting model on task i. Definitions differ between libraries, so each is written
beside its name. A row of R may be None (multitask training has only a last row), and what then
cannot be computed is None.

Worked example, T = 3::

    R = [[.9, .1, .1], [.6, .8, .2], [.5, .7, .9]]      b = [.1, .1, .1]
    average_accuracy   (.5 + .7 + .9) / 3        = .7
    forgetting         ((.9-.5) + (.8-.7)) / 2   = .25
    bwt                                          = -.25
    fwt                ((.1-.1) + (.2-.1)) / 2   = .05
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

__all__ = [
    "all_metrics",
    "average_accuracy",
    "bwt",
    "forgetting",
    "forgetting_vs_best",
    "fwt",
]

Row = Sequence[float] | None
Matrix = Sequence[Row]


def average_accuracy(R: Matrix) -> float:
    """``1/T sum_i R[T-1][i]``: the final scores, every task equal (Lopez-Paz & Ranzato 2017)."""
    last = _last(R)
    return sum(last) / len(last)


def forgetting(R: Matrix) -> float | None:
    """``1/(T-1) sum_{i<T-1} R[i][i] - R[T-1][i]``: against just after learning (Avalanche)."""
    last = _last(R)
    drops = []
    for i in range(len(R) - 1):
        row = R[i]
        if row is None:
            return None
        drops.append(row[i] - last[i])
    return _mean(drops)


def forgetting_vs_best(R: Matrix) -> float | None:
    """``1/(T-1) sum_{i<T-1} max_{i<=l<=T-2} R[l][i] - R[T-1][i]`` (Chaudhry et al. 2018).

    Against the best score since the task was learned; negative when the last row is better still.
    """
    last = _last(R)
    drops = []
    for i in range(len(R) - 1):
        rows = [row for row in R[i:-1] if row is not None]
        if len(rows) < len(R) - 1 - i:
            return None
        drops.append(max(row[i] for row in rows) - last[i])
    return _mean(drops)


def bwt(R: Matrix) -> float | None:
    """``1/(T-1) sum_{i<T-1} R[T-1][i] - R[i][i]``: backward transfer (Lopez-Paz & Ranzato 2017)."""
    value = forgetting(R)
    return None if value is None else 0.0 - value


def fwt(R: Matrix, b: Sequence[float]) -> float | None:
    """``1/(T-1) sum_{i>=1} R[i-1][i] - b[i]``: forward transfer (Lopez-Paz & Ranzato 2017).

    b is measured on the starting model, before any task was trained.
    """
    gains = []
    for i in range(1, len(R)):
        row = R[i - 1]
        if row is None:
            return None
        gains.append(row[i] - b[i])
    return _mean(gains)


def all_metrics(
    R: Matrix, b: Sequence[float], better: Literal["higher", "lower"] = "higher"
) -> dict[str, float | None]:
    """Every metric of this module by name; ``average`` is :func:`average_accuracy`.

    Where lower scores are better (losses), forgetting is how far they have risen, and transfer how
    far they have fallen: the formulas on ``-R``. The average is that of R itself.
    """
    if better == "lower":
        negative = all_metrics(
            [None if row is None else [-value for value in row] for row in R], [-x for x in b]
        )
        return {**negative, "average": average_accuracy(R)}
    return {
        "average": average_accuracy(R),
        "forgetting": forgetting(R),
        "forgetting_vs_best": forgetting_vs_best(R),
        "bwt": bwt(R),
        "fwt": fwt(R, b),
    }


def _last(R: Matrix) -> Sequence[float]:
    if not R or R[-1] is None:
        raise ValueError("R has no last row: the stream was not trained to its end")
    return R[-1]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
