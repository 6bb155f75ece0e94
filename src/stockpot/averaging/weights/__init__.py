"""Where a model's true weights live, and how to write them so that they stay written.

One writer a file, chosen by looking at the parameters and the optimizer. A write to a parameter
whose truth lives elsewhere looks right in memory and is undone by the next optimizer step.
"""

from __future__ import annotations

from torch import nn

from stockpot.averaging.weights.names import named_trainable, trainable_weights, unwrap
from stockpot.averaging.weights.plain import Box, Piece, Region, Span, Weights

__all__ = [
    "Box",
    "Piece",
    "Region",
    "Span",
    "Weights",
    "find_weights",
    "trainable_weights",
    "unwrap",
]


def find_weights(model: nn.Module, optimizer: object | None = None) -> Weights:
    """The writer for this model, trained by this optimizer.

    Args:
        model: as it trains, wrapped or not.
        optimizer: what steps it. Without it, master copies that only the optimizer knows of cannot
            be found (DeepSpeed needs it).

    Raises:
        StockpotError: if the true weights are somewhere that no writer knows, with the reason.
    """
    from stockpot.averaging.weights import fsdp, masters, zero

    optimizer = optimizer if optimizer is not None else getattr(model, "optimizer", None)
    masters.refuse_unsupported(model, optimizer)
    parameters = named_trainable(model)
    if zero.recognises(parameters, optimizer):
        return zero.find(model, optimizer)
    if fsdp.recognises(model):
        return fsdp.find(model, optimizer)
    return masters.find(model, optimizer)
