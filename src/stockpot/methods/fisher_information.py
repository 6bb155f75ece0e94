"""Diagonal Fisher information: the mean of squared per-example gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from stockpot.averaging.weights import trainable_weights
from stockpot.errors import ConfigError
from stockpot.models.learner import ImageLearner, evaluating, to_device
from stockpot.processes import ALONE, Processes

if TYPE_CHECKING:
    from stockpot.models.learner import Learner
    from stockpot.streams.data import TaskData

__all__ = ["fisher_diagonal"]

# Per-example gradients of a chunk live at once; this bounds them to 16 MiB of float32 on a CPU,
# where larger blocks go back to the system each time and cost page faults, and to 256 MiB on a GPU.
_CHUNK_ELEMENTS = 4 * 2**20
_CHUNK_ELEMENTS_GPU = 64 * 2**20


def fisher_diagonal(
    learner: Learner,
    data: TaskData,
    samples: int | None,
    labels: Literal["sampled", "true", "exact"],
    seed: int,
    passes: Callable[[int], None] = lambda examples: None,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """``F[j] = 1/N sum_n (d log p(y_n | x_n) / d theta[j])^2``, per example (Martens 2014).

    The square is taken per example and then summed; the square of a batch's summed gradient, which
    many implementations use, is another quantity. The model is in eval mode and no statistic of it
    moves.

    Args:
        learner: the model at the weights to take the Fisher values at.
        data: the examples of the task.
        samples: how many of them to use, drawn without replacement; None: all.
        labels: ``"sampled"`` draws y from the model's own distribution, ``"true"`` takes the data's
            (the empirical Fisher), ``"exact"`` sums over all y, weighted by p(y | x).
        seed: of the draws.
        passes: called with how many examples have gone forward and backward, once for each label
            that a gradient was taken for.
        processes: share the examples, with the labels that one process would draw; all get the
            values.

    Returns:
        float32 values on the model's device, by the names of the trainable parameters.
    """
    with evaluating(learner.module):
        if isinstance(learner, ImageLearner):
            totals, count, used = _accumulate(learner, data, samples, labels, seed, processes)
        else:
            totals, count, used = _one_by_one(learner, data, samples, labels, seed, processes)
    passes(sum(processes.gather(used)))
    return {name: processes.sum_(total) / count for name, total in totals.items()}


_Totals = tuple[dict[str, Tensor], int, int]
"""This process's sums of squares; how many examples all have; how many passes this one made."""


def _one_by_one(
    learner: Learner,
    data: TaskData,
    samples: int | None,
    labels: Literal["sampled", "true", "exact"],
    seed: int,
    processes: Processes,
) -> _Totals:
    """Of texts: log p is that of all learned tokens, each after the data's tokens before it."""
    if labels == "exact":
        raise ConfigError("labels = exact would sum over all texts; use sampled or true")
    parameters = trainable_weights(learner.module)
    device = next(iter(parameters.values())).device
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data), generator=generator)[:samples]
    totals = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
    words = used = 0
    for number, row in enumerate(chosen.tolist()):
        batch = data.__getitems__([row])
        if number % processes.world != processes.rank:
            if labels == "sampled":
                words = words or _choices(learner, to_device(batch, device))
                _pass_over(learner.count(batch), words, generator)
            continue
        logits, targets, _ = learner.predictions(to_device(batch, device))
        if labels == "sampled":
            chances = F.softmax(logits.detach().float(), dim=-1).cpu()
            targets = torch.multinomial(chances, 1, generator=generator).flatten().to(device)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                totals[name].add_(gradient.float().square())
        used += 1
    return totals, len(chosen), used


@torch.no_grad()
def _choices(learner: Learner, batch: Any) -> int:
    """How many tokens the model chooses among."""
    return learner.predictions(batch).logits.shape[-1]


def _pass_over(places: int, words: int, generator: torch.Generator) -> None:
    """Draw what another process draws, so that the next draw is what it would be in one process.

    What a draw takes from the generator depends on the shape alone, not on the probabilities.
    """
    torch.multinomial(torch.ones(places, words), 1, generator=generator)


def _accumulate(
    learner: ImageLearner,
    data: TaskData,
    samples: int | None,
    labels: Literal["sampled", "true", "exact"],
    seed: int,
    processes: Processes,
) -> _Totals:
    parameters = {n: p.detach() for n, p in trainable_weights(learner.module).items()}
    frozen = {
        n: t.detach()
        for n, t in (*learner.module.named_parameters(), *learner.module.named_buffers())
        if n not in parameters
    }
    device = next(iter(parameters.values())).device
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data), generator=generator)[:samples]
    totals = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}

    def log_likelihood(
        weights: dict[str, Tensor], pixels: Tensor, allowed: Tensor | None, label: Tensor
    ) -> Tensor:
        output = functional_call(learner.module, {**frozen, **weights}, (pixels.unsqueeze(0),))
        logits = learner.select(output, None if allowed is None else allowed.unsqueeze(0))
        return -F.cross_entropy(logits.float(), label.unsqueeze(0))

    size = sum(p.numel() for p in parameters.values())
    elements = _CHUNK_ELEMENTS if device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    words = used = 0
    for number, rows in enumerate(chosen.split(max(1, min(256, elements // max(1, size))))):
        batch = data.__getitems__(rows)
        if number % processes.world != processes.rank:
            if labels == "sampled":
                words = words or _choices(learner, to_device(batch, device))
                _pass_over(len(rows), words, generator)
            continue
        pixels = learner.preprocess(batch["pixel_values"].to(device))
        allowed = None if batch["allowed"] is None else batch["allowed"].to(device)
        with torch.no_grad():
            probabilities = F.softmax(
                learner.select(learner.module(pixels), allowed).float(), dim=-1
            ).cpu()
        for label, weight in _labels(labels, batch["labels"], probabilities, generator):
            if not bool((weight > 0).any()):
                continue
            per_example = _per_example(
                grad(log_likelihood), parameters, pixels, allowed, label.to(device)
            )
            for name, gradient in per_example.items():
                # einsum squares and sums without a second copy of the gradients.
                flat = gradient.float().reshape(len(label), -1)
                totals[name] += torch.einsum("ni,ni,n->i", flat, flat, weight.to(device)).view_as(
                    totals[name]
                )
            used += len(label)
    return totals, len(chosen), used


def _per_example(
    gradient: Any,
    parameters: dict[str, Tensor],
    pixels: Tensor,
    allowed: Tensor | None,
    label: Tensor,
) -> dict[str, Tensor]:
    """The gradient at every example, stacked: at once, or one by one where vmap cannot.

    Recurrent layers and forwards that look at their data cannot be vectorised.
    """
    in_dims = (None, 0, None if allowed is None else 0, 0)
    try:
        with warnings.catch_warnings():
            # That vmap falls back to a loop for some operation is no news for the user.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            result: dict[str, Tensor] = vmap(gradient, in_dims=in_dims, randomness="same")(
                parameters, pixels, allowed, label
            )
    except RuntimeError:  # of many kinds; what is wrong otherwise fails below as well
        rows = [
            gradient(parameters, pixels[n], None if allowed is None else allowed[n], label[n])
            for n in range(len(label))
        ]
        result = {name: torch.stack([row[name] for row in rows]) for name in parameters}
    return result


def _labels(
    kind: Literal["sampled", "true", "exact"],
    true: Tensor,
    probabilities: Tensor,
    generator: torch.Generator,
) -> list[tuple[Tensor, Tensor]]:
    """The labels to take gradients for, each with the weight of its square, per example."""
    one = torch.ones(len(true))
    if kind == "true":
        return [(true, one)]
    if kind == "sampled":
        return [(torch.multinomial(probabilities, 1, generator=generator).flatten(), one)]
    likeliest = probabilities.argmax(dim=1)
    return [
        # Where p(y | x) = 0 the gradient may be infinite; any other label does, its weight is 0.
        (torch.where(weight > 0, torch.full_like(true, label), likeliest), weight)
        for label, weight in enumerate(probabilities.unbind(dim=1))
    ]
