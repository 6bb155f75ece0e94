"""What an average does to the optimizer's state: kept, scaled or reset."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from stockpot.averaging.weights import Piece, Weights
from stockpot.averaging.weights.masters import unwrap_optimizer
from stockpot.errors import StockpotError

__all__ = ["OptimizerState", "check_optimizer_state", "update_moments"]

OptimizerState = Literal["keep", "scale", "reset"]

# First moments by the names that torch's and the common third-party optimizers give them.
_FIRST = ("exp_avg", "momentum_buffer", "mu")


def check_optimizer_state(value: str) -> None:
    """Refuse an unknown policy."""
    valid = typing.get_args(OptimizerState)
    if value not in valid:
        raise ValueError(f"optimizer_state = {value!r} is not one of {', '.join(valid)}")


@torch.no_grad()
def update_moments(
    weights: Weights, pieces: Mapping[str, Piece], policy: OptimizerState, beta: float
) -> None:
    """Treat the state of what was averaged.

    ``scale`` multiplies first moments by ``1 - beta``, as if the anchor had been reached with no
    momentum; ``reset`` forgets all state of these parameters, step counts included.

    Raises:
        StockpotError: if ``scale`` finds state without a first moment.
    """
    factor = 0.0 if policy == "reset" else 1.0 - beta
    if policy == "keep" or weights.reset_moments(pieces, factor):
        return
    keys = {id(piece.key) for piece in pieces.values() if piece.key is not None}
    for optimizer in _optimizers(weights.optimizer):
        for parameter in [p for p in optimizer.state if id(p) in keys]:
            state = optimizer.state[parameter]
            if policy == "reset":
                state.clear()
                continue
            first = [state[key] for key in _FIRST if isinstance(state.get(key), Tensor)]
            if state and not first:
                raise StockpotError(
                    f"optimizer_state='scale': {type(optimizer).__name__} has no first moment "
                    f"(its state is {', '.join(map(str, state))}); use 'keep' or 'reset'"
                )
            for moment in first:
                moment.mul_(factor)


def _optimizers(optimizer: object | None) -> Iterator[Any]:
    several = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    for one in several:
        if isinstance(inner := unwrap_optimizer(one), torch.optim.Optimizer):
            yield inner
