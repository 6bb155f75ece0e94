"""The loss along the straight line between two sets of weights: the anchor and what is deployed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stockpot.errors import NonFiniteError
from stockpot.processes import ALONE, Processes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stockpot.evaluation.score import Progress, Score
    from stockpot.models.learner import ImageLearner, Learner
    from stockpot.streams.data import TaskData

__all__ = ["LinePoint", "barrier", "interpolate", "scores_along_line", "spread"]


@dataclass(frozen=True)
class LinePoint:
    """One score of one task at one place of the line, as a line of ``lines.jsonl`` has it."""

    alpha: float
    """0 is the anchor, 1 the deployed weights."""
    task: str
    metric: str
    value: float | None
    """None where it is not finite: the model overflows there."""
    n: int
    stderr: float | None
    better: str


def interpolate(
    anchor: Mapping[str, Tensor], deployed: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """``(1 - alpha) * anchor + alpha * deployed``, in float32, rounded once to the weights' type.

    The ends are the weights themselves, bit for bit. Every floating-point tensor is interpolated,
    BatchNorm's running statistics too: between two networks they are not those that the data would
    give, so that a barrier may be theirs (Jordan et al. 2022, arXiv 2211.08403). Other tensors,
    such as counters, are the deployed ones.
    """
    from stockpot.arithmetic import lerp

    return {
        name: lerp(anchor[name], weight, alpha) if weight.is_floating_point() else weight
        for name, weight in deployed.items()
    }


def spread(data: TaskData, limit: int | None) -> TaskData:
    """At most ``limit`` examples, evenly spread: data sets are often sorted by label."""
    import torch

    if limit is None or limit >= len(data):
        return data
    return data.subset(torch.arange(limit) * len(data) // limit)


def scores_along_line(
    anchor: Mapping[str, Tensor],
    deployed: Mapping[str, Tensor],
    learner: Learner,
    tasks: Mapping[str, TaskData],
    points: int,
    batch_size: int,
    device: torch.device | str,
    *,
    bfloat16: bool = False,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> list[LinePoint]:
    """Score every task at ``points`` places ``alpha = 0, 1/(points-1), ..., 1``.

    The scores are the held-out loss (cross-entropy in nats: its mean over the images, or over all
    learned tokens) and, for images, the accuracy. The model holds ``deployed`` afterwards.

    Args:
        anchor: the weights at alpha = 0.
        deployed: the weights at alpha = 1.
        learner: the model; its weights are overwritten meanwhile.
        tasks: held-out examples, by task.
        points: how many places, both ends included.
        batch_size: examples at a time.
        device: where the model is.
        bfloat16: whether to score by autocast.
        progress: called with how many of the evaluations are done, and of how many.
        processes: share the batches; all get the points.
    """
    import torch

    found = []
    done, total = 0, points * len(tasks)
    for place in range(points):
        alpha = place / (points - 1)
        learner.load(interpolate(anchor, deployed, alpha))
        for task, data in tasks.items():
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16):
                scores = _scores(learner, data, batch_size, device, processes)
            found += [_point(alpha, task, score) for score in scores]
            done += 1
            if progress is not None:
                progress(done, total)
    return found  # at the last place, alpha = 1, the model was given the deployed weights


def _point(alpha: float, task: str, score: Score) -> LinePoint:
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    value, stderr = finite(score.value), finite(score.stderr)
    return LinePoint(alpha, task, score.metric, value, score.n, stderr, score.better)


def _scores(
    learner: Learner,
    data: TaskData,
    batch_size: int,
    device: torch.device | str,
    processes: Processes,
) -> list[Score]:
    from stockpot.evaluation.language import held_out_loss
    from stockpot.evaluation.score import Score
    from stockpot.models.learner import ImageLearner

    if isinstance(learner, ImageLearner):
        return _image_scores(learner, data, batch_size, device, processes)
    try:
        return [held_out_loss(learner, data, batch_size, device, processes=processes)]
    except NonFiniteError:
        return [Score(math.nan, len(data), math.nan, "loss", better="lower")]


def _image_scores(
    learner: ImageLearner,
    data: TaskData,
    batch_size: int,
    device: torch.device | str,
    processes: Processes,
) -> list[Score]:
    """Loss and accuracy from one pass."""
    import torch

    from stockpot.evaluation.score import mean_score
    from stockpot.models.learner import evaluating, to_device

    losses, right = torch.zeros(len(data)), torch.zeros(len(data))
    size = processes.share_size(len(data), batch_size)
    with torch.inference_mode(), evaluating(learner.module):
        for rows in processes.mine(torch.arange(len(data)).split(size)):
            predictions = learner.predictions(to_device(data.__getitems__(rows), device))
            loss = predictions.losses()
            losses[rows] = loss.cpu()
            # NaN is no answer, though argmax finds it.
            found = (predictions.logits.argmax(dim=-1) == predictions.targets) & loss.isfinite()
            right[rows] = found.float().cpu()
    processes.sum_(losses)
    processes.sum_(right)
    return [
        mean_score(losses, "loss", "test", better="lower"),
        mean_score(right, "accuracy", "test"),
    ]


def barrier(alphas: Sequence[float], losses: Sequence[float]) -> float:
    """Height of the loss barrier on the line: ``max_a L(a) - ((1 - a) L(0) + a L(1))``, in nats.

    It is 0 where the loss is nowhere above the straight line between its ends: then both are
    linearly mode connected. Frankle et al. (2020, arXiv 1912.05671) subtract the mean of both ends;
    where these differ, as they do after another task, that would count a loss that merely falls
    along the way, so this is the form of Entezari et al. (2022, arXiv 2110.06296).

    Args:
        alphas: the places, ascending from 0 to 1.
        losses: the loss at each of them, finite.

    Raises:
        ValueError: if the places are no line from 0 to 1, or a loss is missing or not finite.
    """
    ascending = all(a < b for a, b in itertools.pairwise(alphas))
    if len(alphas) < 2 or alphas[0] != 0 or alphas[-1] != 1 or not ascending:
        raise ValueError(f"alphas = {list(alphas)} do not ascend from 0 to 1")
    if len(losses) != len(alphas) or not all(map(math.isfinite, losses)):
        raise ValueError(f"{len(alphas)} finite losses are needed; got {list(losses)}")
    first, last = losses[0], losses[-1]
    return max(
        loss - ((1 - alpha) * first + alpha * last)
        for alpha, loss in zip(alphas, losses, strict=True)
    )
