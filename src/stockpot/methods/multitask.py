"""Multitask fine-tuning: all tasks at once, the upper baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from stockpot.errors import ConfigError, nearest
from stockpot.methods.base import Method, Stored, TaskRun

__all__ = ["Multitask"]


class Multitask(Method):
    """Fine-tune on all tasks at once, for as many steps as the stream has: the upper baseline."""

    name: ClassVar[str] = "multitask"
    joint: ClassVar[bool] = True

    without: str | None = Field(
        None,
        description="a task that is not trained on, only scored: what a model knows that has never "
        "seen it; several with commas",
    )

    def check_tasks(self, names: Sequence[str]) -> None:
        """What is left out is in the stream, and something is left."""
        for name in self.left_out():
            if name not in names:
                raise ConfigError(f"multitask: without: no task {name!r}{nearest(name, names)}")
        if not set(names) - set(self.left_out()):
            raise ConfigError("multitask: without: that leaves no task to train on")

    def left_out(self) -> tuple[str, ...]:
        """The names of the tasks that are not trained on."""
        return tuple(name.strip() for name in (self.without or "").split(",") if name.strip())

    def stored(self, run: TaskRun) -> Stored:
        """All data, at once."""
        return Stored(data=sum(task.train.nbytes() for task in run.tasks))

    def training_identity(self, stage: int) -> dict[str, Any]:
        """Plain fine-tuning, on more data."""
        return {}
