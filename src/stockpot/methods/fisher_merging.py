"""Fisher merging: average the experts, each weight by what it matters to its own task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from stockpot.methods._experts import Experts
from stockpot.methods.base import Stored, TaskRun, size_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FisherMerging"]


class FisherMerging(Experts):
    """sum_i F_i theta_i / sum_i F_i for each weight (paper, eq. 15).

    F_i are the Fisher values of expert i on its own task.
    """

    name: ClassVar[str] = "fisher-merging"
    reference: ClassVar[str] = "Matena & Raffel 2022, arXiv 2111.09832"
    needs_weights: ClassVar[bool] = True

    labels: Literal["sampled", "true", "exact"] = Field(
        "exact",
        description="labels the gradients are taken for: sampled from the model, true, or the "
        "exact expectation (as in the original)",
    )
    samples: int | None = Field(
        2000, ge=1, description="examples per task for its Fisher values; null: all"
    )
    floor: float = Field(
        1e-6,
        ge=1e-30,
        allow_inf_nan=False,
        description="smallest Fisher value, so that no weight is 0/0",
    )
    normalize: bool = Field(
        False, description="divide each expert's Fisher values by their norm over the model"
    )

    _fishers: list[Any] = PrivateAttr(default_factory=list)

    def end_task(self, run: TaskRun) -> None:
        """Take this expert's Fisher values, keep them, and merge."""
        from stockpot.methods.fisher_information import fisher_diagonal

        fisher = fisher_diagonal(
            run.learner,
            self.training_data(run),
            self.samples,
            self.labels,
            run.seed,
            passes=run.passes,
            processes=run.processes,
        )
        fisher = {name: values.cpu() for name, values in fisher.items()}
        self._fishers = [*run.memory.load_all("fisher"), fisher]
        if not run.last:
            run.memory.save("fisher", fisher)
        super().end_task(run)

    def stored(self, run: TaskRun) -> Stored:
        """theta_0, the experts, and the Fisher values of each."""
        weights = super().stored(run).weights
        return Stored(weights, other=sum(size_of(values.values()) for values in self._fishers))

    def merge(
        self, start: Mapping[str, Tensor], experts: list[dict[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Weight by Fisher values; parameters that do not train have none and are averaged."""
        from stockpot.merging.rules import fisher, linear

        measured = set(self._fishers[0])
        weights = [{n: w for n, w in e.items() if n in measured} for e in experts]
        frozen = [{n: w for n, w in e.items() if n not in measured} for e in experts]
        merged = fisher(weights, self._fishers, floor=self.floor, normalize=self.normalize)
        return {**merged, **(linear(frozen) if frozen[0] else {})}
