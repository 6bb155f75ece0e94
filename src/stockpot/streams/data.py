"""Examples in memory, fetched a batch at a time, and the tasks and streams made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stockpot.errors import StockpotError
from stockpot.streams.text import Benchmark

__all__ = ["Batch", "ImageData", "Mixture", "Scenario", "Stream", "Task", "TaskData", "digest_of"]

Scenario = Literal["class-incremental", "task-incremental", "domain-incremental"]


class Batch(TypedDict):
    """One batch of labelled images."""

    pixel_values: Tensor
    """(B, C, H, W); uint8 in 0 .. 255, or float in [0, 1]."""
    labels: Tensor
    """(B,) int64."""
    allowed: Tensor | None
    """(B, labels) bool: the labels that each example chooses from; None: all of them."""


class TaskData(Protocol):
    """Examples of one kind, fetched a batch at a time."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Any:
        """The batch of these examples, a mapping from names to tensors."""

    def subset(self, indices: Tensor) -> TaskData:
        """These examples."""

    def fingerprint(self, known: dict[int, bytes] | None = None) -> str:
        """SHA-256 of what the examples are."""

    def lengths(self) -> Tensor | None:
        """(N,) how long each example is; None where all are alike."""

    def nbytes(self) -> int:
        """Bytes of the examples as they are stored, whether or not others share them."""

    def joined(self, batches: Sequence[Any]) -> Any:
        """Several batches of this kind as one."""


def digest_of(tensors: Sequence[Tensor | None], known: dict[int, bytes] | None = None) -> str:
    """SHA-256 of some tensors: their kinds, shapes and values.

    Args:
        tensors: None stands for one that is not there.
        known: digests of tensors by their place in memory, filled and used by calls that share it:
            the images of two hundred tasks are hashed once.
    """
    known = {} if known is None else known
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        # A part of a tensor may begin where the tensor does.
        place = hash((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()))
        if place not in known:
            part = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            part.update(tensor.contiguous().numpy().data)
            known[place] = part.digest()
        digest.update(known[place])
    return digest.hexdigest()


class ImageData(Dataset[Batch]):
    """Labelled images that share one tensor in memory.

    A subset or a permutation is a view: two hundred tasks over the same images cost two hundred
    lists of row numbers and permutations, not two hundred copies.

    Args:
        images: (N, C, H, W), uint8 or float in [0, 1].
        labels: (N,) int64, the labels the model is to give.
        rows: which of the N images belong to this data set; all by default.
        allowed: (labels,) bool, the labels to choose from (task-incremental scenario).
        permutation: (C*H*W,) int64, an order of the pixels (the permuted stream).
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        rows: Tensor | None = None,
        allowed: Tensor | None = None,
        permutation: Tensor | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.rows = torch.arange(len(images)) if rows is None else rows
        self.allowed = allowed
        self.permutation = permutation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """The batch of these examples (PyTorch's fetcher calls this once a batch)."""
        # index_select is several times as fast as indexing with brackets.
        rows = self.rows.index_select(0, torch.as_tensor(indices))
        images = self.images.index_select(0, rows)
        if self.permutation is not None:
            images = images.flatten(1).index_select(1, self.permutation).view_as(images)
        allowed = None if self.allowed is None else self.allowed.expand(len(rows), -1)
        return {
            "pixel_values": images,
            "labels": self.labels.index_select(0, rows),
            "allowed": allowed,
        }

    def subset(self, indices: Tensor) -> ImageData:
        """These examples, in this order, over the same images."""
        rows = self.rows[indices]
        return ImageData(self.images, self.labels, rows, self.allowed, self.permutation)

    def fingerprint(self, known: dict[int, bytes] | None = None) -> str:
        """SHA-256 of what the examples are (:func:`digest_of` says what ``known`` is)."""
        parts = (self.images, self.labels, self.rows, self.allowed, self.permutation)
        return digest_of(parts, known)

    def lengths(self) -> None:
        """Images are all alike."""
        return

    def nbytes(self) -> int:
        """Pixels and labels of these examples, even where tasks share the images."""
        pixels = self.images[0].numel() * self.images.element_size()
        return len(self) * (pixels + self.labels.element_size())

    def joined(self, batches: Sequence[Batch]) -> Batch:
        """Several batches as one; if one may choose any label, all may."""
        allowed = [batch["allowed"] for batch in batches]
        return {
            "pixel_values": torch.cat([batch["pixel_values"] for batch in batches]),
            "labels": torch.cat([batch["labels"] for batch in batches]),
            "allowed": None
            if any(mask is None for mask in allowed)
            else torch.cat([mask for mask in allowed if mask is not None]),
        }


class Mixture(Dataset[Any]):
    """Several data sets as one: the examples of the first, then those of the second, and so on."""

    def __init__(self, parts: Sequence[TaskData]) -> None:
        self.parts = [part for part in parts if len(part)]
        self._ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.parts else 0

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Any:
        """The batch of these examples; within it, examples of one part stand together."""
        index = torch.as_tensor(indices)
        owner = torch.searchsorted(self._ends, index, right=True)
        batches: list[Any] = []
        for number in owner.unique().tolist():
            begin = int(self._ends[number - 1]) if number else 0
            batches.append(self.parts[number].__getitems__(index[owner == number] - begin))
        return batches[0] if len(batches) == 1 else self.joined(batches)

    def subset(self, indices: Tensor) -> Mixture:
        """These examples; they are ordered by part."""
        owner = torch.searchsorted(self._ends, indices, right=True)
        begins = torch.cat([torch.zeros(1, dtype=torch.int64), self._ends[:-1]])
        return Mixture(
            [
                part.subset(indices[owner == number] - begins[number])
                for number, part in enumerate(self.parts)
            ]
        )

    def fingerprint(self, known: dict[int, bytes] | None = None) -> str:
        """SHA-256 of what the examples are."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(part.fingerprint(known).encode())
        return digest.hexdigest()

    def lengths(self) -> Tensor | None:
        """The parts' lengths, one after the other."""
        lengths = [length for part in self.parts if (length := part.lengths()) is not None]
        return torch.cat(lengths) if len(lengths) == len(self.parts) and lengths else None

    def nbytes(self) -> int:
        """The parts' together."""
        return sum(part.nbytes() for part in self.parts)

    def joined(self, batches: Sequence[Any]) -> Any:
        """As the parts join theirs: they are all of one kind."""
        return self.parts[0].joined(batches)


@dataclass(frozen=True)
class Task:
    """One data set to learn, with the data it is scored on."""

    name: str
    train: TaskData
    test: TaskData
    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)
    """What the task is scored on beside its test examples, by name."""


@dataclass(frozen=True)
class Stream:
    """The ordered tasks, and what the model needs to know of them."""

    name: str
    scenario: Scenario
    tasks: tuple[Task, ...]
    labels: int | None = None
    """How many labels the model chooses from; None for a stream of text."""
    image_shape: tuple[int, int, int] | None = None
    """(C, H, W); None for a stream of text."""
    notes: tuple[str, ...] = ()
    """What the user should know of the data: what was cut, or left out."""

    def __post_init__(self) -> None:
        """Refuse what would fail later and less clearly: empty tasks, labels out of range."""
        if not self.tasks:
            raise StockpotError(f"stream {self.name!r} has no tasks")
        seen: set[tuple[int, ...]] = set()
        for task in self.tasks:
            for split, data in (("training", task.train), ("test", task.test)):
                self._check(task.name, split, data, seen)

    def _check(self, task: str, split: str, data: TaskData, seen: set[tuple[int, ...]]) -> None:
        where = f"stream {self.name!r}, task {task!r}"
        if len(data) == 0:
            raise StockpotError(f"{where} has no {split} examples: every task needs at least one")
        if not isinstance(data, ImageData) or self.labels is None:
            return
        same = id(data.labels), id(data.rows), id(data.allowed)
        if same in seen:  # two hundred permutations of the same images have the same labels
            return
        seen.add(same)
        labels = data.labels[data.rows]
        bad = (labels < 0) | (labels >= self.labels)
        if data.allowed is not None:
            bad |= ~data.allowed[labels.clamp(0, self.labels - 1)]
        if bad.any():
            row = int(bad.nonzero()[0])
            raise StockpotError(
                f"{where}, {split} example {row}: label {int(labels[row])} is out of range; the "
                f"model has labels 0 to {self.labels - 1}"
                + ("" if data.allowed is None else " and this task only some of them")
            )

    def fingerprint(self) -> str:
        """SHA-256 over the scenario and every task's examples."""
        digest = hashlib.sha256(f"{self.scenario} {self.labels} {self.image_shape}".encode())
        known: dict[int, bytes] = {}
        for task in self.tasks:
            digest.update(task.name.encode())
            for data in (task.train, task.test):
                digest.update(data.fingerprint(known).encode())
            for name, benchmark in task.benchmarks.items():
                digest.update(f"{name} {benchmark.fingerprint()}".encode())
        return digest.hexdigest()
