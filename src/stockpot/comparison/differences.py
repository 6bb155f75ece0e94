"""Items that are numbers before and after: losses, shares of programs, right or wrong over seeds.

Each item has a difference d, positive where it became worse; the *drop* is their mean. Numbers that
are shares (from 0 to 1) need care where few items differ: a bootstrap of 45 zeros and 5 ones has
never seen what else could happen. For them the interval is that of Agresti and Min.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import bootstrap, norm, permutation_test, ttest_1samp
from scipy.stats import nct as noncentral_t
from scipy.stats import t as student_t

__all__ = [
    "interval",
    "items_needed",
    "no_change_test",
    "p_above",
    "smallest_visible",
    "smoothed",
    "spread",
]

_RESAMPLES = 9999
_SEED = 20250109
_BOOTSTRAP = range(50, 2001)
"""Below, resampling so few gives intervals that are too short; above, it only costs time."""
_FLIPS = "sign flips"
_T_TEST_ABOVE = 200
"""Above, the mean is normal for all purposes, and flipping signs only costs time."""

Numbers = NDArray[np.float64]


def no_change_test(d: Numbers) -> tuple[float, str]:
    """Two-sided p of "before and after could be exchanged", and the name of the test.

    Fisher's randomisation test of the mean flips the signs of the differences
    (``scipy.stats.permutation_test``): in all ways for up to 13 of them, else in 9,999 ways drawn
    with a fixed seed. More than 200 are given to Student's t-test. A difference of 0 has no sign.
    """
    changed = d[d != 0]
    if len(changed) > _T_TEST_ABOVE:
        return _t_test(d, 0.0, "two-sided"), "t-test"
    if len(changed) < 2:
        return 1.0, _FLIPS
    result = permutation_test(
        (changed,),
        _sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(_SEED),
    )
    return min(1.0, float(result.pvalue)), _FLIPS


def _sum(d: Numbers, axis: int = -1) -> Numbers:
    return np.asarray(d.sum(axis=axis))


def _constant(d: Numbers) -> bool:
    """Whether all differences are the same, but for rounding: there is no spread to judge by."""
    return float(np.ptp(d)) <= 1e-9 * float(np.abs(d).max())


def _t_test(d: Numbers, mean: float, alternative: str) -> float:
    if _constant(d):
        above = float(d[0]) > mean
        return 0.0 if (above if alternative == "greater" else float(d[0]) != mean) else 1.0
    return float(ttest_1samp(d, mean, alternative=alternative).pvalue)


def smoothed(d: Numbers) -> tuple[float, float, float]:
    """Mean, standard deviation and number of shares' differences with two items' worth added.

    Agresti & Min (2005), Statistics in Medicine 24:729, add half an item to each cell of the table
    of right and wrong before and after: here half an item each of +1 and -1, which is as far as a
    share can go, and one of 0.
    """
    n = len(d) + 2.0
    mean = float(d.sum()) / n
    variance = (float((d * d).sum()) + 1) / n - mean * mean
    return mean, math.sqrt(variance), n


def spread(d: Numbers, shares: bool) -> float:
    """The standard deviation of the differences that sizes and powers are computed with."""
    if shares:
        return smoothed(d)[1]
    return 0.0 if len(d) < 2 or _constant(d) else float(d.std(ddof=1))


def interval(d: Numbers, shares: bool, level: float = 0.95) -> tuple[float, float] | None:
    """Confidence interval of the drop; None for a single number that is no share.

    Shares: Student's interval of the smoothed differences, within [-1, 1]. Other numbers: the
    bootstrap, bias-corrected and accelerated (Efron 1987; ``scipy.stats.bootstrap``, 9,999
    resamples, fixed seed); with fewer than 50 or more than 2,000 items Student's interval,
    ``mean +- t s / sqrt(n)``.
    """
    if shares:
        mean, deviation, n = smoothed(d)
        half = _t_quantile(level, len(d)) * deviation / math.sqrt(n)
        return max(-1.0, mean - half), min(1.0, mean + half)
    if len(d) < 2:
        return None
    mean = float(d.mean())
    if _constant(d):
        return mean, mean
    half = _t_quantile(level, len(d)) * float(d.std(ddof=1)) / math.sqrt(len(d))
    if len(d) not in _BOOTSTRAP:
        return mean - half, mean + half
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of differences that are nearly all the same
        found: Any = bootstrap(
            (d,),
            np.mean,
            confidence_level=level,
            n_resamples=_RESAMPLES,
            batch=max(1, 2**24 // len(d)),
            method="BCa",
            rng=np.random.default_rng(_SEED),
        ).confidence_interval
    if not (np.isfinite(found.low) and np.isfinite(found.high)):
        return mean - half, mean + half
    return float(found.low), float(found.high)


def _t_quantile(level: float, n: int) -> float:
    return float(student_t.ppf((1 + level) / 2, max(1, n - 1)))


def p_above(d: Numbers, limit: float, shares: bool) -> float:
    """One-sided p of "the drop is at most ``limit``": Student's t, of shares on smoothed ones."""
    if not shares:
        return _t_test(d, limit, "greater") if len(d) > 1 else 1.0
    mean, deviation, n = smoothed(d)
    return float(student_t.sf((mean - limit) * math.sqrt(n) / deviation, max(1, len(d) - 1)))


@functools.lru_cache(maxsize=1024)
def smallest_visible(
    n: int, deviation: float, alpha: float, wanted_power: float = 0.8
) -> float | None:
    """The smallest true drop (or gain) that a two-sided t-test would have called real.

    Its power is that of the noncentral t distribution with n - 1 degrees of freedom and
    noncentrality ``drop sqrt(n) / deviation`` (Cohen 1988, chapter 2; statsmodels ``TTestPower``).

    Args:
        n: items.
        deviation: standard deviation of the differences seen.
        alpha: two-sided level of the test.
        wanted_power: how often it is to be seen.

    Returns:
        In the score's unit; None if so few items could never be called real (the flips of n signs
        give no p below ``2 * 0.5**n``), or if the differences have no spread to judge by.
    """
    if n < 2 or 2 * 0.5**n > alpha or deviation == 0:
        return None
    critical = student_t.isf(alpha / 2, n - 1)

    def lacking(shift: float) -> float:
        return float(noncentral_t.sf(critical, n - 1, shift)) - wanted_power

    # Near critical + norm.ppf(power) for many items, above it for few.
    return float(brentq(lacking, 0.0, 4 * critical + 8)) * deviation / math.sqrt(n)


def items_needed(
    deviation: float, distance: float, alpha: float, wanted_power: float = 0.8
) -> int | None:
    """How many items it takes to tell a drop from a limit, if the drop seen is the true one.

    ``((z(1 - alpha) + z(power)) deviation / distance)**2``, rounded up: a one-sided z-test.

    Args:
        deviation: standard deviation of the differences.
        distance: from the drop to the limit.
        alpha: one-sided level of the test.
        wanted_power: how often they are to be told apart.

    Returns:
        None if drop and limit are the same, so that no number would do, or without a spread.
    """
    if distance == 0 or deviation == 0:
        return None
    factor = norm.isf(alpha) + norm.ppf(wanted_power)
    return max(2, math.ceil((float(factor) * deviation / distance) ** 2))
