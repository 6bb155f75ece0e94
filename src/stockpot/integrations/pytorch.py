"""SFA for loops whose optimizer step cannot be reached: a hook on the optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from stockpot.averaging import SFA
from stockpot.averaging.weights.masters import unwrap_optimizer
from stockpot.errors import StockpotError

__all__ = ["averaging"]


@contextlib.contextmanager
def averaging(sfa: SFA, model: nn.Module, optimizer: object, *, total_steps: int) -> Iterator[SFA]:
    """Attach ``sfa`` and call it after each ``optimizer.step()``, wherever that is called.

    For a recipe that hides its loop::

        with averaging(SFA(p=0.25), model, optimizer, total_steps=T) as sfa:
            recipe.train()

    A step that a GradScaler skips is not counted, unless the optimizer is fused: then the hook runs
    although nothing was stepped. Where you can write ``sfa.step()`` yourself, do.

    Args:
        sfa: the settings.
        model: the model that trains.
        optimizer: a torch optimizer, or accelerate's wrapper of one.
        total_steps: T, how often the optimizer will step.

    Raises:
        StockpotError: if the optimizer cannot be hooked (DeepSpeed), or as :meth:`SFA.attach`.
    """
    inner = unwrap_optimizer(optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise StockpotError(
            f"{type(inner).__name__} is no torch optimizer and has no step hook: call sfa.step() "
            "after each step, or use the callback for your trainer"
        )
    with sfa.attach(model, optimizer, total_steps=total_steps):

        def after_step(*_: object) -> None:
            sfa.step()

        handle = inner.register_step_post_hook(after_step)
        try:
            yield sfa
        finally:
            handle.remove()
