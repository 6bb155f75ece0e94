"""Tensors of safetensors files, read when they are asked for and then forgotten.

The library's own reader maps files into memory, and a mapped page counts as the process's memory
once it is touched; here bytes are read into a tensor that goes when its user is done with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stockpot.errors import CheckpointError, StockpotError
from stockpot.safetensors_header import TensorInfo, read_header

__all__ = ["TensorsOnDisk"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorsOnDisk(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files.

    Raises:
        StockpotError: if a file is damaged.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._places: dict[str, TensorInfo] = {}
        self._files: dict[Path, FileIO] = {}
        self._buffers: dict[torch.dtype, Tensor] = {}
        for path in paths:
            try:
                # In the order of the file, so that a reader of all of it never goes back.
                for info in read_header(path):
                    self._places[info.name] = info
            except (CheckpointError, OSError) as error:
                raise StockpotError(f"anchor {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return self.elements(name, 0, place.numel).view(place.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor that has a first dimension."""
        shape = self.shape(name)
        row = shape[1:].numel()
        return self.elements(name, start * row, stop * row).view(stop - start, *shape[1:])

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor.

        Raises:
            StockpotError: if the file has become shorter, or holds a type of number unknown here.
        """
        values = torch.empty(stop - start, dtype=self._dtype(name))
        self._fill(values, self._places[name], start)
        return values

    def _dtype(self, name: str) -> torch.dtype:
        place = self._places[name]
        if place.dtype not in _DTYPES:
            raise StockpotError(f"anchor {place.path}: {name!r} has the type {place.dtype}")
        return _DTYPES[place.dtype]

    def stream(self, name: str, start: int, stop: int) -> Tensor:
        """Like :meth:`elements`, in memory that the next call uses again.

        New memory costs more than reading into it: the system clears each page first.
        """
        dtype = self._dtype(name)
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < stop - start:
            buffer = self._buffers[dtype] = torch.empty(stop - start, dtype=dtype)
        values = buffer[: stop - start]
        self._fill(values, self._places[name], start)
        return values

    def _fill(self, values: Tensor, place: TensorInfo, start: int) -> None:
        view: Any = memoryview(values.view(torch.uint8).numpy().data if values.numel() else b"")
        offset = place.offset + start * values.element_size()
        descriptor = self._open(place.path).fileno()
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if not count:
                raise StockpotError(f"anchor {place.path} was cut short while in use")
            done += count

    def _open(self, path: Path) -> FileIO:
        # Kept open, so that the system sees one reader going on and reads ahead of it.
        if path not in self._files:
            self._files[path] = FileIO(path)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._files[path].fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._files[path]

    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, from the header."""
        return torch.Size(self._places[name].shape)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
