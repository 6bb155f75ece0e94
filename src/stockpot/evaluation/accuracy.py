"""Accuracy on held-out images."""

from __future__ import annotations

import torch

from stockpot.errors import NonFiniteError
from stockpot.evaluation.score import Progress, Score, mean_score, silent
from stockpot.models.learner import ImageLearner, evaluating, to_device
from stockpot.streams.data import TaskData

__all__ = ["accuracy"]


@torch.inference_mode()
def accuracy(
    learner: ImageLearner,
    data: TaskData,
    batch_size: int,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Score:
    """Share of ``data`` whose label has the largest logit, in eval mode.

    The first label wins a tie. In the task-incremental scenario only the task's own labels compete.
    """
    correct = []
    done = 0
    with evaluating(learner.module):
        for rows in torch.arange(len(data)).split(batch_size):
            batch = to_device(data.__getitems__(rows), device)
            logits = learner.logits(batch["pixel_values"], batch["allowed"])
            if bool(logits.isnan().any()):
                raise NonFiniteError(
                    "the model gives logits that are not a number and cannot be scored. Its "
                    "weights are finite, so look at its normalisation statistics"
                )
            correct.append(logits.argmax(dim=-1) == batch["labels"])
            done += len(rows)
            progress(done, len(data))
    return mean_score(torch.cat(correct).float().cpu(), "accuracy", "test")
