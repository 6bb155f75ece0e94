"""Progress of an experiment: one live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.control import Control
from rich.live import Live
from rich.segment import ControlType

from stockpot.cli.output import can_redraw, counted
from stockpot.cli.progress_state import Going, Progress
from stockpot.cli.progress_view import ProgressView
from stockpot.experiment.observer import There

if TYPE_CHECKING:
    from rich.console import Console

    from stockpot.experiment.plan import Plan, Run

__all__ = ["LineObserver", "LiveObserver", "progress_observer"]

_FASTEST_SECONDS = 0.25
_SHARE = 0.01
"""The most of a processor's time that drawing may take."""
_LINE_SECONDS = 5.0
_FAILURES_TOLD = 5


def progress_observer(console: Console, name: str) -> LiveObserver | LineObserver:
    """A live view if the console can show one, else a line now and then."""
    return (LiveObserver if can_redraw(console) else LineObserver)(console, name)


class LiveObserver(Progress):
    """The live view, drawn by a thread of its own.

    Args:
        console: the terminal.
        name: the experiment's.
        clock: seconds.
    """

    def __init__(
        self, console: Console, name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(name, clock)
        self._console = console
        self._view = ProgressView(self)
        self._live = Live(
            self._view,
            console=console,
            auto_refresh=False,
            transient=True,
            vertical_overflow="crop",
        )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_drawing, daemon=True)
        self._drawing = threading.Lock()
        self._width = 0
        self.drawing_seconds = 0.0
        """Processor time that drawing has taken."""

    def experiment_begins(self, plan: Plan, task_names: tuple[str, ...], there: There) -> None:
        """Draw for the first time."""
        super().experiment_begins(plan, task_names, there)
        self._live.start()
        self._thread.start()

    def run_failed(self, run: Run, error: Exception) -> None:
        """Say so above the view, where it stays; the view counts those after the first few."""
        super().run_failed(run, error)
        if len(self.failed) > _FAILURES_TOLD:
            return
        with self._drawing:
            self._make_room()
            self._console.print(f"failed: {run.id}", style="red", highlight=False, markup=False)

    def close(self) -> None:
        """Take the view away and show the cursor again, whatever happens meanwhile."""
        self._over.set()
        try:
            if self._thread.is_alive():
                self._thread.join()
            if self._live.is_started:
                with contextlib.suppress(OSError), self._drawing:  # the terminal may be gone
                    self._make_room()
                    self._live.stop()
        except KeyboardInterrupt:
            self._console.show_cursor(True)
            raise

    def _keep_drawing(self) -> None:
        pause = 0.0
        with contextlib.suppress(OSError):  # the terminal is gone; the experiment goes on
            while not self._over.wait(pause):
                begin = time.thread_time()
                self._draw()
                spent = time.thread_time() - begin
                self.drawing_seconds += spent
                pause = max(_FASTEST_SECONDS, spent / _SHARE)

    def _draw(self) -> None:
        with self._drawing:
            self._make_room()
            self._live.refresh()

    def _make_room(self) -> None:
        """Take back the lines that a terminal which became narrower has broken in two.

        The view then takes more lines than it was drawn with, and all of them must go. A terminal
        that cuts lines instead of breaking them loses as many lines above the view.
        """
        width, before = self._console.width, self._width
        self._width = width
        if width >= before:
            return
        rows = sum(-(-cells // width) - 1 for cells in self._view.widths if cells)
        erase_and_up = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1))
        self._console.control(Control(*erase_and_up * min(rows, self._console.height)))


class LineObserver(Progress):
    """A line per finished run, and one every few seconds within a long one."""

    def __init__(
        self, console: Console, name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(name, clock)
        self._console = console
        self._said = self.began

    def _say(self, text: str, style: str = "") -> None:
        self._said = self.clock()
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _say_where(self, run: Run, text: str) -> None:
        """A line every few seconds, with the time left if it is known; of several runs in turn."""
        now, going = self.clock(), self.going[run.id]
        turn = _LINE_SECONDS * (len(self.at_work()) - 0.5)
        if now - self._said <= _LINE_SECONDS or (self.several and now - going.said <= turn):
            return
        going.said = now
        left = self.time_left.left()
        self._say(f"{run.id}, task {self._task(going)}: {text}{f', {left.text()}' if left else ''}")

    def _task(self, going: Going) -> str:
        assert going.now is not None
        stage = going.now.stage
        if len(stage.tasks) > 1:
            return going.now.task
        return f"{stage.row + 1} of {len(self.tasks)} ({going.now.task})"

    def experiment_begins(self, plan: Plan, task_names: tuple[str, ...], there: There) -> None:
        """Say how much there is to do."""
        super().experiment_begins(plan, task_names, there)
        self._say(
            f"{self.name}: {counted(self.total, 'run')} over {counted(len(task_names), 'task')}, "
            f"{self.time_left.steps:,} optimizer steps to train"
        )

    def run_begins(self, run: Run, finished: int) -> None:
        """Say where a stopped run goes on."""
        known = run.id in self.going  # it has waited for another run
        super().run_begins(run, finished)
        if 0 < finished < len(run.stages) and not known:
            self._say(f"{run.id}: goes on after task {finished} of {len(run.stages)}")

    def step(self, run: Run, step: int, loss: float | None) -> None:
        """A line every few seconds, when there is a loss to give."""
        super().step(run, step, loss)
        now = self.going[run.id].now
        if loss is not None and now is not None:
            self._say_where(run, f"step {step:,} of {now.stage.steps:,}, loss {loss:.4g}")

    def scoring(self, run: Run, what: str, done: int, total: int) -> None:
        """A line every few seconds."""
        super().scoring(run, what, done, total)
        if self.going[run.id].now is not None:
            self._say_where(run, f"scoring {what}, {done:,} of {total:,}")

    def run_ends(self, run: Run) -> None:
        """A line per run; finished ones of an earlier call are passed over in silence."""
        going = self.going[run.id]
        super().run_ends(run)
        if not going.fresh or self.measure is None:
            return
        m = self.measure
        average = f"{going.history.mean_so_far()[-1] * m.scale:.{m.digits}f} {m.unit}"
        left = self.time_left.left() if self.done < self.total else None
        took = f"{self.clock() - going.began:.1f} s{f', {left.text()}' if left else ''}"
        self._say(f"[{self.done}/{self.total}] {run.id}: average {average}  ({took})")

    def run_failed(self, run: Run, error: Exception) -> None:
        """A line per failure."""
        super().run_failed(run, error)
        self._say(f"[{self.done}/{self.total}] {run.id} failed", "red")

    def close(self) -> None:
        """Nothing to take away."""
