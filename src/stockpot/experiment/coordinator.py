"""All runs of an experiment in workers: who does what next, and what they leave taken up."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stockpot import errors
from stockpot.errors import StockpotError
from stockpot.experiment.jobs import Event, Executor, Job
from stockpot.experiment.observer import Observer, Row
from stockpot.experiment.plan import Plan, Run
from stockpot.experiment.prefixes import PrefixStore
from stockpot.experiment.record import Record
from stockpot.experiment.scheduler import Scheduler
from stockpot.files import await_file, remove_scratch

__all__ = ["Coordinator"]

_WAIT_SECONDS = 1.0


class Coordinator:
    """Has runs done by an executor's workers, and is the only writer of what belongs to all runs.

    Args:
        plan: all runs.
        record: open and held.
        prefixes: what runs share; only the coordinator deletes from it.
        observer: is told how it goes, of several runs at a time.
        rows: the scores of finished stages; grows.
        retries: how often a run is tried again whose worker died.
        run_failed: is told of runs that fail, and why.
    """

    def __init__(
        self,
        plan: Plan,
        record: Record,
        prefixes: PrefixStore,
        observer: Observer,
        rows: dict[tuple[str, int], Row],
        retries: int,
        run_failed: Callable[[Run, str], None],
    ) -> None:
        self._runs = {run.id: run for run in plan.runs}
        self._record, self._prefixes, self._observer = record, prefixes, observer
        self._rows, self._run_failed = rows, run_failed
        self._merges: dict[str, list[Mapping[str, float]]] = {}
        self._begun: set[str] = set()
        self._ended: set[str] = set()
        """Runs whose journals hold something new."""
        self._jobs = 0
        finished = {run: record.finished(run) for run in self._runs}
        self._scheduler = Scheduler(plan, finished, prefixes.has, prefixes.has_scores, retries)
        for run in plan.runs:
            if finished[run.id] < len(run.stages):  # the others have been looked at
                for stage in run.stages[: finished[run.id]]:
                    prefixes.used(stage.trained)

    def run(self, executor: Executor, now_and_then: Callable[[], None]) -> None:
        """Have everything done that is not finished.

        Args:
            executor: where; it is closed at the end, whatever happens.
            now_and_then: called after every look at the workers.

        Raises:
            StockpotError: what stopped a worker and would stop all.
        """
        try:
            while not self._scheduler.over:
                self._submit(executor)
                for event in executor.events(_WAIT_SECONDS):
                    self._hear(event)
                self._submit(executor)  # before files are written: somebody waits for work
                for run_id in self._ended:
                    self._fold(run_id, self._scheduler.done(run_id))
                self._ended.clear()
                now_and_then()
        finally:
            executor.close()
            for run_id in self._begun:  # of workers that were stopped
                self._fold(run_id)
            remove_scratch(self._record.runs)  # of workers that were killed

    def _submit(self, executor: Executor) -> None:
        while self._jobs < executor.slots and (found := self._scheduler.next()) is not None:
            run, until = found
            self._fold(run.id, self._scheduler.done(run.id))
            done, stages = self._record.finished(run.id), self._record.stages()
            if run.id not in self._begun:
                self._begun.add(run.id)
                self._observer.run_begins(run, done)
            self._jobs += 1
            executor.submit(Job(run.id, until, tuple(stages[run.id, n] for n in range(done))))

    def _hear(self, event: Event) -> None:
        run, values = self._runs[event.run], event.values
        if event.kind == "stage_begins":
            merges = self._merges[run.id] = []
            self._observer.stage_begins(run, run.stages[values["stage"]], merges)
            return
        self._merges.setdefault(run.id, []).extend(values.get("merges", ()))
        if event.kind == "step":
            self._observer.step(run, values["step"], values["loss"])
        elif event.kind == "scoring":
            self._observer.scoring(run, values["what"], values["done"], values["total"])
        elif event.kind == "stage_ends":
            self._stage_ends(run, values["stage"], values["trained"], Row(**values["row"]))
            self._ended.add(run.id)
        else:
            self._jobs -= 1
            self._job_ends(run, event)

    def _job_ends(self, run: Run, event: Event) -> None:
        if event.kind == "fatal":
            kind = getattr(errors, event.values.get("type", ""), StockpotError)
            raise kind(event.error)
        if event.kind == "finished":
            self._scheduler.job_ends(run.id)
            if self._scheduler.done(run.id) == len(run.stages):
                self._observer.run_ends(run)
            return
        self._fold(run.id, self._scheduler.done(run.id))
        if event.kind == "failed":
            self._scheduler.fails(run.id)
            self._run_failed(run, event.error)
        elif not self._scheduler.dies(run.id):
            self._run_failed(run, f"the process that trained it {event.error}")

    def _stage_ends(self, run: Run, number: int, trained: bool, row: Row) -> None:
        """A stage is finished, as its worker tells or its journal says."""
        if (run.id, number) not in self._rows:
            self._rows[run.id, number] = row
            self._scheduler.stage_ends(run.id, number)
            self._observer.stage_ends(run, run.stages[number], trained, row)

    def _fold(self, run_id: str, expected: int = 0) -> None:
        """Take up the finished stages of a run, waiting for them if there should be more."""
        run = self._runs[run_id]

        def fold() -> bool | None:
            for line, scores in self._record.fold(run_id):
                number = line["stage"]
                self._prefixes.used(run.stages[number].trained)
                row = Row.of(score for score in scores if score["stage"] == number)
                self._stage_ends(run, number, line["trained_here"], row)
            return self._record.finished(run_id) >= expected or None

        await_file(fold, self._record.journals / run_id)
