"""Reading parts of tensors from many files at once, in the order of the files.

Bytes are read into memory that is used again, not mapped: a file that is cut short meanwhile, or a
disk that fails, is then an error with the file's name and not the end of the process, and the
memory used is what it seems. The system is told what will be read next.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stockpot.errors import NonFiniteError
from stockpot.merging.checkpoint import CheckpointError, TensorInfo
from stockpot.merging.dtypes import torch_dtype
from stockpot.merging.formulas import Part
from stockpot.merging.plan import Entry

__all__ = ["Reader", "as_bytes"]

_AHEAD = 32 << 20  # bytes of each file that the system is asked to have ready


class Reader:
    """Parts of a merge's inputs, in the precision to compute in.

    Each thread has buffers of its own; a part is good until the thread asks for the next.
    """

    def __init__(self, paths: Iterable[Path], wide: torch.dtype, device: torch.device) -> None:
        self._files = {path: os.open(path, os.O_RDONLY) for path in paths}
        self._ahead = dict.fromkeys(self._files, 0)
        self._wide = wide
        self._device = device
        self._local = threading.local()
        self.bytes_read = 0

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
            tensor = self._widened(slot, info, start, stop)
            if check:
                _check_finite(tensor, info, start)
            tensors.append(tensor.to(self._device))
        first = 1 if entry.base is not None else 0
        last = first + len(entry.models)
        return Part(
            entry.name,
            start,
            tensors[0] if first else None,
            tensors[first:last],
            tensors[last:],
        )

    def raw(self, info: TensorInfo, start: int, stop: int) -> memoryview:
        """Bytes of elements ``start`` to ``stop``, as they are."""
        buffer = self._buffer("raw", 0, torch.uint8, (stop - start) * info.itemsize)
        self._fill(buffer, info, start)
        return as_bytes(buffer)

    def _widened(self, slot: int, info: TensorInfo, start: int, stop: int) -> Tensor:
        dtype = torch_dtype(info.dtype)
        wide = self._buffer("wide", slot, self._wide, stop - start)
        if dtype == self._wide:
            self._fill(wide, info, start)
            return wide
        narrow = self._buffer(info.dtype, 0, dtype, stop - start)
        self._fill(narrow, info, start)
        return wide.copy_(narrow)

    def _buffer(self, kind: str, slot: int, dtype: torch.dtype, size: int) -> Tensor:
        buffers: dict[tuple[str, int], Tensor] = self._local.__dict__.setdefault("buffers", {})
        buffer = buffers.get((kind, slot))
        if buffer is None or buffer.numel() < size:
            buffer = buffers[kind, slot] = torch.empty(size, dtype=dtype)
        return buffer[:size]

    def _fill(self, target: Tensor, info: TensorInfo, start: int) -> None:
        view = as_bytes(target)
        offset = info.offset + start * info.itemsize
        self._read_ahead(info.path, offset + len(view))
        done = 0
        while done < len(view):
            count = os.preadv(self._files[info.path], [view[done:]], offset + done)
            if not count:
                raise CheckpointError(f"{info.path} was cut short while it was read")
            done += count
        self.bytes_read += len(view)

    def _read_ahead(self, path: Path, offset: int) -> None:
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


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor of one dimension on the CPU."""
    array: Any = tensor.view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(array)


def _check_finite(tensor: Tensor, info: TensorInfo, start: int) -> None:
    # A sum meets every NaN and infinity at half the cost of a search for them; one that
    # overflows is looked at again.
    if math.isfinite(float(tensor.sum())):
        return
    wrong = torch.isfinite(tensor).logical_not_()
    if bool(wrong.any()):
        index = start + int(wrong.nonzero()[0])
        raise NonFiniteError(
            f"{info.path}: tensor {info.name!r} holds {tensor[index - start].item()} at element "
            f"{index:,}; merge models whose training did not diverge"
        )
