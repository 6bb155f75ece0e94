"""Runs of an experiment in a process that others work beside."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockpot.errors import ConfigError, DamagedRecordError, DiskFullError
from stockpot.experiment.config import load_experiment
from stockpot.experiment.environment import quiet_libraries
from stockpot.experiment.jobs import Event, Job, Told, WorkerSettings
from stockpot.experiment.journal import Journal, WorkersPrefixes
from stockpot.experiment.observer import Observer, Row
from stockpot.experiment.plan import make_plan
from stockpot.files import NO_SPACE, read_json

if TYPE_CHECKING:
    from stockpot.experiment.plan import Run, Stage
    from stockpot.experiment.stages import RunLoop

__all__ = ["Worker", "enter", "stops_all"]

_ALL = (ConfigError, DamagedRecordError, DiskFullError)
_TOLD_SECONDS = 0.3
"""How often a worker tells where it is."""


def stops_all(error: Exception, folder: Path) -> bool:
    """Whether an error of one run would meet all runs, or hurt the record that they share.

    An error of the operating system does if it is one of the record's files, of a full disk, or of
    a write that does not say where. That of a file that a method or a library reads, of a network
    or of a model that is not found ends its own run.

    Args:
        error: what a run ended with.
        folder: the record's.
    """
    if not isinstance(error, OSError):
        return isinstance(error, _ALL)
    if error.errno in NO_SPACE:
        return True
    if isinstance(error.filename, str | bytes):
        place = Path(os.fsdecode(error.filename)).resolve()
        return place.is_relative_to(folder.resolve())
    return error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)


def enter(settings: WorkerSettings) -> None:
    """Make this process like the one that starts the workers, before anything else is imported."""
    os.environ.update(settings.environment)
    with contextlib.suppress(OSError):  # on another machine it may not be there
        os.chdir(settings.directory)
    sys.path += [place for place in settings.modules if place not in sys.path]


class Worker:
    """Does jobs of one experiment, one at a time, in this process.

    Data are read when it is made; a device is first touched by the first job, so that a process
    may be forked in between.

    Args:
        settings: the experiment and where its record is.

    Raises:
        ConfigError: if the stream is not the one that the record is made with.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        enter(settings)
        quiet_libraries()
        self.settings = settings
        self.experiment = load_experiment(settings.experiment, output=settings.folder)
        self.stream = self.experiment.load_stream()
        self.plan = make_plan(self.experiment, self.stream, settings.share_prefixes)
        if self.plan.data != read_json(settings.folder / "experiment.json")["data"]:
            raise ConfigError(
                f"the examples of {self.stream.name} that a worker reads are not those that this "
                "experiment was started with. Workers read the data by the experiment's settings "
                "alone: a stream that was changed in the program can only be run with jobs=1; on "
                "other machines the files must be the same"
            )
        self._runs = {run.id: run for run in self.plan.runs}
        self._journal = Journal(settings.folder)
        self._told = _Told()
        self._loop: RunLoop | None = None
        # The trainer collects garbage at every task; what is alive now need not be searched.
        gc.collect()
        gc.freeze()

    def work(self, job: Job, tell: Told) -> None:
        """Do one job and tell how it goes; the last event is finished, failed or fatal."""
        self._told.begin(job, tell)
        try:
            if self._loop is None:
                self._loop = self._make_loop()
            self._journal.take(job.finished)
            self._track_anew()
            self._loop.run(self._runs[job.run], job.until)
        except Exception as error:
            if stops_all(error, self.settings.folder):
                tell(Event("fatal", job.run, {"type": type(error).__name__}, str(error)))
            else:  # a method, a model or a library: the others go on
                tell(Event("failed", job.run, {}, self._journal.keep_error(job.run, error)))
        else:
            tell(Event("finished", job.run))

    def _make_loop(self) -> RunLoop:
        import torch

        from stockpot.experiment.measuring import make_evaluator
        from stockpot.experiment.stages import RunLoop

        threads = self.settings.threads or self.experiment.training.threads
        if threads is not None:
            torch.set_num_threads(threads)
        evaluator = make_evaluator(self.experiment, self.stream, self.settings.programs)
        prefixes = WorkersPrefixes(self.settings.folder / "prefixes", self.plan.uses())
        return RunLoop(
            self.experiment,
            self.stream,
            self.plan,
            self._journal,
            prefixes,
            self._told,
            evaluator,
        )

    def _track_anew(self) -> None:
        """Trackers read a run's finished stages once; other workers may have added some since."""
        from stockpot.experiment.tracking import Tracking

        assert self._loop is not None
        names = [task.name for task in self.stream.tasks]
        self._loop.tracking = Tracking(self.experiment, self._journal, names)


class _Told(Observer):
    """Tells the coordinator what an observer would be told, now and then."""

    def begin(self, job: Job, tell: Told) -> None:
        """A job begins."""
        self._job, self._tell = job, tell
        self._merges: Sequence[Mapping[str, float]] = ()
        self._sent = 0
        self._last = 0.0
        self._loss: float | None = None

    def _event(self, kind: str, **values: Any) -> None:
        self._last = time.monotonic()
        self._tell(Event(kind, self._job.run, values))

    def _is_time(self) -> bool:
        return time.monotonic() - self._last > _TOLD_SECONDS

    def _new_merges(self) -> list[dict[str, float]]:
        new = [dict(merge) for merge in self._merges[self._sent :]]
        self._sent += len(new)
        return new

    def stage_begins(self, run: Run, stage: Stage, merges: Sequence[Mapping[str, float]]) -> None:
        """Told at once."""
        self._merges, self._sent = merges, 0
        self._event("stage_begins", stage=stage.number)

    def step(self, run: Run, step: int, loss: float | None) -> None:
        """Told a few times a second."""
        self._loss = self._loss if loss is None else loss
        if self._is_time():
            self._event("step", step=step, loss=self._loss, merges=self._new_merges())
            self._loss = None

    def scoring(self, run: Run, what: str, done: int, total: int) -> None:
        """Told a few times a second."""
        if self._is_time():
            self._event("scoring", what=what, done=done, total=total)

    def stage_ends(self, run: Run, stage: Stage, trained: bool, row: Row) -> None:
        """Told at once: others may wait for it."""
        plain = {"values": dict(row.values), "metric": row.metric, "better": row.better}
        merges = self._new_merges()
        self._event("stage_ends", stage=stage.number, trained=trained, merges=merges, row=plain)
