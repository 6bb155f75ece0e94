"""What a worker writes of its run: a file per finished stage, which the record's owner takes up.

Many workers may work for one record, on one machine or on several that share a file system, and
each file has one writer. Weights, items, memory and checkpoints belong to a run and go where they
always go. What belongs to all runs, the logs above all, is written by one process, the coordinator:
a worker leaves ``jobs/<run>/stage-0003.json`` with the stage's lines of all logs, and the
coordinator folds them into the logs (:meth:`~stockpot.experiment.record.Record.fold`).

The file appears whole or not at all, so a stage is finished when it is there. Whoever opens the
record folds what killed workers, or a killed coordinator, have left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stockpot.errors import ConfigError
from stockpot.experiment.prefixes import PrefixStore
from stockpot.experiment.record import Record
from stockpot.files import read_json, write_json

__all__ = ["Journal", "WorkersPrefixes"]


class Journal(Record):
    """The record as a worker has it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._start: tuple[int, str] | None = None

    def take(self, finished: Iterable[Mapping[str, Any]]) -> None:
        """Begin with a job, given the lines of the finished stages of its run."""
        self._stages = {(line["run"], line["stage"]): dict(line) for line in finished}

    def check_start(self, seed: int, fingerprint: str) -> None:
        """Remember the starting weights for the coordinator; refuse others than the record's.

        Raises:
            ConfigError: if the same model and seed gave other weights before.
        """
        self._start = seed, fingerprint
        path = self.folder / "start.json"
        held = read_json(path) if path.exists() else {}
        if held.get(str(seed), fingerprint) != fingerprint:
            raise ConfigError(self._another_start(seed))

    def finish_stage(
        self,
        stage: dict[str, Any],
        scores: list[dict[str, Any]],
        merges: list[dict[str, Any]],
        curves: list[dict[str, Any]],
        lines: list[dict[str, Any]],
    ) -> None:
        """Write a stage's lines; it is finished with that."""
        run, number = stage["run"], stage["stage"]
        folder = self.journals / run
        folder.mkdir(parents=True, exist_ok=True)
        held = {
            "start": self._start,
            "stage": stage,
            "scores": scores,
            "merges": merges,
            "curves": curves,
            "lines": lines,
        }
        write_json(folder / f"stage-{number:04d}.json", held)
        self._stages[run, number] = stage
        self.stage_file(run, number).with_suffix(".json").unlink(missing_ok=True)


class WorkersPrefixes(PrefixStore):
    """The store as a worker has it: only the coordinator knows what is not needed any more."""

    def used(self, key: str) -> None:
        """Not here."""
