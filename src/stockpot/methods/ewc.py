"""Elastic weight consolidation: an L2 penalty weighted by what each weight matters to old tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from stockpot.methods._penalty import Penalty, inner, part_of
from stockpot.methods.base import Parts, Stored, TaskRun

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EWC", "consolidate"]


class EWC(Penalty):
    """Loss + strength / 2 * sum_k sum_j F_k[j] (theta[j] - theta_k[j])^2 over all past tasks k.

    F_k is the diagonal Fisher information of task k at theta_k, the weights deployed after it: the
    mean over examples of squared *per-example* gradients (not the square of a batch's gradient). On
    a class-incremental stream with one head EWC forgets almost everything: that is the method, not
    a mistake of yours.
    """

    name: ClassVar[str] = "ewc"
    reference: ClassVar[str] = "Kirkpatrick et al. 2017, arXiv 1612.00796"

    labels: Literal["sampled", "true", "exact"] = Field(
        "sampled",
        description="labels the gradients are taken for: sampled from the model, the data's true "
        "ones, or the exact expectation over the model's distribution (one pass a label)",
    )
    samples: int | None = Field(
        2000, ge=1, description="examples of the finished task for its Fisher values; null: all"
    )

    _precision: list[Any] = PrivateAttr(default_factory=list)
    """strength * F, summed over the past tasks, one per term."""
    _offset: Any = PrivateAttr(0.0)

    def start_task(self, run: TaskRun) -> None:
        """Load the sum of all past tasks' penalties, itself one quadratic form."""
        super().start_task(run)
        self._precision = []
        if not run.in_parts:
            self._take(run.memory.load("ewc"), lambda name, whole: whole)

    def take_parts(self, run: TaskRun, parts: Parts) -> None:
        """The penalty's sum goes over parts; what it is at least belongs to one process."""
        super().take_parts(run, parts)
        pieces = parts.pieces()
        self._take(run.memory.load("ewc"), lambda name, whole: part_of(whole, pieces[name]))
        self._offset = self._offset if run.processes.main else 0.0

    def _take(
        self, past: Mapping[str, Tensor] | None, cut: Callable[[str, Tensor], Tensor]
    ) -> None:
        """Pull towards the past tasks' centre: with each weight, or each part ``cut`` from it."""
        if past is None:
            return
        for term in self._terms:
            term.anchor.copy_(cut(term.name, past[f"centre.{term.name}"]))
            precision = cut(term.name, past[f"precision.{term.name}"]).to(term.anchor)
            self._precision.append(self.strength * precision)
        self._offset = (self.strength * past["offset"]).to(self._terms[0].anchor)

    def before_step(self, run: TaskRun) -> Tensor | None:
        """Add ``strength * F * (theta - centre)`` to the gradient."""
        import torch

        energy = self._offset
        for term, precision in zip(self._terms, self._precision, strict=False):
            difference = term.subtract()
            pull = torch.mul(precision, difference, out=term.pull)
            term.add_to_gradient(pull, run.loss_scale)
            energy = energy + inner(pull, difference)
        return energy / 2 if self._precision else None

    def end_task(self, run: TaskRun) -> None:
        """Add this task's Fisher values and weights to the penalty of the tasks to come."""
        from stockpot.averaging.weights import trainable_weights
        from stockpot.methods.fisher_information import fisher_diagonal

        if run.last:
            return  # no task will ask for them
        fisher = fisher_diagonal(
            run.learner,
            self.training_data(run),
            self.samples,
            self.labels,
            run.seed,
            passes=run.passes,
            processes=run.processes,
        )
        weights = {n: p.detach() for n, p in trainable_weights(run.model).items()}
        run.memory.save("ewc", consolidate(run.memory.load("ewc"), fisher, weights))
        run.memory.drop_superseded("ewc")

    def stored(self, run: TaskRun) -> Stored:
        """One quadratic form, however many tasks: centre, precision (float32) and its offset."""
        from stockpot.averaging.weights import trainable_weights

        vector = 4 * sum(weight.numel() for weight in trainable_weights(run.model).values())
        return Stored(weights=vector, other=vector + 8)


def consolidate(
    kept: Mapping[str, Tensor] | None, fisher: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Add one task's ``F (theta - theta_k)^2`` to the sum of the earlier ones.

    A sum of quadratics is a quadratic, so all past tasks together cost what one costs, exactly::

        A (theta - c)^2 + F (theta - w)^2 = (A + F) (theta - c')^2 + A F / (A + F) (w - c)^2
        c' = c + F / (A + F) (w - c)

    Args:
        kept: what this function returned for the earlier tasks, or None.
        fisher: F, by parameter name.
        weights: w, the weights at which F was taken, by the same names.

    Returns:
        ``precision.<name>``, ``centre.<name>``, and the scalar ``offset`` (float64).
    """
    import torch

    result: dict[str, Tensor] = {}
    offset = torch.zeros((), dtype=torch.float64) if kept is None else kept["offset"].clone()
    for name, values in fisher.items():
        new = values.detach().cpu()
        here = weights[name].detach().cpu().to(new.dtype)
        if kept is None:
            result[f"precision.{name}"], result[f"centre.{name}"] = new, here.clone()
            continue
        old, centre = kept[f"precision.{name}"], kept[f"centre.{name}"]
        summed = old + new
        # Where both are 0 nothing pulls and the centre does not matter.
        share = torch.where(summed > 0, new / summed, torch.ones_like(summed))
        move = here - centre
        offset += (old * share * move.square()).sum(dtype=torch.float64)
        result[f"precision.{name}"] = summed
        result[f"centre.{name}"] = centre + share * move
    return {**result, "offset": offset}
