"""A score: a metric's value, what it rests on, and what became of every item."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

__all__ = ["Progress", "Score", "headline_value", "mean_score", "silent"]

Progress = Callable[[int, int], None]
"""Called with how many items are done, and of how many."""


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Score:
    """A metric's value on one task, or on one benchmark of it."""

    value: float
    n: int
    """How many items were scored."""
    stderr: float
    """Standard error of the value; for a share of n, sqrt(value * (1 - value) / n)."""
    metric: str = "accuracy"
    evaluation: str = "test"
    """What was scored: ``test`` for the task's held-out examples, else a benchmark's name."""
    better: Literal["higher", "lower"] = "higher"
    items: Tensor | None = field(default=None, compare=False)
    """(n,) the metric of every item, in the data's order, so that two models can be compared."""
    headline: bool = True
    """Whether it is (part of) the task's score in R."""
    texts: tuple[dict[str, Any], ...] = ()
    """What was generated for every item, where something was."""

    @property
    def name(self) -> str:
        """``gsm8k flexible``; for the held-out examples the metric alone."""
        return self.metric if self.evaluation == "test" else f"{self.evaluation} {self.metric}"

    def aside(self) -> Score:
        """The same, but not part of the task's score in R."""
        return replace(self, headline=False)


def mean_score(items: Tensor, metric: str, evaluation: str, **more: Any) -> Score:
    """The mean of the items with its standard error, ``s / sqrt(n)`` with s over n.

    For items that are right or wrong this is ``sqrt(value * (1 - value) / n)``.
    """
    values = items.double()
    n = len(values)
    value = float(values.sum()) / n
    variance = float((values - value).square().sum()) / n
    if bool((values * values == values).all()):
        variance = value * (1 - value)
    return Score(value, n, math.sqrt(variance / n), metric, evaluation, items=items, **more)


def headline_value(scores: Sequence[Score]) -> float | None:
    """A task's score in R: the mean of its headline scores; None if it has none."""
    values = [score.value for score in scores if score.headline]
    return math.fsum(values) / len(values) if values else None
