"""What several runs train alike is trained once: a store of trained weights by content key."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockpot.files import read_json, read_tensors, sha256, space_errors, write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PrefixStore"]


class PrefixStore:
    """Trained weights, and what their training cost, under the key of all that decided them."""

    def __init__(self, folder: Path, uses: Counter[str]) -> None:
        self.folder = folder
        self._left = Counter(uses)
        self._shared = {key for key, count in uses.items() if count > 1}

    def path(self, key: str) -> Path:
        """The file of a key's weights."""
        return self.folder / key / "model.safetensors"

    def has(self, key: str) -> bool:
        """Whether the weights of ``key`` are there."""
        return self.path(key).exists()

    def load(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and costs.

        Raises:
            DamagedRecordError: if the file is not what was written.
        """
        about: dict[str, Any] = read_json(self.folder / key / "trained.json")
        return read_tensors(self.path(key), about["sha256"]), about

    def wants(self, key: str) -> bool:
        """Whether another stage will ask for the weights of ``key``."""
        return key in self._shared

    def save(self, key: str, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Keep what was trained."""
        scratch = self.folder / f".{key}.{os.getpid()}"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            with space_errors(scratch):
                scratch.mkdir(parents=True)
                write_tensors(scratch / "model.safetensors", weights)
                digest = sha256(scratch / "model.safetensors")
                write_json(scratch / "trained.json", {**about, "sha256": digest})
                shutil.rmtree(self.folder / key, ignore_errors=True)
                scratch.rename(self.folder / key)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def used(self, key: str) -> None:
        """A stage has what it needs of ``key``; after the last one it is deleted."""
        self._left[key] -= 1
        if self._left[key] <= 0:
            shutil.rmtree(self.folder / key, ignore_errors=True)
