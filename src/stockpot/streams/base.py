"""What the settings of all streams share; loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from stockpot.streams.data import Stream
    from stockpot.streams.text import TextStream

__all__ = ["StreamSettings", "TasksByLabel"]


class StreamSettings(BaseModel):
    """Base of all streams' settings: a name, typed fields, and how to load the data."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    of_text: ClassVar[bool] = False
    """Whether the tasks are for language models."""
    name: str

    def load(self) -> Stream | TextStream:
        """Read the data and cut it into tasks."""
        raise NotImplementedError(f"{type(self).__name__}.load")


class TasksByLabel(StreamSettings):
    """Tasks that are groups of labels: which of them, in which order, how many examples."""

    order: tuple[int, ...] | None = Field(
        None, description="the order of the tasks by number, e.g. [1, 0]; null: as they come"
    )
    train_limit: int | None = Field(
        None, ge=1, description="at most so many training examples a task; null: all"
    )
    test_limit: int | None = Field(
        None, ge=1, description="at most so many test examples a task; null: all"
    )

    @model_validator(mode="after")
    def _order_is_a_choice_of_tasks(self) -> Self:
        self.check_order(self._task_count())
        return self

    def check_order(self, count: int | None) -> None:
        """Whether ``order`` chooses among ``count`` tasks (None: not known before loading).

        Raises:
            ValueError: if it names a task twice, none at all, or one that is not there.
        """
        if self.order is None:
            return
        if sorted(set(self.order)) != sorted(self.order) or not self.order:
            raise ValueError(f"order = {list(self.order)} names a task twice or none at all")
        if min(self.order) < 0 or (count is not None and max(self.order) >= count):
            last = "" if count is None else f" to {count - 1}"
            raise ValueError(f"order = {list(self.order)}: tasks are numbered 0{last}")

    def _task_count(self) -> int | None:
        raise NotImplementedError(f"{type(self).__name__}._task_count")
