"""How long an experiment will still take: what is left, at the rates that were measured."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stockpot.experiment.observer import There
    from stockpot.experiment.plan import Plan, Run, Stage

__all__ = ["Left", "TimeLeft", "Work", "clock_text", "duration_text", "work_left"]

_BASIS_SECONDS = 1.0
"""A stage that still trains is no basis before so many seconds of steps."""
_KEPT = 0.9
"""The weight of earlier stages with each new one: machines become faster and slower."""
_FIRST = 0.1
"""The weight of the first stage, in which libraries do many things for the only time."""
_RECENT = 8
"""How many runs go on at a time is the most there were when one of so many stages began."""


@dataclass(frozen=True)
class Work:
    """What one stage takes."""

    method: str
    steps: int
    """Optimizer steps to train; 0 if the weights are there or another run trains them before."""
    passes: int
    """How many models are scored on all tasks: equal weights once, the starting model too."""


@dataclass(frozen=True)
class Left:
    """Seconds that are left."""

    seconds: float
    whole: bool
    """False as long as nothing has been scored: what scoring takes is not in it."""

    def text(self) -> str:
        """``about 12 min left``."""
        more = "" if self.whole else " and scoring"
        return f"about {duration_text(self.seconds)}{more} left"

    def short(self) -> str:
        """``12 min left``."""
        more = "" if self.whole else " + scoring"
        return f"{duration_text(self.seconds)}{more} left"


class _Rate:
    """Seconds per unit of a method, mostly its last ten stages'; of all for one not seen yet."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, method: str, seconds: float, units: float) -> None:
        if not units:
            return
        for key in (method, ""):
            before = self._sums.get(key, (0.0, 0.0))
            self._sums[key] = (_KEPT * before[0] + seconds, _KEPT * before[1] + units)

    def with_more(self, method: str, seconds: float, units: float) -> _Rate:
        """A copy to which something was added."""
        copy = _Rate()
        copy._sums = dict(self._sums)
        copy.add(method, seconds, units)
        return copy

    def of(self, method: str) -> float | None:
        seconds, units = self._sums.get(method) or self._sums.get("", (0.0, 0.0))
        return seconds / units if units else None


def work_left(
    runs: Iterable[Run], finished: Collection[tuple[str, int]], kept: Iterable[str]
) -> Iterator[tuple[tuple[str, int], Work]]:
    """What the unfinished stages take, by run and number, in their order.

    Args:
        runs: in the order in which they run.
        finished: stages, by run and number, that are done.
        kept: content keys of trained weights that are there.
    """
    trained = set(kept)
    scored: set[str] = set()
    seed: int | None = None
    for run in runs:
        if run.seed != seed:
            seed, scored = run.seed, set()
        for stage in run.stages:
            if (run.id, stage.number) in finished:
                continue
            steps = 0 if stage.trained in trained else stage.steps
            models = {stage.deployed} | ({"start"} if stage.number == 0 else set())
            passes = len(models - scored)
            trained.add(stage.trained)
            scored |= models
            yield (run.id, stage.number), Work(run.method.name, steps, passes)


class _Timed:
    """A stage that runs: how long its steps have taken, from the first to the latest."""

    def __init__(self, work: Work, began: float, cold: bool) -> None:
        self.work, self.began, self.cold = work, began, cold
        self.stepping, self.stepped, self.step_now = 0.0, 0, 0
        self._first: tuple[int, float] | None = None

    def step(self, step: int, now: float) -> None:
        if self._first is None:
            self._first = (step, now)
        self.step_now = step
        self.stepped, self.stepping = step - self._first[0], now - self._first[1]


class TimeLeft:
    """The time left of an experiment, as it goes.

    A stage's time is its optimizer steps, first to last, and the rest: getting ready, ending the
    task, scoring, writing. Steps have a rate per method, and so has the rest, per model that is
    scored, or per stage where nothing is scored. What is left, times these rates, is divided by how
    many runs go on at a time; but no run takes less than what is left of itself.

    Args:
        plan: all runs.
        there: what an earlier call left; it costs nothing.
        clock: seconds.
    """

    def __init__(
        self, plan: Plan, there: There, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plan, self._clock = plan, clock
        self._finished = set(there.rows)
        self._kept = set(there.trained)
        self._failed: set[str] = set()
        self._steps, self._passes, self._idle = _Rate(), _Rate(), _Rate()
        self._stages: dict[str, _Timed] = {}
        self._at_a_time: deque[int] = deque(maxlen=_RECENT)
        self._warm = False
        self._lay_out()

    def _lay_out(self) -> None:
        """What is left, run by run, and who trains what several runs need."""
        runs = [run for run in self._plan.runs if run.id not in self._failed]
        self._left: dict[str, dict[int, Work]] = {}
        self._sums: dict[str, tuple[Work, int]] = {}
        for (run_id, number), work in work_left(runs, self._finished, self._kept):
            self._left.setdefault(run_id, {})[number] = work
        self._trainer = {
            stage.trained: (run.id, stage.number)
            for run in runs
            for stage in run.stages
            if stage.number in (own := self._left.get(run.id, {})) and own[stage.number].steps
        }

    @property
    def steps(self) -> int:
        """Optimizer steps still to train, those of a stage that has begun included."""
        return sum(work.steps for own in self._left.values() for work in own.values())

    def stage_begins(self, run: Run, stage: Stage) -> None:
        """A stage starts to train."""
        nothing = Work(run.method.name, 0, 0)
        work = self._left.get(run.id, {}).get(stage.number, nothing)
        self._stages[run.id] = _Timed(work, self._clock(), not self._warm)
        self._at_a_time.append(len(self._stages))

    def step(self, run: Run, step: int) -> None:
        """So many optimizer steps are done; need not be called for each, but for first and last."""
        if run.id in self._stages:
            self._stages[run.id].step(step, self._clock())

    def stage_ends(self, run: Run, stage: Stage, trained: bool) -> None:
        """A stage is scored and written."""
        self._finished.add((run.id, stage.number))
        if trained:
            self._kept.add(stage.trained)
            self._trained_elsewhere(run, stage)
        self._left.get(run.id, {}).pop(stage.number, None)
        self._sums.pop(run.id, None)
        timed = self._stages.pop(run.id, None)
        if timed is None:
            return
        method, weight = timed.work.method, _FIRST if timed.cold else 1.0
        self._warm = True
        self._steps.add(method, weight * timed.stepping, weight * timed.stepped)
        rest, passes = self._clock() - timed.began - timed.stepping, timed.work.passes
        rate = self._passes if passes else self._idle
        rate.add(method, weight * rest, weight * (passes or 1))

    def _trained_elsewhere(self, run: Run, stage: Stage) -> None:
        """Another run was to train this; it need not any more."""
        other, number = self._trainer.get(stage.trained, (run.id, stage.number))
        if other != run.id and number in (own := self._left.get(other, {})):
            own[number] = replace(own[number], steps=0)
            self._sums.pop(other, None)

    def run_failed(self, run: Run) -> None:
        """A run goes no further; what it would have trained for others falls to them."""
        self._stages.pop(run.id, None)
        self._failed.add(run.id)
        self._lay_out()

    def run_stops(self, run: Run) -> None:
        """A run does not go on for now: it waits for another, or its process was lost."""
        self._stages.pop(run.id, None)

    def left(self) -> Left | None:
        """What is left; None as long as there is nothing to go by."""
        steps_rate = self._steps
        for stage in self._stages.values():
            if stage.stepping >= _BASIS_SECONDS:
                steps_rate = steps_rate.with_more(stage.work.method, stage.stepping, stage.stepped)
        total, longest, whole = 0.0, 0.0, True
        for run_id in self._left:
            work, idle = self._sum(run_id)
            per_step, per_pass = steps_rate.of(work.method), self._passes.of(work.method)
            if work.steps and per_step is None:
                return None
            whole = whole and not (work.passes and per_pass is None)
            seconds = work.steps * (per_step or 0.0) + work.passes * (per_pass or 0.0)
            seconds += idle * (self._idle.of(work.method) or 0.0)
            if run_id in self._stages:
                seconds -= self._progress(self._stages[run_id], steps_rate)
            total, longest = total + max(0.0, seconds), max(longest, seconds)
        if not whole and not total:
            return None
        return Left(max(total / max(self._at_a_time, default=1), longest), whole)

    def _sum(self, run: str) -> tuple[Work, int]:
        """All that is left of a run, and how many of its stages score nothing."""
        if run not in self._sums:
            works = self._left[run].values()
            steps, passes = sum(work.steps for work in works), sum(work.passes for work in works)
            method = next((work.method for work in works), "")
            idle = sum(not work.passes for work in works)
            self._sums[run] = (Work(method, steps, passes), idle)
        return self._sums[run]

    def _progress(self, stage: _Timed, steps_rate: _Rate) -> float:
        """How much of what a running stage was expected to take lies behind."""
        work = stage.work
        per_step, per_pass = steps_rate.of(work.method), self._passes.of(work.method)
        stepped = min(stage.step_now, work.steps) * (per_step or 0.0)
        rest = self._clock() - stage.began - stage.stepping
        return stepped + min(rest, work.passes * (per_pass or 0.0))


def duration_text(seconds: float) -> str:
    """``45 s``, ``12 min``, ``5 h 20 min``, ``3 d 4 h``: as exact as an estimate may be."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def clock_text(seconds: float) -> str:
    """``0:08``, ``12:34``, ``5:06:07``."""
    whole = int(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
