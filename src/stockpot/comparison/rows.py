"""One score of one task before and after: the numbers, before any verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stockpot.comparison import differences, right_wrong

__all__ = ["ALPHA", "LEAST_ITEMS", "ItemScore", "Key", "Kind", "Left", "Row", "Scored", "compare"]

ALPHA = 0.05
"""Two-sided level of all tests, over all tasks together."""
LEAST_ITEMS = right_wrong.fewest_one_way(ALPHA)
"""Six: a drop of fewer whole items than this is never called real, however it was measured."""

Key = tuple[str, str]
"""A task's name and a score's."""
Kind = Literal["right or wrong", "share", "number"]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class ItemScore:
    """What became of every item of one score."""

    items: Numbers
    """(n,) in the data's order."""
    better: str = "higher"
    headline: bool = True
    prompts: Sequence[str] = ()
    """What each item asks, where that is known."""
    texts: Sequence[str] = ()
    """What was written for each, where something was."""


@dataclass(frozen=True)
class Scored:
    """One model with its items."""

    name: str
    scores: Mapping[Key, ItemScore]


@dataclass(frozen=True)
class Left:
    """A score that cannot be compared, and why."""

    task: str
    score: str
    reason: str
    judged: bool
    """Whether BEFORE has it as part of the task's score, so that a drop of it goes unseen."""


@dataclass(frozen=True)
class Row:
    """One score of one task, before and after.

    The drop is positive where AFTER is worse, whichever direction of the score is better.
    """

    task: str
    score: str
    better: str
    headline: bool
    kind: Kind
    n: int
    before: float
    """Mean over the items (and seeds)."""
    after: float
    drop: float
    interval: tuple[float, float] | None
    """Of the drop, 95 %."""
    lost: int
    """Items that became worse."""
    won: int
    """Items that became better."""
    p: float
    """Two-sided, of "nothing has changed", for this score alone."""
    test: str
    spread: float
    """Standard deviation of the items' differences."""
    by_seed: Mapping[int, float]
    """The drop of each seed, if there are several."""
    d: Numbers = field(repr=False, compare=False)
    """(n,) the items' differences, averaged over seeds."""
    examples: Sequence[Mapping[str, Any]] = ()

    @property
    def share(self) -> bool:
        """Whether the score is a share, which is written in per cent."""
        return self.kind != "number"

    def p_above(self, limit: float) -> float:
        """One-sided p of "the drop is at most ``limit``"."""
        if self.kind == "right or wrong":
            return right_wrong.p_above(self.lost, self.won, self.n, limit)
        return differences.p_above(self.d, limit, self.share)

    def smallest_visible(self, alpha: float) -> float | None:
        """The smallest true change that would have been called real, four times in five."""
        if self.kind == "right or wrong":
            changing = (self.lost + self.won) / self.n
            return right_wrong.smallest_visible(self.n, changing, alpha)
        found = differences.smallest_visible(self.n, self.spread, alpha)
        if found is None or not self.share:
            return found
        found = max(found, LEAST_ITEMS / self.n)
        return found if found <= 1 else None


def compare(
    key: Key, before: Sequence[ItemScore], after: Sequence[ItemScore], seeds: Sequence[int]
) -> Row | str:
    """One score before and after, each once per seed; or why it cannot be compared.

    The same item occurs once per seed, so its differences are averaged over the seeds first; the
    tests are over items.
    """
    for side, scores in (("BEFORE", before), ("AFTER", after)):
        for score in scores:
            if (reason := _unusable(score, side)) is not None:
                return reason
    sizes = sorted({len(score.items) for score in (*before, *after)})
    if len(sizes) > 1:
        return (
            f"it has {len(before[0].items)} items before and {len(after[0].items)} after"
            if len(before) == 1 or len(before[0].items) != len(after[0].items)
            else f"seeds have different numbers of items ({', '.join(map(str, sizes))})"
        )
    directions = {score.better for score in (*before, *after)}
    if len(directions) > 1:
        return "higher is better on one side and lower on the other"
    return _row(key, before, after, seeds)


def _unusable(score: ItemScore, side: str) -> str | None:
    bad = int((~np.isfinite(score.items)).sum())
    if score.items.ndim != 1:
        return f"{side} has a table where one number an item belongs"
    if not len(score.items):
        return f"{side} has no items"
    if bad:
        return f"{bad} of {len(score.items)} items of {side} are not finite numbers"
    return None


def _row(
    key: Key, before: Sequence[ItemScore], after: Sequence[ItemScore], seeds: Sequence[int]
) -> Row:
    first = before[0]
    sign = 1.0 if first.better == "higher" else -1.0
    old = np.stack([score.items for score in before]).astype(np.float64)
    new = np.stack([score.items for score in after]).astype(np.float64)
    by_seed = sign * (old - new)
    d = by_seed.mean(axis=0)
    d[np.abs(d) < 1e-12] = 0.0  # a third and two thirds that cancel
    kind = _kind(old, new, first.better)
    lost, won = int((d > 0).sum()), int((d < 0).sum())
    if kind == "right or wrong":
        interval: tuple[float, float] | None = right_wrong.interval(lost, won, len(d))
        p, test = right_wrong.mcnemar_p(lost, won), "McNemar, exact"
    else:
        interval = differences.interval(d, kind == "share")
        p, test = differences.no_change_test(d)
    return Row(
        task=key[0],
        score=key[1],
        better=first.better,
        headline=first.headline and after[0].headline,
        kind=kind,
        n=len(d),
        before=float(old.mean()),
        after=float(new.mean()),
        drop=float(d.mean()),
        interval=interval,
        lost=lost,
        won=won,
        p=p,
        test=test,
        spread=differences.spread(d, kind != "number"),
        by_seed=dict(zip(seeds, by_seed.mean(axis=1).tolist(), strict=True))
        if len(seeds) > 1
        else {},
        d=d,
        examples=_examples(d, first, after[0]),
    )


def _kind(old: Numbers, new: Numbers, better: str) -> Kind:
    """By the values: scores of which lower is better are no shares of what is right."""
    values = np.concatenate([old, new])
    if better != "higher" or values.min() < 0 or values.max() > 1:
        return "number"
    binary = len(old) == 1 and bool(((values == 0) | (values == 1)).all())
    return "right or wrong" if binary else "share"


_EXAMPLES = 3


def _examples(d: Numbers, before: ItemScore, after: ItemScore) -> list[dict[str, Any]]:
    """The items that lost and won most, the first ones among equals, with their texts."""
    if not (before.prompts or before.texts or after.texts):
        return []
    order = np.argsort(-d, kind="stable").tolist()
    most_won = np.argsort(d, kind="stable").tolist()
    picked = [("lost", item) for item in order[:_EXAMPLES] if d[item] > 0]
    picked += [("won", item) for item in most_won[:_EXAMPLES] if d[item] < 0]
    return [
        {
            "what": what,
            "item": item,
            "before": float(before.items[item]),
            "after": float(after.items[item]),
            **{
                name: texts[item]
                for name, texts in (
                    ("prompt", before.prompts),
                    ("text_before", before.texts),
                    ("text_after", after.texts),
                )
                if len(texts) == len(d)
            },
        }
        for what, item in picked
    ]
