"""Images in folders named after their labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stockpot.errors import StockpotError
from stockpot.streams.encoded import LabelledFiles, hold_out, test_split

__all__ = ["is_image_folder", "open_image_folder"]

_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)


@dataclass(frozen=True)
class _Files:
    """Image files by number."""

    paths: tuple[Path, ...]

    def name(self, row: int) -> str:
        return str(self.paths[row])

    def read(self, rows: Sequence[int]) -> list[bytes | Path]:
        return [self.paths[row] for row in rows]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            stat = path.stat()
            digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def is_image_folder(place: Path, splits: Mapping[str, str]) -> bool:
    """Whether there are images at ``<split>/<label>/`` or at ``<label>/``."""
    if not place.is_dir():
        return False
    train = place / splits.get("train", "train")
    tops = [train] if train.is_dir() else [place]
    return any(True for top in tops for label in _folders(top) for _ in _images(label))


def open_image_folder(
    place: Path, splits: Mapping[str, str], test_share: float
) -> tuple[LabelledFiles, LabelledFiles, tuple[str, ...], tuple[str, ...]]:
    """The images of a folder: training, test, the labels' names, and notes.

    Args:
        place: holds ``train/<label>/...`` and ``test/<label>/...`` (or validation, val, valid), or
            ``<label>/...`` alone. Folders below a label's count as the label's.
        splits: other names of ``train`` and ``test``.
        test_share: the share of each label held out if there is no test folder.

    Raises:
        StockpotError: if a split or a label's images are missing.
    """
    present = [folder.name for folder in _folders(place)]
    train, test = splits.get("train", "train"), test_split(present, splits)
    for name in (train, test):
        if name in splits.values() and name not in present:
            raise StockpotError(
                f"image folder {place} has no folder {name!r} (it has {', '.join(present)})"
            )
    if train not in present:
        if test is not None:
            raise StockpotError(
                f"image folder {place} has a folder {test!r} and no folder 'train'; name the "
                "training images' with stream.splits, {train: ...}"
            )
        train, test = ".", None
    labels = [folder.name for folder in _folders(place / train)]
    if len(labels) < 2:
        raise StockpotError(
            f"image folder {place / train} has {len(labels)} folders of a label; two or more are "
            "needed, each named after its label"
        )
    training = _read(place / train, labels)
    if test is None:
        files, held = hold_out(training, test_share, labels, f"image folder {place}")
        note = f"{place} has no test split: {test_share:.0%} of each label are held out"
        return files, held, tuple(labels), (note,)
    found = [folder.name for folder in _folders(place / test)]
    for label in sorted(set(labels) ^ set(found)):
        here, there = (train, test) if label in labels else (test, train)
        raise StockpotError(
            f"image folder {place}: label {label!r} is in {here!r} and not in {there!r}; every "
            "label needs images to train on and to test on"
        )
    return training, _read(place / test, labels), tuple(labels), ()


def _read(top: Path, labels: Sequence[str]) -> LabelledFiles:
    """All images of a split, label by label."""
    paths: list[Path] = []
    answers: list[int] = []
    for number, label in enumerate(labels):
        found = list(_images(top / label))
        if not found:
            raise StockpotError(
                f"{top / label} holds no images ({', '.join(sorted(_SUFFIXES))}); put some there, "
                "or remove the folder"
            )
        paths += found
        answers += [number] * len(found)
    return LabelledFiles(_Files(tuple(paths)), torch.arange(len(paths)), torch.tensor(answers))


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(place: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(place):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in _SUFFIXES:
                yield Path(folder, file)
