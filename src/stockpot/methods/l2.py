"""L2 penalty towards the previous task's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from stockpot.methods._penalty import Penalty, inner
from stockpot.methods.base import TaskRun

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["L2"]


class L2(Penalty):
    """Loss + strength / 2 * ||theta - theta_o||^2 (paper, eq. 1)."""

    name: ClassVar[str] = "l2"
    reference: ClassVar[str] = "arXiv 2501.05559, eq. 1"

    def before_step(self, run: TaskRun) -> Tensor | None:
        """Add ``strength * (theta - theta_o)`` to the gradient."""
        parts = []
        for term in self._terms:
            difference = term.subtract()
            term.add_to_gradient(difference, self.strength * run.loss_scale)
            parts.append(inner(difference, difference))
        return self.strength / 2 * sum(parts[1:], parts[0]) if parts else None
