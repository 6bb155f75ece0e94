"""McNemar's test, its interval and its power: against statsmodels, enumeration and simulation."""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, multinomial
from statsmodels.stats.contingency_tables import mcnemar

from stockpot.comparison.right_wrong import (
    fewest_one_way,
    interval,
    mcnemar_p,
    p_above,
    power,
    smallest_visible,
)


def tables(n):
    return [(lost, won) for lost in range(n + 1) for won in range(n + 1 - lost)]


def counts(most=400):
    """(lost, won, n) of any table."""
    return st.tuples(*[st.integers(0, most)] * 3).map(lambda t: (t[0], t[1], sum(t) or 1))


def test_p_is_that_of_statsmodels_for_every_table():
    for lost, won in tables(24):
        theirs = mcnemar([[3, lost], [won, 5]], exact=True).pvalue
        assert mcnemar_p(lost, won) == pytest.approx(min(1, theirs), rel=1e-9), (lost, won)


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 3, 0.0025, 1e-6])
def test_fewest_items_that_can_be_significant(alpha):
    least = next(m for m in itertools.count(1) if mcnemar_p(m, 0) <= alpha)
    assert fewest_one_way(alpha) == least


def test_twenty_items_need_thirty_points():
    assert fewest_one_way(0.05) == 6
    significant = [(lost - won) / 20 for lost, won in tables(20) if mcnemar_p(lost, won) < 0.05]
    assert min(map(abs, significant)) == pytest.approx(6 / 20)


def test_no_table_of_twenty_items_makes_ten_points_real():
    """Whatever else changed: 2 items more were lost than won, of 20."""
    found = [(lost, won) for lost, won in tables(20) if abs(lost - won) == 2]
    assert len(found) == 20  # 2 and 0, 3 and 1, ... 11 and 9, both ways
    for lost, won in found:
        low, high = interval(lost, won, 20)
        assert low < 0 < high
        assert mcnemar_p(lost, won) >= 0.49


# The interval.


def by_simulation(lost, won, n, tail=0.025):
    """The interval as its authors define it, with drawn numbers instead of integrals."""
    draw, size = np.random.default_rng(0), 1_000_000
    changed = lost + won

    def beta(a, b):
        return np.full(size, float(a > 0)) if a == 0 or b == 0 else draw.beta(a, b, size)

    few, many = beta(changed, n - changed + 1), beta(changed + 1, n - changed)
    low, high = 2 * beta(lost, won + 1) - 1, 2 * beta(lost + 1, won) - 1
    return (
        min(np.quantile(few * low, tail), np.quantile(many * low, tail)),
        max(np.quantile(few * high, 1 - tail), np.quantile(many * high, 1 - tail)),
    )


@pytest.mark.parametrize(
    "table", [(12, 2, 50), (6, 0, 20), (5, 0, 20), (0, 0, 7), (20, 0, 20), (0, 9, 9), (1, 7, 21)]
)
def test_interval_is_the_one_of_its_definition(table):
    assert interval(*table) == pytest.approx(by_simulation(*table), abs=2e-3)


def test_interval_of_many_items_is_the_normal_one():
    lost, won, n = 900, 600, 20_000
    drop, variance = (lost - won) / n, (lost + won) / n - ((lost - won) / n) ** 2
    half = 1.96 * math.sqrt(variance / n)
    assert interval(lost, won, n) == pytest.approx((drop - half, drop + half), abs=2e-4)


@functools.cache
def lower_ends(n):
    return {table: interval(*table, n)[0] for table in tables(n)}  # the upper ends mirror them


@pytest.mark.parametrize("n", [5, 6, 20])
def test_interval_leaves_out_0_exactly_if_the_test_rejects(n):
    for lost, won in tables(n):
        low, high = lower_ends(n)[lost, won], -lower_ends(n)[won, lost]
        assert (not low <= 0 <= high) == (mcnemar_p(lost, won) < 0.05), (lost, won)


@pytest.mark.parametrize("n", [5, 20])
def test_interval_covers_the_truth_at_least_as_often_as_it_says(n):
    """Not simulated: the probability of every table, on a grid of true shares lost and won."""
    lows = lower_ends(n)
    low = np.array([lows[lost, won] for lost, won in tables(n)])
    high = np.array([-lows[won, lost] for lost, won in tables(n)])
    cells = np.array([(lost, won, n - lost - won) for lost, won in tables(n)])
    grid = [0, 0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1]
    for a, b in itertools.product(grid, grid):
        if a + b > 1:
            continue
        probability = multinomial.pmf(cells, n, [a, b, 1 - a - b])
        inside = (low - 1e-9 <= a - b) & (a - b <= high + 1e-9)
        assert probability[inside].sum() >= 0.95 - 1e-9, (a, b)
        # Each end alone, which is what a limit is held against.
        assert probability[low > a - b + 1e-9].sum() <= 0.025 + 1e-9, (a, b)


def test_interval_is_not_absurdly_wide():
    """Of 100 items, 20 lost and 10 won: Agresti and Min's interval is a third of a point away."""
    low, high = interval(20, 10, 100)
    drop, half = 10 / 102, 1.96 * math.sqrt(31 - 100 / 102) / 102
    assert (low, high) == pytest.approx((drop - half, drop + half), abs=0.02)


@given(counts())
@settings(max_examples=25, deadline=None)
def test_swapping_before_and_after_mirrors_everything(table):
    lost, won, n = table
    low, high = interval(lost, won, n)
    assert interval(won, lost, n) == pytest.approx((-high, -low), abs=1e-9)
    assert mcnemar_p(won, lost) == mcnemar_p(lost, won)
    assert -1 <= low <= (lost - won) / n <= high <= 1


@given(counts(60), st.integers(1, 500))
@settings(max_examples=25, deadline=None)
def test_items_that_do_not_change_only_make_the_drop_smaller(table, more):
    lost, won, n = table
    few, many = interval(lost, won, n), interval(lost, won, n + more)
    assert (few[0] > 0, few[1] < 0) == (many[0] > 0, many[1] < 0)  # the test does not see them
    assert p_above(lost, won, n, 0.0) == pytest.approx(p_above(lost, won, n + more, 0.0), abs=1e-9)


@given(counts(), st.floats(-0.9, 0.9))
@settings(max_examples=25, deadline=None)
def test_p_against_a_limit_agrees_with_the_interval(table, limit):
    lost, won, n = table
    low, _ = interval(lost, won, n)
    if abs(low - limit) > 1e-6:
        assert (p_above(lost, won, n, limit) < 0.025) == (low > limit)


def test_p_against_0_is_the_one_sided_exact_test():
    for lost, won in tables(12):
        if lost + won:
            exact = binom.sf(lost - 1, lost + won, 0.5)
            assert p_above(lost, won, 30, 0.0) == pytest.approx(exact, abs=1e-9)


def test_p_against_a_limit_errs_no_more_often_than_it_says():
    """20 items, a true drop of exactly the limit: how often it is called above, exactly."""
    n, limit = 20, 0.1
    above = {table: p_above(*table, n, limit) < 0.025 for table in tables(n)}
    for won in (0.0, 0.05, 0.2, 0.4):
        chance = sum(
            multinomial.pmf([*table, n - sum(table)], n, [won + limit, won, 1 - 2 * won - limit])
            for table, called in above.items()
            if called
        )
        assert chance <= 0.025


# What can be seen.


@pytest.mark.parametrize(("n", "changing", "drop"), [(20, 0.4, 0.35), (60, 0.2, 0.15), (9, 1, 0.9)])
def test_power_is_that_of_every_table_added_up(n, changing, drop):
    lost, won = (changing + drop) / 2, (changing - drop) / 2
    exact = sum(
        multinomial.pmf([a, b, n - a - b], n, [lost, won, 1 - changing])
        for a, b in tables(n)
        if a > b and mcnemar_p(a, b) <= 0.05
    )
    assert power(n, changing, drop, 0.05) == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize(
    ("n", "changing", "alpha"), [(50, 0.2, 0.05), (120, 0.3, 0.05 / 3), (1000, 0.1, 0.05)]
)
def test_smallest_visible_drop_is_seen_four_times_in_five(n, changing, alpha):
    drop = smallest_visible(n, changing, alpha)
    share = max(changing, drop)
    draws = np.random.default_rng(1).multinomial(
        n, [(share + drop) / 2, (share - drop) / 2, 1 - share], size=2000
    )
    seen = sum(a > b and mcnemar_p(int(a), int(b)) <= alpha for a, b, _ in draws)
    assert seen / 2000 == pytest.approx(0.8, abs=0.035)


def test_smallest_visible_drop_at_the_edges():
    assert smallest_visible(5, 0.5, 0.05) is None  # five of five is p = 0.0625
    assert 0.9 < smallest_visible(6, 0.5, 0.05) < 1
    assert smallest_visible(20, 0.1, 0.05) > 0.3
    sizes = [smallest_visible(n, 0.2, 0.05) for n in (30, 100, 300, 1000, 10_000)]
    assert sizes == sorted(sizes, reverse=True)
    # For many items it is Connor's (1987) formula.
    n, changing = 10_000, 0.2
    root = (1.959964 + 0.841621) * math.sqrt(changing) / math.sqrt(n)
    assert sizes[-1] == pytest.approx(root, rel=0.02)
