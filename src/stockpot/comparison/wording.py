"""A result in words and numbers: what the terminal, Markdown and JSON say alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from stockpot.comparison.rows import ALPHA, LEAST_ITEMS, Row
from stockpot.comparison.verdict import Comparison, Judged, Limit, Mean, Result

__all__ = [
    "HEADS",
    "amount",
    "as_json",
    "cells",
    "common_score",
    "footnotes",
    "limit_sentence",
    "sentences",
]

_MOST = 4
"""Tasks that a sentence names."""
_SMALL_P = 0.001


# Numbers.


def _number(row: Row, value: float) -> str:
    text = f"{100 * value:.1f}" if row.share else f"{value:.3f}"
    return text.lstrip("-") if float(text) == 0 else text


def _unit(row: Row) -> str:
    if row.share:
        return " points"
    return " nats" if row.score.endswith("loss") else ""


def amount(row: Row, value: float) -> str:
    """``46.1 points``, ``1.380 nats``."""
    return _number(row, value) + _unit(row)


def _p(value: float) -> str:
    return f"<{_SMALL_P}" if value < _SMALL_P else f"{value:.3f}"


def _range(row: Row, ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{_number(row, ends[0])} to {_number(row, ends[1])}"


HEADS = ("task", "score", "n", "before", "after", "drop", "95 % interval", "p", "visible from")
"""The columns of :func:`cells`; the verdict comes after them."""


def cells(judged: Judged) -> tuple[str, ...]:
    """One row of a table."""
    row = judged.row
    visible = judged.smallest_visible
    return (
        row.task,
        row.score,
        f"{row.n:,}",
        _number(row, row.before),
        _number(row, row.after),
        _number(row, row.drop),
        _range(row, row.interval),
        _p(judged.p_corrected),
        "-" if visible is None else _number(row, visible),
    )


def common_score(rows: Sequence[Judged]) -> str | None:
    """``accuracy, in %``: the score of all rows, if it is one, so that they need not name it."""
    if len({judged.row.score for judged in rows}) != 1:
        return None
    row = rows[0].row
    return f"{row.score}{', in %' if row.share else ', in nats' if _unit(row) else ''}"


# Sentences.


def _named(judged: Sequence[Judged]) -> str:
    """``math (1.380 nats), law (0.200 nats)``, the largest first."""
    ranked = sorted(judged, key=lambda j: -abs(j.row.drop))
    several = len({j.row.task for j in judged}) < len(judged)
    names = [
        f"{j.row.task}{f' {j.row.score}' if several else ''} ({amount(j.row, abs(j.row.drop))})"
        for j in ranked[:_MOST]
    ]
    more = f" and {len(ranked) - _MOST} more" if len(ranked) > _MOST else ""
    return ", ".join(names) + more


def _count(number: int, total: int) -> str:
    noun = "task" if total == 1 else "tasks"
    return f"{'The' if total == 1 else f'{number} of {total}'} {noun}"


def sentences(comparison: Comparison) -> list[str]:
    """What a comparison found, in two or three sentences."""
    groups: dict[str, list[Judged]] = {}
    for judged in comparison.tasks:
        groups.setdefault(judged.verdict, []).append(judged)
    total = len(comparison.tasks)
    said = []
    for verdict in ("forgotten", "learned"):
        if found := groups.get(verdict):
            was = "was" if len(found) == 1 else "were"
            said.append(f"{_count(len(found), total)} {was} {verdict}: {_named(found)}.")
    if found := groups.get("no change seen"):
        shows = "shows" if len(found) == 1 else "show"
        said.append(f"{_count(len(found), total)} {shows} no change that {_seen(found)}.")
    if found := groups.get("too few items"):
        has = "has" if len(found) == 1 else "have"
        said.append(f"{_count(len(found), total)} {has} too few items to say.")
    if (mean := comparison.mean) is not None:
        said.append(_average(mean, comparison.tasks[0].row))
    return said


def _average(mean: Mean, row: Row) -> str:
    head = f"On average over the {mean.tasks} tasks AFTER is"
    if float(_number(row, mean.drop)) == 0:
        within = "" if mean.interval is None else f" (drop {_range(row, mean.interval)})"
        return f"{head} as good as BEFORE{within}."
    ends = mean.interval
    if ends is not None and mean.drop < 0:
        ends = (-ends[1], -ends[0])
    within = "" if ends is None else f" ({_range(row, ends)})"
    return f"{head} {amount(row, abs(mean.drop))} {'worse' if mean.drop > 0 else 'better'}{within}."


def _seen(judged: Sequence[Judged]) -> str:
    visible = [j for j in judged if j.smallest_visible is not None]
    if not visible or len({_unit(j.row) for j in visible}) > 1:
        return "can be told from chance"
    worst = max(visible, key=lambda j: j.smallest_visible or 0)
    size = amount(worst.row, worst.smallest_visible or 0)
    return f"can be told from chance (one of {size} would have been, four times in five)"


def limit_sentence(result: Result) -> str:
    """Passed, failed or undecided, and why."""
    limit = result.limit
    assert limit is not None
    if found := result.in_state("exceeded"):
        verb = "is" if len(found) == 1 else "are"
        return f"Failed: {_named(found)} {verb} forgotten by more than {_limit(found, limit)}."
    reasons = [_undecided(judged, limit) for judged in result.in_state("undecided")[:_MOST]]
    reasons += [
        f"{left.task} {left.score} could not be compared: {left.reason}"
        for left in result.unseen[:_MOST]
    ]
    if reasons:
        hidden = len(result.in_state("undecided")) + len(result.unseen) - len(reasons)
        return "Undecided: " + "; ".join(reasons) + (f"; and {hidden} more" if hidden else "") + "."
    how = "the interval of every drop ends" if limit.strict else "every measured drop is"
    return f"Passed: {how} within {_limit(result.judged, limit)}."


def _limit(judged: Iterable[Judged], limit: Limit) -> str:
    texts = dict.fromkeys(amount(j.row, limit.value) for j in judged)
    return f"the limit of {' or '.join(texts)}"


def _undecided(judged: Judged, limit: Limit) -> str:
    row, check = judged.row, judged.check
    assert check is not None
    bound = amount(row, limit.value)
    name = f"{row.task} {row.score}"
    if check.items_needed is None:
        need = "no number of items could tell them apart if this is the true drop"
    else:
        need = f"about {check.items_needed:,} items would be needed"
    items = "1 item" if row.n == 1 else f"{row.n:,} items"
    if row.drop > limit.value:
        return (
            f"{name} dropped by {amount(row, row.drop)}, over the limit of {bound}, but {items} "
            f"cannot tell this from the limit ({need})"
        )
    reach = "has no interval"
    if row.interval is not None:
        most = amount(row, row.interval[1])
        reach = f"may have dropped by as much as {most}, over the limit of {bound}"
    return f"{name} {reach} ({items}; {need})"


def footnotes(result: Result) -> list[str]:
    """How to read the tables."""
    judged = result.judged
    notes = [
        "drop: how much worse AFTER is (a negative drop is a gain), "
        + " and ".join(_units(judged))
        + "; its interval is for one task alone."
    ]
    if len(judged) > 1:
        notes.append(
            f"p is corrected for {len(judged)} tests (Holm); below 0.05 a change is called real."
        )
    else:
        notes.append("Below p = 0.05 a change is called real.")
    notes.append(
        "visible from: a true change of this size would have been called real four times in five, "
        "with so many items."
    )
    if shares := [j.row.n for j in judged if j.row.share]:
        n = min(shares)
        points = f"of {n:,} items that is {100 * LEAST_ITEMS / n:.1f} points"
        notes.append(
            f"Fewer than {LEAST_ITEMS} whole items, all one way, are never called real: "
            + (points if n >= LEAST_ITEMS else f"{n} are too few for anything")
            + "."
        )
    notes += _seed_notes(result)
    if any(j.row.score.endswith("loss") for j in judged):
        notes.append("A loss is here the mean over texts; summary.json has the mean over tokens.")
    return [*notes, *result.notes]


def _units(judged: Sequence[Judged]) -> list[str]:
    units = []
    if any(j.row.share for j in judged):
        units.append("in percentage points")
    if any(j.row.score.endswith("loss") for j in judged):
        units.append("in nats for losses")
    return units or ["in the score's unit"]


def _seed_notes(result: Result) -> list[str]:
    notes = []
    several = [c for c in result.comparisons if len(c.pairing.seeds) > 1]
    if several:
        seeds = ", ".join(map(str, several[0].pairing.seeds))
        notes.append(
            f"Seeds {seeds}: an item's differences are averaged over the seeds, then tested over "
            "items. This speaks of these models, not of other seeds."
        )
    split = [
        j.row.task
        for j in result.judged
        if j.verdict in ("forgotten", "learned")
        and min(j.row.by_seed.values(), default=0) < 0 < max(j.row.by_seed.values(), default=0)
    ]
    if split:
        notes.append(f"The seeds disagree on which way it went: {', '.join(split)}.")
    if result.judged and all(not j.row.d.any() for j in result.judged):
        notes.append("Every item has the same score before and after.")
    return notes


# JSON.


def as_json(result: Result) -> dict[str, Any]:
    """The result for machines; its keys are stable."""
    return {
        "before": result.before,
        "after": result.after,
        "verdict": result.verdict,
        "summary": [text for c in result.comparisons for text in sentences(c)],
        "alpha": ALPHA,
        "tests": len(result.judged),
        "limit": _limit_json(result),
        "exit_code": result.exit_code,
        "comparisons": [_comparison_json(comparison) for comparison in result.comparisons],
        "notes": list(result.notes),
    }


def _limit_json(result: Result) -> dict[str, Any] | None:
    if result.limit is None:
        return None
    outcome = {0: "passed", 1: "failed", 3: "undecided"}[result.exit_code]
    return {
        "max_forgetting": result.limit.value,
        "strict": result.limit.strict,
        "outcome": outcome,
        "reason": limit_sentence(result),
    }


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    pairing, mean = comparison.pairing, comparison.mean
    return {
        "setting": pairing.setting,
        "before": pairing.before,
        "after": pairing.after,
        "seeds": list(pairing.seeds),
        "mean": None
        if mean is None
        else {"drop": mean.drop, "interval": _ends(mean.interval), "tasks": mean.tasks},
        "tasks": [_judged_json(judged) for judged in comparison.tasks],
        "other_scores": [_judged_json(judged) for judged in comparison.aside],
        "not_compared": [
            {"task": left.task, "score": left.score, "reason": left.reason, "counts": left.judged}
            for left in pairing.left
        ],
    }


def _ends(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _judged_json(judged: Judged) -> dict[str, Any]:
    row, check = judged.row, judged.check
    return {
        "task": row.task,
        "score": row.score,
        "better": row.better,
        "kind": row.kind,
        "n": row.n,
        "before": row.before,
        "after": row.after,
        "drop": row.drop,
        "interval": _ends(row.interval),
        "lost": row.lost,
        "won": row.won,
        "test": row.test,
        "p": row.p,
        "p_corrected": judged.p_corrected,
        "smallest_visible": judged.smallest_visible,
        "verdict": judged.verdict,
        "drop_by_seed": {str(seed): drop for seed, drop in row.by_seed.items()},
        "limit": None
        if check is None
        else {
            "state": check.state,
            "p": check.p,
            "p_corrected": check.p_corrected,
            "items_needed": check.items_needed,
        },
        "examples": [dict(example) for example in row.examples],
    }
