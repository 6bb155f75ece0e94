"""What a running experiment tells whoever watches it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stockpot.experiment.plan import Plan, Run, Stage

__all__ = ["Observer"]


class Observer:
    """Silent; a progress display overrides what it shows."""

    def experiment_begins(self, plan: Plan, task_names: tuple[str, ...]) -> None:
        """All runs are laid out."""

    def run_begins(self, run: Run, finished: int) -> None:
        """A run begins, or goes on after ``finished`` stages."""

    def stage_begins(self, run: Run, stage: Stage) -> None:
        """Training of a stage begins."""

    def step(self, step: int, loss: float | None) -> None:
        """An optimizer step is done; the loss is given now and then."""

    def scoring(self, what: str, done: int, total: int) -> None:
        """So many items of a task or benchmark are scored."""

    def stage_ends(self, run: Run, stage: Stage, trained: bool, scores: list[str]) -> None:
        """A stage is finished; ``trained`` is False when its weights were there already."""

    def run_ends(self, run: Run) -> None:
        """A run is finished."""

    def run_failed(self, run: Run, error: Exception) -> None:
        """A run stopped on an error; the others go on."""
