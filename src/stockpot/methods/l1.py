"""L1 penalty towards the previous task's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from stockpot.methods._penalty import Penalty
from stockpot.methods.base import TaskRun

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["L1"]


class L1(Penalty):
    """Loss + strength * ||theta - theta_o||_1 (paper, section 6)."""

    name: ClassVar[str] = "l1"
    reference: ClassVar[str] = "arXiv 2501.05559, section 6"

    def before_step(self, run: TaskRun) -> Tensor | None:
        """Add ``strength * sign(theta - theta_o)`` to the gradient (0 where they are equal)."""
        parts = []
        for term in self._terms:
            difference = term.subtract()
            parts.append(difference.abs().sum())
            term.add_to_gradient(difference.sign_(), self.strength * run.loss_scale)
        return self.strength * sum(parts[1:], parts[0]) if parts else None
