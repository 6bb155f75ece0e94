"""What L1, L2 and EWC share: a penalty on the distance to earlier weights, added at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PrivateAttr

from stockpot.methods.base import Method, TaskRun

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Penalty"]


class Penalty(Method):
    """Loss + strength * penalty(theta - theta_o), where theta_o is the previous task's model.

    The penalty's gradient is written down, not found by autograd, and worked out on all parameters
    laid end to end: a handful of operations a step, however many tensors the model has.
    """

    curve: ClassVar[str | None] = "strength"
    headline: ClassVar[tuple[str, ...]] = ("strength",)

    strength: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="weight of the penalty in the loss (lambda)"
    )

    _weights: list[Any] = PrivateAttr(default_factory=list)
    _anchor: Any = PrivateAttr(None)
    """theta_o, all parameters end to end."""
    _difference: Any = PrivateAttr(None)
    """theta - theta_o in the same layout; written anew at every step."""

    def start_task(self, run: TaskRun) -> None:
        """Go on from the previous task's weights and pull towards them."""
        import torch

        from stockpot.arithmetic import wide
        from stockpot.averaging.weights import trainable_weights

        super().start_task(run)
        self._weights = list(trainable_weights(run.model).values()) if run.stage else []
        if self._weights:
            self._anchor = torch.cat([wide(weight.detach()).flatten() for weight in self._weights])
            self._difference = torch.empty_like(self._anchor)

    def _subtract_anchor(self) -> Tensor:
        """Work out theta - theta_o in the same memory every time: fresh memory costs faults."""
        import torch

        flat = [weight.detach().view(-1) for weight in self._weights]
        difference: Tensor = torch.cat(flat, out=self._difference)
        return difference.sub_(self._anchor)

    def _add_to_gradients(self, pull: Tensor, factor: float) -> None:
        """``gradient += factor * pull``, for every parameter its stretch of ``pull``."""
        import torch

        for weight in self._weights:
            if weight.grad is None:  # not reached by the loss, but the penalty reaches it
                weight.grad = torch.zeros_like(weight)
        stretches = pull.split([weight.numel() for weight in self._weights])
        for weight, stretch in zip(self._weights, stretches, strict=True):
            weight.grad.add_(stretch.view_as(weight), alpha=factor)
