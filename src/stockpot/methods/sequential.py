"""Sequential fine-tuning: each task from where the last one ended, with no protection."""

from __future__ import annotations

from typing import Any, ClassVar

from stockpot.methods.base import Method, Stored, TaskRun

__all__ = ["Sequential"]


class Sequential(Method):
    """Fine-tune on task after task and do nothing about forgetting: the lower baseline."""

    name: ClassVar[str] = "sequential"

    def stored(self, run: TaskRun) -> Stored:
        """Nothing."""
        return Stored()

    def training_identity(self, stage: int) -> dict[str, Any]:
        """Plain fine-tuning in every stage."""
        return {}
