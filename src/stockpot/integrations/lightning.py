"""SFA for Lightning's ``Trainer``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from stockpot.averaging import SFA, Anchor, MergeEvent
from stockpot.averaging.anchor import Store
from stockpot.averaging.lora import LoraMode
from stockpot.averaging.moments import OptimizerState
from stockpot.averaging.sfa import Buffers, ParameterChoice
from stockpot.errors import StockpotError

__all__ = ["SFACallback"]

_ANCHOR = Path("sfa-anchor", "anchor.safetensors")
_log = logging.getLogger("stockpot")


class SFACallback(Callback):
    """Average the module with its own past a few times while ``Trainer`` trains it.

    One line in a script::

        trainer = Trainer(..., callbacks=[SFACallback(p=0.25, beta=0.5)])

    The arguments are those of :class:`stockpot.SFA`. Without ``anchor``, theta_o is the module when
    ``fit`` begins; it is kept in ``<default_root_dir>/sfa-anchor`` for ``fit(ckpt_path=...)``.
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
        self._record: dict[str, Any] | None = None
        self._seen = 0

    @property
    def events(self) -> list[MergeEvent]:
        """The merge events so far, those before a resume included."""
        return self.sfa.events

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the anchor, or on resume the one that the run was started with."""
        if len(trainer.optimizers) != 1:
            raise StockpotError(
                f"SFA needs one optimizer and this module has {len(trainer.optimizers)}: "
                "Lightning's global_step counts the steps of all of them, so p has no meaning"
            )
        path = Path(trainer.default_root_dir) / _ANCHOR
        resumed = trainer.global_step > 0
        anchor: Anchor | None = None
        if resumed and self.sfa.anchor_given is None:
            if self._record is None:
                raise StockpotError(
                    "cannot resume with SFA: the checkpoint was written without it, and its "
                    "weights are not the anchor. Give anchor='path' of the model that training "
                    "started from"
                )
            anchor = Anchor.load(path, store="disk")
        # -1 and infinity: Lightning does not know how long it will train.
        total = trainer.estimated_stepping_batches
        self.sfa.events = []
        self.sfa.attach(
            pl_module,
            trainer.optimizers[0],
            total_steps=float("inf") if total == -1 else total,  # type: ignore[arg-type]
            anchor=anchor,
            anchor_path=path,
        )
        if resumed and self._record is not None:
            self.sfa.load_state_dict(self._record)
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Average if an optimizer step was taken and it is a merge step."""
        if trainer.global_step == self._seen:
            return  # gradients are being accumulated
        self._seen = trainer.global_step
        event = self.sfa.step(self._seen)
        if event is not None:
            _log.info(
                "SFA: averaged at step %d, L2 distance to the anchor %.4g -> %.4g",
                event.step,
                event.distance_before,
                event.distance_after,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average once more only if training ended before its last merge step."""
        if not self.sfa.attached:
            return
        averaged = {event.step for event in self.sfa.events}
        if self._seen and self._seen not in averaged and self.sfa.total_steps not in averaged:
            self.sfa.merge(self._seen)
            _log.warning(
                "SFA: training ended at step %d, before its last merge step. The weights are "
                "averaged now, in memory; the checkpoints lack it. Save with "
                "trainer.save_checkpoint().",
                self._seen,
            )
        self._record = self.sfa.state_dict()
        self.sfa.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the anchor."""
        if self.sfa.attached:
            return self.sfa.state_dict()
        return self._record or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint says until training starts."""
        self._record = dict(state_dict) or None
