"""SFA: sequential fine-tuning with averaging, as the object that a training script holds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import nn
from torch.optim import Optimizer

from stockpot.arithmetic import l2_distance
from stockpot.averaging.anchor import Anchor, Store, check_store
from stockpot.averaging.blend import average_, check_beta, check_shape
from stockpot.averaging.schedule import check_p, merge_steps, merge_steps_every
from stockpot.averaging.weights import trainable_weights
from stockpot.errors import StockpotError

__all__ = ["SFA", "MergeEvent"]


@dataclass(frozen=True)
class MergeEvent:
    """One averaging: at which optimizer step, how far from the anchor, and how long it took."""

    step: int
    beta: float
    distance_before: float
    """L2 distance to the anchor before the average."""
    distance_after: float
    """L2 distance to the anchor after it: (1 - beta) times the one before."""
    seconds: float


class SFA:
    """Average a model with its own past a few times while it trains (arXiv 2501.05559, Alg. 1).

    At each merge step, after the optimizer's step: ``theta <- beta * theta_o + (1 - beta) *
    theta``; training goes on from there. The last optimizer step is always a merge step::

        with SFA(p=0.25, beta=0.5).attach(model, optimizer, total_steps=T) as sfa:
            for batch in data:
                ...
                optimizer.step()
                sfa.step()

    Args:
        p: averaging frequency as a fraction of the task's T optimizer steps, in (0, 1].
        beta: the anchor's share in each average, in [0, 1].
        every: average every N optimizer steps instead of by ``p``.
        anchor: theta_o: the weights when ``attach`` is called (default), an :class:`Anchor`, or the
            path of a safetensors file.
        store: where the anchor is kept: ``"device"``, ``"cpu"`` or, for a path, ``"disk"``.

    Raises:
        ValueError: if ``p``, ``beta`` or ``every`` is out of range, or ``store="disk"`` is asked
            for without a path.
    """

    def __init__(
        self,
        p: float = 0.25,
        beta: float = 0.5,
        *,
        every: int | None = None,
        anchor: Anchor | str | Path | None = None,
        store: Store = "cpu",
    ) -> None:
        self.p = check_p(p)
        self.beta = check_beta(beta)
        self.every = every
        self.store: Store = store
        if every is not None:
            merge_steps_every(1, every)  # refuses a bad value here and not when training starts
        check_store(store)
        if store == "disk" and not isinstance(anchor, str | Path):
            raise ValueError("store='disk' reads the anchor from a file: give anchor='path'")
        self._given = anchor
        self._anchor: Anchor | None = None
        self._model: nn.Module | None = None
        self._merge_steps: frozenset[int] = frozenset()
        self._step = 0
        self.events: list[MergeEvent] = []
        self.left_alone: list[str] = []

    def attach(
        self, model: nn.Module, optimizer: Optimizer | None = None, *, total_steps: int
    ) -> Self:
        """Take the anchor and fix the merge steps; call it once, before the first step.

        Args:
            model: the model that trains; averages are written into its parameters.
            optimizer: the optimizer that trains it. Its moments are kept as they are.
            total_steps: T, the number of optimizer steps of this task.

        Raises:
            StockpotError: if the anchor belongs to another model.
        """
        del optimizer  # moments are kept; the argument is part of the interface for what needs it
        steps = (
            merge_steps(total_steps, self.p)
            if self.every is None
            else merge_steps_every(total_steps, self.every)
        )
        self._merge_steps = frozenset(steps)
        self._model = model
        self._step = 0
        self._anchor = self._take_anchor(model)
        self._check_anchor(model, self._anchor)
        return self

    def _check_anchor(self, model: nn.Module, anchor: Anchor) -> None:
        """An anchor of another model is refused now and not at the first merge step."""
        weights = trainable_weights(model)
        shared = [name for name in weights if name in anchor]
        if not shared:
            raise StockpotError(
                "the anchor holds none of the model's trainable weights (it has "
                f"{', '.join(list(anchor)[:3]) or 'nothing'}; the model has "
                f"{', '.join(list(weights)[:3]) or 'nothing that trains'}): nothing to average"
            )
        for name in shared:
            check_shape(name, weights[name], anchor[name])

    def _take_anchor(self, model: nn.Module) -> Anchor:
        if isinstance(self._given, Anchor):
            return self._given
        if self._given is not None:
            return Anchor.load(self._given, store=self.store)
        return Anchor.capture(model, store="device" if self.store == "device" else "cpu")

    def step(self, global_step: int | None = None) -> MergeEvent | None:
        """Tell SFA that the optimizer has stepped; averages if this is a merge step.

        Args:
            global_step: the number of optimizer steps done, 1-based. By default SFA counts its own
                calls; a resumed run should give it.

        Returns:
            The merge event, or None when this step is no merge step.
        """
        if self._model is None or self._anchor is None:
            raise RuntimeError("SFA.step() before SFA.attach(model, optimizer, total_steps=T)")
        self._step = self._step + 1 if global_step is None else global_step
        if self._step not in self._merge_steps:
            return None
        begin = time.perf_counter()
        before = self._distance()
        self.left_alone = average_(self._model, self._anchor, self.beta)
        event = MergeEvent(
            step=self._step,
            beta=self.beta,
            distance_before=before,
            distance_after=self._distance(),
            seconds=time.perf_counter() - begin,
        )
        self.events.append(event)
        return event

    def _distance(self) -> float:
        assert self._model is not None
        assert self._anchor is not None
        weights = trainable_weights(self._model)
        shared = [name for name in weights if name in self._anchor]
        anchor = self._anchor
        return l2_distance((weights[n] for n in shared), (anchor[n] for n in shared))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the model and the anchor; ``events`` stay."""
        self._model = None
        self._anchor = None
