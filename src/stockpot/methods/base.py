"""A method is five hooks around ordinary fine-tuning; this is what they are and what they see.

Settings are the fields of a method's class: typed, bounded, each described where it stands. Nothing
here imports torch when it is imported, so that an experiment is checked in a moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from stockpot.processes import ALONE, Processes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from stockpot.averaging.weights import Piece
    from stockpot.models.learner import Learner
    from stockpot.streams.data import Task, TaskData

__all__ = ["Memory", "Method", "Parts", "Stored", "TaskRun", "anchor_bytes", "short", "size_of"]


def short(value: Any) -> str:
    """A setting's value as names and figures give it: short, but never another value's."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return ",".join(map(short, value))
    if not isinstance(value, float):
        return str(value)
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


class Memory:
    """What a method keeps from task to task: named tensors in safetensors files, by stage.

    A file is tagged with the stage that wrote it and only earlier stages are read, so that a stage
    that was killed in its last moment and is done again finds what it found the first time.
    """

    def __init__(self, folder: Path, stage: int, processes: Processes = ALONE) -> None:
        self.folder = folder
        self.stage = stage
        self.processes = processes
        """Those that share the run: the main one writes, and says what all of them read."""

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors`` under ``name`` for later stages."""
        if not self.processes.main:
            return
        from stockpot.files import write_tensors

        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.folder / f"{name}-{self.stage:04d}.safetensors", tensors)

    def load_all(self, name: str) -> list[dict[str, Tensor]]:
        """Everything kept under ``name`` by earlier stages, oldest first."""
        files = self.processes.from_main(lambda: [path.name for path in self._files(name)])
        return [self._read(file) for file in files]

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What the latest earlier stage kept under ``name``, or None."""
        files = self.processes.from_main(lambda: [path.name for path in self._files(name)])
        return self._read(files[-1]) if files else None

    def drop_superseded(self, name: str) -> None:
        """Delete what earlier stages kept under ``name`` except the latest that is still needed."""
        for path in self._files(name)[:-1] if self.processes.main else ():
            path.unlink()

    def _read(self, file: str) -> dict[str, Tensor]:
        from stockpot.errors import StockpotError
        from stockpot.files import await_file, read_tensors

        path = self.folder / file
        if await_file(lambda: path if path.exists() else None, self.folder) is None:
            raise StockpotError(
                f"process {self.processes.rank} does not see {path}, which the main process has: "
                "all processes of a run must see the same run folder"
            )
        return read_tensors(path)

    def _files(self, name: str) -> list[Path]:
        files = sorted(self.folder.glob(f"{name}-[0-9][0-9][0-9][0-9].safetensors"))
        return [path for path in files if int(path.stem[-4:]) < self.stage]


@dataclass(frozen=True)
class Stored:
    """Bytes that a method must keep from the tasks so far, beside the model that trains."""

    weights: int = 0
    """Checkpoints: the anchor, the starting model, experts."""
    data: int = 0
    """Training examples, as they lie in memory."""
    other: int = 0
    """What belongs to the method alone: Fisher values."""


@dataclass
class TaskRun:
    """One task being fine-tuned, as its method sees it."""

    stage: int
    """0 for the first task of the stream."""
    last: bool
    """Whether no task follows."""
    tasks: tuple[Task, ...]
    """What is trained now: one task, or all of them at once for multitask."""
    past: tuple[Task, ...]
    """The tasks trained before, in order."""
    learner: Learner
    """The model, and how images become its logits."""
    start: Mapping[str, Tensor]
    """theta_0, the weights before the first task."""
    previous: Mapping[str, Tensor]
    """The weights deployed after the previous task; theta_0 for the first."""
    memory: Memory
    seed: int
    """Seed of this run and stage, for whatever the method draws."""
    total_steps: int
    """T, the number of optimizer steps of this stage."""
    device: torch.device
    loss_scale: float = 1.0
    """What the loss was multiplied by before its gradient was taken (float16 training)."""
    merges: list[dict[str, float]] = field(default_factory=list)
    """The merge events of this stage."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """Scores that were taken while this stage trained."""
    processes: Processes = ALONE
    """Those that share this run; all of them do the same, unless a method splits its work."""
    in_parts: bool = False
    """Whether each process is going to hold parts of the weights, which ``take_parts`` is told."""
    extra_examples: int = 0
    """Forward and backward passes on single examples beside training (Fisher values)."""

    @property
    def model(self) -> nn.Module:
        """The model that trains."""
        return self.learner.module

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put ``weights`` into the model."""
        self.learner.load(weights)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the model's weights as they are now."""
        return self.learner.weights()

    def passes(self, examples: int) -> None:
        """Count forward and backward passes on single examples beside training."""
        self.extra_examples += examples


class Parts(Protocol):
    """What one process has of weights that several processes share."""

    optimizer: object
    """What steps them, for whoever writes them (:func:`find_weights`)."""

    def pieces(self) -> dict[str, Piece]:
        """This process's part of each trainable weight, by name: the true values."""

    def gradient(self, piece: Piece) -> Tensor:
        """Its gradient, of the shape of ``piece.values``; what is added to it counts.

        Only between the backward pass and the optimizer's step.
        """


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def anchor_bytes(run: TaskRun) -> int:
    """Bytes of theta_o as methods pull or average towards it: of the weights that train."""
    from stockpot.averaging.weights import trainable_weights

    return size_of(trainable_weights(run.model).values())


class Method(BaseModel):
    """What is done around ordinary fine-tuning so that less is forgotten: five hooks.

    The default of each hook is plain sequential fine-tuning.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True)

    name: ClassVar[str]
    reference: ClassVar[str] = ""
    joint: ClassVar[bool] = False
    """Whether all tasks are trained at once."""
    starts_from: ClassVar[Literal["previous", "start"]] = "previous"
    """Which weights a task's training starts from: the previous task's, or theta_0."""
    needs_weights: ClassVar[bool] = False
    """Whether it looks at the weights while they train, and so cannot be used with adapters."""
    curve: ClassVar[str | None] = None
    """The setting along which figures draw this method's curve."""
    headline: ClassVar[tuple[str, ...]] = ()
    """The settings that a run's name always gives; others only when they are not the default."""

    def check_tasks(self, names: Sequence[str]) -> None:
        """Refuse a stream that the settings do not fit, before anything is trained.

        Raises:
            ConfigError: saying which setting does not fit.
        """

    def left_out(self) -> tuple[str, ...]:
        """The names of tasks that joint training leaves out."""
        return ()

    def start_task(self, run: TaskRun) -> None:
        """Choose the weights to start from; load what earlier tasks left."""
        run.load(run.previous if self.starts_from == "previous" else run.start)

    def training_data(self, run: TaskRun) -> TaskData:
        """What to train on: as many examples as the tasks have."""
        from stockpot.streams.data import Mixture

        return run.tasks[0].train if len(run.tasks) == 1 else Mixture([t.train for t in run.tasks])

    def take_parts(self, run: TaskRun, parts: Parts) -> None:
        """Go on with this process's parts of the weights (``training.parallel``: fsdp2, zero2/3).

        Called after ``start_task``, which had the whole weights (and where ``run.in_parts`` says
        so need not prepare what only steps need), and before the first step.
        ``before_step`` then adds to :meth:`Parts.gradient` and returns this process's part of the
        penalty. A method that has ``before_step`` or ``after_step`` and does not say here what
        they do to parts trains with ``training.parallel: ddp`` alone.
        """

    def before_step(self, run: TaskRun) -> Tensor | None:
        """May add to the gradients, before they are clipped; returns the penalty's value."""
        return None

    def averages_at(self, step: int) -> bool:
        """Whether ``after_step`` averages the weights at this step."""
        return False

    def after_step(self, run: TaskRun, step: int) -> None:
        """May change the weights, after optimizer step ``step`` (1-based)."""

    def end_task(self, run: TaskRun) -> None:
        """Keep what later tasks need; leave in the model the weights to deploy."""

    def stored(self, run: TaskRun) -> Stored:
        """What must be kept after this task so that another can be trained, were there one.

        Asked after ``end_task``. Every method answers for itself: there is no honest default.
        """
        raise NotImplementedError(f"{type(self).__name__}.stored")

    # What follows says which runs have trained the same thing, so that it is trained once.

    def settings(self) -> dict[str, Any]:
        """All settings, by name."""
        return self.model_dump(mode="json")

    def given(self) -> dict[str, Any]:
        """The settings worth naming: the headline ones, and others that are not the default.

        They follow from the settings' values alone, so that the resolved experiment, with every
        default written out, gives the same names.
        """
        return {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
            or (name in self.headline and getattr(self, name) is not None)
        }

    @property
    def label(self) -> str:
        """``sfa p=0.25 beta=0.5``."""
        return " ".join([self.name, *(f"{k}={short(v)}" for k, v in self.given().items())])

    def training_identity(self, stage: int) -> dict[str, Any]:
        """What, beside data, seed and starting weights, decides the weights trained in a stage.

        Empty for plain fine-tuning, which is what every method does on a first task.
        """
        return {"method": self.name, **self.settings()} if stage else {}

    def deploy_identity(self, stage: int) -> dict[str, Any]:
        """What decides the deployed weights, given the trained ones; empty if they are the same."""
        return {}
