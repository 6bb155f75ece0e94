"""What is known of a running experiment: the numbers that its displays show."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stockpot.cli.time_left import TimeLeft
from stockpot.experiment.observer import Observer, Row, There
from stockpot.metrics import average_accuracy, forgetting
from stockpot.report.table import Interval, Measure, measure_of

if TYPE_CHECKING:
    from stockpot.experiment.plan import Plan, Run, Stage

__all__ = ["Going", "History", "Now", "Progress", "Setting", "clean"]

LOSS_POINTS = 50
_SPEED_SECONDS = 20.0


def clean(name: str) -> str:
    """A user's name without what would move the cursor."""
    return "".join(character if character.isprintable() else " " for character in name)


@dataclass
class Now:
    """The stage that is trained, ended or scored at the moment."""

    stage: Stage
    task: str
    merges: Sequence[Mapping[str, float]]
    step: int = 0
    first: tuple[float, int] | None = None
    """When the first optimizer step was seen, and which it was."""
    scoring: tuple[str, int, int] | None = None
    """What is scored, items done, of how many."""
    losses: dict[int, float] = field(default_factory=dict)
    """Mean losses by fiftieths of the stage; the last one is of the steps just done."""
    samples: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def training(self) -> bool:
        """Whether optimizer steps are being made."""
        return self.scoring is None and self.first is not None and self.step < self.stage.steps

    def speed(self, now: float) -> float | None:
        """Optimizer steps a second over the last 20 s; None before there are two."""
        if self.first is None:
            return None
        if self.training:
            self.samples.append((now, self.step))
            while len(self.samples) > 2 and now - self.samples[0][0] > _SPEED_SECONDS:
                self.samples.popleft()
        ends = self.samples if len(self.samples) > 1 else [self.first, (now, self.step)]
        (begin, before), (end, after) = ends[0], ends[-1]
        return (after - before) / (end - begin) if after > before and end > begin else None


@dataclass
class History:
    """The scores of one run so far: rows of R by the number of the task trained last.

    A score that was not taken (``evaluation.tasks``) is NaN, and left out of means.
    """

    label: str
    seed: int
    joint: bool
    """Whether all tasks were trained at once."""
    rows: dict[int, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``sfa p=0.25 beta=0.5, seed 1``."""
        return f"{self.label}, seed {self.seed}"

    def learned(self) -> dict[int, float]:
        """Each trained task's score just after its own training."""
        return {} if self.joint else {task: row[task] for task, row in self.rows.items()}

    def mean_so_far(self) -> list[float]:
        """After each trained task, the mean of all tasks trained by then."""
        if self.joint:
            return [_mean(row) for row in self.rows.values()]
        return [_mean(row[: task + 1]) for task, row in sorted(self.rows.items())]

    def forgotten_so_far(self, sign: int) -> list[float]:
        """After each task from the second on, the mean loss of score since learned."""
        learned = self.learned()
        return [
            _mean([sign * (learned[task] - row[task]) for task in range(last)])
            for last, row in sorted(self.rows.items())
            if last and not self.joint and all(task in learned for task in range(last))
        ]


@dataclass
class Going:
    """A run that has begun and is not over."""

    run: Run
    history: History
    began: float
    fresh: bool
    """Whether there was something left to do."""
    now: Now | None = None
    between: bool = True
    """Whether no stage is at work: it begins, or waits for what another run trains."""
    said: float = 0.0
    """When a line was written of it."""

    def share(self) -> float:
        """How much of it is done by its optimizer steps, 0 to 1."""
        if self.now is None:
            return 0.0
        stages = self.run.stages
        behind = sum(stage.steps for stage in stages[: self.now.stage.number]) + self.now.step
        return behind / max(1, sum(stage.steps for stage in stages))


@dataclass
class Setting:
    """The finished runs of one method and setting."""

    label: str
    planned: int
    """How many seeds it is to have."""
    average: Interval
    """The final average over the seeds so far."""
    averages: list[float]
    forgotten: list[float] = field(default_factory=list)


class Progress(Observer):
    """Follows an experiment; displays read it, from another thread if they hold ``lock``.

    Args:
        name: the experiment's.
        clock: seconds.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.clock = clean(name), clock
        self.lock = threading.RLock()
        self.began = clock()
        self.tasks: tuple[str, ...] = ()
        self.total = self.done = 0
        self.failed: list[str] = []
        self.going: dict[str, Going] = {}
        """The runs that go on, by id, in the order in which they began."""
        self.several = False
        """Whether more than one has been at work at a time."""
        self.before: History | None = None
        """The scores of the run that finished last."""
        self.measure: Measure | None = None
        self.settings: dict[str, Setting] = {}
        self._rows: Mapping[tuple[str, int], Row] = {}

    def experiment_begins(self, plan: Plan, task_names: tuple[str, ...], there: There) -> None:
        """All runs are laid out."""
        self.tasks = tuple(map(clean, task_names))
        self._names = task_names
        self.total = len(plan.runs)
        self._planned = Counter(clean(run.label) for run in plan.runs)
        self._rows = there.rows
        self.time_left = TimeLeft(plan, there, self.clock)

    @property
    def current(self) -> Going | None:
        """The run that goes on, the last that began where there are several."""
        return next(reversed(self.going.values()), None)

    def at_work(self) -> list[Going]:
        """The runs that go on and do not wait, those that began first before the others."""
        return [going for going in self.going.values() if not going.between]

    def run_begins(self, run: Run, finished: int) -> None:
        """A run begins or goes on: its rows of an earlier call are taken up."""
        with self.lock:
            joint = len(run.stages) == 1 and len(run.stages[0].tasks) > 1
            history = History(clean(run.label), run.seed, joint)
            new = Going(run, history, self.clock(), finished < len(run.stages), said=self.clock())
            going = self.going.setdefault(run.id, new)
            going.between = True
            self.time_left.run_stops(run)
            for stage in run.stages[:finished]:
                if (run.id, stage.number) in self._rows:
                    self._add_row(going, stage, self._rows[run.id, stage.number])

    def stage_begins(self, run: Run, stage: Stage, merges: Sequence[Mapping[str, float]]) -> None:
        """A stage begins to train."""
        with self.lock:
            tasks = stage.tasks
            name = self.tasks[tasks[0]] if len(tasks) == 1 else f"{len(tasks)} tasks at once"
            going = self.going[run.id]
            going.now, going.between = Now(stage, name, merges), False
            self.several = self.several or len(self.at_work()) > 1
            self.time_left.stage_begins(run, stage)

    def step(self, run: Run, step: int, loss: float | None) -> None:
        """Called up to ten thousand times a second: little is done unless there is a loss."""
        now = self.going[run.id].now
        if now is None:
            return
        now.step = step
        if loss is not None or now.first is None:
            self._note(run, now, step, loss)
        elif now.scoring is not None:  # scores that were taken between two steps
            now.scoring = None

    def _note(self, run: Run, now: Now, step: int, loss: float | None) -> None:
        with self.lock:
            now.scoring = None
            if now.first is None:
                now.first = (self.clock(), step)
            if loss is not None:
                now.losses[(step - 1) * LOSS_POINTS // now.stage.steps] = loss
            self.time_left.step(run, step)

    def scoring(self, run: Run, what: str, done: int, total: int) -> None:
        """What is scored."""
        now = self.going[run.id].now
        if now is not None:
            now.scoring = (what, done, total)

    def stage_ends(self, run: Run, stage: Stage, trained: bool, row: Row) -> None:
        """A row of R is known."""
        with self.lock:
            going = self.going[run.id]
            going.between = True
            self._add_row(going, stage, row)
            self.time_left.stage_ends(run, stage, trained)

    def run_ends(self, run: Run) -> None:
        """A run is finished: it counts for its setting."""
        setting = self._with_result(self.going[run.id].history)
        with self.lock:
            self.done += 1
            self.before = self.going.pop(run.id).history
            if setting is not None:
                self.settings[setting.label] = setting

    def _with_result(self, history: History) -> Setting | None:
        """The run's setting, this run among its finished ones."""
        if self.measure is None:
            return None
        rows = [history.rows.get(task) for task in range(len(self.tasks))]
        R = [None if row is None else [_known(value) for value in row] for row in rows]
        final = None if R[-1] is None else average_accuracy(R)
        if final is None:
            return None
        lost = forgetting(R)
        known = self.settings.get(history.label)
        averages = [*(known.averages if known else []), final]
        forgotten = known.forgotten if known else []
        if lost is not None:
            forgotten = [*forgotten, self.measure.sign * lost]
        average = Interval.of(averages)
        assert average is not None
        return Setting(history.label, self._planned[history.label], average, averages, forgotten)

    def run_failed(self, run: Run, error: Exception) -> None:
        """A run is over without a result."""
        with self.lock:
            self.done += 1
            self.failed.append(run.id)
            self.going.pop(run.id, None)
            self.time_left.run_failed(run)

    def look(self) -> None:
        """Note where the running stages are: the steps themselves take no time to tell."""
        for going in self.going.values():
            if going.now is not None and going.now.training and not going.between:
                self.time_left.step(going.run, going.now.step)

    def ranked(self) -> list[Setting]:
        """The settings with a finished run, the best first."""
        sign = 1 if self.measure is None else self.measure.sign
        return sorted(self.settings.values(), key=lambda s: -sign * s.average.mean)

    def share_done(self) -> float:
        """How much of all runs is done, those that go on by their optimizer steps, 0 to 1."""
        part = sum(going.share() for going in self.going.values())
        return min(1.0, (self.done + part) / max(1, self.total))

    def _add_row(self, going: Going, stage: Stage, row: Row) -> None:
        if self.measure is None:
            self.measure = measure_of([{"metric": row.metric, "better": row.better}])
        going.history.rows[stage.row] = [row.values.get(name, math.nan) for name in self._names]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are known; NaN if none is."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
