"""Reading parts of tensors from many files at once, in the order of the files.

Bytes are read into memory that is used again, not mapped: a file that is cut short meanwhile, or a
disk that fails, is then an error with the file's name and not the end of the process, and the
memory used is what it seems. The system is told what will be read next.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stockpot.errors import NonFiniteError
from stockpot.merging.arrays import Array
from stockpot.merging.checkpoint import CheckpointError, TensorInfo
from stockpot.merging.dtypes import as_bytes, looks_finite, stored_as, widen
from stockpot.merging.formulas import Part
from stockpot.merging.plan import Entry

__all__ = ["Reader"]

_AHEAD = 32 << 20  # bytes of each file that the system is asked to have ready


class Reader:
    """Parts of a merge's inputs, in the precision to compute in.

    Each thread has buffers of its own; a part is good until the thread asks for the next.
    """

    def __init__(self, paths: Iterable[Path], wide: Any, device: str = "cpu") -> None:
        self._files = {os.fspath(path): os.open(path, os.O_RDONLY) for path in paths}
        self._ahead = dict.fromkeys(self._files, 0)
        self._wide = np.dtype(wide)
        self._device = device
        self._local = threading.local()

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def part(self, entry: Entry, start: int, stop: int, check: bool = True) -> Part:
        """Elements of one tensor of every input, which are looked at if they are not known yet.

        Raises:
            NonFiniteError: if one holds NaN or infinity.
            CheckpointError: if a file has become shorter.
        """
        tensors = []
        for slot, info in enumerate(entry.sources):
            tensor = self._widened(slot, info, start, stop, check)
            tensors.append(self._on_device(tensor))
        first = 1 if entry.base is not None else 0
        last = first + len(entry.models)
        return Part(
            entry.name,
            start,
            tensors[0] if first else None,
            tensors[first:last],
            tensors[last:],
        )

    def _on_device(self, array: np.ndarray) -> Array:
        if self._device == "cpu":
            return array
        import torch

        return torch.from_numpy(array).to(self._device)

    def raw(self, info: TensorInfo, start: int, stop: int) -> memoryview:
        """Bytes of elements ``start`` to ``stop``, as they are."""
        buffer = self._buffer("raw", 0, np.dtype(np.uint8), (stop - start) * info.itemsize)
        self._fill(buffer, info, start)
        return as_bytes(buffer)

    def _widened(
        self, slot: int, info: TensorInfo, start: int, stop: int, check: bool
    ) -> np.ndarray:
        stored = np.dtype(stored_as(info.dtype))
        wide = self._buffer("wide", slot, self._wide, stop - start)
        same = stored == self._wide
        raw = wide if same else self._buffer(info.dtype, 0, stored, stop - start)
        self._fill(raw, info, start)
        if check and not looks_finite(raw, info.dtype):
            _refuse_non_finite(widen(raw, info.dtype, np.empty(raw.size)), info, start)
        return wide if same else widen(raw, info.dtype, wide)

    def _buffer(self, kind: str, slot: int, dtype: np.dtype[Any], size: int) -> np.ndarray:
        buffers: dict[tuple[str, int], np.ndarray]
        buffers = self._local.__dict__.setdefault("buffers", {})
        buffer = buffers.get((kind, slot))
        if buffer is None or buffer.size < size:
            buffer = buffers[kind, slot] = np.empty(size, dtype)
        return buffer[:size]

    def _fill(self, target: np.ndarray, info: TensorInfo, start: int) -> None:
        view = as_bytes(target)
        path = os.fspath(info.path)
        offset = info.offset + start * info.itemsize
        self._read_ahead(path, offset + len(view))
        done = 0
        while done < len(view):
            count = os.preadv(self._files[path], [view[done:]], offset + done)
            if not count:
                raise CheckpointError(f"{info.path} was cut short while it was read")
            done += count

    def _read_ahead(self, path: str, offset: int) -> None:
        """Ask for the next stretch when half of the last is used; threads may ask twice."""
        known = self._ahead[path]
        if known - _AHEAD // 2 < offset and hasattr(os, "posix_fadvise"):
            begin = max(offset, known)
            self._ahead[path] = offset + _AHEAD
            length = offset + _AHEAD - begin
            os.posix_fadvise(self._files[path], begin, length, os.POSIX_FADV_WILLNEED)

    def rewind(self) -> None:
        """The files will be read once more from an earlier place."""
        self._ahead = dict.fromkeys(self._files, 0)


def _refuse_non_finite(array: np.ndarray, info: TensorInfo, start: int) -> None:
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        raise NonFiniteError(
            f"{info.path}: tensor {info.name!r} holds {array[wrong[0]]} at element "
            f"{start + int(wrong[0]):,}; merge models whose training did not diverge"
        )
