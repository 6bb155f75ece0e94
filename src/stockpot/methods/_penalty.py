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

    The gradient is added to the parameters' gradients directly, a few fused operations a step,
    instead of through autograd.
    """

    curve: ClassVar[str | None] = "strength"
    headline: ClassVar[tuple[str, ...]] = ("strength",)

    strength: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="weight of the penalty in the loss (lambda)"
    )

    _weights: list[Any] = PrivateAttr(default_factory=list)
    _anchor: list[Any] = PrivateAttr(default_factory=list)

    def start_task(self, run: TaskRun) -> None:
        """Go on from the previous task's weights and pull towards them."""
        from stockpot.averaging.weights import trainable_weights

        super().start_task(run)
        weights = trainable_weights(run.model)
        self._weights = list(weights.values()) if run.stage else []
        self._anchor = [parameter.detach().clone() for parameter in self._weights]

    def _gradients(self) -> list[Tensor]:
        import torch

        for parameter in self._weights:
            if parameter.grad is None:  # not reached by the loss, but the penalty reaches it
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._weights]
