"""The YAML, the loop over runs and tasks, the run folder, resume."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stockpot.experiment.config import Experiment, load_experiment

if TYPE_CHECKING:
    from stockpot.experiment.runner import Outcome, run_experiment

__all__ = ["Experiment", "Outcome", "load_experiment", "run_experiment"]


def __getattr__(name: str) -> Any:
    # The runner brings torch and transformers; checking an experiment needs neither.
    if name in ("Outcome", "run_experiment"):
        return getattr(importlib.import_module("stockpot.experiment.runner"), name)
    raise AttributeError(f"module 'stockpot.experiment' has no attribute {name!r}")
