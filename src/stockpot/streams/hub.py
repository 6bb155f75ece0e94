"""Image data sets by hub id, from a local folder, or from an offline mirror."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stockpot.errors import StockpotError
from stockpot.streams.images import LabelledImages

__all__ = ["load_hub_images", "resolve_source"]


def resolve_source(source: str) -> str:
    """Where to read ``source`` from.

    ``STOCKPOT_DATA`` names an offline mirror: if it holds ``<org>/<name>``, that folder is read
    instead of the hub, by the same code.
    """
    mirror = os.environ.get("STOCKPOT_DATA")
    if mirror and not Path(source).is_absolute() and (Path(mirror) / source).is_dir():
        return str((Path(mirror) / source).resolve())
    return source


def load_hub_images(source: str, labels: int) -> LabelledImages:
    """Read a data set with the columns ``image`` and ``label`` and the splits train and test.

    Args:
        source: a hub id, or a local folder.
        labels: how many labels there are; one outside 0 .. labels - 1 is an error.

    Raises:
        StockpotError: if the data set cannot be had, lacks a split or a column, or a row is bad.
    """
    import datasets

    place = resolve_source(source)
    try:
        splits = datasets.load_dataset(place)
    except Exception as error:  # the hub client raises many kinds
        mirror = os.environ.get("STOCKPOT_DATA")
        raise StockpotError(
            f"cannot load the data set {source!r}: {_first_line(error)}. It was looked for "
            + (f"under STOCKPOT_DATA={mirror} and " if mirror else "")
            + "on the hub; without a network, set STOCKPOT_DATA to a folder that holds "
            f"{source}/data/*.parquet, or give a local folder as stream.path"
        ) from error
    for split in ("train", "test"):
        if split not in splits:
            raise StockpotError(
                f"data set {source!r} has no split {split!r} (it has {', '.join(splits)})"
            )
    train_images, train_labels = _decode(source, "train", splits["train"], labels)
    test_images, test_labels = _decode(source, "test", splits["test"], labels)
    return LabelledImages(train_images, train_labels, test_images, test_labels)


def _decode(source: str, split: str, data: Any, labels: int) -> tuple[Tensor, Tensor]:
    """All images of a split as one uint8 tensor (N, C, H, W), and its labels."""
    from PIL import Image

    for column in ("image", "label"):
        if column not in data.column_names:
            raise StockpotError(
                f"data set {source!r}, split {split!r} has no column {column!r} (it has "
                f"{', '.join(data.column_names)})"
            )
    # Straight from Arrow: going through the rows costs ten times as long as the decoding.
    column = data.with_format("arrow")[:]["image"].combine_chunks()
    images: list[Any] = []
    for row, (encoded, file) in enumerate(
        zip(column.field("bytes").to_pylist(), column.field("path").to_pylist(), strict=True)
    ):
        try:
            place = file if encoded is None else io.BytesIO(encoded)
            images.append(np.asarray(Image.open(place)))
        except Exception as error:
            raise StockpotError(
                f"data set {source!r}, split {split!r}, row {row}: not an image "
                f"({_first_line(error)})"
            ) from error
        if images[row].dtype != np.uint8:
            raise StockpotError(
                f"data set {source!r}, split {split!r}, row {row}: pixels of kind "
                f"{images[row].dtype}; this stream reads images of 8 bits a channel"
            )
        if images[row].shape != images[0].shape:
            raise StockpotError(
                f"data set {source!r}, split {split!r}, row {row}: {images[row].shape} pixels "
                f"where row 0 has {images[0].shape}; this stream needs images of one size"
            )
    if not images:
        raise StockpotError(f"data set {source!r}, split {split!r} has no rows")
    pixels = torch.from_numpy(np.stack(images))
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    try:
        answers = torch.tensor(data["label"][:], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise StockpotError(
            f"data set {source!r}, split {split!r}: the labels are not all whole numbers "
            f"({_first_line(error)})"
        ) from error
    bad = ((answers < 0) | (answers >= labels)).nonzero().flatten()
    if len(bad):
        row = int(bad[0])
        raise StockpotError(
            f"data set {source!r}, split {split!r}, row {row}: label {int(answers[row])} is out of "
            f"range; labels are 0 to {labels - 1}"
        )
    return pixels, answers


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
