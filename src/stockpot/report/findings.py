"""The answer in two sentences, computed from the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from stockpot.report.table import Group, Interval, Measure, measure_of, method_title

__all__ = ["YARDSTICKS", "headline"]

# What needs all tasks at once, or old data, is a yardstick and not a competitor of the others.
YARDSTICKS = ("multitask", "rehearsal")

_SAME_TIME = 0.1
"""Times within a tenth of each other are called the same: machines are not steadier."""

Ranked = tuple[Interval, Group]


def headline(groups: Sequence[Group]) -> str:
    """Which method and setting keeps most at what price, and what cannot be concluded."""
    if not groups:
        return ""
    measure = measure_of(groups[0].runs)
    ranked = sorted(
        ((score, group) for group in groups if (score := group.metric("average"))),
        key=lambda pair: -measure.sign * pair[0].mean,
    )
    free = [pair for pair in ranked if pair[1].method not in YARDSTICKS]
    if not free:
        return ""
    best_score, best = free[0]
    if not free[1:]:
        return (
            f"{method_title(best)} has {measure.text(best_score)} on average over the tasks; no "
            "other method without old data is there to compare it with."
        )
    first = (
        f"Without old data, {method_title(best)} does best on average over the tasks: "
        f"{measure.text(best_score)}"
    )
    sequential = next((pair for pair in ranked if pair[1].method == "sequential"), None)
    if sequential and best.method != "sequential":
        first += f", against {measure.text(sequential[0])} for sequential fine-tuning"
        first += _price(best, sequential[1])
    first += "."
    picked = " Settings were picked on these same scores."
    if len(free) == len({group.method for _, group in free}):
        picked = ""
    return first + _rival(free, measure) + picked


def _rival(free: Sequence[Ranked], measure: Measure) -> str:
    """The second sentence: who is next, and whether that is decided."""
    best_score, best = free[0]
    others = [pair for pair in free if pair[1].method != best.method]
    rival_score, rival = (others or free[1:])[0]
    kind = "method" if others else "setting"
    second = f" The next {kind} is {method_title(rival)} with {measure.text(rival_score)}"
    if best_score.half_width is None or rival_score.half_width is None:
        return second + "; with one seed, no difference can be called real."
    if abs(best_score.mean - rival_score.mean) > best_score.half_width + rival_score.half_width:
        return second + "; the intervals do not overlap."
    return second + "; the intervals overlap, so this does not say which of the two is better."


def _price(best: Group, sequential: Group) -> str:
    """``, in 1.2 times its training time, keeping 0.2 MB between tasks``; nothing if unknown."""
    parts = []
    spent, base = best.metric("seconds"), sequential.metric("seconds")
    if spent and base and base.mean > 0:
        ratio = spent.mean / base.mean
        same = abs(ratio - 1) < _SAME_TIME
        times = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
        time = "about the same training time" if same else f"{times} times its training time"
        parts.append(f"in {time}")
    stored = best.metric("stored_bytes")
    if stored:
        size = size_text(stored.mean) if stored.mean else "nothing"
        parts.append(f"keeping {size} between tasks")
    return "".join(f", {part}" for part in parts)


def size_text(size: float) -> str:
    """``3.2 MB``: bytes with a decimal unit."""
    value, unit = size, "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if float(f"{value:.3g}") < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
