"""Which optimizer steps are merge steps: pure functions of (T, p), with no state to lose."""

from __future__ import annotations

import math
from numbers import Integral, Real

__all__ = ["check_p", "merge_steps", "merge_steps_every"]


def check_p(p: float) -> float:
    """Return ``p`` if it is a usable averaging frequency.

    Raises:
        ValueError: if ``p`` is not in (0, 1].
    """
    if not (isinstance(p, Real) and 0.0 < p <= 1.0):
        raise ValueError(
            f"p = {p!r} is not in (0, 1]: p is the averaging frequency as a fraction of the "
            "task's optimizer steps (1 averages once, at the end; 0.25 averages four times)"
        )
    return float(p)


def merge_steps(total_steps: int, p: float) -> tuple[int, ...]:
    """The merge steps of Algorithm 1 (arXiv 2501.05559, section 3), 1-based and ascending.

    ``{round(k * p * T) : k = 1 .. floor(1/p)} | {T}``. Each multiple is rounded by itself: p = 0.25
    gives four merge events whatever T is, where a rounded period would average twice in a row at
    the end. Multiples that round to step 0 (p * T < 1/2) are no steps and fall away.

    Args:
        total_steps: T, the number of optimizer steps (not micro-batches) of the task.
        p: averaging frequency, a fraction of T in (0, 1].

    Raises:
        ValueError: if ``total_steps`` is below 1 or ``p`` is not in (0, 1].
    """
    _check_total(total_steps)
    p = check_p(p)
    if p * total_steps <= 1.0:  # every step, without counting through 1/p multiples
        return tuple(range(1, total_steps + 1))
    # 1/p for p = 0.1 or 1/3 may fall a rounding error short of the integer that is meant.
    multiples = math.floor(1.0 / p + 1e-9)
    steps = {min(round(k * p * total_steps), total_steps) for k in range(1, multiples + 1)}
    return tuple(sorted((steps | {total_steps}) - {0}))


def merge_steps_every(total_steps: int, every: int) -> tuple[int, ...]:
    """Merge steps at every ``every``-th optimizer step, and at the last one.

    Raises:
        ValueError: if ``total_steps`` or ``every`` is below 1.
    """
    _check_total(total_steps)
    if not isinstance(every, Integral) or every < 1:
        raise ValueError(f"every = {every!r} is not a whole number of optimizer steps, 1 or more")
    return tuple(sorted({*range(every, total_steps + 1, every), total_steps}))


def _check_total(total_steps: int) -> None:
    if not isinstance(total_steps, Integral) or total_steps < 1:
        raise ValueError(
            f"total_steps = {total_steps!r}: averaging needs to know how many optimizer steps the "
            "task has, a whole number of 1 or more"
        )
