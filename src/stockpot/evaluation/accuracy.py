"""Accuracy on held-out images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stockpot.errors import NonFiniteError
from stockpot.models.learner import Learner, evaluating
from stockpot.streams.data import TaskData

__all__ = ["Score", "accuracy"]


@dataclass(frozen=True)
class Score:
    """A metric's value with what it rests on."""

    value: float
    n: int
    """How many examples were scored."""
    stderr: float
    """Standard error of the value; for a share of n, sqrt(value * (1 - value) / n)."""
    metric: str = "accuracy"


@torch.inference_mode()
def accuracy(
    learner: Learner, data: TaskData, batch_size: int, device: torch.device | str = "cpu"
) -> Score:
    """Share of ``data`` whose label has the largest logit, in eval mode.

    The first label wins a tie. In the task-incremental scenario only the task's own labels compete.
    """
    correct = 0
    with evaluating(learner.module):
        for rows in torch.arange(len(data)).split(batch_size):
            batch = data.__getitems__(rows)
            allowed = None if batch["allowed"] is None else batch["allowed"].to(device)
            logits = learner.logits(batch["pixel_values"].to(device), allowed)
            if bool(logits.isnan().any()):
                raise NonFiniteError(
                    "the model gives logits that are not a number and cannot be scored. Its "
                    "weights are finite, so look at its normalisation statistics"
                )
            correct += int((logits.argmax(dim=-1) == batch["labels"].to(device)).sum())
    value = correct / len(data)
    return Score(value, len(data), (value * (1 - value) / len(data)) ** 0.5)
