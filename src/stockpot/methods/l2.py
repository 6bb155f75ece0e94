"""L2 penalty towards the previous task's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from stockpot.methods._penalty import Penalty
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
        import torch

        if not self._weights:
            return None
        with torch.no_grad():
            difference = torch._foreach_sub(self._weights, self._anchor)
            torch._foreach_add_(
                self._gradients(), difference, alpha=self.strength * run.loss_scale
            )
            return self.strength / 2 * sum(d.square().sum() for d in difference)
