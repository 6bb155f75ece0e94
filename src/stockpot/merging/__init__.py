"""Combining finished models.

Rules are pure functions from named tensors to named tensors (a state dict, or the tensors of a
safetensors file); what they are given is never modified. `merge` applies the same formulas to
checkpoints on disk, of any size. Importing this package loads no torch: names are found when they
are asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stockpot.merging.on_disk import MergeResult, merge
    from stockpot.merging.rules import (
        Weights,
        breadcrumbs,
        dare,
        fisher,
        linear,
        lines,
        magmax,
        model_stock,
        slerp,
        task_arithmetic,
        ties,
        wise_ft,
    )

__all__ = [
    "MergeResult",
    "Weights",
    "breadcrumbs",
    "dare",
    "fisher",
    "linear",
    "lines",
    "magmax",
    "merge",
    "model_stock",
    "slerp",
    "task_arithmetic",
    "ties",
    "wise_ft",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "on_disk" if name in ("merge", "MergeResult") else "rules"
    return getattr(import_module(f"stockpot.merging.{home}"), name)
