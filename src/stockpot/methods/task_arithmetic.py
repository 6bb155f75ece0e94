"""Task arithmetic: add the task vectors of all experts to the starting model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from stockpot.errors import ConfigError
from stockpot.methods._experts import Experts

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TaskArithmetic"]


class TaskArithmetic(Experts):
    """theta_0 + scale * sum_i (theta_i - theta_0), each theta_i trained from theta_0.

    With ``weights`` each task vector has a factor of its own in place of ``scale``.
    """

    name: ClassVar[str] = "task-arithmetic"
    reference: ClassVar[str] = "Ilharco et al. 2023, arXiv 2212.04089"
    curve: ClassVar[str | None] = "scale"
    headline: ClassVar[tuple[str, ...]] = ("scale",)

    scale: float = Field(
        0.5,
        ge=-1e6,
        le=1e6,
        allow_inf_nan=False,
        description="factor of the summed task vectors (lambda)",
    )

    weights: tuple[float, ...] | None = Field(
        None,
        description="each task's own factor instead of scale, in the stream's order; a list of "
        "such lists makes a grid: [[0.25, 0.75], [0.75, 0.25]]",
    )

    def check_tasks(self, names: Sequence[str]) -> None:
        """A factor for every task."""
        if self.weights is not None and len(self.weights) != len(names):
            raise ConfigError(
                f"task-arithmetic: weights = {list(self.weights)} has {len(self.weights)} factors "
                f"and the stream has {len(names)} tasks ({', '.join(names)}): give one for each"
            )

    def given(self) -> dict[str, Any]:
        """Without the scale where weights take its place."""
        return {k: v for k, v in super().given().items() if k != "scale" or self.weights is None}

    def merge(
        self, start: Mapping[str, Tensor], experts: list[dict[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Add the scaled task vectors."""
        from stockpot.merging.rules import task_arithmetic

        if self.weights is None:
            return task_arithmetic(start, experts, scale=self.scale)
        return task_arithmetic(start, experts, weights=self.weights[: len(experts)])
