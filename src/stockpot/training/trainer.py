"""One task, fine-tuned by ``transformers.Trainer`` with a method's hooks around its steps."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import accelerate.optimizer
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from stockpot.errors import NonFiniteError
from stockpot.files import read_tensors, sha256, space_errors, write_json, write_tensors
from stockpot.methods.base import Method, TaskRun
from stockpot.models.learner import check_finite, copy_weights, load_weights_
from stockpot.streams.data import TaskData
from stockpot.training.arguments import make_optimizer, training_arguments
from stockpot.training.batches import BatchLoader, ShuffledBatches, as_fetched
from stockpot.training.costs import PeakMemory
from stockpot.training.losses import LossLog
from stockpot.training.settings import TrainingSettings

__all__ = ["TaskTrainer", "Trained", "Watch", "choose_device", "train_task"]

# accelerate asks at every optimizer step whether a package is installed, by searching the path:
# a tenth of a small model's step. The answer does not change while a process lives.
accelerate.optimizer.is_lomo_available = functools.cache(accelerate.optimizer.is_lomo_available)

_AROUND = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What accelerate puts on a model that it prepares."""
_MARKER = "stockpot.json"
"""Written last into a checkpoint: one without it was cut short and is not used."""


@dataclass
class Trained:
    """What training one task gave, beside the weights, which stay in the model."""

    steps: int
    seconds: float
    peak_memory: int
    """Bytes; of several processes, those of the one that needed most."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss with its penalty over the window that ends there)."""


@dataclass(frozen=True)
class Watch:
    """Scores that are taken while a task trains; their time is not counted as training."""

    probe: Callable[[int, str], None] = lambda step, moment: None
    """Called with the step and ``step``, ``before merge`` or ``after merge``."""
    every: int | None = None
    """Optimizer steps between two calls, from step 0 on and at the last; None: none."""
    merges: bool = False
    """Whether to call it around every merge event."""
    losses: Callable[[Sequence[tuple[int, float]]], None] = lambda points: None
    """Called with all (step, mean loss) so far when a window of the loss ends."""


def choose_device(name: str) -> torch.device:
    """``auto``: a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def train_task(
    method: Method,
    run: TaskRun,
    data: TaskData,
    settings: TrainingSettings,
    scratch: Path,
    on_step: Callable[[int, float | None], None] = lambda step, loss: None,
    where: str = "training",
    watch: Watch | None = None,
) -> Trained:
    """Train ``run.model`` on ``data`` for ``run.total_steps`` optimizer steps.

    Data order and dropout follow from ``run.seed`` alone. A checkpoint in ``scratch`` that an
    earlier, killed call left is taken up, and the result is the same as without the kill.

    Where several processes share the run (``run.processes``) all of them call this with the same
    arguments and the same weights, and have the same weights and the same answer afterwards.
    ``settings.parallel`` says how they share the work. A checkpoint is good for any number of
    processes and any way of sharing.

    Args:
        method: its ``before_step`` and ``after_step`` are called around every optimizer step.
        run: the task as the method sees it; its model is trained in place.
        data: the training examples.
        settings: optimizer, batch size and the like.
        scratch: folder for checkpoints within the task; empty or absent after success.
        on_step: called with the step and, at the end of a window, its mean loss.
        where: how errors name this task.
        watch: scores to take while it trains.

    Raises:
        NonFiniteError: if the loss or a weight becomes NaN or infinite.
        ConfigError: if several processes cannot train it in this way (:func:`check_parallel`).
    """
    from stockpot.training.parallel import own_settings

    with own_settings(settings, run.processes.world):
        if run.processes.several:
            from stockpot.training.parallel.trainer import train_shared

            return train_shared(
                method, run, data, settings, scratch, on_step, where, watch or Watch()
            )
        return _train_alone(method, run, data, settings, scratch, on_step, where, watch or Watch())


def _train_alone(
    method: Method,
    run: TaskRun,
    data: TaskData,
    settings: TrainingSettings,
    scratch: Path,
    on_step: Callable[[int, float | None], None],
    where: str,
    watch: Watch,
) -> Trained:
    trainer = TaskTrainer(method, run, data, settings, scratch, on_step, where, watch)
    memory = PeakMemory(run.device)
    memory.start()
    try:
        trainer.train(resume_from_checkpoint=trainer.usable_checkpoint())
    finally:
        trainer.let_go()
    check_finite(run.model, where)
    shutil.rmtree(scratch, ignore_errors=True)
    log = trainer.log_of_losses
    return Trained(run.total_steps, trainer.elapsed(), memory.stop(), log.points)


class TaskTrainer(Trainer):
    """``transformers.Trainer`` with the method's penalty, in-memory data and exact resume."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        method: Method,
        run: TaskRun,
        data: TaskData,
        settings: TrainingSettings,
        scratch: Path,
        on_step: Callable[[int, float | None], None],
        where: str,
        watch: Watch,
    ) -> None:
        self.method, self.run, self.settings, self.watch = method, run, settings, watch
        self.scratch, self.where, self.on_step = scratch, where, on_step
        self.log_of_losses = LossLog(run.total_steps)
        self._seconds_before = 0.0
        self._began = time.perf_counter()
        self._saved = time.monotonic()
        self._probing = 0.0
        own = run.model.__dict__
        self._own_forward = {"forward": own["forward"]} if "forward" in own else {}
        self._on_cpu = run.device.type == "cpu"
        super().__init__(
            model=run.model,
            args=training_arguments(run, settings, scratch),
            train_dataset=data,
            data_collator=as_fetched,
            callbacks=[_Hooks(self)],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = True  # by compute_loss below

    def elapsed(self) -> float:
        """Seconds of training, those before a kill included, scores meanwhile not."""
        return self._seconds_before + time.perf_counter() - self._began - self._probing

    def probe(self, step: int, moment: str) -> None:
        """Take the scores that were asked for."""
        begin = time.perf_counter()
        with self.model_to_score():
            self.watch.probe(step, moment)
        self._probing += time.perf_counter() - begin

    @contextlib.contextmanager
    def model_to_score(self) -> Iterator[None]:
        """Scores are taken in the weights' own precision, as they are after the task."""
        around = {name: self.run.model.__dict__.get(name) for name in _AROUND}
        self.release_model()
        yield
        self.run.model.__dict__.update({n: v for n, v in around.items() if v is not None})

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the settings, over all trainable parameters in one group."""
        if self.optimizer is None:
            parameters = [p for p in (model or self.model).parameters() if p.requires_grad]
            self.optimizer = make_optimizer(parameters, self.settings)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches straight from memory."""
        data: Any = self.train_dataset
        lengths = data.lengths() if self.settings.group_by_length else None
        batches: Any = ShuffledBatches(len(data), self.settings.batch_size, self.run.seed, lengths)
        return BatchLoader(data, batch_sampler=batches, collate_fn=as_fetched)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Cross-entropy, its mean over the images, or learned tokens, of the optimizer step.

        With gradient accumulation each micro-batch gives its share of that mean, so that a short
        last one does not count as much as a full one.
        """
        learner = self.run.learner
        loss = learner.loss(inputs, model)
        if num_items_in_batch is not None:
            loss = loss * (learner.count(inputs) / num_items_in_batch)
        return (loss, None) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward; then, before clipping, the method's penalty."""
        loss = self._forward_backward(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the last micro-batch of an optimizer step
            scaler = self.accelerator.scaler
            self.run.loss_scale = scaler.get_scale() if scaler is not None else 1.0
            penalty = self.method.before_step(self.run)
            if penalty is not None:
                loss = loss + penalty
        # On a CPU looking costs nothing; on a GPU it would wait, so windows are looked at instead.
        if self._on_cpu and not math.isfinite(float(loss)):
            self.refuse_loss(self.state.global_step + 1, float(loss))
        self.log_of_losses.add(loss)
        return loss

    def _forward_backward(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: int | None
    ) -> Tensor:
        """What the base class does, less the questions it asks at every step of any set-up."""
        if not model.training:
            model.train()
        batch = inputs if self._on_cpu else self._prepare_inputs(inputs)
        loss: Tensor = self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def refuse_loss(self, step: int, loss: float) -> NoReturn:
        """The loss is not finite: nothing that follows would be."""
        raise NonFiniteError(
            f"{self.where}: the loss is {loss} at step {step} of {self.run.total_steps}. "
            "Nothing of this task was saved; the tasks before it are intact. Lower "
            "training.learning_rate, set training.max_grad_norm, or lower the method's strength"
        )

    def finish_step(self, step: int) -> None:
        """After the optimizer's step: the method's turn, then the log."""
        merging = self.watch.merges and self.method.averages_at(step)
        if merging:
            self.probe(step, "before merge")
        self.method.after_step(self.run, step)
        if merging:
            self.probe(step, "after merge")
        every = self.watch.every
        if every and (step % every == 0 or step == self.run.total_steps):
            self.probe(step, "step")
        closed = self.log_of_losses.close_window(step)
        loss = self.log_of_losses.glimpse(step) if closed is None else closed
        # Processes glimpse by their own clocks, and must stop at the same step.
        seen = closed if self.run.processes.several else loss
        if seen is not None and not math.isfinite(seen):
            self.refuse_loss(step, seen)
        self.on_step(step, loss)
        if closed is not None:
            begin = time.perf_counter()
            self.watch.losses(self.log_of_losses.points)
            self._probing += time.perf_counter() - begin

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> int | None:
        """How many images or learned tokens a step has; None if they are in one micro-batch."""
        if len(batch_samples) == 1:
            return None
        return sum(self.run.learner.count(batch) for batch in batch_samples)

    def release_model(self) -> None:
        """Take off what accelerate put around the model's forward: the next call decides anew.

        Left on, autocast would reach into scoring and into trainings in another precision.
        """
        own = self.run.model.__dict__
        for name in _AROUND:
            own.pop(name, None)
        own.update(self._own_forward)

    def let_go(self) -> None:
        """Leave the model alone, and free what would otherwise lie about while it is scored."""
        self.release_model()
        if self.optimizer is not None:
            self.optimizer.state.clear()  # the moments: as large as the model twice over
        self.callback_handler.callbacks.clear()  # the trainer and its hooks hold each other
        if not self._on_cpu:
            torch.cuda.empty_cache()

    # What a small model would pay at every step for numbers that nobody reads.

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return grad_norm

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    # Checkpoints within a task. Weights are written as everywhere in this program, which takes tied
    # and non-contiguous ones as well; the Trainer's own way refuses them.

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "model.safetensors", self.weights_to_save())

    def weights_to_save(self) -> dict[str, Tensor]:
        """All weights, in host memory."""
        return copy_weights(self.run.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = read_tensors(Path(resume_from_checkpoint) / "model.safetensors")
        load_weights_(self.run.model, weights)

    def time_to_save(self, step: int) -> bool:
        """Whether a checkpoint is due when ``step`` is done."""
        interval = self.settings.checkpoint_seconds
        if interval is None or step >= self.run.total_steps:
            return False
        if time.monotonic() - self._saved < interval:
            return False
        self._saved = time.monotonic()
        return True

    def should_save(self, step: int) -> bool:
        """Asked after a step."""
        return self.time_to_save(step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.scratch / f"checkpoint-{self.state.global_step}"
        with space_errors(folder):
            super()._save_checkpoint(model, trial)
            for path in folder.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        files = {path.name: sha256(path) for path in folder.iterdir() if path.name != _MARKER}
        state = {
            "files": files,
            "merges": self.run.merges,
            "curve": self.run.curve,
            "losses": self.log_of_losses.state(),
            "seconds": self.elapsed(),
        }
        write_json(folder / _MARKER, state)
        for other in self.scratch.glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def usable_checkpoint(self) -> str | None:
        """The newest complete checkpoint in ``scratch``; its log is taken up."""
        found = self.find_checkpoint()
        return None if found is None else self.take_up(*found)

    def take_up(self, folder: Path, state: dict[str, Any]) -> str:
        """Take up the log of a checkpoint; returns the folder for ``Trainer``."""
        self.run.merges[:] = state["merges"]
        self.run.curve[:] = state["curve"]
        self.log_of_losses.restore(state["losses"], self.run.device)
        self._seconds_before = state["seconds"]
        return str(folder)

    def find_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint in ``scratch``, and what its marker says."""
        folders = sorted(
            self.scratch.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])
        )
        for folder in folders:
            with contextlib.suppress(OSError, ValueError, KeyError):
                state: dict[str, Any] = json.loads((folder / _MARKER).read_text())
                if all(sha256(folder / name) == digest for name, digest in state["files"].items()):
                    return folder, state
        return None


class _Hooks(TrainerCallback):
    """Hands the Trainer's events on and asks for a checkpoint when it is time."""

    def __init__(self, trainer: TaskTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._trainer.watch.every and state.global_step == 0:
            self._trainer.probe(0, "step")

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._trainer.finish_step(state.global_step)
        if self._trainer.should_save(state.global_step):
            control.should_save = True
