"""Settings of the streams of photographs: CIFAR-100, Food-101 and the user's own images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stockpot.errors import ConfigError, nearest
from stockpot.streams.base import TasksByLabel

if TYPE_CHECKING:
    from stockpot.streams.data import Stream
    from stockpot.streams.encoded import LabelledFiles
    from stockpot.streams.images import Groups

__all__ = ["Cifar100", "Food101", "ImageSplit", "Images"]

_USUAL_LABELS = 5
"""Labels a task where nothing else is said: the paper's (section 4)."""
_LONGEST_NAME = 30


class ImageSplit(TasksByLabel):
    """A data set of labelled images, cut into tasks by label.

    The paper does not say what the model answers with in its twenty tasks. The default here is
    ``class-incremental``, one head over all labels and the task not told: it is the scenario of the
    published numbers for ViT-B/16 on split CIFAR-100, it needs no knowledge beyond the image, and
    nothing in the paper says that its model is told the task. With ``task-incremental`` the same
    head is masked to the task's labels, which is far easier.
    """

    path: str = Field(description="hub id, or a local folder with the same columns")
    tasks: int | None = Field(
        None,
        ge=1,
        description="number of tasks, as equal as they come; null: about five labels each",
    )
    labels_per_task: int | None = Field(
        None, ge=1, description="labels of a task, the last may have fewer; null: see tasks"
    )
    labels: int | None = Field(
        None, ge=2, description="only the first so many labels take part; null: all"
    )
    label_order_seed: int | None = Field(
        None,
        ge=0,
        lt=2**32,
        description="seed of the order in which labels are grouped into tasks (that of NumPy's "
        "RandomState, as elsewhere in the field); null: in their natural order",
    )
    scenario: Literal["class-incremental", "task-incremental", "domain-incremental"] = Field(
        "class-incremental",
        description="class-incremental: one head over all labels; task-incremental: the same head, "
        "each task choosing among its own labels; domain-incremental: one shared head, the label's "
        "place in its task",
    )
    size: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="images are resized to size x size pixels when loaded; null: as they are, "
        "which must be one size",
    )

    known_labels: ClassVar[int | None] = None
    """How many labels the data set has, where that is known before it is read."""

    @model_validator(mode="after")
    def _labels_can_be_cut(self) -> Self:
        if self.tasks is not None and self.labels_per_task is not None:
            raise ValueError(
                f"tasks = {self.tasks} and labels_per_task = {self.labels_per_task}: give one, the "
                "other follows"
            )
        if self.known_labels is not None:
            self._sizes(self.known_labels)
        return self

    def _task_count(self) -> int | None:
        return None if self.known_labels is None else len(self._sizes(self.known_labels))

    def _sizes(self, available: int) -> list[int]:
        """How many labels each task has.

        Args:
            available: the labels of the data set.

        Raises:
            ValueError: if they cannot be cut so, with what can be done.
        """
        count = available if self.labels is None else self.labels
        if count > available:
            raise ValueError(f"labels = {count}: the data set has {available}")
        if self.labels_per_task is not None:
            whole, rest = divmod(count, self.labels_per_task)
            sizes = [self.labels_per_task] * whole + [rest] * (rest > 0)
        else:
            tasks = self.tasks or max(2, round(count / _USUAL_LABELS))
            if tasks > count:
                raise ValueError(f"tasks = {tasks}: {count} labels make at most {count} tasks")
            sizes = [count // tasks + (number < count % tasks) for number in range(tasks)]
        if self.scenario == "domain-incremental" and len(set(sizes)) > 1:
            possible = [str(n) for n in range(2, count // 2 + 1) if count % n == 0]
            raise ValueError(
                f"scenario = domain-incremental: tasks share one head, so all need the same number "
                f"of labels, and {count} labels do not make {len(sizes)} equal tasks; "
                + (f"tasks may be {', '.join(possible)}" if possible else "choose another scenario")
            )
        if self.scenario != "class-incremental" and min(sizes) == 1:
            raise ValueError(
                f"scenario = {self.scenario}: a task of one label leaves nothing to choose; make "
                "fewer tasks, or choose class-incremental"
            )
        return sizes

    def groups(self, names: Sequence[str]) -> Groups:
        """The tasks in the order asked for, each with its labels.

        Args:
            names: of all labels of the data set, in their natural order.

        Raises:
            ValueError: if the labels cannot be cut so.
        """
        import numpy as np

        sizes = self._sizes(len(names))
        self.check_order(len(sizes))
        labels = list(range(sum(sizes)))
        if self.label_order_seed is not None:
            # The legacy generator: its numbers are frozen, and class orders are published as seeds.
            labels = np.random.RandomState(self.label_order_seed).permutation(labels).tolist()
        ends = np.cumsum(sizes).tolist()
        members = [tuple(labels[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
        groups = tuple(zip(_task_names(members, names), members, strict=True))
        return groups if self.order is None else [groups[number] for number in self.order]

    def _files(self) -> tuple[LabelledFiles, LabelledFiles, tuple[str, ...], tuple[str, ...]]:
        """Training and test images as they are encoded, the labels' names, and notes."""
        raise NotImplementedError(f"{type(self).__name__}._files")

    def load(self) -> Stream:
        """Choose the images, decode them, and cut them into one task per group of labels."""
        from dataclasses import replace

        from stockpot.streams.decoding import decode
        from stockpot.streams.images import LabelledImages, split_stream

        train, test, names, notes = self._files()
        try:
            groups = self.groups(names)
            tasks = len(self._sizes(len(names)))
        except ValueError as error:
            raise ConfigError(f"stream {self.name}, {self.path}: {error}") from error
        train = train.limited(groups, self.train_limit)
        test = test.limited(groups, self.test_limit)
        remedy = "; stream.size = 224, say, resizes them all" if self.size is None else ""
        train_images, test_images = decode((train, test), self.size, remedy)
        data = LabelledImages(train_images, train.labels, test_images, test.labels)
        stream = split_stream(f"{self.name}/{tasks}-tasks", data, groups, self.scenario)
        return replace(stream, notes=notes)


def _task_names(members: Sequence[Sequence[int]], names: Sequence[str]) -> list[str]:
    """``cat+dog`` where that is short; else ``0-4``, or ``task-0`` if the labels are no range."""
    spelled = ["+".join(names[label] for label in labels) for labels in members]
    if max(map(len, spelled)) <= _LONGEST_NAME and len(set(spelled)) == len(spelled):
        return spelled
    if any(list(labels) != list(range(labels[0], labels[-1] + 1)) for labels in members):
        return [f"task-{number}" for number in range(len(members))]
    return [
        f"{labels[0]}-{labels[-1]}" if len(labels) > 1 else f"{labels[0]}" for labels in members
    ]


class Cifar100(ImageSplit):
    """CIFAR-100 (hub id uoft-cs/cifar100): 60,000 photographs of 32x32 pixels, 100 labels."""

    name: Literal["cifar100"] = "cifar100"
    path: str = Field(
        "uoft-cs/cifar100", description="hub id, or a local folder with the same columns"
    )
    known_labels: ClassVar[int | None] = 100

    def _files(self) -> tuple[LabelledFiles, LabelledFiles, tuple[str, ...], tuple[str, ...]]:
        from stockpot.streams.hub import open_hub_images

        return open_hub_images(self.path, image="img", label="fine_label", labels=100)


class Food101(ImageSplit):
    """Food-101 (hub id ethz/food101): 101,000 photographs of dishes, 101 labels.

    The photographs are of many sizes, so ``size`` has to be set (224 for most models) unless a copy
    of one size is read. The hub's split ``validation`` is the test set.
    """

    name: Literal["food101"] = "food101"
    path: str = Field("ethz/food101", description="hub id, or a local folder with the same columns")
    labels: int | None = Field(
        100,
        ge=2,
        description="only the first so many labels take part (the paper leaves out label 100); "
        "null: all 101",
    )
    known_labels: ClassVar[int | None] = 101

    def _files(self) -> tuple[LabelledFiles, LabelledFiles, tuple[str, ...], tuple[str, ...]]:
        from stockpot.streams.hub import open_hub_images

        return open_hub_images(self.path, image="image", label="label", labels=101)


class Images(ImageSplit):
    """Your own images: a folder train/<label>/*.png beside test/<label>/, or any data set.

    Labels are the names of the folders, sorted (or those of the column). Without a split test,
    validation, val or valid, a share of each label is held out.
    """

    name: Literal["images"] = "images"
    path: str = Field(description="image folder, hub id, or local data-set folder")
    config: str | None = Field(None, description="configuration of a hub data set that has several")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="what the columns of a data set are called: {image: img, label: species}",
    )
    splits: dict[str, str] = Field(
        default_factory=dict,
        description="what the splits (or their folders) are called: {train: training, test: dev}",
    )
    test_share: float = Field(
        0.2, gt=0, lt=1, description="share of each label held out where there is one split only"
    )

    @field_validator("columns", "splits")
    @classmethod
    def _known_roles(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        roles = ("image", "label") if info.field_name == "columns" else ("train", "test")
        for role in value:
            if role not in roles:
                raise ValueError(f"unknown key {role!r}{nearest(role, roles)}")
        return value

    def _files(self) -> tuple[LabelledFiles, LabelledFiles, tuple[str, ...], tuple[str, ...]]:
        from stockpot.streams.hub import open_hub_images
        from stockpot.streams.image_folder import is_image_folder, open_image_folder
        from stockpot.streams.source import resolve_source

        place = Path(resolve_source(self.path)).expanduser()
        if (place.is_absolute() or self.path.startswith(".")) and not place.is_dir():
            raise ConfigError(f"stream.path = {self.path}: there is no such folder")
        if is_image_folder(place, self.splits):
            return open_image_folder(place, self.splits, self.test_share)
        return open_hub_images(
            self.path,
            image=self.columns.get("image", "image"),
            label=self.columns.get("label", "label"),
            splits=self.splits,
            config=self.config,
            test_share=self.test_share,
        )
