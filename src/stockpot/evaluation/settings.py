"""What an experiment may say about how models are scored: typed, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stockpot.streams.draws import limited

__all__ = ["EvaluationSettings", "Programs"]


@dataclass(frozen=True)
class Programs:
    """Whether programs that models write may be run. Never from a file: files come from others."""

    run: bool = False
    allow_weak: bool = False
    """Whether limits alone will do, where the machine offers no isolation."""
    skip: bool = False
    """Whether to leave such benchmarks out instead of refusing the experiment."""


class EvaluationSettings(BaseModel):
    """How models are scored, and when."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int | None = Field(
        None,
        ge=1,
        le=2**31,
        description="examples scored at a time; null: 1000 images, 32 texts",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="bfloat16 scores by autocast: several times as fast on a GPU, and rounded",
    )
    every: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="score during training too, every so many optimizer steps, or below 1 every "
        "such share of a task's steps; null: only after each task",
    )
    tasks: Literal["all", "recent", "sample"] = Field(
        "all",
        description="what is scored after (and during) a task: all tasks; the tasks_limit latest; "
        "or the current one and a sample of the earlier ones. After the last task always all",
    )
    tasks_limit: int = Field(
        10,
        ge=1,
        description="how many tasks recent and sample score, the current one included",
    )
    every_tasks: int = Field(
        1,
        ge=1,
        description="score other tasks than the current one only after every so many tasks",
    )
    merges: bool = Field(
        False, description="score just before and just after every merge event too"
    )
    during_limit: int | None = Field(
        500, ge=1, description="examples per task for scores during training; null: all"
    )
    kl: int = Field(
        256,
        ge=0,
        description="examples of the new task to take the forward KL divergence from the anchor "
        "on, after each task; 0: do not",
    )
    line: int = Field(
        0,
        ge=0,
        description="points on the straight line from the anchor to the deployed weights at which "
        "the tasks' held-out loss is taken, after each task; at least 3; 0: do not",
    )
    line_limit: int | None = Field(
        200, ge=1, description="examples per task for the points of the line; null: all"
    )
    max_new_tokens: int = Field(
        512, ge=1, description="the longest generated answer, in tokens (GSM8K, HumanEval)"
    )
    shots: int = Field(5, ge=0, le=163, description="solved problems in front of each of HumanEval")
    samples: int = Field(
        1, ge=1, description="programs per problem of HumanEval; more than 1 are drawn by chance"
    )
    pass_at: tuple[int, ...] = Field((1,), description="k of HumanEval's pass@k, each <= samples")
    temperature: float = Field(
        0.8, gt=0, allow_inf_nan=False, description="of the draws if samples > 1"
    )
    lm_eval: tuple[str, ...] = Field(
        (), description="tasks of lm-evaluation-harness to score too, by name (stockpot[lm-eval])"
    )
    lm_eval_include: str | None = Field(
        None, description="a folder with task files of your own for lm-evaluation-harness"
    )
    lm_eval_limit: int | None = Field(None, ge=1, description="documents per such task; null: all")
    lm_eval_shots: int | None = Field(
        None, ge=0, description="solved examples in front of each; null: as the task says"
    )

    @field_validator("line")
    @classmethod
    def _both_ends_and_between(cls, line: int) -> int:
        if 0 < line < 3:
            raise ValueError(
                f"line = {line}: a line needs at least 3 points, its ends and one between; 0 "
                "leaves it out"
            )
        return line

    @model_validator(mode="after")
    def _k_within_samples(self) -> Self:
        if not self.pass_at or any(k < 1 or k > self.samples for k in self.pass_at):
            raise ValueError(
                f"pass_at = {list(self.pass_at)}: each k is from 1 to samples = {self.samples}"
            )
        return self

    @property
    def thinned(self) -> bool:
        """Whether some scores are left out after some tasks."""
        return self.tasks != "all" or self.every_tasks > 1

    def tasks_during(self, current: int, count: int, seed: int) -> list[int]:
        """Which tasks are scored while task ``current`` is trained, in the stream's order.

        The current one is always among them. A sample is drawn by the seed and the task, so that
        it is the same for all methods and after a resume; other seeds draw others.

        Args:
            current: the task that is trained, by number.
            count: tasks of the stream.
            seed: the run's.
        """
        if (current + 1) % self.every_tasks:
            return [current]
        if self.tasks == "all":
            return list(range(count))
        if self.tasks == "recent":
            return list(range(max(0, current + 1 - self.tasks_limit), current + 1))
        drawn = limited(range(current), self.tasks_limit - 1, seed * 1_000_003 + current)
        return [*drawn, current]

    def tasks_after(self, current: int, count: int, seed: int) -> list[int]:
        """Which tasks are scored after task ``current``: all of them after the last."""
        last = current == count - 1
        return list(range(count)) if last else self.tasks_during(current, count, seed)

    def tasks_at_start(self, count: int) -> list[int]:
        """Which tasks the starting model is scored on.

        Without the scores on tasks to come there is no forward transfer, and no use for those of
        the starting model on all tasks; the one on the first task is where its curve begins.
        """
        return list(range(count)) if self.tasks == "all" else [0]

    def steps_between(self, total: int) -> int | None:
        """Optimizer steps between two scores during training of a task of ``total`` steps."""
        if self.every is None:
            return None
        return max(1, round(self.every * total if self.every < 1 else self.every))
