"""Accuracy on held-out images."""

from __future__ import annotations

import torch

from stockpot.errors import NonFiniteError
from stockpot.evaluation.score import Progress, Score, mean_score, silent
from stockpot.models.learner import ImageLearner, evaluating, to_device
from stockpot.processes import ALONE, Processes
from stockpot.streams.data import TaskData

__all__ = ["accuracy"]


@torch.inference_mode()
def accuracy(
    learner: ImageLearner,
    data: TaskData,
    batch_size: int,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> Score:
    """Share of ``data`` whose label has the largest logit, in eval mode.

    The first label wins a tie. In the task-incremental scenario only the task's own labels compete.
    Several processes share the batches; all get the score.
    """
    correct = torch.zeros(len(data))
    done = 0
    size = processes.share_size(len(data), batch_size)
    with evaluating(learner.module):
        for rows in processes.mine(torch.arange(len(data)).split(size)):
            batch = to_device(data.__getitems__(rows), device)
            logits = learner.logits(batch["pixel_values"], batch["allowed"])
            right = (logits.argmax(dim=-1) == batch["labels"]).float()
            if bool(logits.isnan().any()):
                right[:] = torch.nan
            correct[rows] = right.cpu()
            done += len(rows)
            progress(min(len(data), done * processes.world), len(data))
    if bool(processes.sum_(correct).isnan().any()):
        raise NonFiniteError(
            "the model gives logits that are not a number and cannot be scored. Its weights are "
            "finite, so look at its normalisation statistics"
        )
    return mean_score(correct, "accuracy", "test")
