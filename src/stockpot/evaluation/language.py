"""What a language model gives to texts: the held-out loss, and the likeliest of some choices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stockpot.errors import NonFiniteError
from stockpot.evaluation.score import Progress, Score, mean_score, silent
from stockpot.models.language import TextLearner
from stockpot.models.learner import Learner, evaluating, to_device
from stockpot.processes import ALONE, Processes
from stockpot.streams.data import TaskData
from stockpot.streams.text import Choices

__all__ = ["choices", "held_out_loss", "negative_log_likelihoods"]


@torch.inference_mode()
def negative_log_likelihoods(
    learner: Learner,
    data: TaskData,
    batch_size: int,
    device: torch.device | str,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> tuple[Tensor, Tensor]:
    """(N,) ``-sum log p`` of what is learned of every example, in nats, and how many tokens.

    Examples of similar length share a batch; the order of the result is the data's. Several
    processes share the batches; all get the result.
    """
    total = torch.zeros(len(data), dtype=torch.float64)
    count = torch.zeros(len(data), dtype=torch.float64)
    done = 0
    lengths = data.lengths()
    order = torch.arange(len(data)) if lengths is None else lengths.argsort(descending=True)
    size = processes.share_size(len(data), batch_size)
    with evaluating(learner.module):
        for rows in processes.mine(order.split(size)):
            batch = to_device(data.__getitems__(rows), device)
            predictions = learner.predictions(batch)
            losses, owner = predictions.losses().double().cpu(), rows[predictions.example.cpu()]
            total.index_add_(0, owner, losses)
            count.index_add_(0, owner, torch.ones_like(losses))
            done += len(rows)
            progress(min(len(data), done * processes.world), len(data))
    processes.sum_(total)
    processes.sum_(count)
    if not bool(total.isfinite().all()):
        raise NonFiniteError(
            "the model gives likelihoods that are not finite and cannot be scored; its weights are "
            "finite, so it overflows: look at its precision"
        )
    return total, count


def held_out_loss(
    learner: Learner,
    data: TaskData,
    batch_size: int,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> Score:
    """Mean cross-entropy per learned token, in nats: ``sum_n L_n / sum_n T_n``.

    Its standard error is that of a ratio of means (by linearisation):
    ``sqrt(n / (n - 1) sum_n (L_n - value T_n)^2) / sum_n T_n``. The items are ``L_n / T_n``.
    """
    losses, tokens = negative_log_likelihoods(
        learner, data, batch_size, device, progress, processes
    )
    value = float(losses.sum() / tokens.sum())
    n = len(losses)
    spread = float((losses - value * tokens).square().sum())
    stderr = math.sqrt(spread * n / max(1, n - 1)) / float(tokens.sum())
    items = (losses / tokens).float()
    return Score(value, n, stderr, "loss", "test", better="lower", items=items)


def choices(
    learner: TextLearner,
    name: str,
    benchmark: Choices,
    batch_size: int,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> list[Score]:
    """Share of questions whose right answer is the likeliest, by the sum of its log p.

    The second score divides each choice's log p by its length in characters before it compares
    (lm-evaluation-harness: ``acc`` and ``acc_norm``, where lengths are characters too). The first
    choice wins a tie.
    """
    questions = benchmark.questions
    data = learner.form.choices(questions)
    losses, _ = negative_log_likelihoods(learner, data, batch_size, device, progress, processes)
    right, normalised = [], []
    place = 0
    for question in questions:
        own = -losses[place : place + len(question.choices)]
        place += len(question.choices)
        characters = torch.tensor([max(1, len(choice)) for choice in question.choices])
        right.append(int(own.argmax()) == question.answer)
        normalised.append(int((own / characters).argmax()) == question.answer)
    return [
        mean_score(torch.tensor(right).float(), "accuracy", name),
        mean_score(torch.tensor(normalised).float(), "accuracy_norm", name, headline=False),
    ]
