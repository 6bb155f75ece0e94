"""DeepSpeed: the true weights are flat partitions in the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stockpot.averaging.weights.plain import Weights
from stockpot.errors import StockpotError

__all__ = ["find", "recognises"]


def recognises(parameters: Mapping[str, nn.Parameter], optimizer: Any) -> bool:
    """Whether DeepSpeed keeps the true weights of these parameters."""
    return any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters.values())


def find(model: nn.Module, optimizer: Any) -> Weights:
    """The writer for a model that :func:`recognises` knows."""
    raise StockpotError("SFA cannot average under DeepSpeed ZeRO yet")
