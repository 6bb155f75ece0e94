"""An experiment: its record opened, its runs one after another, its summary."""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stockpot.errors import ConfigError, StockpotError
from stockpot.evaluation.settings import Programs
from stockpot.evaluation.tasks import Evaluator
from stockpot.experiment.config import Experiment
from stockpot.experiment.coordinator import Coordinator
from stockpot.experiment.environment import describe_environment
from stockpot.experiment.follower import FollowedPrefixes, Follower
from stockpot.experiment.jobs import MakeExecutor, WorkerSettings
from stockpot.experiment.local import LocalJobs
from stockpot.experiment.measuring import make_evaluator
from stockpot.experiment.observer import Observer, Row, There
from stockpot.experiment.plan import Plan, Run, describe_plan, make_plan
from stockpot.experiment.prefixes import PrefixStore
from stockpot.experiment.record import Record
from stockpot.experiment.stages import RunLoop
from stockpot.experiment.summary import write_summary
from stockpot.experiment.worker import stops_all
from stockpot.processes import Processes, check_one_process, met_by_all, processes
from stockpot.streams.data import Stream
from stockpot.tracking.trackers import check_trackers

__all__ = ["Outcome", "open_record", "run_experiment"]


_SUMMARY_SECONDS = 2.0
"""How old summary.json may be while an experiment runs, so that a report can be had meanwhile."""
_SUMMARY_SHARE = 20.0
"""How many times as long as it takes to make it is waited until it is made again."""


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
    jobs: int = 1,
    executor: MakeExecutor | None = None,
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
        jobs: how many runs at a time, each in a process of its own. The record is the same. They
            read the stream anew, so it must be the one that the experiment describes.
        executor: another place for the runs than this machine; ``jobs`` does not count then.

    Raises:
        StockpotError: if nothing can go on: another experiment's folder, a damaged record, a full
            disk.
    """
    check_trackers(experiment.training.report_to)
    among = processes()
    if experiment.training.threads is not None:
        torch.set_num_threads(experiment.training.threads)
    if stream is None:
        with among.main_first():
            stream = experiment.load_stream()
    evaluator = make_evaluator(experiment, stream, programs or Programs(), among)
    plan = make_plan(experiment, stream, share_prefixes)
    _check_same_data(among, plan)
    if executor is None and jobs != 1:
        executor = LocalJobs.of(jobs, experiment.resources, experiment.training.device)
    if executor is not None:
        check_one_process()
    settings = WorkerSettings(
        experiment=experiment.output.resolve() / "experiment.yaml",
        folder=experiment.output.resolve(),
        programs=programs or Programs(),
        threads=experiment.training.threads,
        share_prefixes=share_prefixes,
    )
    watcher = observer or Observer()
    return _Runner(experiment, stream, plan, watcher, evaluator, settings, executor).run()


def open_record(
    record: Record,
    experiment: Experiment,
    plan: Plan,
    stream: Stream,
    evaluator: Evaluator,
    processes_of_a_run: int,
) -> None:
    """Start a record that is held, or take it up, and say in it what it is made with.

    Raises:
        ConfigError: if it is another experiment's, or the data have changed.
        DamagedRecordError: if a file of it cannot be trusted.
    """
    environment = describe_environment(experiment.seeds)
    if evaluator.sandbox is not None:
        environment["isolation of generated programs"] = evaluator.sandbox.level
    environment["notes on the data"] = list(stream.notes)
    environment["processes of a run"] = processes_of_a_run
    record.open(experiment, plan.data, environment, len(plan.runs), evaluator.skipped)
    record.write_plan(describe_plan(plan, stream))


def _check_same_data(among: Processes, plan: Plan) -> None:
    """Refuse processes that have read other examples than the main one."""
    if any(data != plan.data for data in among.gather(plan.data)):
        raise ConfigError(
            "the processes of this run have read different data: the data set, how it is read or a "
            "library differs between their machines"
        )


class _Runner:
    def __init__(
        self,
        experiment: Experiment,
        stream: Stream,
        plan: Plan,
        observer: Observer,
        evaluator: Evaluator,
        settings: WorkerSettings,
        executor: MakeExecutor | None,
    ) -> None:
        self.settings, self.executor = settings, executor
        self.processes = evaluator.processes
        self.experiment, self.stream, self.plan, self.observer = experiment, stream, plan, observer
        self.evaluator = evaluator
        self.failures: dict[str, str] = {}
        self.next_summary = 0.0
        """From when on, by the monotonic clock, summary.json may be written again."""
        self.record, self.prefixes = (
            Record(experiment.output),
            PrefixStore(experiment.output / "prefixes", plan.uses()),
        )
        if not self.processes.main:
            self.record = Follower(experiment.output)
            self.prefixes = FollowedPrefixes(self.prefixes.folder, plan.uses())
            self.observer = Observer()
            untracked = experiment.training.model_copy(update={"report_to": ()})
            self.experiment = replace(experiment, training=untracked)
        self.loop = RunLoop(
            self.experiment,
            stream,
            plan,
            self.record,
            self.prefixes,
            self.observer,
            evaluator,
        )

    def run(self) -> Outcome:
        with contextlib.ExitStack() as stack:
            # Told to all: the others would wait for a main process that may not work here.
            self.processes.from_main(lambda: stack.enter_context(self.record.held()))
            return self._run_all()

    def _run_all(self) -> Outcome:
        finished = self.processes.from_main(self._open)
        if isinstance(self.record, Follower):
            self.record.take(finished)
        names = tuple(task.name for task in self.stream.tasks)
        # The trainer collects garbage at every task; what is alive now need not be searched.
        gc.collect()
        gc.freeze()
        rows = self._rows()
        kept = frozenset(key for key in self.plan.uses() if self.prefixes.has(key))
        self.observer.experiment_begins(self.plan, names, There(rows, kept))
        self.record.write_failures({})  # those of an earlier call are tried again
        try:
            if self.executor is None:
                self._one_after_another(self.plan.runs)
            else:
                self._in_workers(self.executor, rows)
        except KeyboardInterrupt:
            if self.processes.main:
                write_summary(self.record, self.plan, self.stream)
            raise
        finally:
            gc.unfreeze()
        failures = {
            run.id: self.failures[run.id] for run in self.plan.runs if run.id in self.failures
        }
        if not self.processes.main:
            return Outcome(self.record.folder, [], failures)
        summary = write_summary(self.record, self.plan, self.stream)
        if not failures:
            shutil.rmtree(self.prefixes.folder, ignore_errors=True)
        for folder in (self.record.scratch, self.record.journals):
            shutil.rmtree(folder, ignore_errors=True)
        return Outcome(self.record.folder, summary, failures)

    def _open(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Open the record; returns what is finished."""
        open_record(
            self.record,
            self.experiment,
            self.plan,
            self.stream,
            self.evaluator,
            self.processes.world,
        )
        return self.record.stages()

    def _one_after_another(self, runs: Iterable[Run]) -> None:
        for run in runs:
            try:
                self.loop.run(run)
            except Exception as error:  # a method, a model or a library: the others go on
                if stops_all(error, self.record.folder):
                    raise
                if self.processes.several and not met_by_all(error):
                    raise
                self._run_failed(run, error, self.record.keep_error(run.id, error))
            self._summarise_now_and_then()

    def _in_workers(self, make_executor: MakeExecutor, rows: dict[tuple[str, int], Row]) -> None:
        # What is finished is checked here, and trackers that lack some of it catch up.
        runs = self.plan.runs
        self._one_after_another(r for r in runs if self.record.finished(r.id) == len(r.stages))
        coordinator = Coordinator(
            self.plan,
            self.record,
            self.prefixes,
            self.observer,
            rows,
            self.experiment.resources.retries,
            lambda run, reason: self._run_failed(run, StockpotError(reason), reason),
        )
        executor = make_executor(self.settings, self.experiment.resources)
        coordinator.run(executor, self._summarise_now_and_then)

    def _run_failed(self, run: Run, error: Exception, reason: str) -> None:
        self.failures[run.id] = reason
        self.record.write_failures(self.failures)
        self.observer.run_failed(run, error)

    def _summarise_now_and_then(self) -> None:
        now = time.monotonic()
        if self.processes.main and now >= self.next_summary:
            write_summary(self.record, self.plan, self.stream)
            done = time.monotonic()
            # It reads all logs: where that takes long, it is done seldom.
            self.next_summary = done + max(_SUMMARY_SECONDS, _SUMMARY_SHARE * (done - now))

    def _rows(self) -> dict[tuple[str, int], Row]:
        """The scores of the stages that an earlier call finished."""
        scores: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for line in self.record.scores():
            scores.setdefault((line["run"], line["stage"]), []).append(line)
        finished = [
            (run.id, number)
            for run in self.plan.runs
            for number in range(self.record.finished(run.id))
        ]
        return {stage: Row.of(scores.get(stage, [])) for stage in finished}
