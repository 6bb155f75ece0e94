"""Merge steps against the paper's rule, written out again in exact arithmetic."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from stockpot.averaging import merge_steps, merge_steps_every

quick = settings(max_examples=100, deadline=None)
totals = st.integers(1, 5000)
HALF = Fraction(1, 2)


def choices(total: int, p: Fraction) -> list[set[int]]:
    """For each k the whole numbers nearest to k*p*T: one, or two if it lies halfway between."""
    multiples = [k * p * total for k in range(1, math.floor(1 / p) + 1)]
    return [{math.ceil(x - HALF), math.floor(x + HALF)} for x in multiples]


def assert_is_the_rule(total: int, steps: tuple[int, ...], p: Fraction) -> None:
    allowed = choices(total, p)
    assert set(steps) <= set().union(*allowed) | {total}
    assert total in steps
    assert all(numbers & ({0} | set(steps)) for numbers in allowed)
    if all(len(numbers) == 1 for numbers in allowed):
        assert set(steps) == (set().union(*allowed) | {total}) - {0}


def assert_is_a_schedule(total: int, steps: tuple[int, ...]) -> None:
    assert isinstance(steps, tuple)
    assert all(type(step) is int for step in steps)
    assert all(a < b for a, b in pairwise(steps))
    assert steps[0] >= 1
    assert steps[-1] == total


# Known numbers.


@pytest.mark.parametrize("total", [100, 953, 1000])
@pytest.mark.parametrize(
    ("p", "events"), [(1, 1), (0.98, 2), (0.75, 2), (0.5, 2), (0.25, 4), (0.17, 6), (0.1, 10)]
)
def test_how_often_the_paper_averages(total: int, p: float, events: int) -> None:
    assert len(merge_steps(total, p)) == events


@pytest.mark.parametrize(
    ("total", "p", "steps"),
    [
        (100, 1, (100,)),
        (100, 0.98, (98, 100)),
        (953, 0.75, (715, 953)),  # 714.75
        (953, 0.25, (238, 476, 715, 953)),  # 238.25, 476.5 (either side; Python: even), 714.75
        (100, 0.17, (17, 34, 51, 68, 85, 100)),
        (953, 0.1, (95, 191, 286, 381, 476, 572, 667, 762, 858, 953)),
        (7, 0.3, (2, 4, 6, 7)),  # 2.1, 4.2, 6.3
        (3, 0.25, (1, 2, 3)),  # .75, 1.5, 2.25: the last rounds to a step that is there already
        (1, 1.0, (1,)),
        (1, 0.01, (1,)),
        (5, 0.001, (1, 2, 3, 4, 5)),  # never more often than at every step
    ],
)
def test_steps_worked_out_by_hand(total: int, p: float, steps: tuple[int, ...]) -> None:
    assert merge_steps(total, p) == steps


@pytest.mark.parametrize("n", [3, 49, 93, 99, 210])
def test_one_nth_that_is_no_float_gives_n_events(n: int) -> None:
    # 1 / (1/93) is a little less than 93, and 1 / (1/49) a little more than 49.
    assert merge_steps(100 * n, 1 / n) == tuple(range(100, 100 * n + 1, 100))


# Against the rule in exact arithmetic.


@quick
@given(totals, st.integers(50, 10_000))
@example(15, 1000)  # ties: 1.5, 4.5, 7.5, ...
def test_decimal_p_follows_the_rule(total: int, ten_thousandths: int) -> None:
    p = Fraction(ten_thousandths, 10_000)
    steps = merge_steps(total, float(p))
    assert_is_a_schedule(total, steps)
    assert_is_the_rule(total, steps, p)


@quick
@given(totals, st.integers(1, 200))
def test_one_nth_follows_the_rule(total: int, n: int) -> None:
    assert_is_the_rule(total, merge_steps(total, 1 / n), Fraction(1, n))


@quick
@given(st.integers(1, 200), st.integers(0, 5000))
def test_one_nth_gives_n_events_at_equal_distances(n: int, more: int) -> None:
    total = n + more
    steps = merge_steps(total, 1 / n)
    assert len(steps) == n
    gaps = [b - a for a, b in pairwise((0, *steps))]
    assert max(gaps) - min(gaps) <= 2
    assert abs(max(gaps) - total / n) < 1 + 1e-9


@quick
@given(totals, st.floats(5e-3, 1.0))
def test_any_p_follows_the_rule(total: int, p: float) -> None:
    exact = Fraction(p)
    # Where floats cannot tell, either answer is right; the cases above cover those that matter.
    assume(abs(1 / exact - round(1 / exact)) > Fraction(1, 10**6))
    multiples = [k * exact * total for k in range(1, math.floor(1 / exact) + 1)]
    assume(all(abs(x - math.floor(x) - HALF) > Fraction(1, 10**6) for x in multiples))
    steps = merge_steps(total, p)
    assert_is_a_schedule(total, steps)
    assert_is_the_rule(total, steps, exact)


@quick
@given(totals, st.floats(5e-3, 1.0))
def test_no_more_events_than_multiples_and_an_end(total: int, p: float) -> None:
    steps = merge_steps(total, p)
    assert_is_a_schedule(total, steps)
    assert len(steps) <= min(total, math.floor(1 / p + 1e-6) + 1)


@quick
@given(st.integers(1, 300), st.integers(1, 400))
def test_every_n_steps_and_the_last(total: int, every: int) -> None:
    steps = merge_steps_every(total, every)
    assert_is_a_schedule(total, steps)
    assert steps == tuple(t for t in range(1, total + 1) if t % every == 0 or t == total)


def test_every_by_hand() -> None:
    assert merge_steps_every(10, 3) == (3, 6, 9, 10)
    assert merge_steps_every(9, 3) == (3, 6, 9)
    assert merge_steps_every(4, 1) == (1, 2, 3, 4)
    assert merge_steps_every(4, 100) == (4,)


# What is refused.


@pytest.mark.parametrize(
    "p", [0, 0.0, -0.0, -0.25, 1.0000001, 25, math.nan, math.inf, -math.inf, "0.25", None]
)
def test_p_out_of_range_is_refused_by_name(p: object) -> None:
    with pytest.raises(ValueError, match=r"^p = .*not in \(0, 1\]"):
        merge_steps(100, p)  # type: ignore[arg-type]


@pytest.mark.parametrize("total", [0, -1, -0.5])
def test_no_steps_are_refused_by_name(total: int) -> None:
    with pytest.raises(ValueError, match="total_steps"):
        merge_steps(total, 0.5)
    with pytest.raises(ValueError, match="total_steps"):
        merge_steps_every(total, 1)


@pytest.mark.parametrize("every", [0, -1, 1.5, 2.0, math.nan, "2", None])
def test_every_is_a_whole_number_of_steps(every: object) -> None:
    with pytest.raises(ValueError, match=r"^every = "):
        merge_steps_every(100, every)  # type: ignore[arg-type]


@pytest.mark.parametrize("total", [10.5, math.nan, math.inf])
def test_half_a_step_is_refused_by_name(total: float) -> None:
    try:
        merge_steps(total, 0.5)  # type: ignore[arg-type]
    except (ValueError, OverflowError, TypeError) as error:
        assert "total_steps" in str(error)  # noqa: PT017 (any of the three would do)
    else:
        pytest.fail("accepted")


def test_a_tiny_p_averages_at_every_step() -> None:
    # 1e-12 would run for days; this one overflows at once.
    assert merge_steps(3, 5e-324) == (1, 2, 3)
