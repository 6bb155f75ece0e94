"""Labelled images as they lie on disk: chosen by their labels before any is decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from stockpot.errors import StockpotError

if TYPE_CHECKING:
    from stockpot.streams.images import Groups

__all__ = ["EncodedImages", "LabelledFiles", "hold_out", "test_split"]

_TEST_SPLITS = ("test", "validation", "val", "valid")


class EncodedImages(Protocol):
    """Image files by number, wherever they are."""

    def name(self, row: int) -> str:
        """Where image ``row`` is from, for an error message."""

    def read(self, rows: Sequence[int]) -> list[bytes | Path]:
        """These files, or where they are; ``rows`` ascend."""

    def fingerprint(self) -> str:
        """Changes when the files do."""


@dataclass(frozen=True)
class LabelledFiles:
    """Some of the images of a source, with their labels."""

    source: EncodedImages
    rows: Tensor
    """(N,) int64, ascending: which images of the source."""
    labels: Tensor
    """(N,) int64."""

    def chosen(self, places: Tensor) -> LabelledFiles:
        """Those at these places."""
        return replace(self, rows=self.rows[places], labels=self.labels[places])

    def limited(self, groups: Groups, limit: int | None) -> LabelledFiles:
        """Those of the groups' labels, at most ``limit`` a group.

        A limit takes the first image of each label, then the second of each, and so on: data sets
        are often sorted by label, and a task must not lose some of its labels.
        """
        if not groups or not len(self.labels):
            return self.chosen(torch.zeros(0, dtype=torch.int64))
        taken = []
        for _, members in groups:
            places = [(self.labels == label).nonzero().flatten() for label in members]
            turn = torch.cat([torch.arange(len(some)) for some in places])
            first = turn.argsort(stable=True)[:limit]
            taken.append(torch.cat(places)[first])
        return self.chosen(torch.cat(taken).sort()[0])


def hold_out(
    files: LabelledFiles, share: float, names: Sequence[str], where: str
) -> tuple[LabelledFiles, LabelledFiles]:
    """Split by label: ``round(share * n)`` of a label's n images, one at least, are for testing.

    The draw is the same in every run and for every seed of an experiment (a generator of its own,
    seed 0).

    Raises:
        StockpotError: if a label has a single image.
    """
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(len(files.labels), dtype=torch.bool)
    for label, name in enumerate(names):
        places = (files.labels == label).nonzero().flatten()
        if len(places) == 1:
            raise StockpotError(
                f"{where}: label {name!r} has one image; two are needed, one to train and one to "
                "test (there is no test split)"
            )
        count = min(max(1, round(share * len(places))), len(places) - 1) if len(places) else 0
        held[places[torch.randperm(len(places), generator=generator)[:count]]] = True
    return files.chosen((~held).nonzero().flatten()), files.chosen(held.nonzero().flatten())


def test_split(present: Sequence[str], asked: Mapping[str, str]) -> str | None:
    """The name of the test split: the one asked for, else the first usual name that is there."""
    if "test" in asked:
        return asked["test"]
    return next((name for name in _TEST_SPLITS if name in present), None)
