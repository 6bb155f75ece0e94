"""Rehearsal: a share of the training examples comes from past tasks (Robins 1995)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stockpot.methods.base import Method, Stored, TaskRun

if TYPE_CHECKING:
    from stockpot.streams.data import TaskData

__all__ = ["Rehearsal"]


class Rehearsal(Method):
    """Replace a share of the current task's examples by examples of all past tasks.

    Of the N examples trained on, ``round(fraction * N)`` are drawn without replacement from the
    union of all past tasks, and the rest, also without replacement, from the current task: 95 % and
    5 % in the paper's first variant (section 5.1). N, and so the number of steps, stays the same.
    """

    name: ClassVar[str] = "rehearsal"
    reference: ClassVar[str] = "Robins 1995"
    curve: ClassVar[str | None] = "fraction"
    headline: ClassVar[tuple[str, ...]] = ("fraction",)

    fraction: float = Field(
        0.05, gt=0, lt=1, description="share of the training examples drawn from all past tasks"
    )

    def training_data(self, run: TaskRun) -> TaskData:
        """The current task with a share of it replaced."""
        import torch

        from stockpot.streams.data import Mixture

        current = super().training_data(run)
        if not run.past:
            return current
        buffer = Mixture([task.train for task in run.past])
        replayed = min(round(self.fraction * len(current)), len(buffer))
        generator = torch.Generator().manual_seed(run.seed)
        old = torch.randperm(len(buffer), generator=generator)[:replayed]
        new = torch.randperm(len(current), generator=generator)[: len(current) - replayed]
        return Mixture([current.subset(new), buffer.subset(old)])

    def stored(self, run: TaskRun) -> Stored:
        """The training examples of every task so far: any of them may be drawn."""
        return Stored(data=sum(task.train.nbytes() for task in (*run.past, *run.tasks)))
