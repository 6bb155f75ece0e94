"""The run folder: plain files, written so that a kill at any moment loses nothing finished.

A stage (one training of one run) is finished when its line is in ``stages.jsonl``. Its merge events
and scores are written before that line; lines of a stage without it are leftovers of a kill and are
dropped when the folder is opened again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockpot.errors import ConfigError, DamagedRecordError, StockpotError
from stockpot.files import (
    check_manifest,
    exclusive,
    link_or_copy,
    read_json,
    read_tensors,
    remove_scratch,
    sha256,
    space_errors,
    write_json,
    write_tensors,
    write_text,
)

if TYPE_CHECKING:
    from torch import Tensor

    from stockpot.evaluation.score import Score
    from stockpot.experiment.config import Experiment

__all__ = ["Record"]

_STAGES = "stages"
_OPTIONAL = ("merges", "curves", "lines")
"""Logs that a record need not have: nothing was averaged, or this was not asked for."""


class Record:
    """One experiment's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.scratch = folder / "scratch"
        self.journals = folder / "jobs"
        self._stages: dict[tuple[str, int], dict[str, Any]] = {}

    # Opening.

    def open(
        self,
        experiment: Experiment,
        data: str,
        environment: dict[str, Any],
        planned: int,
        skipped: Sequence[str] = (),
    ) -> None:
        """Start the folder, or take it up where an earlier call stopped. Hold the lock meanwhile.

        Args:
            experiment: what runs.
            data: fingerprint of the stream's examples.
            environment: on what it runs.
            planned: how many runs there will be.
            skipped: benchmarks that are left out.

        Raises:
            ConfigError: if the folder holds another experiment, or the data have changed.
            DamagedRecordError: if a file of the record cannot be trusted.
        """
        described = self.folder / "experiment.json"
        remove_scratch(self.folder)
        another = None
        if described.exists():
            another = self._what_differs(described, experiment, data, list(skipped))
        if another is not None:
            log = self.folder / "stages.jsonl"
            if (log.exists() and log.stat().st_size) or any(self.journals.glob("*/stage-*.json")):
                raise ConfigError(another)
            # Nothing of that other experiment is finished; its checkpoints are of no use to this.
            (self.folder / "start.json").unlink(missing_ok=True)
            shutil.rmtree(self.scratch, ignore_errors=True)
            shutil.rmtree(self.folder / "prefixes", ignore_errors=True)
        # First of all: a folder with this file is a record.
        write_json(
            described,
            {
                "name": experiment.name,
                "planned": planned,
                "data": data,
                "left out": list(skipped),
                **experiment.common(),
            },
        )
        with space_errors(self.folder):
            self.runs.mkdir(exist_ok=True)
        self._drop_leftovers()
        for folder in sorted(self.journals.glob("*")):  # of workers that were killed, or of all
            self.fold(folder.name)
        shutil.rmtree(self.journals, ignore_errors=True)
        write_json(self.folder / "environment.json", environment)
        write_text(self.folder / "experiment.yaml", experiment.to_yaml())

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Say which runs there will be, so that the folder can be read before they are finished."""
        write_json(self.folder / "plan.json", plan)

    def write_failures(self, failures: Mapping[str, str]) -> None:
        """Say which runs of this call stopped on an error, and why; none: no file."""
        path = self.folder / "failures.json"
        if failures:
            write_json(path, dict(failures))
        else:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it.

        Raises:
            ConfigError: if it is there and holds something else.
            StockpotError: if another process is working in it.
        """
        described = self.folder / "experiment.json"
        if self.folder.is_dir() and not described.exists():
            strange = [path.name for path in self.folder.iterdir() if path.name[0] != "."]
            if strange:
                raise ConfigError(
                    f"{self.folder} is not empty and holds no stockpot record (it has "
                    f"{', '.join(sorted(strange)[:3])}); choose another folder with --output"
                )
        try:
            with space_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make the run folder {self.folder}: {error.strerror}; choose another with "
                "--output"
            ) from error
        with exclusive(self.folder):
            yield

    def _what_differs(
        self, described: Path, experiment: Experiment, data: str, skipped: list[str]
    ) -> str | None:
        """Why the folder's experiment is another than this one; None if it is the same."""
        held = read_json(described)
        if not isinstance(held, dict):
            raise DamagedRecordError(f"{described} is damaged: it holds no experiment")
        changes = []
        # These do not change what is measured.
        free = {"device", "threads", "checkpoint_seconds", "report_to", "parallel"}
        for section, now in experiment.common().items():
            before = held.get(section, {})
            if section == "evaluation":  # what an older version could not measure is not measured
                before = {"line": 0, "line_limit": now["line_limit"], **before}
                before = {"tasks": "all", "tasks_limit": now["tasks_limit"], **before}
                before = {"every_tasks": 1, **before}
            changes += [
                f"{section}.{key}: {before.get(key)!r} there, {now.get(key)!r} now"
                for key in sorted({*before, *now} - free)
                if before.get(key) != now.get(key)
            ]
        if changes:
            return (
                f"{self.folder} holds another experiment ({'; '.join(changes)}). Choose another "
                "folder with --output, or delete that one. Methods and seeds may be added to a "
                "folder; the rest may not change."
            )
        if held.get("left out", []) != skipped:
            before = ", ".join(held.get("left out", [])) or "nothing"
            return (
                f"in {self.folder} {before} is left out, and now {', '.join(skipped) or 'nothing'} "
                "would be (--run-programs). Choose another folder with --output, or delete that one"
            )
        if held.get("data") != data:
            return (
                f"the examples of {experiment.stream.name} are not those that {self.folder} was "
                "made with: the data set or how it is read has changed. Choose another folder "
                "with --output"
            )
        return None

    def _drop_leftovers(self) -> None:
        self._stages = {
            (line["run"], line["stage"]): line for line in self._read_log(_STAGES, repair=True)
        }
        for log in (*_OPTIONAL, "scores"):
            lines = self._read_log(log, repair=True)
            kept = [line for line in lines if self._is_finished(line)]
            if len(kept) < len(lines):
                self._rewrite(log, kept)
        self._check_scores()

    def _is_finished(self, line: dict[str, Any]) -> bool:
        # The scores of the starting model (stage -1) are written with those of the first stage.
        return (line["run"], max(line["stage"], 0)) in self._stages

    def _check_scores(self) -> None:
        scored = {(line["run"], line["stage"]) for line in self.scores()}
        for run, stage in self._stages:
            if (run, stage) not in scored:
                raise DamagedRecordError(
                    f"{self.folder / 'scores.jsonl'} lacks the scores of run {run!r}, stage "
                    f"{stage}, which stages.jsonl calls finished: the file was cut or edited. "
                    f"Restore it, or delete {self.folder} to run the experiment again"
                )

    def _read_log(self, name: str, repair: bool = False) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.jsonl"
        if not path.exists():
            if (
                (self.folder / "experiment.json").exists()
                and name not in _OPTIONAL
                and self._stages
            ):
                raise DamagedRecordError(f"{path} is missing from the record")
            return []
        text = path.read_text(encoding="utf-8", errors="replace")
        body, newline, tail = text.rpartition("\n")
        lines = []
        for number, line in enumerate(body.split("\n") if newline else [], 1):
            try:
                value = json.loads(line)
                if not {"run", "stage"} <= value.keys():
                    raise ValueError("no run and stage")
                if name == "scores" and not isinstance(value["value"], int | float):
                    raise ValueError(f"the value {value['value']!r} is no number")
            except (ValueError, AttributeError, TypeError, KeyError) as error:
                raise DamagedRecordError(
                    f"{path}:{number}: damaged line ({error}). Restore the file, or delete "
                    f"{self.folder} to run the experiment again"
                ) from error
            lines.append(value)
        if tail and repair:  # a write that was cut by a kill
            self._rewrite(name, lines)
        return lines

    def _rewrite(self, name: str, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        write_text(self.folder / f"{name}.jsonl", text)

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        path = self.folder / f"{name}.jsonl"
        with space_errors(path):
            size = path.stat().st_size if path.exists() else 0
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(path, size)  # a full disk takes half a line; take it back
                raise

    def check_start(self, seed: int, fingerprint: str) -> None:
        """Remember the starting weights of a seed; refuse to go on from others.

        Raises:
            ConfigError: if the same model and seed gave other weights before.
        """
        path = self.folder / "start.json"
        held = read_json(path) if path.exists() else {}
        if held.get(str(seed), fingerprint) != fingerprint:
            raise ConfigError(self._another_start(seed))
        if str(seed) not in held:
            write_json(path, {**held, str(seed): fingerprint})

    def _another_start(self, seed: int) -> str:
        return (
            f"the model starts from other weights than when {self.folder} was made (seed "
            f"{seed}): its files, its code or a library has changed, or differs between the "
            "machines that work on it. Choose another folder with --output"
        )

    def check_stage(self, run: str, stage: int, key: str) -> None:
        """Refuse to take a finished stage for what other settings would give.

        Raises:
            ConfigError: if its content key is another.
        """
        if self._stages[run, stage].get("key") != key:
            raise ConfigError(
                f"run {run!r} in {self.folder} was made with other settings or by another version "
                "than would make it now. Choose another folder with --output"
            )

    # Reading.

    def scores(self) -> list[dict[str, Any]]:
        """All evaluations."""
        return self._read_log("scores")

    def merges(self) -> list[dict[str, Any]]:
        """All merge events."""
        return self._read_log("merges")

    def curves(self) -> list[dict[str, Any]]:
        """All scores that were taken while a task trained."""
        return self._read_log("curves")

    def lines(self) -> list[dict[str, Any]]:
        """All scores along lines from the anchor to the deployed weights."""
        return self._read_log("lines")

    def stages(self) -> dict[tuple[str, int], dict[str, Any]]:
        """All finished stages by run and number."""
        return dict(self._stages)

    def load(self) -> Record:
        """Read the finished stages of a folder without changing anything."""
        self._stages = {(line["run"], line["stage"]): line for line in self._read_log(_STAGES)}
        return self

    def finished(self, run: str) -> int:
        """How many stages of a run are finished, counted from the first."""
        count = 0
        while (run, count) in self._stages:
            count += 1
        return count

    def weights(self, run: str, stage: int) -> dict[str, Tensor]:
        """The weights deployed after a finished stage, checked against their hash."""
        line = self._stages[run, stage]
        return read_tensors(self.stage_file(run, stage), line["sha256"])

    # Writing.

    def run_folder(self, run: str) -> Path:
        """The folder of one run."""
        return self.runs / run

    def stage_file(self, run: str, stage: int) -> Path:
        """The weights deployed after a stage."""
        return self.run_folder(run) / f"stage-{stage:04d}.safetensors"

    def save_weights(
        self, run: str, stage: int, weights: dict[str, Tensor], same_as: Path | None
    ) -> str:
        """Keep the weights deployed after a stage; returns their SHA-256.

        Args:
            run: the run's id.
            stage: the stage's number.
            weights: what to write.
            same_as: a file that already holds exactly these weights.
        """
        path = self.stage_file(run, stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        if same_as is not None:
            link_or_copy(same_as, path)
        else:
            write_tensors(path, weights)
        return sha256(path)

    def save_items(self, run: str, name: str, scores: Sequence[tuple[str, list[Score]]]) -> None:
        """Keep what became of every item, and what was written for it.

        ``items/<name>.safetensors`` has a float32 tensor per score, named ``task/score``, with the
        items in the data's order; ``items/<name>.jsonl`` a line per generated text.
        """
        tensors: dict[str, Tensor] = {}
        texts: list[dict[str, Any]] = []
        for task, own in scores:
            for score in own:
                if score.items is not None:
                    tensors[f"{task}/{score.name}"] = score.items.float()
                texts += [{"task": task, "score": score.name, **text} for text in score.texts]
        folder = self.run_folder(run) / "items"
        with space_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / f"{name}.safetensors", tensors)
        if texts:
            lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
            write_text(folder / f"{name}.jsonl", lines)

    def save_ready(self, run: str, stage: int, about: dict[str, Any]) -> None:
        """A stage's weights are deployed and written; what is left is to score them."""
        write_json(self.stage_file(run, stage).with_suffix(".json"), about)

    def ready(
        self, run: str, stage: int, key: str
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The weights of an unfinished stage that only lacks its scores, and what they cost."""
        path = self.stage_file(run, stage)
        try:
            about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
            return (read_tensors(path, about["sha256"]), about) if about["key"] == key else None
        except (OSError, ValueError, KeyError, DamagedRecordError):
            return None

    def finish_stage(
        self,
        stage: dict[str, Any],
        scores: list[dict[str, Any]],
        merges: list[dict[str, Any]],
        curves: list[dict[str, Any]],
        lines: list[dict[str, Any]],
    ) -> None:
        """Write a stage's lines; with the last of them it is finished."""
        for name, rows in (("merges", merges), ("curves", curves), ("lines", lines)):
            if rows:
                self._append(name, rows)
        self._append("scores", scores)
        self._append(_STAGES, [stage])
        self._stages[stage["run"], stage["stage"]] = stage
        self.stage_file(stage["run"], stage["stage"]).with_suffix(".json").unlink(missing_ok=True)

    def fold(self, run: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Take up what workers have finished of a run (:mod:`stockpot.experiment.journal`).

        A kill between the lines of the logs and the deletion of the journal's file doubles nothing:
        a stage that the logs call finished is passed over.

        Returns:
            The line in stages.jsonl of each stage, and its lines in scores.jsonl.

        Raises:
            ConfigError: if a worker has started from other weights than the record says. Its stage
                is not taken up.
        """
        found = []
        for path in sorted((self.journals / run).glob("stage-*.json")):
            held = read_json(path)
            stage = held["stage"]
            if (stage["run"], stage["stage"]) not in self._stages:
                try:
                    self.check_start(*held["start"])
                except ConfigError:
                    path.unlink()
                    raise
                logs = (held[name] for name in ("scores", *_OPTIONAL))
                self.finish_stage(stage, *logs)
                found.append((stage, held["scores"]))
            path.unlink()
        return found

    def keep_error(self, run: str, error: Exception) -> str:
        """What to say of a run that failed; of errors not our own a traceback is kept."""
        if isinstance(error, StockpotError):
            return str(error)
        path = self.run_folder(run) / "error.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(traceback.format_exception(error)))
        return f"{type(error).__name__}: {error} (where: {path})"

    def finish_run(self, run: str, stages: int, keep: str) -> None:
        """Leave the weights that are to be kept, with a manifest of their hashes.

        A kill may come between the manifest and the deletion of what it does not name: that is
        deleted by the next call.
        """
        folder = self.run_folder(run)
        manifest_file = folder / "manifest.json"
        if manifest_file.exists():
            manifest = read_json(manifest_file)
            check_manifest(folder, manifest, self.folder)
        else:
            manifest = self._manifest(run, stages - 1, keep)
            write_json(manifest_file, manifest)
        for path in folder.glob("stage-*"):
            if path.name not in manifest:
                path.unlink(missing_ok=True)
        shutil.rmtree(folder / "memory", ignore_errors=True)
        (folder / "error.txt").unlink(missing_ok=True)  # of an earlier try

    def _manifest(self, run: str, last: int, keep: str) -> dict[str, Any]:
        """The files of weights that a finished run keeps, put where they belong."""
        if keep == "none":
            return {}
        folder = self.run_folder(run)
        link_or_copy(self.stage_file(run, last), folder / "model.safetensors")
        kept = {"model.safetensors": last}
        if keep == "all":
            kept |= {self.stage_file(run, n).name: n for n in range(last + 1)}
        return {
            name: {
                "sha256": self._stages[run, number]["sha256"],
                "bytes": (folder / name).stat().st_size,
            }
            for name, number in kept.items()
        }
