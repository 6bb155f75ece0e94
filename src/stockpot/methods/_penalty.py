"""What L1, L2 and EWC share: a penalty on the distance to earlier weights, added at every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PrivateAttr

from stockpot.methods.base import Method, Parts, Stored, TaskRun, anchor_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from stockpot.averaging.weights import Piece

__all__ = ["Penalty", "Term", "inner", "make_terms", "part_of"]


class Penalty(Method):
    """Loss + strength * penalty(theta - theta_o), where theta_o is the previous task's model.

    The penalty's gradient is written down, not found by autograd: a few operations per tensor and
    step, in memory that is used again at every step. It needs theta_o and room for two tensors.
    """

    needs_weights: ClassVar[bool] = True
    curve: ClassVar[str | None] = "strength"
    headline: ClassVar[tuple[str, ...]] = ("strength",)

    strength: float = Field(
        1.0,
        ge=0,
        le=1e38,
        allow_inf_nan=False,
        description="weight of the penalty in the loss (lambda)",
    )

    _terms: list[Term] = PrivateAttr(default_factory=list)
    """One per trainable tensor; empty on the first task, which has nothing to pull towards."""

    def start_task(self, run: TaskRun) -> None:
        """Go on from the previous task's weights and pull towards them."""
        from stockpot.averaging.weights import trainable_weights

        super().start_task(run)
        pulls = run.stage and not run.in_parts
        self._terms = make_terms(trainable_weights(run.model)) if pulls else []

    def take_parts(self, run: TaskRun, parts: Parts) -> None:
        """The penalty's sums go over parts: each process pulls on its own."""
        if not run.stage:
            return
        pieces = parts.pieces()
        anchors = {n: part_of(run.previous[n], piece) for n, piece in pieces.items()}
        weights = {name: _PartOfWeight(parts, piece) for name, piece in pieces.items()}
        values = {name: piece.values for name, piece in pieces.items()}
        self._terms = _terms(weights, values, anchors)

    def stored(self, run: TaskRun) -> Stored:
        """theta_o."""
        return Stored(weights=anchor_bytes(run))


@dataclass(slots=True)
class Term:
    """One tensor's part of a penalty. Tensors of one size and kind share their working memory."""

    name: str
    weight: Any
    """The parameter, or what has its ``grad``, whose gradient the penalty adds to."""
    theta: Any
    """The same memory, outside autograd."""
    anchor: Any
    """theta_o, in the precision to compute in."""
    difference: Any
    """theta - theta_o, written anew by ``subtract``."""
    pull: Any
    """Room for the penalty's gradient."""

    def subtract(self) -> Tensor:
        """Work out ``theta - theta_o``."""
        import torch

        result: Tensor = torch.sub(self.theta, self.anchor, out=self.difference)
        return result

    def add_to_gradient(self, pull: Tensor, factor: float) -> None:
        """``gradient += factor * pull``; a weight that the loss did not reach gets a gradient."""
        if self.weight.grad is None:
            self.weight.grad = self.theta.new_zeros(self.theta.shape)
        self.weight.grad.add_(pull, alpha=factor)


def make_terms(weights: Mapping[str, Any]) -> list[Term]:
    """Terms that pull towards the weights as they are now.

    Working memory is taken once, of the largest tensor's size: fresh blocks at every step cost page
    faults.
    """
    from stockpot.arithmetic import wide

    anchors = {name: wide(w.detach()).clone().contiguous() for name, w in weights.items()}
    return _terms(weights, {name: w.detach() for name, w in weights.items()}, anchors)


def part_of(whole: Tensor, piece: Piece) -> Tensor:
    """A copy of what a process has of a tensor as it has of a weight, beside that."""
    from stockpot.arithmetic import wide
    from stockpot.averaging.anchor import Anchor

    part = Anchor({piece.name: whole}).part(piece)
    return wide(part.to(piece.values.device)).clone().contiguous()


class _PartOfWeight:
    """Has the gradient of a part where a parameter has its own."""

    def __init__(self, parts: Parts, piece: Piece) -> None:
        self._parts, self._piece = parts, piece

    @property
    def grad(self) -> Tensor:
        return self._parts.gradient(self._piece)


def _terms(
    weights: Mapping[str, Any], values: Mapping[str, Any], anchors: Mapping[str, Any]
) -> list[Term]:
    import torch

    largest: dict[Any, int] = {}
    for anchor in anchors.values():
        kind = (anchor.dtype, anchor.device)
        largest[kind] = max(largest.get(kind, 0), anchor.numel())
    room = {
        kind: torch.empty(2, size, dtype=kind[0], device=kind[1]) for kind, size in largest.items()
    }
    terms = []
    for name, weight in weights.items():
        anchor = anchors[name]
        first, second = room[anchor.dtype, anchor.device][:, : anchor.numel()]
        views = first.view(anchor.shape), second.view(anchor.shape)
        terms.append(Term(name, weight, values[name], anchor, *views))
    return terms


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Sum of the products of two tensors of one shape."""
    return left.view(-1).dot(right.view(-1))
