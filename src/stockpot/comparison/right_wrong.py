"""Items that are right or wrong before and after: McNemar's test, and what it can tell.

Of n items, ``lost`` were right and are wrong now, ``won`` were wrong and are right now. The others
say nothing. The *drop* is ``(lost - won) / n``; its true value is ``psi (2 theta - 1)``, with psi
the share of items that change and theta the share of those that are lost.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import beta, binom, binomtest

__all__ = [
    "fewest_one_way",
    "interval",
    "mcnemar_p",
    "p_above",
    "power",
    "smallest_visible",
]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(100)
_TINY = 1e-10
"""Probability of numbers of changed items that is left out of a power."""


def mcnemar_p(lost: int, won: int) -> float:
    """Two-sided p of McNemar's exact test: ``lost`` among ``lost + won`` throws of a fair coin.

    McNemar (1947), Psychometrika 12:153; the exact form is the sign test.
    """
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def fewest_one_way(alpha: float) -> int:
    """The fewest changed items with which the exact test can reject: all of them one way.

    The least m with ``2 * 0.5**m <= alpha``: 6 at 0.05, so with 20 items nothing below 30 points
    can be called real.
    """
    return math.ceil(1 - math.log2(alpha))


def interval(lost: int, won: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the drop that agrees with the exact test.

    It leaves 0 out if and only if ``mcnemar_p`` is below ``1 - level``. Fay & Lumbard (2021),
    Statistics in Medicine 40:1147, by melding two Clopper-Pearson intervals, of psi and of theta.
    That it covers at least ``level`` is conjectured there and checked for many n; so do our tests.
    """
    tail = (1 - level) / 2
    return _lower(lost, won, n, tail), -_lower(won, lost, n, tail)


def p_above(lost: int, won: int, n: int, limit: float) -> float:
    """One-sided p of "the drop is at most ``limit``", by the same method as the interval.

    Below ``(1 - level) / 2`` if and only if the whole interval lies above the limit. At a limit of
    0 it is the one-sided exact test.
    """
    return _confidence(limit, lost, won, n)


def _lower(lost: int, won: int, n: int, tail: float) -> float:
    """The lower end: where the confidence distribution has ``tail`` below it."""

    def excess(drop: float) -> float:
        return _confidence(drop, lost, won, n) - tail

    return float(brentq(excess, -1.0, 1.0, xtol=1e-9)) if excess(-1.0) < 0 else -1.0


def _confidence(drop: float, lost: int, won: int, n: int) -> float:
    """``P(psi (2 theta - 1) <= drop)`` under the cautious confidence distributions.

    theta ~ Beta(lost, won + 1); psi ~ Beta(m, n - m + 1) where that makes the product smaller
    (theta > 1/2), else Beta(m + 1, n - m), with m = lost + won. A Beta with a first parameter of 0
    is 0, with a second of 0 it is 1.
    """
    changed = lost + won
    if drop >= 1:
        return 1.0
    if lost == 0:  # theta = 0
        return 1.0 if drop >= 0 else _psi_at_least(np.array([-drop]), changed, n)[0]
    if drop >= 0:
        # Above the drop: theta > (1 + drop) / 2, and psi > drop / (2 theta - 1).
        tail = float(beta.sf((1 + drop) / 2, lost, won + 1))
        theta = beta.isf(tail * (1 + _NODES) / 2, lost, won + 1)
        above = beta.sf(drop / (2 * theta - 1), changed, n - changed + 1)
        return 1 - tail * float(_WEIGHTS @ above) / 2
    head = float(beta.cdf((1 + drop) / 2, lost, won + 1))
    theta = beta.ppf(head * (1 + _NODES) / 2, lost, won + 1)
    below = _psi_at_least(-drop / (1 - 2 * theta), changed, n)
    return head * float(_WEIGHTS @ below) / 2


def _psi_at_least(psi: NDArray[np.float64], changed: int, n: int) -> NDArray[np.float64]:
    """``P(Beta(m + 1, n - m) >= psi)``."""
    if changed == n:
        return (psi <= 1).astype(np.float64)
    return np.asarray(beta.sf(psi, changed + 1, n - changed))


def power(n: int, changing: float, drop: float, alpha: float) -> float:
    """Probability that the exact test calls a true drop real, in its direction.

    The number m of changed items is Binomial(n, ``changing``), the lost ones among them
    Binomial(m, ``(1 + drop / changing) / 2``): the exact power of Duffy (1984), Biometrics 40:1005.

    Args:
        n: items.
        changing: the share of items that change, at least ``drop``.
        drop: the true drop, above 0.
        alpha: two-sided level of the test.
    """
    changed = np.arange(binom.ppf(_TINY, n, changing), binom.isf(_TINY, n, changing) + 1)
    needed = binom.isf(alpha / 2, changed, 0.5)  # more than so many lost ones are needed
    share = min(1.0, (1 + drop / changing) / 2)
    return float(binom.pmf(changed, n, changing) @ binom.sf(needed, changed, share))


@functools.lru_cache(maxsize=1024)
def smallest_visible(
    n: int, changing: float, alpha: float, wanted_power: float = 0.8
) -> float | None:
    """The smallest true drop (or gain) that the exact test would have called real.

    Args:
        n: items.
        changing: the share of items that changed. A larger drop changes more of them: exactly as
            many as it takes.
        alpha: two-sided level of the test.
        wanted_power: how often it is to be seen.

    Returns:
        A share of the items; None if no drop at all could be called real with so few.
    """

    def lacking(drop: float) -> float:
        return power(n, max(changing, drop), drop, alpha) - wanted_power

    return float(brentq(lacking, 1e-9, 1.0, xtol=1e-6)) if lacking(1.0) >= 0 else None
