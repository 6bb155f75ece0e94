"""SFA for MosaicML's Composer, the paper's own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from composer.core import Algorithm, Event, State, TimeUnit
from composer.loggers import Logger

from stockpot import averaging
from stockpot.averaging import Anchor, MergeEvent
from stockpot.averaging.anchor import Store
from stockpot.averaging.lora import LoraMode
from stockpot.averaging.moments import OptimizerState
from stockpot.averaging.sfa import Buffers, ParameterChoice
from stockpot.errors import StockpotError

__all__ = ["SFA"]


class SFA(Algorithm):
    """Average the model with its own past a few times while Composer trains it.

    One line in a script::

        trainer = Trainer(..., algorithms=[SFA(p=0.25, beta=0.5)])

    The arguments are those of :class:`stockpot.SFA`. A run that is resumed needs ``anchor="path"``:
    the weights of its checkpoint are not the anchor.
    """

    def __init__(
        self,
        p: float = 0.25,
        beta: float = 0.5,
        every: int | None = None,
        anchor: Anchor | str | Path | None = None,
        store: Store = "cpu",
        optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "keep",
        lora: LoraMode = "auto",
        parameters: ParameterChoice | None = None,
    ) -> None:
        self.sfa = averaging.SFA(
            p, beta, every, anchor, store, optimizer_state, buffers, lora, parameters
        )

    @property
    def events(self) -> list[MergeEvent]:
        """The merge events so far."""
        return self.sfa.events

    def match(self, event: Event, state: State) -> bool:
        """At the start, and after each optimizer step, before evaluation and checkpoints."""
        return bool(event in (Event.FIT_START, Event.BATCH_END))

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Attach, or count a step and average if it is a merge step."""
        step = int(state.timestamp.batch)
        if event == Event.BATCH_END:
            self.sfa.step(step)
            return
        if step and self.sfa.anchor_given is None:
            raise StockpotError(
                "cannot resume with SFA: the weights of a checkpoint are not the anchor. Give "
                "anchor='path' of the model that training started from"
            )
        self.sfa.attach(state.model, list(state.optimizers), total_steps=_total_batches(state))


def _total_batches(state: State) -> int:
    """T. Elapsed durations count whole epochs only, so batches are counted."""
    duration: Any = state.max_duration
    if duration is not None and duration.unit == TimeUnit.BATCH:
        return int(duration.value)
    length = state.dataloader_len
    if duration is not None and duration.unit == TimeUnit.EPOCH and length is not None:
        return int(duration.value) * int(length)
    raise StockpotError(
        f"SFA cannot tell how many batches max_duration={duration} is: give it in batches ('100ba')"
        ", or in epochs of a dataloader with a length"
    )
