"""TIES merging: trim small changes, elect a sign, average what agrees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stockpot.methods._experts import Experts

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ties"]


class Ties(Experts):
    """theta_0 + scale * disjoint mean of the trimmed task vectors that agree with the elected sign.

    As in its original, the trim is over the whole model; ``per_tensor`` trims within each tensor,
    as mergekit and PEFT do, which is another method.
    """

    name: ClassVar[str] = "ties"
    reference: ClassVar[str] = "Yadav et al. 2023, arXiv 2306.01708"
    curve: ClassVar[str | None] = "density"
    headline: ClassVar[tuple[str, ...]] = ("density", "scale")

    density: float = Field(
        0.2, gt=0, le=1, description="share of each task vector's entries that the trim keeps"
    )
    scale: float = Field(
        1.0,
        ge=-1e6,
        le=1e6,
        allow_inf_nan=False,
        description="factor of the merged task vector (lambda)",
    )
    per_tensor: bool = Field(False, description="trim within each tensor, not over the whole model")

    def merge(
        self, start: Mapping[str, Tensor], experts: list[dict[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Trim, elect, merge."""
        from stockpot.merging.rules import ties

        return ties(
            start,
            experts,
            density=self.density,
            scale=self.scale,
            per_tensor=self.per_tensor,
        )
