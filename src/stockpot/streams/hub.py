"""Image data sets by hub id, from a local folder, or from an offline mirror."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stockpot.errors import StockpotError, first_line
from stockpot.streams.encoded import LabelledFiles, hold_out, test_split
from stockpot.streams.images import LabelledImages
from stockpot.streams.source import cannot_load, resolve_source

__all__ = ["load_hub_images", "open_hub_images"]


def load_hub_images(source: str, labels: int) -> LabelledImages:
    """Read a data set with the columns ``image`` and ``label`` and the splits train and test.

    Args:
        source: a hub id, or a local folder.
        labels: how many labels there are; one outside 0 .. labels - 1 is an error.

    Raises:
        StockpotError: if the data set cannot be had, lacks a split or a column, or a row is bad.
    """
    from stockpot.streams.decoding import decode

    train, test, _, _ = open_hub_images(source, "image", "label", {"test": "test"}, labels=labels)
    train_images, test_images = decode((train, test), size=None)
    return LabelledImages(train_images, train.labels, test_images, test.labels)


def open_hub_images(
    source: str,
    image: str,
    label: str,
    splits: Mapping[str, str] | None = None,
    *,
    labels: int | None = None,
    config: str | None = None,
    test_share: float | None = None,
) -> tuple[LabelledFiles, LabelledFiles, tuple[str, ...], tuple[str, ...]]:
    """The images of a data set, not decoded yet: training, test, the labels' names, and notes.

    Args:
        source: a hub id, or a local folder.
        image: the column of images.
        label: the column of labels: numbers from 0, or any texts, which are then sorted.
        splits: what ``train`` and ``test`` are called; by default train, and the first of test,
            validation, val and valid.
        labels: how many labels there are; None: as many as the data set names or has.
        config: the hub's configuration of the data set.
        test_share: the share of each label held out if there is no test split; None: refuse that.

    Raises:
        StockpotError: if the data set cannot be had, lacks a split or a column, or a label is bad.
    """
    splits = splits or {}
    data = _load(source, config)
    train, test = splits.get("train", "train"), test_split(list(data), splits)
    held_out = test is None and test_share is not None
    if held_out and train not in data and "train" not in splits and len(data) == 1:
        train = next(iter(data))
    for split in (train, *(() if held_out else (test or "test",))):
        if split not in data:
            raise StockpotError(
                f"data set {source!r} has no split {split!r} (it has {', '.join(data)})"
            )
        for column in (image, label):
            if column not in data[split].column_names:
                raise StockpotError(
                    f"data set {source!r}, split {split!r} has no column {column!r} (it has "
                    f"{', '.join(data[split].column_names)})"
                )
    where = f"data set {source!r}, split {train!r}"
    answers, names = _labels(where, data[train], label, None, labels)
    training = _files(where, data[train], image, answers)
    if held_out or test is None:
        assert test_share is not None
        files, held = hold_out(training, test_share, names, where)
        note = f"data set {source!r} has no test split: {test_share:.0%} of each label are held out"
        return files, held, names, (note,)
    where = f"data set {source!r}, split {test!r}"
    answers, _ = _labels(where, data[test], label, names, labels)
    return training, _files(where, data[test], image, answers), names, ()


def _load(source: str, config: str | None) -> Any:
    import datasets

    place = str(Path(resolve_source(source)).expanduser())
    try:
        if (Path(place) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(place)
        return datasets.load_dataset(place, config)
    except Exception as error:  # the hub client raises many kinds
        if Path(place).is_dir():
            raise StockpotError(
                f"cannot load the data set {source!r}: {first_line(error)}. The folder {place} "
                "holds no data set (data/*.parquet, say), and no images at train/<label>/ either"
            ) from error
        raise cannot_load(source, error, "stream.path") from error


class _HubImages:
    """The images of a split by number: Arrow's own bytes, left on disk until they are read."""

    def __init__(self, where: str, data: Any, column: str) -> None:
        self._where = where
        self._column = column
        self._fingerprint = f"{data._fingerprint} {column}"
        self._data = data.select_columns([column]).with_format("arrow")

    def name(self, row: int) -> str:
        return f"{self._where}, row {row}"

    def read(self, rows: Sequence[int]) -> list[bytes | Path]:
        # Straight from Arrow: going through the rows costs ten times as long as the decoding.
        begin = rows[0]
        values = self._data[begin : rows[-1] + 1][self._column]
        files: list[bytes | Path] = []
        for row in rows:
            value = values[row - begin].as_py()
            if value is None:
                raise StockpotError(f"{self.name(row)}: there is no image")
            files.append(Path(value["path"]) if value["bytes"] is None else value["bytes"])
        return files

    def fingerprint(self) -> str:
        return self._fingerprint


def _files(where: str, data: Any, column: str, labels: torch.Tensor) -> LabelledFiles:
    import datasets

    if not isinstance(data.features[column], datasets.Image):
        raise StockpotError(
            f"{where}: column {column!r} holds {data.features[column]}, not images; name the "
            "column of images with stream.columns, {image: ...}"
        )
    if not len(data):
        raise StockpotError(f"{where} has no rows")
    return LabelledFiles(_HubImages(where, data, column), torch.arange(len(data)), labels)


def _labels(
    where: str, data: Any, column: str, names: Sequence[str] | None, count: int | None
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The labels as numbers from 0, and what they are called.

    Args:
        where: for messages.
        data: the split.
        column: of the labels.
        names: of the labels, when they are known from the training split.
        count: how many labels there are; None: as many as the data set names or has.
    """
    values = data.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    known = getattr(data.features[column], "names", None)
    if names is None and count is None and known is None:
        _check_kinds(where, column, values)
        names = tuple(map(str, sorted(set(values))))
    if known is None and count is None:
        # Texts, or numbers as they come: both go by their names.
        assert names is not None
        place = {name: number for number, name in enumerate(names)}
        values = [place.get(str(value), -1) for value in values]
    try:
        answers = torch.tensor(values, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise StockpotError(
            f"{where}: the labels are not all whole numbers ({first_line(error)})"
        ) from error
    if names is None:
        names = tuple(known) if known and count in (None, len(known)) else None
        names = names or tuple(map(str, range(count or 0)))
    bad = ((answers < 0) | (answers >= len(names))).nonzero().flatten()
    if len(bad):
        row = int(bad[0])
        value = data[row : row + 1][column][0] if known is None else int(answers[row])
        raise StockpotError(
            f"{where}, row {row}: label {value} is out of range; labels are "
            + (f"0 to {len(names) - 1}" if known or count else f"those of training: {names[:9]}")
        )
    return answers, tuple(names)


def _check_kinds(where: str, column: str, values: Sequence[object]) -> None:
    """Labels that are texts, or whole numbers."""
    for row, value in enumerate(values):
        if not isinstance(value, type(values[0])) or not isinstance(value, int | str):
            raise StockpotError(
                f"{where}, row {row}: label {value!r} in column {column!r}; labels are whole "
                "numbers, or texts, all of one kind"
            )
