"""Fine-tune a model on one task after another without it forgetting the earlier ones.

Public names are loaded on first use, so that ``import stockpot`` costs no torch and no
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stockpot.averaging import SFA, Anchor, average_, merge_steps
    from stockpot.experiment import load_experiment, run_experiment

_HOMES = {
    "SFA": "stockpot.averaging",
    "Anchor": "stockpot.averaging",
    "average_": "stockpot.averaging",
    "merge_steps": "stockpot.averaging",
    "load_experiment": "stockpot.experiment",
    "run_experiment": "stockpot.experiment",
}

__all__ = [
    "SFA",
    "Anchor",
    "__version__",
    "average_",
    "load_experiment",
    "merge_steps",
    "run_experiment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stockpot' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
