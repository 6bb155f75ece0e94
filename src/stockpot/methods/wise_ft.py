"""WiSE-FT: one average with the previous task's model, at the end of each task."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from stockpot.methods.base import Method, Stored, TaskRun, anchor_bytes, size_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WiseFT"]


class WiseFT(Method):
    """At the end of a task: theta <- beta * theta_o + (1 - beta) * theta. SFA with p = 1.

    The task itself is plain fine-tuning, so that all beta share its training.
    """

    name: ClassVar[str] = "wise-ft"
    reference: ClassVar[str] = "Wortsman et al. 2022, arXiv 2109.01903"
    curve: ClassVar[str | None] = "beta"
    headline: ClassVar[tuple[str, ...]] = ("beta",)

    beta: float = Field(
        0.5, ge=0, le=1, description="share of the previous task's model in the average"
    )

    def end_task(self, run: TaskRun) -> None:
        """Average with the previous task's model; the first task has none to average with."""
        from stockpot.arithmetic import l2_distance
        from stockpot.averaging import average_
        from stockpot.averaging.weights import trainable_weights

        if not run.stage:
            return
        begin = time.perf_counter()
        whole = run.weights() if run.learner.adapted else {}
        weights: dict[str, Tensor] = {**trainable_weights(run.model)}
        if run.learner.adapted:  # what is averaged is the model that base and adapters make
            weights = {name: whole[name] for name in sorted(run.learner.parameter_names())}
        anchor = {name: run.previous[name].to(weights[name].device) for name in weights}
        before = l2_distance(weights.values(), anchor.values())
        average_(weights if run.learner.adapted else run.model, anchor, self.beta)
        if run.learner.adapted:
            run.load(whole)
        run.merges.append(
            {
                "step": run.total_steps,
                "beta": self.beta,
                "distance_before": before,
                "distance_after": l2_distance(weights.values(), anchor.values()),
                "seconds": time.perf_counter() - begin,
            }
        )

    def stored(self, run: TaskRun) -> Stored:
        """theta_o; of adapters whole, for the whole model is averaged."""
        if not run.learner.adapted:
            return Stored(weights=anchor_bytes(run))
        names = run.learner.parameter_names()
        return Stored(weights=size_of(run.previous[name] for name in names))

    def training_identity(self, stage: int) -> dict[str, Any]:
        """Plain fine-tuning."""
        return {}

    def deploy_identity(self, stage: int) -> dict[str, Any]:
        """The average is taken after training."""
        return {"method": self.name, **self.settings()} if stage else {}
