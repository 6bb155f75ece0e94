"""Forward KL divergence from the anchor, on the new task's data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stockpot.models.learner import Learner, evaluating, to_device
from stockpot.streams.data import TaskData

__all__ = ["Divergence", "kl_from"]

_ELEMENTS = 2**28
"""Log-probabilities of the anchor that are held at once: 1 GiB in float32, in host memory."""
_AT_ONCE = 8
"""Texts of a batch: thousands of places times a large vocabulary."""


@dataclass(frozen=True)
class Divergence:
    """A mean over places (images, or learned tokens), in nats."""

    value: float
    examples: int
    """How many examples it was measured on."""


@torch.inference_mode()
def kl_from(
    anchor: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    learner: Learner,
    data: TaskData,
    examples: int,
    batch_size: int,
    device: torch.device | str,
) -> Divergence:
    """``E_x KL(p_anchor(. | x) || p(. | x))``, mean over the places of the first examples, in nats.

    How far the model's answers have moved on the new task's data goes with what it forgets better
    than how far its weights have (Shenfeld et al. 2025, arXiv 2509.04259). The model holds
    ``weights`` afterwards. Only as many batches of the examples are used as the anchor's answers to
    them fit 1 GiB, but at least one.
    """
    with evaluating(learner.module):
        learner.load(anchor)
        held: list[Tensor] = []
        batches: list[Tensor] = []
        elements = 0
        size = batch_size if data.lengths() is None else min(batch_size, _AT_ONCE)
        for rows in torch.arange(min(examples, len(data))).split(size):
            batch = to_device(data.__getitems__(rows), device)
            logits = learner.predictions(batch).logits
            if batches and elements + logits.numel() > _ELEMENTS:
                break
            elements += logits.numel()
            held.append(F.log_softmax(logits.float(), dim=-1).cpu())
            batches.append(rows)
        learner.load(weights)
        total, places = 0.0, 0
        for rows, before in zip(batches, held, strict=True):
            logits = learner.predictions(to_device(data.__getitems__(rows), device)).logits
            now = F.log_softmax(logits.float(), dim=-1)
            before = before.to(now.device)
            # Labels that a task does not allow have no probability in either.
            terms = torch.where(before.isneginf(), 0.0, before.exp() * (before - now))
            total += float(terms.sum(dtype=torch.float64))
            places += len(logits)
    return Divergence(max(0.0, total / places), sum(map(len, batches)))
