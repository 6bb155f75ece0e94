"""What several runs train alike is trained and scored once: a store by content key."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockpot.errors import DamagedRecordError
from stockpot.files import read_json, read_tensors, sha256, space_errors, write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from stockpot.evaluation.score import Score

__all__ = ["PrefixStore"]


class PrefixStore:
    """Trained weights, what their training cost, and scores, under the key of what decided them.

    Args:
        folder: where they are.
        uses: how many stages need the weights of each key.
    """

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
        """Keep what was trained, unless another job has kept the same meanwhile."""
        scratch = self.folder / f".{key}.{uuid.uuid4().hex}"  # jobs may be on several machines
        try:
            with space_errors(scratch):
                scratch.mkdir(parents=True)
                write_tensors(scratch / "model.safetensors", weights)
                digest = sha256(scratch / "model.safetensors")
                write_json(scratch / "trained.json", {**about, "sha256": digest})
                self._put(scratch, key)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _put(self, scratch: Path, key: str) -> None:
        try:
            scratch.rename(self.folder / key)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self.has(key):  # whole, and perhaps in use by now
                return
            shutil.rmtree(self.folder / key)
            scratch.rename(self.folder / key)

    def has_scores(self, key: str) -> bool:
        """Whether the scores of the weights of ``key`` are there."""
        return (self.folder / key / "scores.json").exists()

    def scores(self, key: str) -> list[tuple[str, list[Score]]] | None:
        """Task by task, the scores of the weights of ``key``; None if there are none to be had."""
        from stockpot.evaluation.score import Score

        with contextlib.suppress(OSError, ValueError, KeyError, DamagedRecordError):
            held = json.loads((self.folder / key / "scores.json").read_text(encoding="utf-8"))
            items = read_tensors(self.folder / key / "scores.safetensors", held["sha256"])
            return [
                (
                    task,
                    [
                        Score(**{**one, "texts": tuple(one["texts"])}, items=items.get(f"{t}.{n}"))
                        for n, one in enumerate(own)
                    ],
                )
                for t, (task, own) in enumerate(held["scores"])
            ]
        return None

    def save_scores(self, key: str, scores: Iterable[tuple[str, list[Score]]]) -> None:
        """Keep the scores of the weights of ``key``, with what became of every item."""
        folder = self.folder / key
        items: dict[str, Tensor] = {}
        plain = []
        for t, (task, own) in enumerate(scores):
            for n, score in enumerate(own):
                if score.items is not None:
                    items[f"{t}.{n}"] = score.items
            plain.append((task, [_plain(score) for score in own]))
        with space_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "scores.safetensors", items)
        digest = sha256(folder / "scores.safetensors")
        write_json(folder / "scores.json", {"sha256": digest, "scores": plain})

    def used(self, key: str) -> None:
        """A stage has what it needs of ``key``; after the last one it is deleted."""
        self._left[key] -= 1
        if self._left[key] <= 0:
            shutil.rmtree(self.folder / key, ignore_errors=True)


def _plain(score: Score) -> dict[str, Any]:
    """A score without its items."""
    return {f.name: getattr(score, f.name) for f in fields(score) if f.name != "items"}
