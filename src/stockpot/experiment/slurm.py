"""The parts of an experiment that a batch system runs as jobs of their own.

The record is opened once. Then each job takes one run through its stages, or through its first
ones; many may do so at a time, on any machines that see the record's folder, and each writes into
its run's journal. At last everything is gathered into the record.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from stockpot.errors import ConfigError, StockpotError, nearest
from stockpot.evaluation.settings import Programs
from stockpot.experiment.config import Experiment
from stockpot.experiment.follower import FollowedPrefixes, Follower
from stockpot.experiment.journal import Journal, WorkersPrefixes
from stockpot.experiment.measuring import make_evaluator
from stockpot.experiment.observer import Observer, Row, There
from stockpot.experiment.plan import Plan, Run, make_plan
from stockpot.experiment.prefixes import PrefixStore
from stockpot.experiment.record import Record
from stockpot.experiment.runner import Outcome, open_record
from stockpot.experiment.stages import RunLoop
from stockpot.experiment.summary import write_summary
from stockpot.experiment.worker import stops_all
from stockpot.files import exclusive, read_json, shared, write_json
from stockpot.processes import met_by_all, processes
from stockpot.streams.data import Stream

__all__ = ["Parts"]

_NOTE = "failed.json"


@dataclass
class Parts:
    """An experiment that is run in parts.

    Args:
        experiment: the whole of it.
        stream: its tasks.
        programs: consent to run the programs that models write.
    """

    experiment: Experiment
    stream: Stream
    programs: Programs

    def __post_init__(self) -> None:
        self.processes = processes()
        self.evaluator = make_evaluator(self.experiment, self.stream, self.programs, self.processes)
        self.plan: Plan = make_plan(self.experiment, self.stream)
        self.folder = self.experiment.output
        self.notes = self.folder / "scratch"

    def open(self) -> None:
        """Make the record, or take it up where an earlier call stopped.

        Raises:
            StockpotError: if a part is at work in it, or it is another experiment's.
        """
        record = Record(self.folder)
        with record.held():
            self._open(record)
            record.write_failures({})
            for note in self.notes.glob(f"*/{_NOTE}"):
                note.unlink()

    def gather(self) -> Outcome:
        """Take up what the parts have finished; runs that are not finished have failed.

        What they need to go on is kept.
        """
        record = Record(self.folder)
        with record.held():
            self._open(record)
            failures = {}
            for run in self.plan.runs:
                if record.finished(run.id) < len(run.stages):
                    failures[run.id] = self._why_not(run)
                else:
                    # Its job may have been killed after its last stage, in the middle of this.
                    record.finish_run(run.id, len(run.stages), self.experiment.record.weights)
            record.write_failures(failures)
            summary = write_summary(record, self.plan, self.stream)
            if not failures:
                for folder in (record.scratch, record.journals, self.folder / "prefixes"):
                    shutil.rmtree(folder, ignore_errors=True)
        return Outcome(self.folder, summary, failures)

    def run(
        self, name: str, until: int | None, watch: Callable[[Plan, There], Observer]
    ) -> str | None:
        """Take one run through its stages that are not finished, in this process and its like.

        Args:
            name: the run's id.
            until: up to (not including) this stage; None: all.
            watch: makes the observer of a plan of this run alone, and of what is there of it.

        Returns:
            Why the run failed; None if it did not.

        Raises:
            ConfigError: if there is no such run, or the record is not open.
            StockpotError: if another part is at this run, or everything would fail.
        """
        run = next((run for run in self.plan.runs if run.id == name), None)
        if run is None:
            raise ConfigError(f"no run {name!r}{nearest(name, (r.id for r in self.plan.runs))}")
        self._check_open()
        threads = self.experiment.training.threads or self.experiment.resources.cpus
        torch.set_num_threads(threads)
        with self._held(run):
            finished = self.processes.from_main(lambda: self._finished(run))
            observer = watch(replace(self.plan, runs=(run,)), self._there(finished))
            reason = self._run(run, until, [held["stage"] for held in finished], observer)
            if self.processes.main:
                note = self.notes / run.id / _NOTE
                if reason is not None:
                    note.parent.mkdir(parents=True, exist_ok=True)
                    write_json(note, {"reason": reason})
                else:
                    note.unlink(missing_ok=True)
        return reason

    def _run(
        self, run: Run, until: int | None, finished: list[Mapping[str, Any]], observer: Observer
    ) -> str | None:
        experiment, prefixes, uses = self.experiment, self.folder / "prefixes", self.plan.uses()
        journal = Journal(self.folder)
        journal.take(finished)
        record: Record = journal
        store: PrefixStore = WorkersPrefixes(prefixes, uses)
        if not self.processes.main:
            record, store = Follower(self.folder), FollowedPrefixes(prefixes, uses)
            for line in finished:
                record.finish_stage(dict(line), [], [], [], [])
            untracked = experiment.training.model_copy(update={"report_to": ()})
            experiment, observer = replace(experiment, training=untracked), Observer()
        loop = RunLoop(experiment, self.stream, self.plan, record, store, observer, self.evaluator)
        try:
            loop.run(run, until)
        except Exception as error:
            if stops_all(error, self.folder):
                raise
            if self.processes.several and not met_by_all(error):
                raise
            reason = journal.keep_error(run.id, error) if self.processes.main else str(error)
            observer.run_failed(run, error)
            return reason
        return None

    def _open(self, record: Record) -> None:
        each = self.experiment.resources.processes
        open_record(record, self.experiment, self.plan, self.stream, self.evaluator, each)

    def _check_open(self) -> None:
        path = self.folder / "experiment.json"
        if not path.exists():
            raise ConfigError(f"{self.folder} holds no record yet; --job :open makes it")
        if read_json(path)["data"] != self.plan.data:
            raise ConfigError(
                f"the examples of {self.stream.name} are not those that {self.folder} was made "
                "with: the data set or how it is read has changed, or differs between machines"
            )

    @contextlib.contextmanager
    def _held(self, run: Run) -> Iterator[None]:
        """Keep the record for parts alone, and this run for this part."""
        if not self.processes.main:
            yield
            return
        journal = self.folder / "jobs" / run.id
        with shared(self.folder):
            journal.mkdir(parents=True, exist_ok=True)
            with exclusive(journal):
                yield

    def _finished(self, run: Run) -> list[dict[str, Any]]:
        """What is finished of a run, by the record and by its journal: stage lines and scores."""
        record = Record(self.folder).load()
        scores = [line for line in record.scores() if line["run"] == run.id]
        held = [
            {"stage": record.stages()[run.id, number], "scores": scores}
            for number in range(record.finished(run.id))
        ]
        for path in sorted((self.folder / "jobs" / run.id).glob("stage-*.json")):
            found = read_json(path)
            if found["stage"]["stage"] == len(held):
                held.append({"stage": found["stage"], "scores": found["scores"]})
        return held

    def _there(self, finished: list[dict[str, Any]]) -> There:
        rows = {}
        for held in finished:
            number = held["stage"]["stage"]
            lines = [line for line in held["scores"] if line["stage"] == number]
            rows[held["stage"]["run"], number] = Row.of(lines)
        return There(rows)

    def _why_not(self, run: Run) -> str:
        """Why a run is not finished."""
        with contextlib.suppress(OSError, StockpotError, KeyError):
            return str(read_json(self.notes / run.id / _NOTE)["reason"])
        return (
            "its job was stopped before it was done (a time limit, out of memory?), or has not "
            "begun. Submit the script again to go on"
        )
