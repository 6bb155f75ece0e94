"""Multitask fine-tuning: all tasks at once, the upper baseline."""

from __future__ import annotations

from typing import Any, ClassVar

from stockpot.methods.base import Method

__all__ = ["Multitask"]


class Multitask(Method):
    """Fine-tune on all tasks at once, for as many steps as the stream has: the upper baseline."""

    name: ClassVar[str] = "multitask"
    joint: ClassVar[bool] = True

    def training_identity(self, stage: int) -> dict[str, Any]:
        """Plain fine-tuning, on more data."""
        return {}
