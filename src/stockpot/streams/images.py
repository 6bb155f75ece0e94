"""Streams cut from one labelled image data set: by groups of labels, or by permuting pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stockpot.errors import StockpotError
from stockpot.streams.data import ImageData, Scenario, Stream, Task

__all__ = ["LabelledImages", "permuted_stream", "split_stream"]


@dataclass(frozen=True)
class LabelledImages:
    """A whole data set: images (N, C, H, W) and labels (N,), for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def limited(self, train: int | None, test: int | None, groups: Groups) -> LabelledImages:
        """At most ``train`` and ``test`` examples a group of labels, the first ones of each."""
        keep_train = _first_of_each(self.train_labels, groups, train)
        keep_test = _first_of_each(self.test_labels, groups, test)
        return replace(
            self,
            train_images=self.train_images[keep_train],
            train_labels=self.train_labels[keep_train],
            test_images=self.test_images[keep_test],
            test_labels=self.test_labels[keep_test],
        )


Groups = Sequence[tuple[str, Sequence[int]]]
"""The tasks' names, each with the labels that make it up."""


def _first_of_each(labels: Tensor, groups: Groups, limit: int | None) -> Tensor:
    rows = [_rows(labels, members)[:limit] for _, members in groups]
    return torch.cat(rows)


def _rows(labels: Tensor, members: Sequence[int]) -> Tensor:
    return torch.isin(labels, torch.tensor(list(members))).nonzero().flatten()


def split_stream(name: str, data: LabelledImages, groups: Groups, scenario: Scenario) -> Stream:
    """One task per group of labels.

    The scenario decides what the model answers: in ``domain-incremental`` every task uses the same
    labels, a label's place within its group; in ``class-incremental`` one head covers all labels;
    in ``task-incremental`` too, but each example chooses among its own task's labels.

    Raises:
        StockpotError: if groups of different sizes are to share one head.
    """
    members = [label for _, group in groups for label in group]
    if scenario == "domain-incremental":
        labels = len(groups[0][1])
        if any(len(group) != labels for _, group in groups):
            raise StockpotError(
                f"stream {name!r}: domain-incremental tasks share one head, so every task needs "
                "the same number of labels; choose class-incremental or task-incremental"
            )
    else:
        labels = max(members) + 1

    answers = torch.full((max(members) + 1,), -1)
    for _, group in groups:
        for place, label in enumerate(group):
            answers[label] = place if scenario == "domain-incremental" else label

    train_labels, test_labels = answers[data.train_labels], answers[data.test_labels]
    tasks = []
    for task, group in groups:
        allowed = None
        if scenario == "task-incremental":
            allowed = torch.zeros(labels, dtype=torch.bool)
            allowed[list(group)] = True
        train_rows, test_rows = _rows(data.train_labels, group), _rows(data.test_labels, group)
        tasks.append(
            Task(
                name=task,
                train=ImageData(data.train_images, train_labels, train_rows, allowed),
                test=ImageData(data.test_images, test_labels, test_rows, allowed),
            )
        )
    return _stream(name, scenario, tasks, labels, data)


def permuted_stream(name: str, data: LabelledImages, tasks: int, labels: int, seed: int) -> Stream:
    """The same labels ``tasks`` times, each task with its own order of the pixels.

    The first task keeps the pixels where they are (Goodfellow et al. 2013). Always
    domain-incremental: the labels mean the same in every task.
    """
    pixels = data.train_images[0].numel()
    # One list of rows for all tasks: what a task has of its own is its permutation, 6 kB.
    train_rows = torch.arange(len(data.train_images))
    test_rows = torch.arange(len(data.test_images))
    result = []
    for number in range(tasks):
        # A generator per task: the first ten of two hundred tasks are the ten of a shorter stream.
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        order = torch.randperm(pixels, generator=generator) if number else None
        result.append(
            Task(
                name=f"permutation-{number}",
                train=ImageData(data.train_images, data.train_labels, train_rows, None, order),
                test=ImageData(data.test_images, data.test_labels, test_rows, None, order),
            )
        )
    return _stream(name, "domain-incremental", result, labels, data)


def _stream(
    name: str, scenario: Scenario, tasks: list[Task], labels: int, data: LabelledImages
) -> Stream:
    channels, height, width = data.train_images.shape[1:]
    shape = (int(channels), int(height), int(width))
    return Stream(name, scenario, tuple(tasks), labels, shape)
