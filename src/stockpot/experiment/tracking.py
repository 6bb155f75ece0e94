"""Every run in the trackers that ``training.report_to`` names, from what the record holds.

A stage is logged in full when the record has it, whoever trained it; what a long one has measured
so far is logged every few seconds while it trains. ``tracking/<run>.json`` remembers how far each
tracker is, so that nothing is logged twice, and a tracker that is named or mended later catches up.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import stockpot
from stockpot.errors import first_line
from stockpot.experiment.config import Experiment
from stockpot.experiment.observer import Row
from stockpot.experiment.plan import Run
from stockpot.experiment.record import Record
from stockpot.files import read_json, write_json
from stockpot.metrics import all_metrics
from stockpot.tracking import names
from stockpot.tracking.trackers import TRACKERS, Points, Status, TrackedRun, Tracker

__all__ = ["StageLines", "Tracking", "stage_points", "training_points"]

LIVE_SECONDS = 5.0
"""How long a task trains between two looks at it."""

_log = logging.getLogger("stockpot")

Line = Mapping[str, Any]


@dataclass(frozen=True)
class StageLines:
    """What the record has of one finished stage."""

    stage: Line
    scores: Sequence[Line]
    """With those of the starting model in a run's first stage."""
    merges: Sequence[Line]
    curves: Sequence[Line]

    @cached_property
    def row(self) -> Row:
        """Its row of R."""
        return Row.of([line for line in self.scores if line["stage"] >= 0])

    @cached_property
    def start(self) -> Row:
        """The starting model's scores, in a run's first stage."""
        return Row.of([line for line in self.scores if line["stage"] < 0])


def training_points(
    number: int,
    begins: int,
    losses: Sequence[tuple[int, float]],
    merges: Sequence[Line],
    curve: Sequence[Line],
    rate: Callable[[int], float],
) -> dict[int, dict[str, float]]:
    """What is measured while a stage trains, by step of the run.

    Args:
        number: of the stage, 0 for the first.
        begins: steps of the run before it.
        losses: (step, mean loss), with the stage's own steps, as all of the following.
        merges: its merge events.
        curve: scores that were taken meanwhile.
        rate: the learning rate that a step is made with.
    """
    points: dict[int, dict[str, float]] = defaultdict(dict)
    for step, loss in losses:
        values = {names.LOSS: loss, names.LEARNING_RATE: rate(step), names.TASK: number + 1.0}
        points[begins + step] |= values
    for event in merges:
        points[begins + event["step"]] |= names.merge_values(event)
    for point in curve:  # of several moments of a step the last one counts
        before = point["moment"] == "before merge"
        name = (names.before_merge if before else names.during)(point["task"])
        points[begins + point["step"]][name] = point["value"]
    return points


def stage_points(stages: Sequence[StageLines], tasks: Sequence[str]) -> dict[int, dict[str, float]]:
    """What is measured when the last of ``stages`` is finished: its row of R and what follows.

    Args:
        stages: all stages of the run so far.
        tasks: names, in the stream's order.
    """
    last = stages[-1]
    points: dict[int, dict[str, float]] = defaultdict(dict)
    end = sum(stage.stage["steps"] for stage in stages)
    if len(stages) == 1:
        points[0] |= _score_values([line for line in last.scores if line["stage"] < 0])
    own = [line for line in last.scores if line["stage"] >= 0]
    points[end] |= _score_values(own) | _summary_values(stages, tasks)
    points[end][names.L2_TO_ANCHOR] = last.stage["l2_to_anchor"]
    if last.stage.get("kl_from_anchor") is not None:
        points[end][names.KL_FROM_ANCHOR] = last.stage["kl_from_anchor"]
    points[end][names.SECONDS] = sum(stage.stage["seconds"] for stage in stages)
    points[end][names.PEAK_MEMORY] = max(stage.stage["peak_memory"] for stage in stages)
    return points


def _score_values(lines: Sequence[Line]) -> dict[str, float]:
    """Each task's entry in R, and every single score where that is not all there is."""
    row = Row.of(lines).values
    values = {names.score(task): value for task, value in row.items()}
    scores = Counter(line["task"] for line in lines)
    for line in lines:
        if not (scores[line["task"]] == 1 and line["task"] in row):
            name = names.detail(line["task"], line.get("evaluation", "test"), line["metric"])
            values[name] = line["value"]
    return values


def _summary_values(stages: Sequence[StageLines], tasks: Sequence[str]) -> dict[str, float]:
    """The metrics of continual learning as if the stream ended here; not those with no meaning."""
    seen = tasks[: stages[-1].stage["row"] + 1]
    R: list[list[float | None] | None] = [None] * len(seen)
    for stage in stages:
        R[stage.stage["row"]] = [stage.row.values.get(task) for task in seen]
    first = stages[0].start
    b = [first.values.get(task) for task in seen]
    metrics = all_metrics(R, b, "lower" if first.better == "lower" else "higher")
    return {names.summary(key): value for key, value in metrics.items() if value is not None}


@dataclass
class _Mark:
    """How far a tracker is with a run."""

    id: str
    stages: int = 0
    """Stages that are logged in full."""
    step: int = -1
    """The step of the run up to which the next stage's training is logged."""


class Tracking:
    """All runs of an experiment in all trackers that it names; idle if there is none."""

    def __init__(self, experiment: Experiment, record: Record, tasks: Sequence[str]) -> None:
        self._experiment, self._record, self._tasks = experiment, record, tasks
        self._names: list[str] = list(experiment.training.report_to)
        self._folder = experiment.output / "tracking"
        self._earlier: dict[str, list[StageLines]] | None = None
        self._open: dict[str, Tracker] = {}
        self._marks: dict[str, _Mark] = {}
        self._stages: list[StageLines] = []
        self._sent = 0.0

    @contextlib.contextmanager
    def run(self, run: Run) -> Iterator[None]:
        """Have a run open in every tracker that lacks some of it; the block trains it."""
        if not self._names:
            yield
            return
        status: Status = "failed"
        self._run = run
        try:
            self._begin()
            yield
            status = "finished"
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            for name in list(self._open):
                with self._forgiving(name):
                    self._open.pop(name).close(status)

    def watch(
        self, merges: Sequence[Line], curve: Sequence[Line]
    ) -> Callable[[Sequence[tuple[int, float]]], None]:
        """For the trainer: called with all losses so far of the stage that trains.

        Args:
            merges: its merge events; the list grows.
            curve: its scores meanwhile; the list grows.
        """
        number = len(self._stages)
        begins = sum(stage.stage["steps"] for stage in self._stages)

        def losses(points: Sequence[tuple[int, float]]) -> None:
            if not self._open or time.monotonic() - self._sent < LIVE_SECONDS:
                return
            self._sent = time.monotonic()
            rate = self._rate(self._run.stages[number].steps)
            found = training_points(number, begins, points, merges, curve, rate)
            # The last step is logged with what follows it.
            end = begins + self._run.stages[number].steps
            self._log(number, {step: values for step, values in found.items() if step < end})

        return losses

    def stage_ends(self, lines: StageLines) -> None:
        """A stage is finished and in the record."""
        if self._names:
            self._stages.append(lines)
            self._log_stage(len(self._stages) - 1)

    def _begin(self) -> None:
        """Open what lacks something, and log what is in the record already."""
        run = self._run
        done = self._record.finished(run.id)
        self._marks = self._held()
        self._stages = self._stages_there()[:done] if done else []
        for name in list(self._names):
            known = self._marks.get(name)
            if known is not None and known.stages > done:  # the record is an older copy
                known = None
            if known is None or known.stages < len(run.stages):
                with self._forgiving(name):
                    tracker = TRACKERS[name]()
                    found = tracker.open(self._about(), None if known is None else known.id)
                    if known is None or found != known.id:
                        self._marks[name] = _Mark(found)
                    self._open[name] = tracker
                    self._remember()
        for number in range(len(self._stages)):
            self._log_stage(number)
        self._sent = time.monotonic()

    def _log_stage(self, number: int) -> None:
        lines = self._stages[number]
        begins = sum(stage.stage["steps"] for stage in self._stages[:number])
        steps = lines.stage["steps"]
        during = training_points(
            number, begins, lines.stage["losses"], lines.merges, lines.curves, self._rate(steps)
        )
        after = stage_points(self._stages[: number + 1], self._tasks)
        self._log(number, during, after, finished=begins + steps)

    def _log(
        self, number: int, during: Points, after: Points | None = None, finished: int | None = None
    ) -> None:
        """Log to every tracker what it lacks of stage ``number``."""
        for name in list(self._open):
            mark = self._marks[name]
            if mark.stages != number:
                continue  # it has all of this stage
            with self._forgiving(name):
                points: dict[int, dict[str, float]] = defaultdict(dict)
                for step, values in during.items():
                    if step > mark.step:
                        points[step] |= values
                for step, values in (after or {}).items():
                    points[step] |= values
                if points:
                    self._open[name].log(points)
                if finished is not None:
                    mark.stages, mark.step = number + 1, finished
                elif points:
                    mark.step = max(points)
                self._remember()

    @contextlib.contextmanager
    def _forgiving(self, name: str) -> Iterator[None]:
        """A tracker that fails is said and left out; it must never cost a training."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            self._names.remove(name)
            _log.warning(
                "tracking: %s failed and is left out from here on (%s: %s). Training goes on. The "
                "same command, once it works again, logs what is missing.",
                name,
                type(error).__name__,
                first_line(error),
            )

    def _held(self) -> dict[str, _Mark]:
        """How far every tracker is, if what it has is of this very run."""
        path = self._folder / f"{self._run.id}.json"
        with contextlib.suppress(Exception):  # damaged: all is logged again, to a run of its own
            held = read_json(path)
            if held["key"] == self._run.stages[-1].deployed:
                return {name: _Mark(**mark) for name, mark in held["trackers"].items()}
        return {}

    def _remember(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trackers = {name: asdict(mark) for name, mark in self._marks.items()}
        document = {"key": self._run.stages[-1].deployed, "trackers": trackers}
        write_json(self._folder / f"{self._run.id}.json", document)

    def _about(self) -> TrackedRun:
        run, common = self._run, self._experiment.common()
        common["training"].pop("report_to")
        config = {
            "method": run.method.name,
            "settings": run.method.settings(),
            "seed": run.seed,
            "tasks": list(self._tasks),
            **common,
            "stockpot": stockpot.__version__,
        }
        return TrackedRun(run.id, run.label, self._experiment.name, config, self._folder)

    def _rate(self, steps: int) -> Callable[[int], float]:
        from stockpot.training.arguments import learning_rate_at

        return learning_rate_at(self._experiment.training, steps)

    def _stages_there(self) -> list[StageLines]:
        """This run's stages that an earlier call finished; the record is read once for all."""
        if self._earlier is None:
            lines: dict[str, dict[tuple[str, int], list[Line]]] = {}
            for log in ("scores", "merges", "curves"):
                lines[log] = defaultdict(list)
                for line in getattr(self._record, log)():
                    lines[log][line["run"], max(line["stage"], 0)].append(line)
            self._earlier = defaultdict(list)
            for at, stage in sorted(self._record.stages().items()):
                found = StageLines(stage, *(lines[log].get(at, []) for log in lines))
                self._earlier[at[0]].append(found)
        return self._earlier.get(self._run.id, [])
