"""What the numbers allow to be said: verdicts over all tasks, the mean, and a limit to keep."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy.stats import t as student_t

from stockpot.comparison import differences
from stockpot.comparison.rows import ALPHA, LEAST_ITEMS, Left, Row

__all__ = ["Comparison", "Judged", "Limit", "Mean", "Pairing", "Result", "Verdict", "holm", "judge"]

Verdict = Literal["forgotten", "learned", "no change seen", "too few items"]
State = Literal["within", "exceeded", "undecided"]

USEFUL = 0.2
"""Where not even a change of 20 points (of a loss: a fifth of it) would have been seen, items are
too few to say anything."""


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) corrected p: ``max_{j <= i} min(1, (k - j + 1) p_(j))`` for the i-th smallest.

    Below alpha together, at most in a share alpha of all comparisons is anything wrongly called
    real, whatever else the tasks have to do with each other.
    """
    corrected = [0.0] * len(p)
    highest = 0.0
    for place, number in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - place) * p[number]))
        corrected[number] = highest
    return corrected


@dataclass(frozen=True)
class Limit:
    """The most that a task may be forgotten."""

    value: float
    """In the score's own unit: a share for accuracies, nats for losses."""
    strict: bool = False
    """Whether it has to be certain: the upper end of the interval within the limit."""


@dataclass(frozen=True)
class LimitCheck:
    """One task held against the limit."""

    p: float
    """One-sided, of "the drop is at most the limit"."""
    p_corrected: float
    state: State
    items_needed: int | None
    """To tell drop and limit apart in four of five cases, if the drop seen is the true one."""


@dataclass(frozen=True)
class Judged:
    """A row with what can be said of it."""

    row: Row
    p_corrected: float
    """Holm's, over all tasks of all comparisons."""
    verdict: Verdict
    smallest_visible: float | None
    """The smallest true change that would have been called real in four of five cases."""
    check: LimitCheck | None = None


@dataclass(frozen=True)
class Mean:
    """The mean drop over tasks."""

    drop: float
    interval: tuple[float, float] | None
    tasks: int


@dataclass(frozen=True)
class Pairing:
    """What is compared with what, before anything is judged."""

    before: str
    after: str
    setting: str | None
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    left: tuple[Left, ...]


@dataclass(frozen=True)
class Comparison:
    """One pair of models, or of settings over their seeds."""

    pairing: Pairing
    tasks: tuple[Judged, ...]
    """The scores that count."""
    aside: tuple[Judged, ...]
    """All others."""
    mean: Mean | None


@dataclass(frozen=True)
class Result:
    """Everything that a comparison says."""

    before: str
    after: str
    comparisons: tuple[Comparison, ...]
    limit: Limit | None = None
    notes: tuple[str, ...] = ()

    @property
    def judged(self) -> list[Judged]:
        """The scores that count, of all comparisons."""
        return [judged for comparison in self.comparisons for judged in comparison.tasks]

    @property
    def verdict(self) -> str:
        """The verdicts of all tasks in one."""
        count = Counter(judged.verdict for judged in self.judged)
        if count["forgotten"] and count["learned"]:
            return "forgotten and learned"
        for verdict in ("forgotten", "learned", "no change seen"):
            if count[verdict]:
                return verdict
        return "too few items"

    def in_state(self, state: State) -> list[Judged]:
        """The tasks that stand so against the limit."""
        return [j for j in self.judged if j.check is not None and j.check.state == state]

    @property
    def unseen(self) -> list[Left]:
        """Scores of BEFORE that count and that AFTER could not be held against."""
        return [left for c in self.comparisons for left in c.pairing.left if left.judged]

    @property
    def exit_code(self) -> int:
        """0 passed, or no limit; 1 exceeded; 3 the data cannot tell."""
        if self.limit is None:
            return 0
        if self.in_state("exceeded"):
            return 1
        return 3 if self.in_state("undecided") or self.unseen else 0


def judge(
    pairings: Sequence[Pairing],
    before: str,
    after: str,
    limit: Limit | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """Verdicts on all rows, corrected for their number: those that count, and all others apart."""
    parts: dict[int, Judged] = {}
    for headline in (True, False):
        rows = [row for pair in pairings for row in pair.rows if row.headline is headline]
        parts.update(zip(map(id, rows), _judge(rows, limit if headline else None), strict=True))
    comparisons = []
    for pair in pairings:
        own = [parts[id(row)] for row in pair.rows]
        tasks = tuple(judged for judged in own if judged.row.headline)
        aside = tuple(judged for judged in own if not judged.row.headline)
        comparisons.append(Comparison(pair, tasks, aside, _mean([j.row for j in tasks])))
    return Result(before, after, tuple(comparisons), limit, tuple(notes))


def _judge(rows: Sequence[Row], limit: Limit | None) -> list[Judged]:
    corrected = holm([row.p for row in rows])
    alpha = ALPHA / max(1, len(rows))
    judged = []
    for row, p in zip(rows, corrected, strict=True):
        visible = row.smallest_visible(alpha)
        judged.append(Judged(row, p, _verdict(row, p, visible), visible))
    if limit is None:
        return judged
    above = [row.p_above(limit.value) for row in rows]
    return [
        replace(one, check=_held_against(one, limit, p, p_corrected, alpha / 2))
        for one, p, p_corrected in zip(judged, above, holm(above), strict=True)
    ]


def _verdict(row: Row, p: float, visible: float | None) -> Verdict:
    # 6 items' worth: McNemar's test asks for as much by itself, means over seeds or samples do not.
    enough = not row.share or abs(row.drop) * row.n >= LEAST_ITEMS - 1e-9
    if p < ALPHA:
        return ("forgotten" if row.drop > 0 else "learned") if enough else "too few items"
    if row.kind == "number" and row.spread == 0:
        return "no change seen" if row.drop == 0 and row.n > 1 else "too few items"
    useful = USEFUL if row.share else USEFUL * abs(row.before)
    return "no change seen" if visible is not None and visible <= useful else "too few items"


def _held_against(
    judged: Judged, limit: Limit, p: float, p_corrected: float, alpha: float
) -> LimitCheck:
    row = judged.row
    # One-sided at half of alpha, so that it says what the 95 % interval shows.
    state: State = "within"
    if row.drop > limit.value:
        certain = p_corrected < ALPHA / 2 and judged.verdict == "forgotten"
        state = "exceeded" if certain else "undecided"
    elif limit.strict and (row.interval is None or row.interval[1] > limit.value):
        state = "undecided"
    needed = differences.items_needed(row.spread, abs(row.drop - limit.value), alpha)
    return LimitCheck(p, p_corrected, state, needed)


def _mean(rows: Sequence[Row]) -> Mean | None:
    """The mean drop, each of several tasks counted once; its interval is over items within tasks.

    ``t(df) sqrt(sum_t w_t^2 s_t^2 / n_t)`` with w the tasks' weights and df by Welch and
    Satterthwaite (1946, Biometrics Bulletin 2:110). None if the scores have different units.
    """
    tasks = Counter(row.task for row in rows)
    if len(tasks) < 2 or len({(row.share, "" if row.share else row.score) for row in rows}) > 1:
        return None
    weights = [1 / (len(tasks) * tasks[row.task]) for row in rows]
    drop = math.fsum(w * row.drop for w, row in zip(weights, rows, strict=True))
    if any(row.interval is None for row in rows):
        return Mean(drop, None, len(tasks))
    parts = [w * w * row.spread**2 / row.n for w, row in zip(weights, rows, strict=True)]
    variance = math.fsum(parts)
    if variance == 0:
        return Mean(drop, (drop, drop), len(tasks))
    freedom = variance**2 / math.fsum(
        part**2 / max(1, row.n - 1) for part, row in zip(parts, rows, strict=True)
    )
    half = float(student_t.ppf(0.975, freedom)) * math.sqrt(variance)
    least, most = (-1.0, 1.0) if rows[0].share else (-math.inf, math.inf)
    return Mean(drop, (max(least, drop - half), min(most, drop + half)), len(tasks))
