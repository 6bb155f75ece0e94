"""An experiment: its record opened, its runs one after another, its summary."""

from __future__ import annotations

import gc
import os
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stockpot.errors import ConfigError, DamagedRecordError, DiskFullError, StockpotError
from stockpot.evaluation.settings import Programs
from stockpot.evaluation.tasks import Evaluator
from stockpot.experiment.config import Experiment
from stockpot.experiment.environment import describe_environment
from stockpot.experiment.measuring import make_evaluator
from stockpot.experiment.observer import Observer, Row, There
from stockpot.experiment.plan import Plan, Run, describe_plan, make_plan
from stockpot.experiment.prefixes import PrefixStore
from stockpot.experiment.record import Record
from stockpot.experiment.stages import RunLoop
from stockpot.experiment.summary import write_summary
from stockpot.files import write_text
from stockpot.streams.data import Stream
from stockpot.tracking.trackers import check_trackers

__all__ = ["Outcome", "run_experiment"]


_SUMMARY_SECONDS = 2.0
"""How old summary.json may be while an experiment runs, so that a report can be had meanwhile."""


@dataclass(frozen=True)
class Outcome:
    """What became of an experiment."""

    folder: Path
    summary: list[dict[str, Any]]
    """One object per finished run, as in summary.json."""
    failures: dict[str, str]
    """Run ids and what stopped them."""


def run_experiment(
    experiment: Experiment,
    observer: Observer | None = None,
    *,
    stream: Stream | None = None,
    share_prefixes: bool = True,
    programs: Programs | None = None,
) -> Outcome:
    """Run every method, setting and seed of ``experiment``; go on where an earlier call stopped.

    A run that fails is reported and does not stop the others.

    Args:
        experiment: what to run; its ``output`` folder becomes the record.
        observer: is told how it goes.
        stream: the tasks, if they are loaded already (:meth:`Experiment.load_stream`).
        share_prefixes: whether runs that agree up to a task train it once. The weights are the
            same without it.
        programs: consent to run the programs that models write (HumanEval).

    Raises:
        StockpotError: if nothing can go on: another experiment's folder, a damaged record, a full
            disk.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "this release trains each run in one process; start `stockpot run` without torchrun or "
            "accelerate launch"
        )
    check_trackers(experiment.training.report_to)
    if experiment.training.threads is not None:
        torch.set_num_threads(experiment.training.threads)
    stream = experiment.load_stream() if stream is None else stream
    evaluator = make_evaluator(experiment, stream, programs or Programs())
    plan = make_plan(experiment, stream, share_prefixes)
    return _Runner(experiment, stream, plan, observer or Observer(), evaluator).run()


class _Runner:
    def __init__(
        self,
        experiment: Experiment,
        stream: Stream,
        plan: Plan,
        observer: Observer,
        evaluator: Evaluator,
    ) -> None:
        self.experiment, self.stream, self.plan, self.observer = experiment, stream, plan, observer
        self.evaluator = evaluator
        self.record = Record(experiment.output)
        self.prefixes = PrefixStore(experiment.output / "prefixes", plan.uses())
        self.loop = RunLoop(
            experiment, stream, plan, self.record, self.prefixes, observer, evaluator
        )

    def run(self) -> Outcome:
        with self.record.held():
            return self._run_all()

    def _run_all(self) -> Outcome:
        environment = describe_environment(self.experiment.seeds)
        if self.evaluator.sandbox is not None:
            environment["isolation of generated programs"] = self.evaluator.sandbox.level
        environment["notes on the data"] = list(self.stream.notes)
        planned = len(self.plan.runs)
        self.record.open(
            self.experiment, self.plan.data, environment, planned, self.evaluator.skipped
        )
        names = tuple(task.name for task in self.stream.tasks)
        self.record.write_plan(describe_plan(self.plan, self.stream))
        # The trainer collects garbage at every task; what is alive now need not be searched.
        gc.collect()
        gc.freeze()
        self.observer.experiment_begins(self.plan, names, self._there())
        failures: dict[str, str] = {}
        self.record.write_failures(failures)  # those of an earlier call are tried again
        said: float | None = None
        try:
            for run in self.plan.runs:
                try:
                    self.loop.run(run)
                except (ConfigError, DamagedRecordError, DiskFullError, OSError):
                    raise  # these concern all runs
                except Exception as error:  # a method, a model or a library: the others go on
                    failures[run.id] = self._failure(run, error)
                    self.record.write_failures(failures)
                    self.observer.run_failed(run, error)
                if said is None or time.monotonic() - said > _SUMMARY_SECONDS:
                    said = time.monotonic()
                    write_summary(self.record, self.plan, self.stream)
        except KeyboardInterrupt:
            write_summary(self.record, self.plan, self.stream)
            raise
        finally:
            gc.unfreeze()
        summary = write_summary(self.record, self.plan, self.stream)
        if not failures:
            shutil.rmtree(self.prefixes.folder, ignore_errors=True)
        shutil.rmtree(self.record.scratch, ignore_errors=True)
        return Outcome(self.record.folder, summary, failures)

    def _there(self) -> There:
        """What an earlier call left."""
        scores: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for line in self.record.scores():
            scores.setdefault((line["run"], line["stage"]), []).append(line)
        finished = [
            (run.id, number)
            for run in self.plan.runs
            for number in range(self.record.finished(run.id))
        ]
        keys = self.plan.uses()
        return There(
            {stage: Row.of(scores.get(stage, [])) for stage in finished},
            frozenset(key for key in keys if self.prefixes.has(key)),
        )

    def _failure(self, run: Run, error: Exception) -> str:
        """What to say of a run that failed; of errors not our own a traceback is kept."""
        if isinstance(error, StockpotError):
            return str(error)
        path = self.record.run_folder(run.id) / "error.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(traceback.format_exception(error)))
        return f"{type(error).__name__}: {error} (where: {path})"
