"""The record and its prefixes as seen by processes that help with a run but do not write.

Of the processes that share a run only the main one writes. The others read what it has written,
after they have waited for it, and remember which stages are finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockpot.experiment.prefixes import PrefixStore
from stockpot.experiment.record import Record

if TYPE_CHECKING:
    from torch import Tensor

    from stockpot.evaluation.score import Score

__all__ = ["FollowedPrefixes", "Follower"]


class Follower(Record):
    """A record whose files another process writes."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """The main process holds the folder for all."""
        yield

    def take(self, finished: Mapping[tuple[str, int], dict[str, Any]]) -> None:
        """What the main process knows of finished stages."""
        self._stages = dict(finished)

    def write_failures(self, failures: Mapping[str, str]) -> None:
        """Not here."""

    def check_start(self, seed: int, fingerprint: str) -> None:
        """The main process has looked."""

    def save_weights(
        self, run: str, stage: int, weights: dict[str, Tensor], same_as: Path | None
    ) -> str:
        """Not here; the hash is not needed either."""
        return ""

    def save_items(self, run: str, name: str, scores: Sequence[tuple[str, list[Score]]]) -> None:
        """Not here."""

    def save_ready(self, run: str, stage: int, about: dict[str, Any]) -> None:
        """Not here."""

    def finish_stage(
        self,
        stage: dict[str, Any],
        scores: list[dict[str, Any]],
        merges: list[dict[str, Any]],
        curves: list[dict[str, Any]],
        lines: list[dict[str, Any]],
    ) -> None:
        """Remember that it is finished."""
        self._stages[stage["run"], stage["stage"]] = stage

    def finish_run(self, run: str, stages: int, keep: str) -> None:
        """Not here."""


class FollowedPrefixes(PrefixStore):
    """A store that another process fills and empties."""

    def save(self, key: str, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Not here."""

    def used(self, key: str) -> None:
        """Not here."""
