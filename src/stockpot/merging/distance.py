"""How far two checkpoints are from each other: in all, per layer and per tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from stockpot.merging.checkpoint import CheckpointError, open_checkpoint
from stockpot.merging.dtypes import stored_as
from stockpot.merging.on_disk import DEFAULT_CHUNK, Settings
from stockpot.merging.plan import Entry
from stockpot.merging.reading import Reader
from stockpot.merging.survey import InnerProducts

__all__ = ["Distance", "distance"]

_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")


@dataclass(frozen=True)
class Measure:
    """Two vectors' norms, inner product, and the norm of their difference."""

    name: str
    elements: int
    left: float
    right: float
    inner: float
    l2: float
    """``||a - b||``."""

    @property
    def cosine(self) -> float:
        """<a, b> / (||a|| ||b||); NaN where one is 0."""
        norms = self.left * self.right
        return max(-1.0, min(1.0, self.inner / norms)) if norms else math.nan

    @property
    def relative(self) -> float:
        """``||a - b|| / ||a||``; NaN where a is 0."""
        return self.l2 / self.left if self.left else math.nan

    def as_json(self) -> dict[str, Any]:
        """For machines; null where a quotient has no value."""
        quotients = {"relative": self.relative, "cosine": self.cosine}
        return {
            "name": self.name,
            "elements": self.elements,
            "l2": self.l2,
            "l2_of_first": self.left,
            "l2_of_second": self.right,
            **{key: None if math.isnan(value) else value for key, value in quotients.items()},
        }


@dataclass(frozen=True)
class Distance:
    """From one checkpoint to another."""

    total: Measure
    layers: tuple[Measure, ...]
    """Tensors of one layer together, in the order of the files; the others one by one."""
    tensors: tuple[Measure, ...]
    skipped: tuple[str, ...]
    """Tensors that are not floating, or not in both."""


def distance(first: str, second: str, settings: Settings | None = None) -> Distance:
    """L2 distance and cosine of two checkpoints, accumulated in float64.

    Args:
        first: folder, safetensors file or hub id.
        second: another; tensors that only one of them has are left out and named.
        settings: threads and memory.

    Raises:
        CheckpointError: if they have no floating tensor in common, or one of two shapes.
    """
    settings = settings or Settings(chunk=DEFAULT_CHUNK)
    left, right = open_checkpoint(first), open_checkpoint(second)
    entries, skipped = [], []
    for name, info in left.tensors.items():
        other = right.tensors.get(name)
        if other is None:
            skipped.append(name)
            continue
        if other.shape != info.shape:
            raise CheckpointError(
                f"tensor {name!r} has the shape {list(info.shape)} in {first}, but "
                f"{list(other.shape)} in {second}"
            )
        entry = Entry(name, info.dtype, info.shape, None, (info, other))
        if entry.copied:
            skipped.append(name)
        else:
            entries.append(entry)
    skipped += [name for name in right.tensors if name not in left.tensors]
    if not entries:
        raise CheckpointError(f"{first} and {second} have no floating tensor in common")
    tensors = _measure_all(entries, settings)
    return Distance(
        _sum("total", tensors), tuple(_by_layer(tensors)), tuple(tensors), tuple(skipped)
    )


def _measure_all(entries: Sequence[Entry], settings: Settings) -> list[Measure]:
    paths = {source.path for entry in entries for source in entry.sources}
    wide = "F64" if any(s.dtype == "F64" for e in entries for s in e.sources) else "F32"
    reader = Reader(paths, stored_as(wide))
    try:
        with ThreadPoolExecutor(settings.workers) as pool:
            return list(pool.map(lambda entry: _measure(reader, entry, settings.chunk), entries))
    finally:
        reader.close()


def _measure(reader: Reader, entry: Entry, chunk: int) -> Measure:
    products, differences = InnerProducts(), InnerProducts()
    for start in range(0, entry.numel, chunk):
        a, b = reader.part(entry, start, min(start + chunk, entry.numel)).models
        products.add([a, b])
        # From the difference itself: the norms' difference would lose it to rounding.
        differences.add([np.subtract(a, b)])
    (aa, ab), (_, bb) = products.matrix(2)
    squared = differences.matrix(1)[0][0]
    return Measure(entry.name, entry.numel, math.sqrt(aa), math.sqrt(bb), ab, math.sqrt(squared))


def _by_layer(tensors: Sequence[Measure]) -> list[Measure]:
    """Numbered layers by their numbers, together where the first of them stands in the files."""
    groups: dict[str, list[Measure]] = {}
    layers: dict[str, tuple[str, int]] = {}
    for each in tensors:
        found = _LAYER.match(each.name)
        name = found[1] if found else each.name
        groups.setdefault(name, []).append(each)
        if found:
            prefix, _, number = name.rpartition(".")
            layers[name] = (prefix, int(number))
    names = list(groups)
    first = next((names.index(name) for name in names if name in layers), len(names))
    before = names[:first]
    after = [name for name in names[first:] if name not in layers]
    ordered = [*before, *sorted(layers, key=layers.__getitem__), *after]
    return [_sum(name, groups[name]) for name in ordered]


def _sum(name: str, parts: Sequence[Measure]) -> Measure:
    return Measure(
        name,
        sum(part.elements for part in parts),
        math.hypot(*(part.left for part in parts)),
        math.hypot(*(part.right for part in parts)),
        math.fsum(part.inner for part in parts),
        math.hypot(*(part.l2 for part in parts)),
    )
