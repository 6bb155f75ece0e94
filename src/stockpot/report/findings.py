"""The answer in two sentences, computed from the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from stockpot.report.table import Group, measure_of, method_title

__all__ = ["headline"]

# What needs all tasks at once, or old data, is a yardstick and not a competitor of the others.
_YARDSTICKS = ("multitask", "rehearsal")


def headline(groups: Sequence[Group]) -> str:
    """Which method and setting keeps most, how that compares, and what cannot be concluded."""
    if not groups:
        return ""
    measure = measure_of(groups[0].runs)
    ranked = sorted(
        ((score, group) for group in groups if (score := group.metric("average"))),
        key=lambda pair: -measure.sign * pair[0].mean,
    )
    free = [pair for pair in ranked if pair[1].method not in _YARDSTICKS]
    if not free:
        return ""
    best_score, best = free[0]
    first = (
        f"Without old data, {method_title(best)} does best on average over the tasks: "
        f"{measure.text(best_score)}"
    )
    sequential = next((pair for pair in ranked if pair[1].method == "sequential"), None)
    if sequential and best.method != "sequential":
        first += f", against {measure.text(sequential[0])} for sequential fine-tuning"
    first += "."
    picked = " Settings were picked on these same scores."
    if len(free) == len({group.method for _, group in free}):
        picked = ""
    if not free[1:]:
        return first
    others = [pair for pair in free if pair[1].method != best.method]
    rival_score, rival = (others or free[1:])[0]
    kind = "method" if others else "setting"
    second = f" The next {kind} is {method_title(rival)} with {measure.text(rival_score)}"
    if best_score.half_width is None or rival_score.half_width is None:
        second += "; with one seed, no difference can be called real."
    elif abs(best_score.mean - rival_score.mean) > best_score.half_width + rival_score.half_width:
        second += "; the intervals do not overlap."
    else:
        second += "; the intervals overlap, so this does not say which of the two is better."
    return first + second + picked
