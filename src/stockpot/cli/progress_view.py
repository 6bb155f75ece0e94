"""One screen of a running experiment: what fits, the most important first."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.style import Style

from stockpot.cli.time_left import clock_text, duration_text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from stockpot.cli.progress_state import Going, History, Now, Progress, Setting

__all__ = ["ProgressView", "sparkline"]

Line = list[Segment]

_WIDEST = 100
"""Longer lines are tiring to read; only the matrix of scores takes more."""
_NARROW = 60
_MOST_SETTINGS = 8
_PATIENCE = 0.5
_BLOCKS = "▁▂▃▄▅▆▇█"
# How scores and settings share what is left of the screen, from the most to the least: the form of
# the scores, how many settings, and whether empty lines keep the parts apart.
_FORMS = (
    ("matrix", _MOST_SETTINGS, True),
    ("matrix", 4, True),
    ("summary", _MOST_SETTINGS, True),
    ("summary", 4, True),
    ("line", 4, True),
    ("line", 3, False),
    ("line", 1, False),
    ("line", 0, False),
    ("none", 0, False),
)
_ROOMY_HEIGHT = 14
_TASK_CELLS = (10, 24)
"""The least and the most of a task's name in a run's line."""


def sparkline(
    values: Sequence[float], width: int, low: float | None = None, high: float | None = None
) -> str:
    """Values as a row of blocks, averaged in groups where there are more than ``width``.

    Args:
        values: in order; what is not finite is left out.
        width: the most characters.
        low: what the lowest block stands for; None: the least value.
        high: what the highest block stands for; None: the greatest value.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    count = min(width, len(finite))
    edges = [round(part * len(finite) / count) for part in range(count + 1)]
    means = [math.fsum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low = min(means) if low is None else low
    high = max(means) if high is None else high
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    levels = [round((value - low) * scale) for value in means]
    return "".join(_BLOCKS[max(0, min(len(_BLOCKS) - 1, level))] for level in levels)


class ProgressView:
    """Draws a :class:`~stockpot.cli.progress_state.Progress` into the terminal's size.

    No line is as wide as the terminal, and there is one line less than it has, for the cursor, so
    that nothing wraps or scrolls.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._plain = False
        self._console: Console
        self._options: ConsoleOptions
        self._last: list[Line] = []
        self.widths: list[int] = []
        """Of the lines that were drawn last, in cells."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The whole screen."""
        self._console, self._options = console, options
        self._plain = options.ascii_only or options.legacy_windows
        # Without it soon, the lines stay as they are: who holds it may wait for the terminal.
        if self._progress.lock.acquire(timeout=_PATIENCE):
            try:
                width, height = max(1, options.size.width - 1), max(1, options.size.height - 1)
                self._last = self._lines(width, height)
            finally:
                self._progress.lock.release()
        self.widths = [_cells(line) for line in self._last]
        for line in self._last:
            yield from line
            yield Segment.line()
        yield Segment.line()  # the cursor waits below: what is typed (^C) is echoed there

    def _lines(self, width: int, height: int) -> list[Line]:
        narrow = min(width, _WIDEST)
        self._progress.look()
        if self._progress.several:
            return [self._fit(line, width) for line in self._several(narrow, height)]
        head, run = self._head(narrow), self._run(narrow)
        lines: list[Line] = []
        for form, settings, apart in _FORMS:
            scores = self._scores(form, width if form == "matrix" else narrow)
            if scores is None:
                continue
            parts = [head, run, scores, self._settings(settings, narrow)]
            lines = _joined([part for part in parts if part], apart)
            if len(lines) <= height:
                break
        else:  # hardly any room: the running task first
            lines = [*run[1:], *run[:1], *head][:height]
        return [self._fit(line, width) for line in lines]

    def _several(self, width: int, height: int) -> list[Line]:
        """The screen while several runs go on at a time: half for them, half for the results."""
        p = self._progress
        head, runs = self._head(width), p.at_work()
        apart = height >= _ROOMY_HEIGHT
        rows = max(1, height - len(head) - 2 * apart)
        ranked = len(p.settings) + 1 if p.settings else 0
        below = min(ranked, max(rows // 2, rows - len(runs))) if rows > 1 else 0
        below = below if below > 2 or not below else 1  # of two lines one would be a title
        above = rows - below
        shown = self._runs(runs if len(runs) <= above else runs[: above - 1], width)
        if len(runs) > above:
            shown.append([_s(f"and {len(runs) - above + 1:,} more running", "dim")])
        if not runs and p.done < p.total:
            shown = [[_s("starting", "dim")]]
        settings = self._settings(max(1, below - 1) if below else 0, width)
        return _joined([part for part in (head, shown, settings) if part], apart)[-height:]

    # The parts.

    def _head(self, width: int) -> list[Line]:
        """The experiment: its name, runs, time."""
        p = self._progress
        failed = [_s(", "), _s(f"{len(p.failed):,} failed", "bold red")] if p.failed else []
        left = p.time_left.left() if p.done < p.total else None
        so_far = f"{clock_text(p.clock() - p.began)} so far"
        if p.several and (count := len(p.at_work())):
            failed = [*failed, _s(f", {count:,} running")]
        if width < _NARROW:
            runs = [_s(f"{p.done:,}/{p.total:,} runs"), *failed]
            time = [_s(left.short(), "cyan")] if left else [_s(so_far)]
            return [[_s(p.name, "bold")], self._apart(runs, time, width)]
        runs = [_s(f"{p.done:,} of {p.total:,} runs done"), *failed]
        times = [_s(f"{so_far}, "), _s(left.text(), "cyan")] if left else [_s(so_far)]
        return [
            self._apart([_s(p.name, "bold")], runs, width),
            self._bar_line(p.share_done(), times, width),
        ]

    def _run(self, width: int) -> list[Line]:
        """The run that goes on: its task, steps and loss, or what is scored."""
        p = self._progress
        going = p.current
        if going is None:
            return [[_s("starting", "dim")]] if p.done < p.total else []
        history, now = going.history, going.now
        name = [_s(history.label, "bold"), _s(f", seed {history.seed}")]
        if now is None:
            return [name, [_s("starting", "dim")]]
        number = f"task {now.stage.row + 1:,} of {len(p.tasks):,}: "
        task = [_s("" if history.joint else number), _s(now.task, "bold")]
        doing = "" if now.training or now.scoring else "starting"
        if now.first is not None and now.step >= now.stage.steps and not now.scoring:
            doing = "ending the task"
        steps = self._scoring(now, width) if now.scoring else self._steps(now, width)
        return [
            self._apart(name, [], width),
            self._apart(task, [_s(doing, "dim")], width),
            steps,
            self._loss(now, width),
        ]

    def _runs(self, runs: Sequence[Going], width: int) -> list[Line]:
        """A line per run: its name, its task, how far it is in it, and its loss."""
        if not runs:
            return []
        roomy = width >= _NARROW
        tasks = [self._task_in_short(going) for going in runs]
        names = max(cell_len(going.history.name) for going in runs)
        bar = min(16, width // 6) if roomy else 0
        left = width - names - bar - (28 if roomy else 10)
        least, most = _TASK_CELLS
        room = min(max(map(cell_len, tasks)), max(least, min(most, left)))
        lines: list[Line] = []
        for going, task in zip(runs, tasks, strict=True):
            name = [_s(going.history.label, "bold"), _s(f", seed {going.history.seed}")]
            share, doing = self._how_far(going)
            right = [_s(set_cell_size(task, room))]
            if roomy:
                right += [_s("  "), *self._bar_line(share, [], bar)]
            right += [_s(f"{100 * share:4.0f} %")]
            if roomy:
                right += [_s(f"  {doing:<12}", "" if doing.startswith("loss") else "dim")]
            lines.append(self._apart(name, right, width))
        return lines

    def _task_in_short(self, going: Going) -> str:
        if going.now is None or going.history.joint:
            return "" if going.now is None else going.now.task
        return f"{going.now.stage.row + 1}/{len(self._progress.tasks)} {going.now.task}"

    def _how_far(self, going: Going) -> tuple[float, str]:
        """How much of what a run does at the moment is done, and what that is."""
        now, tasks = going.now, self._progress.tasks
        if now is None or (now.first is None and now.scoring is None):
            return 0.0, "starting"
        if now.scoring is not None:
            what, done, total = now.scoring
            share = done / total if total else 0.0
            return (tasks.index(what) + share) / len(tasks) if what in tasks else share, "scoring"
        share = min(1.0, now.step / max(1, now.stage.steps))
        loss = next(reversed(now.losses.values()), None)
        ends = now.step >= now.stage.steps
        return share, "ending" if ends else "" if loss is None else f"loss {loss:.4g}"

    def _steps(self, now: Now, width: int) -> Line:
        total, clock = now.stage.steps, self._progress.clock()
        speed = now.speed(clock)
        roomy = width >= _NARROW
        text = f"{now.step:,} of {total:,} steps" if roomy else f"{now.step:,}/{total:,}"
        if speed is not None and now.training:
            text += f", {_speed_text(speed)}"
            seconds = (total - now.step) / speed
            if roomy and seconds >= 10:
                text += f", {duration_text(seconds)} left"
        return self._bar_line(now.step / max(1, total), [_s(text)], width)

    def _scoring(self, now: Now, width: int) -> Line:
        assert now.scoring is not None
        what, done, total = now.scoring
        tasks = self._progress.tasks
        number = f" {tasks.index(what) + 1} of {len(tasks)}:" if what in tasks else ""
        items = f", {done:,} of {total:,}" if total else ""
        if width < _NARROW:
            text = f"scoring{number or f' {what}'}{items}".replace(" of ", "/").replace(":", "")
        else:
            text = f"scoring{number} {what}{items}"
        share = done / total if total else 0.0
        if what in tasks:
            share = (tasks.index(what) + share) / len(tasks)
        return self._bar_line(share, [_s(text)], width)

    def _loss(self, now: Now, width: int) -> Line:
        losses = list(now.losses.values())
        left: Line = [_s("loss "), _s(f"{losses[-1]:.4g}", "bold")] if losses else []
        merges = len(now.merges)
        right: Line = []
        if merges:
            text = f"{merges:,} merge{'s' if merges > 1 else ''}"
            last = now.merges[-1]
            if width >= _NARROW and "distance_after" in last:
                before, after = last["distance_before"], last["distance_after"]
                text += f", the last from L2 {before:.3g} to {after:.3g}"
            right = [_s(text)]
        if losses and not self._plain:
            room = min(50, width - _cells(left) - _cells(right) - 4)
            left += [_s(" "), _s(sparkline(losses, room), "cyan")]
        return self._apart(left, right, width)

    # Scores.

    def _scores(self, form: str, width: int) -> list[Line] | None:
        """Last scores; None if they cannot be shown in this form."""
        p = self._progress
        mine = None if p.current is None else p.current.history
        history = mine if mine is not None and mine.rows else p.before
        if form == "none" or history is None or p.measure is None:
            return []
        of = "this run" if history is mine else history.name
        lower = ", lower is better" if p.measure.better == "lower" else ""
        head = [_s(f"{p.measure.name}, {p.measure.unit}{lower}  {of}", "dim")]
        if form == "matrix":
            return self._matrix(history, head, width)
        if form == "summary":
            return [head, *self._summary(history, width)]
        return [self._in_a_line(history, width)]

    def _matrix(self, history: History, head: Line, width: int) -> list[Line] | None:
        """A row per task: its score after each task since it was learned.

        Where not all fit beside each other, when it was learned and after the latest tasks.
        """
        p = self._progress
        names = [f"{number} {task}" for number, task in enumerate(p.tasks, 1)]
        margin = min(24, max(5, *map(cell_len, names)))
        longest = max(len(self._score(v)) for row in history.rows.values() for v in row)
        cell = 1 + max(longest, 5)
        room = (width - margin) // cell
        last = max(history.rows)
        whole = len(names) <= room
        if room < 4 or len(names) > 60:
            return None
        after = range(last + 1) if whole else range(max(0, last + 3 - room), last + 1)
        title = "".join(f"{task + 1:>{cell}}" for task in (range(len(names)) if whole else after))
        learned_title = "" if whole else f"{'learned':>{2 * cell}}"
        first = "after task" if whole and margin >= 10 else "after" if whole else ""
        lines = [head, [_s(f"{first:<{margin}}{learned_title}{title}", "dim")]]
        learned = history.learned()
        for task, name in enumerate(names):
            done = task <= last
            line = [_s(set_cell_size(name, margin), "" if done else "dim")]
            if not whole:
                line.append(
                    _s(f"{self._score(learned[task]) if task in learned else '':>{2 * cell}}")
                )
            for row in after if done else ():
                scores = history.rows.get(row) if row >= task or history.joint else None
                text = "" if scores is None else self._score(scores[task])
                line.append(_s(text.rjust(cell), "bold" if row == last else ""))
            lines.append(line)
        return lines

    def _summary(self, history: History, width: int) -> Iterator[Line]:
        """For many tasks: the mean, the newest, what is forgotten, and each task's bar."""
        p = self._progress
        assert p.measure is not None
        means, lost = history.mean_so_far(), history.forgotten_so_far(p.measure.sign)
        last = max(history.rows)
        row = history.rows[last][: last + 1]
        trend = 0 if self._plain else width - 36
        yield [
            _s(f"mean of {_tasks(len(row)):<13}"),
            _s(f"{self._score(means[-1]):>6}", "bold"),
            _s(f"  {sparkline(means, trend)}", "cyan"),
        ]
        if not history.joint:
            name = set_cell_size(p.tasks[last], 13)
            yield [_s(f"newest: {name}"), _s(f"{self._score(row[-1]):>6}", "bold")]
        if lost:
            yield [
                _s(f"{'forgotten on average':<21}"),
                _s(f"{self._score(lost[-1]):>6}", "bold"),
                _s(f"  {self._grows(lost)}"),
            ]
        if not self._plain:
            low = 0.0 if p.measure.better == "higher" else None
            high = 1.0 if p.measure.unit == "%" else None
            yield [_s(f"{'each task now':<21}"), _s(sparkline(row, width - 22, low, high), "cyan")]

    def _in_a_line(self, history: History, width: int) -> Line:
        """Each task's score now if that fits, else the mean and the newest."""
        last = max(history.rows)
        row = history.rows[last][: last + 1]
        p = self._progress
        line: Line = [_s("scores", "dim")]
        for name, value in zip(p.tasks, row, strict=False):
            line += [_s(f"  {name} "), _s(self._score(value), "bold")]
        if _cells(line) <= width:
            return line
        mean = self._score(history.mean_so_far()[-1])
        line = [_s("mean of "), _s(f"{_tasks(len(row))} "), _s(mean, "bold")]
        newest = [_s(", newest "), _s(self._score(row[-1]), "bold")]
        return line if history.joint else line + newest

    def _grows(self, lost: Sequence[float]) -> str:
        """Whether forgetting grows, compared with after the task before."""
        if len(lost) < 2:
            return ""
        now, before = self._score(lost[-1]), self._score(lost[-2])
        if now == before:
            return "as after the task before"
        return f"{'up' if lost[-1] > lost[-2] else 'down'} from {before}"

    def _settings(self, most: int, width: int) -> list[Line]:
        """The settings with finished runs, best first: the answer as it forms."""
        p = self._progress
        ranked = p.ranked()
        if not ranked or not most or p.measure is None:
            return []
        if most == 1:
            best = ranked[0]
            score = _s(self._score(best.average.mean), "bold")
            return [self._apart([_s("best so far: "), _s(best.label)], [score], width)]
        roomy = width >= _NARROW
        unit = f"{p.measure.name}, {p.measure.unit}"
        head = f"best so far ({unit})" if roomy else "best so far"
        lines = [self._apart([_s(head, "dim")], [_s(self._titles(roomy), "dim")], width)]
        shown = ranked if len(ranked) <= most else ranked[: most - 1]
        here = {going.history.label for going in p.going.values()}
        for setting in shown:
            name = _s(setting.label, "bold" if setting.label in here else "")
            lines.append(self._apart([name], self._setting(setting, roomy), width))
        if len(shown) < len(ranked):
            lines.append([_s(f"and {len(ranked) - len(shown)} more", "dim")])
        return lines

    def _titles(self, roomy: bool) -> str:
        return f"{'seeds':>7}{'average':>16}{'forgotten':>11}" if roomy else f"{'average':>8}"

    def _setting(self, setting: Setting, roomy: bool) -> Line:
        average = setting.average
        mean = f"{self._score(average.mean):>8}"
        if not roomy:
            return [_s(mean, "bold")]
        width = average.half_width
        around = "" if width is None else f"{'+-' if self._plain else '±'}{self._score(width)}"
        lost = setting.forgotten
        forgotten = self._score(math.fsum(lost) / len(lost)) if lost else "-"
        seeds = f"{len(setting.averages)} of {setting.planned}"
        return [_s(f"{seeds:>7}"), _s(mean, "bold"), _s(f" {around:<7}"), _s(f"{forgotten:>11}")]

    # Small things.

    def _score(self, value: float) -> str:
        """As the table at the end writes it."""
        measure = self._progress.measure
        assert measure is not None
        if math.isnan(value):
            return "-"
        text = f"{value * measure.scale:.{measure.digits}f}"
        return text.lstrip("-") if float(text) == 0 else text

    def _bar_line(self, share: float, after: Line, width: int) -> Line:
        """A bar with its numbers to the right, on a line."""
        share = share if math.isfinite(share) else 0.0
        room = width - _cells(after) - 2
        if room < 4:
            return after
        bar = ProgressBar(1.0, share, width=room, complete_style="cyan", finished_style="cyan")
        line = list(self._console.render(bar, self._options))
        return [*line, _s(" " * (room + 2 - _cells(line))), *after]

    def _apart(self, left: Line, right: Line, width: int) -> Line:
        """One to the left, one to the right; the left gives way."""
        if not right:
            return left
        room = width - _cells(right) - 2
        if room < 8:
            return left
        left = self._fit(left, room)
        return [*left, _s(" " * (room + 2 - _cells(left))), *right]

    def _fit(self, line: Line, width: int) -> Line:
        """Cut to the width, with a mark; in characters that the terminal has."""
        if self._plain:
            line = [
                Segment(text.encode("ascii", "replace").decode(), style) for text, style, _ in line
            ]
        if _cells(line) <= width:
            return line
        cut = Segment.adjust_line_length(line, width - 1, pad=False)
        return [*cut, _s("." if self._plain else "…")]


@functools.cache
def _style(name: str) -> Style:
    return Style.parse(name)


def _s(text: str, style: str = "") -> Segment:
    return Segment(text, _style(style) if style else None)


def _cells(line: Iterable[Segment]) -> int:
    return sum(cell_len(segment.text) for segment in line)


def _joined(parts: Sequence[list[Line]], apart: bool) -> list[Line]:
    lines: list[Line] = []
    for part in parts:
        if lines and apart:
            lines.append([])
        lines += part
    return lines


def _tasks(count: int) -> str:
    return f"{count:,} task{'' if count == 1 else 's'}"


def _speed_text(speed: float) -> str:
    """``1,204/s``, ``3.1/s``; slow ones by the step: ``12 s each``."""
    if speed < 0.5:
        return f"{duration_text(1 / speed)} each"
    return f"{speed:,.0f}/s" if speed >= 20 else f"{speed:.1f}/s"
