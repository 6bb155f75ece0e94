"""Whether an average stayed written: looked at once it is written, and after the next step."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from stockpot.averaging.weights import Piece, Weights
from stockpot.averaging.weights.masters import unwrap_optimizer
from stockpot.errors import StockpotError

__all__ = ["Watch"]

_ELEMENTS = 4096
_log = logging.getLogger("stockpot")


class Watch:
    """A sample of one tensor, seen before and after an average and after the next step.

    A write to a copy of the weights looks right until the optimizer steps its own. What tells them
    apart: the sample is then back where it was before the average, and the average had moved it by
    much more than a step does. A model that is pulled back that far by one honest step looks the
    same, so this is an error only where no step can be that long (Adam and its kin, whose steps
    are bounded by the learning rate), and a warning elsewhere.
    """

    def __init__(self, weights: Weights, pieces: Mapping[str, Piece]) -> None:
        self.weights = weights
        largest = max(pieces.values(), key=lambda piece: piece.values.numel(), default=None)
        self.name = None if largest is None else largest.name
        self._last: Tensor | None = None
        self._before: Tensor | None = None
        self._written: Tensor | None = None
        self._step_length = 0.0
        self._at = 0

    def _sample(self, values: Tensor) -> Tensor:
        flat = values.detach().reshape(-1)
        every = max(1, flat.numel() // _ELEMENTS)
        return flat[::every][:_ELEMENTS].to("cpu", torch.float32, copy=True)

    def look(self, pieces: Mapping[str, Piece] | None = None) -> None:
        """Remember the weights of a step that is followed by a merge step."""
        if self.name is not None:
            piece = (pieces or self.weights.pieces())[self.name]
            self._last = self._sample(piece.values)

    def before(self, pieces: Mapping[str, Piece]) -> None:
        """Remember the weights just before an average."""
        if self.name is None:
            return
        self._before = self._sample(pieces[self.name].values)
        moved = self._before - self._last if self._last is not None else None
        self._step_length = float("inf") if moved is None else float(moved.norm())

    def after(self, pieces: Mapping[str, Piece], step: int) -> None:
        """Check that the forward pass reads what was just written.

        Raises:
            StockpotError: if it does not.
        """
        if self.name is None:
            return
        piece = pieces[self.name]
        self._written, self._at = self._sample(piece.values), step
        live = self.weights.live(piece)
        if not torch.equal(self._sample(piece.values.to(live.dtype)), self._sample(live)):
            raise StockpotError(
                f"the average of {self.name!r} at step {step} did not reach the weights that the "
                f"model computes with ({self.weights.kind} parameters). Please report this with "
                "your trainer and its version; the model's last checkpoint is good."
            )

    @property
    def waiting(self) -> bool:
        """Whether the step after an average has still to be looked at."""
        return self._written is not None

    def next_step(self) -> None:
        """After the step that follows an average: check that it was not undone.

        Raises:
            StockpotError: if the weights are back where they were before the average.
        """
        written, before, self._written = self._written, self._before, None
        if self.name is None or written is None or before is None:
            return
        now = self._sample(self.weights.pieces()[self.name].values)
        gap = float((before - written).norm())
        if not (gap > 10 * self._step_length and float((now - before).norm()) <= 0.2 * gap):
            return
        message = (
            f"the average written at step {self._at} was undone by the next optimizer step "
            f"({self.name!r} is back where it was)"
        )
        largest = float((now - written).abs().max())
        if largest <= _longest_step(self.weights.optimizer):
            _log.warning("%s, or training pulled it back that fast", message)
            return
        raise StockpotError(
            f"{message}: the optimizer or a wrapper keeps its own copy of the weights. Give "
            "attach() the optimizer that steps them, or train without master copies."
        )


def _longest_step(optimizer: object | None) -> float:
    """More than any element can move in one step; infinite where nothing bounds it."""
    groups = getattr(unwrap_optimizer(optimizer), "param_groups", None) or [{}]
    if not all("betas" in group and "lr" in group for group in groups):
        return float("inf")
    return 20 * max(float(group["lr"]) for group in groups)
