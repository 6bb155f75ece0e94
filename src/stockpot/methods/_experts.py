"""What the merging baselines share: an expert per task, trained from theta_0, merged at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stockpot.methods.base import Method, Stored, TaskRun, size_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Experts"]


class Experts(Method):
    """Train each task from the starting model; deploy the merge of all experts so far.

    All experts are kept, so that storage and the time of a merge grow with the number of tasks.
    """

    starts_from: ClassVar[Literal["previous", "start"]] = "start"

    def end_task(self, run: TaskRun) -> None:
        """Keep this task's expert and deploy the merge."""
        expert = run.weights()
        experts = [*run.memory.load_all("expert"), expert]
        if not run.last:
            run.memory.save("expert", expert)
        run.load(self._merge_all(run, experts))

    def _merge_all(self, run: TaskRun, experts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Parameters by the merge rule; buffers, which no task vector may add to, by their mean.

        Integer buffers such as counters are those of the last expert.
        """
        from stockpot.merging.rules import linear

        trained = run.learner.parameter_names()
        weights = [{n: w for n, w in expert.items() if n in trained} for expert in experts]
        buffers = [{n: w for n, w in expert.items() if n not in trained} for expert in experts]
        start = {name: weight for name, weight in run.start.items() if name in trained}
        averaged = linear(buffers) if buffers[0] else {}
        return {**self.merge(start, weights), **averaged}

    def merge(
        self, start: Mapping[str, Tensor], experts: list[dict[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """The merge rule, on parameters."""
        raise NotImplementedError(f"{type(self).__name__}.merge")

    def stored(self, run: TaskRun) -> Stored:
        """theta_0 and the experts of all tasks so far, each as large."""
        return Stored(weights=(1 + run.stage + 1) * size_of(run.start.values()))

    def training_identity(self, stage: int) -> dict[str, Any]:
        """Plain fine-tuning, from theta_0."""
        return {}

    def deploy_identity(self, stage: int) -> dict[str, Any]:
        """The merge rule and its settings."""
        return {"method": self.name, **self.settings()}
