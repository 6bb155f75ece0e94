"""How two sets of weights become one: per tensor, in place."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from stockpot.arithmetic import is_finite, lerp
from stockpot.averaging.weights import trainable_weights
from stockpot.errors import NonFiniteError, StockpotError

__all__ = ["average_", "check_beta", "check_shape"]


def check_beta(beta: float) -> float:
    """Return ``beta`` if it is a usable share of the anchor.

    Raises:
        ValueError: if ``beta`` is not in [0, 1].
    """
    if not (isinstance(beta, Real) and 0.0 <= beta <= 1.0):
        raise ValueError(
            f"beta = {beta!r} is not in [0, 1]: beta is the anchor's share in each average "
            "(0 keeps the model as it is, 1 puts the anchor back)"
        )
    return float(beta)


@torch.no_grad()
def average_(
    model: nn.Module | Mapping[str, Tensor], anchor: Mapping[str, Tensor], beta: float
) -> list[str]:
    """``theta <- beta * theta_o + (1 - beta) * theta`` in place (arXiv 2501.05559, Algorithm 1).

    Computed in float32 (float64 for float64 weights) and rounded once to the weight's dtype. beta 0
    and beta 1 are exact.

    Args:
        model: the model (its trainable floating-point parameters are averaged), or named weights.
        anchor: theta_o, by the same names.
        beta: the anchor's share, in [0, 1].

    Returns:
        The names that the anchor lacks, and those of integers; these weights are left alone.

    Raises:
        ValueError: if ``beta`` is not in [0, 1].
        StockpotError: if a shape differs between the model and the anchor.
        NonFiniteError: if an average would not be finite; nothing has been written then.
    """
    beta = check_beta(beta)
    weights = trainable_weights(model) if isinstance(model, nn.Module) else model
    shared = [
        name for name, weight in weights.items() if name in anchor and weight.is_floating_point()
    ]
    averages = {name: _average(name, weights[name], anchor[name], beta) for name in shared}
    for name, average in averages.items():
        weights[name].copy_(average)
    return [name for name in weights if name not in averages]


def check_shape(name: str, weight: Tensor, anchor: Tensor) -> None:
    """Refuse an anchor of another model.

    Raises:
        StockpotError: if the shapes differ.
    """
    if weight.shape != anchor.shape:
        raise StockpotError(
            f"weight {name!r} has shape {tuple(weight.shape)} in the model and "
            f"{tuple(anchor.shape)} in the anchor: the anchor belongs to another model"
        )


def _average(name: str, weight: Tensor, anchor: Tensor, beta: float) -> Tensor:
    check_shape(name, weight, anchor)
    average = lerp(weight, anchor.to(weight.device), beta)
    if not is_finite(average):
        raise NonFiniteError(
            f"averaging {name!r} gives values that are not finite: the model or the anchor has "
            "diverged. No weight was changed; lower the learning rate or go back to a checkpoint."
        )
    return average
