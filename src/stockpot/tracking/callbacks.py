"""Merge events in the trackers of a user's own ``Trainer``: those that ``report_to`` names."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)
from transformers.trainer_callback import CallbackHandler

from stockpot.errors import first_line
from stockpot.tracking.names import STEP

__all__ = ["Reporters"]

_log = logging.getLogger("stockpot")


class Reporters:
    """The callbacks that report to trackers, of the ``Trainer`` that calls."""

    def __init__(self, callbacks: Sequence[TrainerCallback] = ()) -> None:
        self._callbacks = list(callbacks)

    @classmethod
    def of_caller(cls) -> Reporters:
        """To be made while a callback is called.

        A callback is told neither of the Trainer nor of its other callbacks, and these see a log
        before it does; so they are looked up among the callers. Where there is no Trainer, none
        is found and nothing is logged.
        """
        frame = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, CallbackHandler):
                return cls(caller.callbacks)
            frame = frame.f_back
        return cls()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log to the run that each tracker has open, under these very names.

        (Trainer's own logs would call them ``train/...``, but for MLflow.) A tracker that fails is
        said and left out.
        """
        for callback in list(self._callbacks):
            try:
                _log_to(callback, values, step)
            except Exception as error:
                self._callbacks.remove(callback)
                _log.warning(
                    "%s: merge events are not logged from here on (%s: %s)",
                    type(callback).__name__,
                    type(error).__name__,
                    first_line(error),
                )


def _log_to(callback: TrainerCallback, values: Mapping[str, float], step: int) -> None:
    run: Any
    if isinstance(callback, TensorBoardCallback):
        if callback.tb_writer is not None:
            for name, value in values.items():
                callback.tb_writer.add_scalar(name, value, step)
    elif isinstance(callback, WandbCallback):
        import wandb

        if (run := wandb.run) is not None:
            run.log({**values, STEP: step})
    elif isinstance(callback, MLflowCallback):
        import mlflow

        if mlflow.active_run() is not None:
            mlflow.log_metrics(dict(values), step=step)
    elif isinstance(callback, TrackioCallback):
        import trackio

        if (run := trackio.context_vars.current_run.get()) is not None:
            run.log({**values, STEP: step})
