"""What an experiment may say about training: typed, checked before anything is loaded."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["TrainingSettings"]


class TrainingSettings(BaseModel):
    """How each task is fine-tuned; the same for all methods."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(1, ge=1, description="passes over each task's training examples")
    steps: int | None = Field(
        None, ge=1, description="optimizer steps per task, instead of epochs; null: by epochs"
    )
    batch_size: int = Field(
        32, ge=1, le=2**31, description="examples per micro-batch, of all processes together"
    )
    gradient_accumulation: int = Field(
        1, ge=1, description="micro-batches per optimizer step (steps are optimizer steps)"
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="a fresh one for every task"
    )
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False, description="peak learning rate")
    weight_decay: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="for adamw (decoupled) and sgd (L2)"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="for sgd")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate over a task: constant, or down to 0"
    )
    warmup: float = Field(
        0.0, ge=0, lt=1, description="share of a task's steps over which the rate rises from 0"
    )
    max_grad_norm: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="clip gradients, penalties included, to this norm; null: do not",
    )
    group_by_length: bool = Field(
        True,
        description="text: batches of examples of similar length, which leaves little padding "
        "(each 50 batches are sorted together; the order still follows from the seed)",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="bfloat16 and float16 train by autocast; weights stay float32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is one")
    parallel: Literal["ddp", "fsdp2", "zero2", "zero3"] = Field(
        "ddp",
        description="how one run is spread where a launcher starts several processes for it: ddp "
        "keeps weights and optimizer whole in each, fsdp2 and zero3 (DeepSpeed) a share of both, "
        "zero2 a share of the optimizer. batch_size stays the size of the whole batch. The weights "
        "are those of one process but for rounding, and with dropout for its draws",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of one run; small models are fastest with 1; null: all"
    )
    checkpoint_seconds: float | None = Field(
        120.0,
        ge=0,
        description="seconds of training between checkpoints within a task; 0: every step; "
        "null: none (a killed task starts again)",
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        (), description="where to show losses, scores and merges meanwhile; each needs its extra"
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_none(cls, value: Any) -> Any:
        """Trainer's own forms: ``wandb`` is ``[wandb]``, and ``none`` is none."""
        if value is None or value == "none":
            return ()
        names = [value] if isinstance(value, str) else value
        listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        return tuple(dict.fromkeys(names)) if listed else names

    @model_validator(mode="after")
    def _options_fit_the_optimizer(self) -> Self:
        if self.optimizer != "sgd" and self.momentum:
            raise ValueError(f"momentum = {self.momentum} belongs to optimizer: sgd")
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError(
                f"weight_decay = {self.weight_decay} with optimizer: adam; use adamw, whose decay "
                "is decoupled from the gradient"
            )
        if self.precision == "float16" and self.device == "cpu":
            raise ValueError("precision = float16 needs a GPU; on a CPU use bfloat16 or float32")
        return self

    def steps_for(self, examples: int) -> int:
        """T, the number of optimizer steps of a task with so many training examples."""
        if self.steps is not None:
            return self.steps
        batches = math.ceil(examples / self.batch_size)
        return self.epochs * math.ceil(batches / self.gradient_accumulation)

    def examples_in(self, steps: int, examples: int) -> int:
        """How many examples go through so many optimizer steps on a task with ``examples``.

        The last micro-batch of an epoch may be short, and its last step have fewer. (Of text in an
        epoch that is not finished the short one may come early: then a few less went through.)
        """
        batches = math.ceil(examples / self.batch_size)
        epochs, rest = divmod(steps, math.ceil(batches / self.gradient_accumulation))
        started = rest * self.gradient_accumulation * self.batch_size
        return epochs * examples + min(examples, started)

    def identity(self) -> dict[str, Any]:
        """What decides the weights that training gives."""
        free = {"checkpoint_seconds", "device", "threads", "report_to", "parallel"}
        return self.model_dump(mode="json", exclude=free)
