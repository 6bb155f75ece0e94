"""``transformers.Trainer`` in every process that shares a training."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.trainer_pt_utils import safe_globals

from stockpot.files import read_tensors
from stockpot.methods.base import Method, TaskRun
from stockpot.models.learner import check_finite
from stockpot.processes import meeting_place
from stockpot.streams.data import TaskData
from stockpot.training.costs import PeakMemory
from stockpot.training.parallel import check_parallel
from stockpot.training.parallel.shares import Shares
from stockpot.training.parallel.spread import Spread, spread_over
from stockpot.training.settings import TrainingSettings
from stockpot.training.trainer import TaskTrainer, Trained, Watch

__all__ = ["train_shared"]


def train_shared(
    method: Method,
    run: TaskRun,
    data: TaskData,
    settings: TrainingSettings,
    scratch: Path,
    on_step: Callable[[int, float | None], None],
    where: str,
    watch: Watch,
) -> Trained:
    """:func:`train_task` in each of several processes; the main one tells ``on_step``.

    All of them take the scores of ``watch``, with the whole weights in the ordinary module.
    """
    processes = run.processes
    check_parallel(method, run.model, settings, processes.world)
    memory = PeakMemory(run.device)
    memory.start()
    threads = torch.get_num_threads()
    spread = spread_over(method, run, settings)
    trained = False
    try:
        trainer = SharedTrainer(spread, method, run, data, settings, scratch, on_step, where, watch)
        torch.set_num_threads(threads)  # accelerate has its own idea of how many
        trainer.draw_own_numbers()
        trainer.train(resume_from_checkpoint=trainer.usable_checkpoint())
        trainer.let_go()
        trained = True
    finally:
        spread.end(trained)
    seconds, losses = trainer.elapsed(), trainer.log_of_losses.points
    del trainer, spread
    gc.collect()  # hooks of sharded modules, and an engine's, hold them
    check_finite(run.model, where)
    _draw_alike(run)
    peak = max(processes.gather(memory.stop()))

    def finish() -> Trained:
        shutil.rmtree(scratch, ignore_errors=True)
        return Trained(run.total_steps, seconds, peak, losses)

    run.merges[:] = processes.from_main(lambda: run.merges)
    run.curve[:] = processes.from_main(lambda: run.curve)
    return processes.from_main(finish)


def _draw_alike(run: TaskRun) -> None:
    """What is drawn from now on is the same in all processes again."""
    torch.set_rng_state(run.processes.from_main(torch.get_rng_state))
    if run.device.type == "cuda":
        state = run.processes.from_main(lambda: torch.cuda.get_rng_state(run.device))
        torch.cuda.set_rng_state(state, run.device)


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SharedTrainer(TaskTrainer):
    """A process's part in a training that several share.

    ``Trainer`` goes through the same steps in each. What is the whole batch's is summed: the number
    of places before a step, which scales the loss so that the mean of the processes' gradients is
    the gradient of the mean over all places; and the loss, after the backward pass, so that all
    see the same and stop at the same step. Only the main process writes.
    """

    lr_scheduler: _Stateful

    def __init__(
        self,
        spread: Spread,
        method: Method,
        run: TaskRun,
        data: TaskData,
        settings: TrainingSettings,
        scratch: Path,
        on_step: Callable[[int, float | None], None],
        where: str,
        watch: Watch,
    ) -> None:
        self.spread, self.processes = spread, run.processes
        if not self.processes.main:
            on_step = _silent
            watch = Watch(watch.probe, watch.every, watch.merges)
        self._loss = torch.zeros((), device=run.device)
        self._save_after_step = False
        self._optimizer_state: dict[str, Any] | None = None
        self._weights: dict[str, Tensor] | None = None
        shares: Any = Shares(data, self.processes)
        super().__init__(method, run, shares, settings, scratch, on_step, where, watch)
        # Trainer's own way for models that were sharded before it saw them: nothing is put around
        # them but autocast.
        self.is_distributed_loading_by_transformers = True

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """It is where it belongs."""

    def draw_own_numbers(self) -> None:
        """Rows of different processes are different rows, and so are their dropout masks."""
        if not self.processes.main:
            drawn = torch.initial_seed() + 1_000_003 * self.processes.rank
            torch.manual_seed((drawn + self.state.global_step) % 2**63)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """That of the weights where they are."""
        self.optimizer = self.spread.optimizer
        return self.optimizer

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """They are the same everywhere, and kept so."""

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # spread.micro_batch does so

    # One step.

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> int:
        """How many places the step has in all processes. Also whether it is time to save after it.

        Both are known in host memory, where a GPU's work is not waited for.
        """
        places = sum(self._places(batch) for batch in batch_samples)
        save = self.processes.main and self.time_to_save(self.state.global_step + 1)
        told = torch.tensor([places, int(save)], device=meeting_place())
        dist.all_reduce(told)
        self._save_after_step = bool(told[1])
        return int(told[0])

    def _places(self, batch: dict[str, Any]) -> int:
        counts = Shares.counts(batch)
        return self.run.learner.count(Shares.examples(batch)) if counts else 0

    def should_save(self, step: int) -> bool:
        """As the main process has decided, before the step."""
        return self._save_after_step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward on this process's share; with the last, the method's penalty."""
        last = self.accelerator.sync_gradients
        if not model.training:
            model.train()
        share = self._places(inputs) / num_items_in_batch  # of the step's places
        batch = Shares.examples(self._prepare_inputs(inputs))
        with self.spread.micro_batch(last):
            loss = self.run.learner.loss(batch, self.spread.called) * share
            self.spread.backward(loss * self.processes.world, self.accelerator)
        result: Tensor = loss.detach()
        self._loss += result
        if last:
            self._end_of_batch()
        return result

    def _end_of_batch(self) -> None:
        scaler = self.accelerator.scaler
        self.run.loss_scale = scaler.get_scale() if scaler is not None else 1.0
        penalty = self.method.before_step(self.run)
        loss, self._loss = self._loss, torch.zeros_like(self._loss)
        if penalty is not None and not self.spread.whole:
            loss += penalty  # of this process's parts
        dist.all_reduce(loss)
        if penalty is not None and self.spread.whole:
            loss += penalty
        if self._on_cpu and not bool(torch.isfinite(loss)):
            self.refuse_loss(self.state.global_step + 1, float(loss))
        self.log_of_losses.add(loss)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self.spread.clip(self.args.max_grad_norm, self.accelerator)

    def store_flos(self) -> None:
        """They are not counted."""

    # Scores meanwhile.

    @contextlib.contextmanager
    def model_to_score(self) -> Iterator[None]:
        """The ordinary module with the whole weights, in every process."""
        around = super().model_to_score() if self.spread.whole else self.spread.gathered()
        with around:
            yield

    # Checkpoints within a task are those of one process.

    def usable_checkpoint(self) -> str | None:
        """The one that the main process finds."""
        found = self.processes.from_main(self.find_checkpoint)
        return None if found is None else self.take_up(*found)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._optimizer_state, self._weights = self.spread.optimizer_state(), self.spread.weights()
        save = functools.partial(super()._save_checkpoint, model, trial)
        self.processes.from_main(lambda: save() if self.processes.main else None)
        self._optimizer_state = self._weights = None

    def weights_to_save(self) -> dict[str, Tensor]:
        """Put together from all processes."""
        assert self._weights is not None
        return self._weights

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        torch.save(self._optimizer_state, Path(output_dir, "optimizer.pt"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about saving the optimizer as well
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))

    def _save_rng_state(self, output_dir: str) -> None:
        states: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.get_rng_state(),
        }
        if self.run.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.run.device)
        torch.save(states, Path(output_dir, "rng_state.pth"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.spread.load(read_tensors(Path(resume_from_checkpoint) / "model.safetensors"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load = functools.partial(torch.load, map_location="cpu", weights_only=True)
        self.spread.load_optimizer_state(load(Path(checkpoint, "optimizer.pt")))
        self.lr_scheduler.load_state_dict(load(Path(checkpoint, "scheduler.pt")))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The main process draws on; the others, of which none is written down, draw anew."""
        if checkpoint is None:
            return
        with safe_globals():
            states = torch.load(Path(checkpoint, "rng_state.pth"), weights_only=True)
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["cpu"])
        if self.run.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.run.device)
        self.draw_own_numbers()


def _silent(step: int, loss: float | None) -> None:
    """The main process tells."""
