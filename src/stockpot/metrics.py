"""Metrics of continual learning: pure functions of the accuracy matrix R and the baseline b.

R[t][i] is the score on task i after training through task t, both 0-based, T tasks; b[i] is the
score of the starting model on task i. Definitions differ between libraries, so each is written
beside its name. A row of R may be None (multitask training has only a last row), and so may be
single scores of R and b (``evaluation.tasks``); a metric that needs one of them is None.

Worked example, T = 3::

    R = [[.9, .1, .1], [.6, .8, .2], [.5, .7, .9]]      b = [.1, .1, .1]
    average_accuracy   (.5 + .7 + .9) / 3        = .7
    learning_accuracy  (.9 + .8 + .9) / 3        = .867
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
    "learning_accuracy",
]

Row = Sequence[float | None] | None
Matrix = Sequence[Row]


def average_accuracy(R: Matrix) -> float | None:
    """``1/T sum_i R[T-1][i]``: the final scores, every task equal (Lopez-Paz & Ranzato 2017)."""
    return _mean(_last(R))


def learning_accuracy(R: Matrix) -> float | None:
    """``1/T sum_i R[i][i]``: each task's score just after it was learned (Riemer et al. 2019)."""
    return _mean([_cell(R, i, i) for i in range(len(R))])


def forgetting(R: Matrix) -> float | None:
    """``1/(T-1) sum_{i<T-1} R[i][i] - R[T-1][i]``: against just after learning (Avalanche)."""
    last = _last(R)
    return _mean([_minus(_cell(R, i, i), last[i]) for i in range(len(R) - 1)])


def forgetting_vs_best(R: Matrix) -> float | None:
    """``1/(T-1) sum_{i<T-1} max_{i<=l<=T-2} R[l][i] - R[T-1][i]`` (Chaudhry et al. 2018).

    Against the best score since the task was learned; negative when the last row is better still.
    A maximum over some of the rows would be another number, so all of them have to be known.
    """
    last = _last(R)
    drops = []
    for i in range(len(R) - 1):
        seen = [_cell(R, t, i) for t in range(i, len(R) - 1)]
        known = [value for value in seen if value is not None]
        drops.append(_minus(max(known), last[i]) if len(known) == len(seen) else None)
    return _mean(drops)


def bwt(R: Matrix) -> float | None:
    """``1/(T-1) sum_{i<T-1} R[T-1][i] - R[i][i]``: backward transfer (Lopez-Paz & Ranzato 2017)."""
    value = forgetting(R)
    return None if value is None else 0.0 - value


def fwt(R: Matrix, b: Sequence[float | None] | None) -> float | None:
    """``1/(T-1) sum_{i>=1} R[i-1][i] - b[i]``: forward transfer (Lopez-Paz & Ranzato 2017).

    b is measured on the starting model, before any task was trained.
    """
    if b is None:
        return None
    return _mean([_minus(_cell(R, i - 1, i), b[i]) for i in range(1, len(R))])


def all_metrics(
    R: Matrix,
    b: Sequence[float | None] | None,
    better: Literal["higher", "lower"] = "higher",
) -> dict[str, float | None]:
    """Every metric of this module by name; ``average`` is :func:`average_accuracy`.

    Where lower scores are better (losses), forgetting is how far they have risen, and transfer how
    far they have fallen: the formulas on ``-R``. The averages are those of R itself.
    """
    sign = -1 if better == "lower" else 1
    signed = [None if row is None else _times(sign, row) for row in R]
    return {
        "average": average_accuracy(R),
        "learned": learning_accuracy(R),
        "forgetting": forgetting(signed),
        "forgetting_vs_best": forgetting_vs_best(signed),
        "bwt": bwt(signed),
        "fwt": fwt(signed, None if b is None else _times(sign, b)),
    }


def _times(sign: int, row: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else sign * value for value in row]


def _last(R: Matrix) -> Sequence[float | None]:
    if not R or R[-1] is None:
        raise ValueError("R has no last row: the stream was not trained to its end")
    return R[-1]


def _cell(R: Matrix, t: int, i: int) -> float | None:
    row = R[t]
    return None if row is None else row[i]


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _mean(values: Sequence[float | None]) -> float | None:
    """None if there is no value, or one is unknown: a mean of the others is another number."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
