"""Progress of an experiment: bars with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from stockpot.experiment.observer import Observer

if TYPE_CHECKING:
    from rich.console import Console

    from stockpot.experiment.plan import Plan, Run, Stage

__all__ = ["progress_observer"]

_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 5.0


def progress_observer(console: Console) -> BarObserver | LineObserver:
    """Bars if the console is a terminal, else a line now and then."""
    return BarObserver(console) if console.is_terminal else LineObserver(console)


class BarObserver(Observer):
    """Three bars: all runs (by optimizer steps still to train), this run's tasks, their steps."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            transient=True,
            speed_estimate_period=60,
        )
        self._runs: TaskID | None = None
        self._tasks: TaskID | None = None
        self._steps: TaskID | None = None
        self._drawn = 0.0
        self._loss: float | None = None

    def experiment_begins(self, plan: Plan, task_names: tuple[str, ...]) -> None:
        """Draw the bars."""
        self._names = task_names
        self._runs = self._progress.add_task("runs ", total=len(plan.runs), detail="")
        self._tasks = self._progress.add_task("tasks", total=len(task_names), detail="")
        self._steps = self._progress.add_task("steps", total=None, detail="")
        self._progress.start()

    def run_begins(self, run: Run, finished: int) -> None:
        """A fresh bar of tasks."""
        assert self._tasks is not None
        assert self._runs is not None
        self._progress.reset(self._tasks, total=len(run.stages), completed=finished)
        self._progress.update(self._runs, detail=run.id)

    def stage_begins(self, run: Run, stage: Stage) -> None:
        """A fresh bar of steps."""
        assert self._tasks is not None
        assert self._steps is not None
        names = ", ".join(self._names[task] for task in stage.tasks)
        self._progress.update(self._tasks, detail=names)
        self._progress.reset(self._steps, total=stage.steps, detail="")
        self._loss = None

    def step(self, step: int, loss: float | None) -> None:
        """Move the bar, ten times a second at most."""
        self._loss = loss if loss is not None else self._loss
        now = time.monotonic()
        if now - self._drawn < _REDRAW_SECONDS or self._steps is None:
            return
        self._drawn = now
        detail = "" if self._loss is None else f"loss {self._loss:.4f}"
        self._progress.update(self._steps, completed=step, detail=detail)

    def scoring(self, what: str, done: int, total: int) -> None:
        """What is scored, in the place of the loss."""
        now = time.monotonic()
        if now - self._drawn < _REDRAW_SECONDS or self._steps is None:
            return
        self._drawn = now
        self._progress.update(self._steps, detail=f"scoring {what}: {done:,} of {total:,}")

    def stage_ends(self, run: Run, stage: Stage, trained: bool, scores: list[str]) -> None:
        """One task further; show the scores."""
        assert self._tasks is not None
        assert self._steps is not None
        self._progress.update(self._steps, completed=stage.steps)
        self._progress.update(self._tasks, advance=1, detail=f"scores {' '.join(scores[:8])}")

    def run_ends(self, run: Run) -> None:
        """One run further."""
        assert self._runs is not None
        self._progress.update(self._runs, advance=1)

    def run_failed(self, run: Run, error: Exception) -> None:
        """One run further, with its failure above the bars."""
        self._console.print(f"failed {run.id}", style="red", highlight=False, markup=False)
        self.run_ends(run)

    def close(self) -> None:
        """Take the bars away."""
        self._progress.stop()


class LineObserver(Observer):
    """A line per finished run, and one every few seconds within a long one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._done = 0
        self._total = 0
        self._began = time.monotonic()
        self._said = time.monotonic()
        self._where = ""
        self._steps = 0

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def experiment_begins(self, plan: Plan, task_names: tuple[str, ...]) -> None:
        """Say how much there is to do."""
        self._names = task_names
        self._total = len(plan.runs)
        self._say(
            f"{self._total} runs over {len(task_names)} tasks, "
            f"{plan.steps_to_train:,} optimizer steps to train"
        )

    def run_begins(self, run: Run, finished: int) -> None:
        """Say where a stopped run goes on."""
        if 0 < finished < len(run.stages):
            self._say(f"{run.id}: goes on after task {finished} of {len(run.stages)}")
        self._fresh = finished < len(run.stages)

    def stage_begins(self, run: Run, stage: Stage) -> None:
        """Remember what to call the steps."""
        names = ", ".join(self._names[task] for task in stage.tasks)
        self._where = f"{run.id}, task {names}"
        self._steps = stage.steps

    def step(self, step: int, loss: float | None) -> None:
        """A line every few seconds, when there is a loss to give."""
        if loss is not None and time.monotonic() - self._said > _LINE_SECONDS:
            self._say(f"{self._where}: step {step:,} of {self._steps:,}, loss {loss:.4f}")

    def scoring(self, what: str, done: int, total: int) -> None:
        """A line every few seconds."""
        if time.monotonic() - self._said > _LINE_SECONDS:
            self._say(f"{self._where}: scoring {what}, {done:,} of {total:,}")

    def run_ends(self, run: Run) -> None:
        """A line per run; finished ones of an earlier call are passed over in silence."""
        self._done += 1
        if self._fresh:
            spent = time.monotonic() - self._began
            left = spent / self._done * (self._total - self._done)
            self._say(
                f"[{self._done}/{self._total}] {run.id}  ({spent:.0f} s, about {left:.0f} s left)"
            )

    def run_failed(self, run: Run, error: Exception) -> None:
        """A line per failure."""
        self._done += 1
        self._say(f"[{self._done}/{self._total}] {run.id} failed")

    def close(self) -> None:
        """Nothing to take away."""
