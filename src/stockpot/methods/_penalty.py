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

    def start_task(self, run: TaskRun) -> None:
        """Go on from the previous task's weights and pull towards them."""
        from stockpot.averaging.weights import trainable_weights

        super().start_task(run)
        self._weights = list(trainable_weights(run.model).values()) if run.stage else []
        self._anchor = self._laid_out() if self._weights else None

    def _laid_out(self) -> Tensor:
        import torch

        return torch.cat([parameter.detach().flatten() for parameter in self._weights])

    def _add_to_gradients(self, pull: Tensor, factor: float) -> None:
        """``gradient += factor * pull``, for every parameter its stretch of ``pull``."""
        import torch

        for parameter in self._weights:
            if parameter.grad is None:  # not reached by the loss, but the penalty reaches it
                parameter.grad = torch.zeros_like(parameter)
        stretches = pull.split([parameter.numel() for parameter in self._weights])
        torch._foreach_add_(
            [parameter.grad for parameter in self._weights],
            [s.view_as(p) for s, p in zip(stretches, self._weights, strict=True)],
            alpha=factor,
        )
