"""What an experiment may say about its stream: typed, checked before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from stockpot.streams.base import StreamSettings, TasksByLabel
from stockpot.streams.language_settings import Domains, Instructions, OwnTasks
from stockpot.streams.vision import Cifar100, Food101, Images

if TYPE_CHECKING:
    from stockpot.streams.data import Stream
    from stockpot.streams.images import Groups, LabelledImages

__all__ = ["STREAMS", "DigitSplit", "Digits", "Mnist", "StreamSettings"]

EVEN_ODD: Groups = (("even", (0, 2, 4, 6, 8)), ("odd", (1, 3, 5, 7, 9)))
PAIRS: Groups = tuple((f"{a}-{a + 1}", (a, a + 1)) for a in range(0, 10, 2))


class DigitSplit(TasksByLabel):
    """Ten digits, cut into tasks by label (or, for MNIST, by permuting pixels)."""

    split: Literal["even-odd", "pairs"] = Field(
        "even-odd",
        description="even-odd: five even labels, then five odd ones; pairs: 0-1, 2-3, .. 8-9",
    )
    scenario: Literal["class-incremental", "task-incremental", "domain-incremental"] = Field(
        "domain-incremental",
        description="domain-incremental: one shared head, the label's place in its task (digit // "
        "2 for even-odd); class-incremental: one ten-way head; task-incremental: the same head, "
        "each task choosing among its own labels",
    )

    def groups(self) -> Groups:
        """The tasks in the order asked for, each with its labels."""
        groups = EVEN_ODD if self.split == "even-odd" else PAIRS
        return groups if self.order is None else [groups[number] for number in self.order]

    def _task_count(self) -> int:
        return 2 if self.split == "even-odd" else 5

    def _images(self) -> LabelledImages:
        raise NotImplementedError(f"{type(self).__name__}._images")

    def load(self) -> Stream:
        """Read the images and cut them into one task per group of labels."""
        from stockpot.streams.images import split_stream

        groups = self.groups()
        data = self._images().limited(self.train_limit, self.test_limit, groups)
        return split_stream(f"{self.name}/{self.split}", data, groups, self.scenario)


class Digits(DigitSplit):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels, embedded: no download."""

    name: Literal["digits"] = "digits"

    def _images(self) -> LabelledImages:
        from stockpot.streams.digits import load_digits

        return load_digits()


class Mnist(DigitSplit):
    """MNIST (hub id ylecun/mnist): 70,000 handwritten digits, 28x28 pixels."""

    name: Literal["mnist"] = "mnist"
    split: Literal["even-odd", "pairs", "permuted"] = Field(  # type: ignore[assignment]
        "even-odd",
        description="even-odd: five even labels, then five odd ones; pairs: 0-1, 2-3, .. 8-9; "
        "permuted: all ten labels in each task, the pixels in another order",
    )
    path: str = Field("ylecun/mnist", description="hub id, or a local folder with the same columns")
    tasks: int | None = Field(
        None, ge=1, description="number of tasks of the permuted split (default 10)"
    )
    seed: int = Field(0, ge=0, description="seed of the permutations (the same in every run)")

    @model_validator(mode="after")
    def _permuted_or_not(self) -> Self:
        if self.split == "permuted" and self.scenario != "domain-incremental":
            raise ValueError(
                f"scenario = {self.scenario}: the permuted split is domain-incremental, its labels "
                "mean the same in every task"
            )
        if self.split != "permuted" and self.tasks is not None:
            raise ValueError(f"tasks = {self.tasks} belongs to split: permuted")
        return self

    def _task_count(self) -> int:
        return (self.tasks or 10) if self.split == "permuted" else super()._task_count()

    def _images(self) -> LabelledImages:
        from stockpot.streams.hub import load_hub_images

        return load_hub_images(self.path, labels=10)

    def load(self) -> Stream:
        """Read MNIST and cut it by labels, or permute its pixels."""
        if self.split != "permuted":
            return super().load()
        from dataclasses import replace

        from stockpot.streams.images import permuted_stream

        everything = (("all", tuple(range(10))),)
        data = self._images().limited(self.train_limit, self.test_limit, everything)
        stream = permuted_stream(
            f"{self.name}/{self.split}", data, self._task_count(), 10, self.seed
        )
        if self.order is None:
            return stream
        return replace(stream, tasks=tuple(stream.tasks[number] for number in self.order))


STREAMS: dict[str, type[StreamSettings]] = {
    "digits": Digits,
    "mnist": Mnist,
    "cifar100": Cifar100,
    "food101": Food101,
    "images": Images,
    "domains": Domains,
    "instructions": Instructions,
    "tasks": OwnTasks,
}
