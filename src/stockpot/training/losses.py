"""The losses of a task as they are recorded: means over windows of its steps."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

__all__ = ["LossLog"]

_LOG_POINTS = 50
"""Losses are recorded as means over windows of 1/50 of a task."""
_GLIMPSE_SECONDS = 1.0
"""How often a watcher gets a loss meanwhile."""


class LossLog:
    """Mean losses over windows of steps; survives a resume, to the same numbers."""

    def __init__(self, total_steps: int) -> None:
        self.window = max(1, math.ceil(total_steps / _LOG_POINTS))
        self.total = total_steps
        self.points: list[tuple[int, float]] = []
        self.pending: list[Tensor] = []
        self._told = (time.monotonic(), 0, 0)

    def add(self, loss: Tensor) -> None:
        """Of a step, or of a micro-batch its share in the step's."""
        self.pending.append(loss.detach())

    def close_window(self, step: int) -> float | None:
        """The mean loss if ``step`` ends a window."""
        if step % self.window and step != self.total:
            return None
        if not self.pending:
            return None
        # float64 means do not depend on how the sum was split by a resume.
        windows = max(1, step - (self.points[-1][0] if self.points else 0))
        mean = float(torch.stack(self.pending).double().sum()) / windows
        self.pending = []
        self.points.append((step, mean))
        self._told = (time.monotonic(), step, 0)
        return mean

    def glimpse(self, step: int) -> float | None:
        """The mean loss of the last second's steps, for whoever watches a long window."""
        now = time.monotonic()
        when, since, count = self._told
        if now - when < _GLIMPSE_SECONDS:
            return None
        self._told = (now, step, len(self.pending))
        recent = self.pending[count:]
        return float(torch.stack(recent).double().sum()) / max(1, step - since) if recent else None

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, as JSON."""
        return {"points": self.points, "pending": [float(loss) for loss in self.pending]}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from :meth:`state`."""
        self.points = [(int(step), float(loss)) for step, loss in state["points"]]
        self.pending = [torch.tensor(loss, device=device) for loss in state["pending"]]
        self._told = (time.monotonic(), self.points[-1][0] if self.points else 0, 0)
