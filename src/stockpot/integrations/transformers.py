"""SFA for Hugging Face's ``Trainer`` and all that take its callbacks (TRL, axolotl, ...)."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stockpot.averaging import SFA, Anchor, MergeEvent
from stockpot.averaging.anchor import Store
from stockpot.averaging.lora import LoraMode
from stockpot.averaging.moments import OptimizerState
from stockpot.averaging.sfa import Buffers, ParameterChoice
from stockpot.errors import StockpotError
from stockpot.tracking.callbacks import Reporters
from stockpot.tracking.names import merge_values

__all__ = ["SFACallback"]

# Not the class's name: Trainer would then rebuild this callback from what is stored.
_KEY = "stockpot.SFA"
_ANCHOR = Path("sfa-anchor", "anchor.safetensors")
_log = logging.getLogger("stockpot")


class SFACallback(TrainerCallback):
    """Average the model with its own past a few times while ``Trainer`` trains it.

    One line in a script::

        trainer = Trainer(model, args, ..., callbacks=[SFACallback(p=0.25, beta=0.5)])

    The arguments are those of :class:`stockpot.SFA`. Without ``anchor``, theta_o is the model when
    training begins; it is kept in ``<output_dir>/sfa-anchor`` if the trainer writes checkpoints, so
    that ``trainer.train(resume_from_checkpoint=True)`` goes on to the same weights.

    Averages are written before the trainer logs, evaluates and saves a step. The last one is
    therefore in the last checkpoint, unless training stops early: then it is taken when training
    ends, with a warning to save the model once more.

    Where the trainer reports to TensorBoard, W&B, MLflow or Trackio, every average is logged there
    as ``merge/beta``, ``merge/distance_before``, ``merge/distance_after`` and ``merge/seconds``, by
    the main process; not the one taken when training has ended, for then they are closed.
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
        self.sfa = SFA(p, beta, every, anchor, store, optimizer_state, buffers, lora, parameters)
        self._open = False
        self._reporters = Reporters()

    @property
    def events(self) -> list[MergeEvent]:
        """The merge events so far, those before a resume included."""
        return self.sfa.events

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: object | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the anchor, or on resume the one that the run was started with."""
        assert model is not None
        path = Path(args.output_dir) / _ANCHOR
        record = state.stateful_callbacks.get(_KEY)
        anchor: Anchor | None = None
        saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
        if state.global_step > 0:
            anchor = self._resumed_anchor(args, path, record)
        elif self._open and self.sfa.anchor is not None:
            anchor = self.sfa.anchor
            _log.warning(
                "SFA: training begins again after an attempt that did not end (out of memory?). "
                "The anchor stays the one of the first attempt, whose steps the trainer keeps."
            )
        self.sfa.events = []
        self.sfa.attach(
            model,
            optimizer,
            total_steps=state.max_steps,
            anchor=anchor,
            anchor_path=path if saves or self.sfa.store == "disk" else None,
        )
        self._open = True
        if state.is_world_process_zero:
            self._reporters = Reporters.of_caller()
        if state.global_step > 0 and record is not None:
            self.sfa.load_state_dict(record)
        if saves:
            state.stateful_callbacks[_KEY] = self.sfa.state_dict()

    def _resumed_anchor(
        self, args: TrainingArguments, path: Path, record: dict[str, Any] | None
    ) -> Anchor | None:
        if self.sfa.anchor_given is not None:
            return None  # attach loads it, and the record's fingerprint is compared
        if record is None:
            raise StockpotError(
                "cannot resume with SFA: the checkpoint was written without it, and its weights "
                "are not the anchor. Give anchor='path' of the model that training started from"
            )
        try:
            return Anchor.load(path, store="disk")
        except FileNotFoundError as error:
            raise StockpotError(
                f"cannot resume with SFA: the anchor {path} that the run was started with is gone. "
                "Put it back, or give anchor='path' of the model that training started from"
            ) from error

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average if this is a merge step, before the trainer logs, evaluates and saves."""
        event = self.sfa.step(state.global_step)
        if event is not None:
            _log.info(
                "SFA: averaged at step %d, L2 distance to the anchor %.4g -> %.4g, %.3f s",
                event.step,
                event.distance_before,
                event.distance_after,
                event.seconds,
            )
            self._reporters.log(merge_values(asdict(event)), state.global_step)
        if _KEY in state.stateful_callbacks:
            state.stateful_callbacks[_KEY] = self.sfa.state_dict()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average once more only if the weights that training ends with are not an average."""
        if not self.sfa.attached:
            return
        best = state.best_global_step if args.load_best_model_at_end else None
        step = best or state.global_step
        averaged = {event.step for event in self.sfa.events}
        # A run resumed from its last checkpoint takes one step more, from an average.
        if step not in averaged and not (best is None and self.sfa.total_steps in averaged):
            self.sfa.merge(step)
            _log.warning(
                "SFA: training ended at step %d with weights that were not averaged%s. They are "
                "now, in memory; the checkpoints lack it. Save with trainer.save_model().",
                state.global_step,
                f" (the best checkpoint, of step {best})" if best else "",
            )
        self.sfa.detach()
        self._open = False
        self._reporters = Reporters()
