"""Headers of safetensors files: where each tensor is, checked against the file. No torch, no numpy.

A file is 8 bytes with the length of a JSON header, the header (names, dtypes, shapes and byte
ranges), and the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from stockpot.errors import CheckpointError

__all__ = ["BYTES", "TensorInfo", "read_header"]

_LARGEST_HEADER = 100_000_000  # the limit of the format's own library

BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
}
"""Per element, by the format's names."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's numbers are: ``numel`` elements of ``dtype`` from ``offset`` on."""

    name: str
    dtype: str
    """As safetensors spells it: F64, F32, BF16, F16, I64, ..."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """Of the first byte in the file, in bytes."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * self.itemsize


def read_header(path: Path) -> Iterator[TensorInfo]:
    """The tensors of one file, by offset; every entry is checked against the file's size.

    Raises:
        CheckpointError: if the header does not fit the file.
    """

    def refuse(reason: str) -> NoReturn:
        raise CheckpointError(f"{path} is damaged or is no safetensors file: {reason}")

    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            refuse(f"it has {size} bytes")
        length = int.from_bytes(start, "little")
        if length > min(size - 8, _LARGEST_HEADER):
            refuse(f"its header claims {length:,} bytes, the file has {size:,}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        refuse(f"its header is no JSON ({error})")
    if not isinstance(header, dict):
        refuse("its header is no JSON mapping")
    header.pop("__metadata__", None)
    entries = []
    for name, entry in header.items():
        info = _entry(name, entry, path, 8 + length)
        if isinstance(info, str):
            refuse(f"tensor {name!r}: {info}")
        entries.append(info)
    end = 8 + length
    for info in sorted(entries, key=lambda each: (each.offset, each.nbytes)):
        if info.offset != end:
            kind = "overlaps the one before" if info.offset < end else "leaves a hole before it"
            refuse(f"tensor {info.name!r} {kind}")
        end += info.nbytes
        yield info
    if end != size:
        what = "cut short" if size < end else "longer than its header says"
        refuse(f"it is {what}: {size:,} bytes instead of {end:,}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return value


def _entry(name: str, entry: Any, path: Path, data: int) -> TensorInfo | str:
    """One tensor's place, or what is wrong with it."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return "needs dtype, shape and two data_offsets"
    if not isinstance(dtype, str) or dtype not in BYTES:
        return f"has the unknown dtype {dtype!r}"
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        return f"has the shape {shape!r} at {begin!r} to {end!r}"
    info = TensorInfo(name, dtype, tuple(shape), path, data + begin)
    if end - begin != info.nbytes:
        return f"has {end - begin:,} bytes for {dtype} of shape {list(shape)}"
    return info
