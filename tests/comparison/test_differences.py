"""Differences that are numbers: against brute force, statsmodels and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from stockpot.comparison.differences import (
    interval,
    items_needed,
    no_change_test,
    p_above,
    smallest_visible,
    smoothed,
)


def drawn(seed, n, mean=0.3):
    return np.random.default_rng(seed).normal(mean, 1, n)


def flipped(d):
    """p over all 2^n flips of the signs."""
    sums = [
        abs(sum(signs * d)) for signs in map(np.array, itertools.product((1, -1), repeat=len(d)))
    ]
    return sum(value >= abs(sum(d)) - 1e-12 for value in sums) / len(sums)


@pytest.mark.parametrize("n", [2, 5, 9, 12])
def test_sign_flips_are_all_of_them_for_few_items(n):
    d = drawn(n, n)
    assert no_change_test(d) == (pytest.approx(flipped(d)), "sign flips")


def test_zeros_have_no_sign():
    d = drawn(0, 8)
    assert no_change_test(np.concatenate([d, np.zeros(300)]))[0] == pytest.approx(flipped(d))
    assert no_change_test(np.zeros(9))[0] == no_change_test(np.array([0.0, 2.0]))[0] == 1.0


def test_drawn_sign_flips_are_close_to_the_t_test():
    d = drawn(3, 150, 0.2)
    p, name = no_change_test(d)
    assert name == "sign flips"
    assert p == pytest.approx(DescrStatsW(d).ttest_mean(0)[1], abs=0.01)
    assert no_change_test(d) == (p, name)  # the seed is fixed


def test_many_items_take_the_t_test():
    d = drawn(4, 400, 0.05)
    assert no_change_test(d) == (pytest.approx(DescrStatsW(d).ttest_mean(0)[1]), "t-test")
    assert no_change_test(np.full(300, 0.25))[0] == 0.0


@pytest.mark.parametrize("n", [2, 30, 49, 2001])
def test_interval_of_few_or_very_many_numbers_is_students(n):
    d = drawn(5, n)
    assert interval(d, shares=False) == pytest.approx(DescrStatsW(d).tconfint_mean(0.05))


def test_interval_of_numbers_is_the_bootstrap_bca():
    """Against Efron's formulas, with resamples of our own."""
    from scipy.stats import norm

    d = np.random.default_rng(6).exponential(1, 60) - 0.5
    rng = np.random.default_rng(7)
    means = np.sort(rng.choice(d, (40_000, 60)).mean(axis=1))
    z0 = norm.ppf((means < d.mean()).mean())
    left = np.array([np.delete(d, i).mean() for i in range(60)])
    apart = left.mean() - left
    a = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    ends = [norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in norm.ppf([0.025, 0.975])]
    assert interval(d, shares=False) == pytest.approx(np.quantile(means, ends), abs=0.02)
    assert interval(d, shares=False) == interval(d, shares=False)


@pytest.mark.parametrize(
    ("d", "shares", "expected"),
    [
        ([0.4], False, None),
        ([0.4] * 5, False, (0.4, 0.4)),
        ([0.0] * 80, False, (0.0, 0.0)),
        ([1.0], True, (-1.0, 1.0)),
    ],
)
def test_intervals_of_what_has_no_spread(d, shares, expected):
    assert interval(np.array(d), shares) == (
        expected if expected is None else pytest.approx(expected)
    )


def test_one_odd_number_among_equals_is_survived():
    for d in (np.r_[np.zeros(99), 1e-3], np.r_[np.ones(60), 1.0000001]):
        low, high = interval(d, shares=False)
        assert low <= d.mean() <= high


def test_smoothing_is_agrestis_and_mins():
    """Their formula for right and wrong, of lost, won and n (with 1.96 for t)."""
    lost, won, n = 9, 3, 40
    d = np.array([1.0] * lost + [-1.0] * won + [0.0] * (n - lost - won))
    mean, deviation, size = smoothed(d)
    their_error = math.sqrt((lost + won + 1) - (lost - won) ** 2 / (n + 2)) / (n + 2)
    assert mean == pytest.approx((lost - won) / (n + 2))
    assert deviation / math.sqrt(size) == pytest.approx(their_error)


@pytest.mark.parametrize("n", [10, 20, 50, 150])
@pytest.mark.parametrize(("rate", "bias"), [(0.03, 1.0), (0.1, 0.5), (0.3, 0.3)])
def test_interval_of_shares_covers_where_few_items_change(n, rate, bias):
    """Three seeds: an item's difference is a mean of three of -1, 0 and 1, alike for one item."""
    rng = np.random.default_rng(n)
    reps = 600
    how = rng.beta(0.3, 0.3 / rate - 0.3, (reps, 1, n))
    changed = rng.random((reps, 3, n)) < how
    d = (changed * np.where(rng.random((reps, 3, n)) < (1 + bias) / 2, 1, -1)).mean(axis=1)
    hits = [low <= rate * bias <= high for low, high in (interval(one, True) for one in d)]
    assert np.mean(hits) > 0.93


@pytest.mark.parametrize(
    ("n", "draw", "mean", "least"),
    [
        (10, lambda rng, n: rng.normal(0.1, 1, n), 0.1, 0.92),
        (30, lambda rng, n: rng.standard_t(4, n), 0.0, 0.92),
        (80, lambda rng, n: rng.exponential(1, n), 1.0, 0.90),
    ],
)
def test_interval_of_losses_covers(n, draw, mean, least):
    rng = np.random.default_rng(8)
    ends = [interval(draw(rng, n), False) for _ in range(250)]
    assert np.mean([low <= mean <= high for low, high in ends]) > least


def test_p_against_a_limit_is_students_and_agrees_with_the_interval():
    from scipy.stats import ttest_1samp

    d = drawn(9, 40, 0.5)
    assert p_above(d, 0.2, False) == pytest.approx(ttest_1samp(d, 0.2, alternative="greater")[1])
    assert p_above(np.array([3.0]), 0.1, False) == 1.0
    shares = np.random.default_rng(10).choice([-1, -1 / 3, 0, 1 / 3, 1], 60)
    for values, kind in ((d, False), (shares, True)):
        low, _ = interval(values, kind)
        for limit in (low - 1e-6, low + 1e-6):
            assert (p_above(values, limit, kind) < 0.025) == (low > limit)


@given(st.integers(0, 10_000), st.sampled_from([4, 30, 60, 250]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_swapping_before_and_after_mirrors_everything(seed, n, shares):
    d = drawn(seed, n)
    if shares:
        d = np.round(np.clip(d / 3, -1, 1) * 3) / 3
    low, high = interval(d, shares)
    assert interval(-d, shares) == pytest.approx((-high, -low), abs=1e-6 + 0.01 * (high - low))
    assert no_change_test(-d)[0] == pytest.approx(no_change_test(d)[0])


@pytest.mark.parametrize("n", [7, 20, 120, 5000])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_smallest_visible_drop_is_that_of_statsmodels(n, alpha):
    if 2 * 0.5**n > alpha:
        assert smallest_visible(n, 1.5, alpha) is None
        return
    theirs = TTestPower().solve_power(nobs=n, alpha=alpha, power=0.8)
    assert smallest_visible(n, 1.5, alpha) == pytest.approx(1.5 * np.squeeze(theirs), rel=1e-3)


@pytest.mark.parametrize("n", [12, 40])
def test_smallest_visible_drop_is_seen_four_times_in_five(n):
    """By the sign flips, which are what is done."""
    shift, rng = smallest_visible(n, 1.0, 0.05), np.random.default_rng(11)
    seen = [no_change_test(rng.normal(shift, 1, n))[0] < 0.05 for _ in range(150)]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.09)


def test_items_needed_are_needed():
    n, rng = items_needed(1.0, 0.25, 0.025), np.random.default_rng(12)
    assert n == math.ceil(((1.959964 + 0.841621) / 0.25) ** 2)
    told = [p_above(rng.normal(0.27, 1, n), 0.02, False) < 0.025 for _ in range(1500)]
    assert np.mean(told) == pytest.approx(0.8, abs=0.04)
    assert items_needed(1.0, 0.0, 0.025) is items_needed(0.0, 0.1, 0.025) is None
    assert items_needed(0.01, 5.0, 0.025) == 2
