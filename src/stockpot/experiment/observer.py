"""What a running experiment tells whoever watches it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stockpot.experiment.plan import Plan, Run, Stage

__all__ = ["Observer", "Row", "There"]


@dataclass(frozen=True)
class Row:
    """A row of R: the score on every task after a stage."""

    values: Mapping[str, float]
    """By task, in the stream's order."""
    metric: str
    """``accuracy``, ``loss``, ...; ``score`` where tasks are scored by different ones."""
    better: str
    """``higher`` or ``lower``."""

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Row:
        """From the lines of ``scores.jsonl`` of one stage: each task's mean headline score."""
        headline = [line for line in lines if line.get("headline", True)]
        found: dict[str, list[float]] = {}
        for line in headline:
            found.setdefault(line["task"], []).append(line["value"])
        metrics = {line["metric"] for line in headline}
        return cls(
            {task: math.fsum(values) / len(values) for task, values in found.items()},
            metrics.pop() if len(metrics) == 1 else "score",
            headline[0].get("better", "higher") if headline else "higher",
        )


@dataclass(frozen=True)
class There:
    """What an earlier call left, so that it is not done again."""

    rows: Mapping[tuple[str, int], Row] = field(default_factory=dict)
    """The scores of finished stages, by run and number of the stage."""
    trained: frozenset[str] = frozenset()
    """The content keys of trained weights that are kept for stages to come."""


class Observer:
    """Silent; a progress display overrides what it shows."""

    def experiment_begins(self, plan: Plan, task_names: tuple[str, ...], there: There) -> None:
        """All runs are laid out, and what an earlier call has done is found."""

    def run_begins(self, run: Run, finished: int) -> None:
        """A run begins, or goes on after ``finished`` stages."""

    def stage_begins(self, run: Run, stage: Stage, merges: Sequence[Mapping[str, float]]) -> None:
        """Training of a stage begins; ``merges`` are its merge events and grow as it trains."""

    def step(self, run: Run, step: int, loss: float | None) -> None:
        """An optimizer step is done; the loss is given now and then."""

    def scoring(self, run: Run, what: str, done: int, total: int) -> None:
        """So many items of a task or benchmark are scored."""

    def stage_ends(self, run: Run, stage: Stage, trained: bool, row: Row) -> None:
        """A stage is finished; ``trained`` is False when its weights were there already."""

    def run_ends(self, run: Run) -> None:
        """A run is finished."""

    def run_failed(self, run: Run, error: Exception) -> None:
        """A run stopped on an error; the others go on."""
