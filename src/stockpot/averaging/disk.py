"""Tensors of safetensors files, read when they are asked for and then forgotten.

The library's own reader maps files into memory, and a mapped page counts as the process's memory
once it is touched; here bytes are read into a tensor that goes when its user is done with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stockpot.errors import StockpotError

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


@dataclass(frozen=True)
class _Place:
    path: Path
    offset: int
    dtype: str
    shape: torch.Size


class TensorsOnDisk(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files.

    Raises:
        StockpotError: if a file is damaged.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._places: dict[str, _Place] = {}
        for path in paths:
            try:
                with safe_open(str(path), framework="pt"):  # checks the header against the size
                    pass
            except (SafetensorError, OSError) as error:
                raise StockpotError(
                    f"anchor {path} is damaged or is no safetensors file: {error}"
                ) from error
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin = 8 + length + entry["data_offsets"][0]
                shape = torch.Size(entry["shape"])
                self._places[name] = _Place(path, begin, entry["dtype"], shape)

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return self.elements(name, 0, place.shape.numel()).view(place.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor that has a first dimension."""
        shape = self._places[name].shape
        row = shape[1:].numel()
        return self.elements(name, start * row, stop * row).view(stop - start, *shape[1:])

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor.

        Raises:
            StockpotError: if the file has become shorter, or holds a type of number unknown here.
        """
        place = self._places[name]
        if place.dtype not in _DTYPES:
            raise StockpotError(f"anchor {place.path}: {name!r} has the type {place.dtype}")
        values = torch.empty(stop - start, dtype=_DTYPES[place.dtype])
        view: Any = memoryview(values.view(torch.uint8).numpy().data if values.numel() else b"")
        offset = place.offset + start * values.element_size()
        with place.path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise StockpotError(f"anchor {place.path} was cut short while in use")
                done += count
        return values

    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, from the header."""
        return self._places[name].shape

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
