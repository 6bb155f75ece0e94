"""What may be said of two models' items: verdicts, the mean over tasks, and a limit."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wilcoxon
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from comparison.tables import judged, loss, row, table
from stockpot.comparison.right_wrong import mcnemar_p
from stockpot.comparison.rows import ItemScore, Left, compare
from stockpot.comparison.verdict import Limit, holm


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_holm_is_that_of_statsmodels(size):
    p = np.random.default_rng(size).uniform(size=size) ** 3
    p[size // 2 :: 5] = p[0]  # ties
    # One call a size: statsmodels collects garbage at every call.
    assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1])


# Verdicts.


def test_a_row_says_what_became_of_the_items():
    found = row(*table(9, 2, 40, right=20))
    assert (found.kind, found.n, found.lost, found.won) == ("right or wrong", 40, 9, 2)
    assert (found.before, found.after, found.drop) == pytest.approx((29 / 40, 22 / 40, 7 / 40))
    assert found.p == pytest.approx(mcnemar([[20, 9], [2, 9]], exact=True).pvalue)


def test_ten_points_of_twenty_items_are_never_real():
    for lost, won in ((won + 2, won) for won in range(10)):
        for right in (0, 20 - lost - won):
            for before, after in itertools.permutations(table(lost, won, 20, right)):
                (one,) = judged([row(before, after)]).judged
                assert abs(one.row.drop) == pytest.approx(0.1)
                assert one.verdict == "too few items"


def test_ten_points_of_twenty_items_are_not_real_over_seeds_either():
    """Even if six items were lost by one of three seeds each, and none was won."""
    right = np.ones((3, 20))
    wrong = right.copy()
    wrong[[0, 1, 2, 0, 1, 2], range(6)] = 0
    (one,) = judged([row(list(right), list(wrong), seeds=(0, 1, 2))]).judged
    assert one.row.drop == pytest.approx(0.1)
    assert one.p_corrected < 0.05  # the sign flips alone would have called it real
    assert one.verdict == "too few items"


def test_what_is_real_is_said_in_its_direction():
    before, after = table(30, 5, 100)
    assert judged([row(before, after)]).verdict == "forgotten"
    assert judged([row(after, before)]).verdict == "learned"
    rng = np.random.default_rng(0)
    old = rng.gamma(4, 0.5, 80)
    assert judged([loss(old, old + 0.2 + rng.normal(0, 0.1, 80))]).verdict == "forgotten"
    assert judged([loss(old, old - 0.2)]).verdict == "learned"


def test_many_items_without_a_change_are_no_change_and_few_are_few():
    many, few = row(*table(20, 19, 1000, 500)), row(*table(1, 2, 20, 10))
    assert judged([many]).verdict == "no change seen"
    assert judged([few]).verdict == "too few items"
    (one,) = judged([many]).judged
    assert one.smallest_visible < 0.03


def test_identical_items():
    assert judged([row(*table(0, 0, 500, 400))]).verdict == "no change seen"
    assert judged([row(*table(0, 0, 10, 5))]).verdict == "too few items"
    same = np.linspace(1, 3, 50)
    (one,) = judged([loss(same, same)]).judged
    assert (one.verdict, one.row.interval, one.smallest_visible) == ("no change seen", (0, 0), None)


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_one_item_says_nothing(better):
    for before, after in ((1.0, 0.0), (0.0, 0.0), (2.5, 7.5)):
        (one,) = judged([row(np.array([before]), np.array([after]), better=better)]).judged
        assert (one.verdict, one.smallest_visible) == ("too few items", None)


def test_tasks_are_corrected_for_each_other():
    """Nine of ten is real alone, and not as one of twenty."""
    alone = row(*table(9, 1, 50))
    others = [row(*table(3, 3, 50), task=f"other {n}") for n in range(19)]
    assert judged([alone]).verdict == "forgotten"
    many = judged([alone, *others]).judged[0]
    assert many.p_corrected == pytest.approx(20 * many.row.p)
    assert many.verdict == "too few items"


def test_scores_that_do_not_count_are_judged_apart():
    real, aside = row(*table(9, 1, 50)), row(*table(30, 0, 50), headline=False, score="other")
    result = judged([real, aside])
    assert [one.row.score for one in result.judged] == ["accuracy"]
    assert result.judged[0].p_corrected == result.judged[0].row.p
    (other,) = result.comparisons[0].aside
    assert (other.verdict, other.row.headline) == ("forgotten", False)


def test_nothing_is_called_real_too_often():
    """Twenty tasks in which nothing changed: in at most 5 % of comparisons any is called real."""
    rng = np.random.default_rng(1)
    lost = rng.binomial(20, 0.5, (400, 20))
    p = {k: mcnemar_p(k, 20 - k) for k in range(21)}
    wrong = [min(holm([p[k] for k in tasks])) < 0.05 for tasks in lost]
    assert np.mean(wrong) <= 0.05


def test_seeds_are_averaged_item_by_item():
    rng = np.random.default_rng(2)
    before, after = rng.integers(0, 2, (2, 3, 90)).astype(float)
    found = row(list(before), list(after), seeds=(0, 1, 7))
    d = (before - after).mean(axis=0)
    assert found.kind == "share"
    assert found.drop == pytest.approx(d.mean())
    assert (found.lost, found.won) == ((d > 1e-9).sum(), (d < -1e-9).sum())
    drops = dict(zip((0, 1, 7), (before - after).mean(axis=1), strict=True))
    assert found.by_seed == pytest.approx(drops)
    # Another test of the same thing, by ranks, is not far.
    assert found.p == pytest.approx(wilcoxon(d[np.abs(d) > 1e-9]).pvalue, abs=0.15)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["binary", "seeds", "share", "loss"]))
@settings(max_examples=25, deadline=None)
def test_swapping_before_and_after_mirrors_everything(seed, kind):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 80))
    if kind == "loss":
        before, after = rng.gamma(3, 0.5, (2, n))
        one, other = loss(before, after), loss(after, before)
    else:
        models = 3 if kind == "seeds" else 1
        values = [0, 0.25, 1] if kind == "share" else [0, 1]
        before, after = rng.choice(values, (2, models, n))
        seeds = tuple(range(models))
        one, other = (
            row(list(a), list(b), seeds=seeds) for a, b in ((before, after), (after, before))
        )
    low, high = one.interval
    width = high - low
    assert other.drop == pytest.approx(-one.drop)
    assert other.interval == pytest.approx((-high, -low), abs=1e-6 + 0.01 * width)
    assert (other.p, other.lost, other.won) == (one.p, one.won, one.lost)
    mirror = {"forgotten": "learned", "learned": "forgotten"}
    verdict = judged([one]).verdict
    if not (kind == "loss" and "items" in verdict):  # of a loss, "few" depends on BEFORE's value
        assert judged([other]).verdict in (mirror.get(verdict, verdict), "too few items")


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 300), st.booleans())
@settings(max_examples=25, deadline=None)
def test_items_that_stay_as_they_are_never_change_p(lost, won, more, right):
    n = lost + won + 1
    few = row(*table(lost, won, n))
    many = row(*table(lost, won, n + more, right=more if right else 0))
    assert many.p == few.p


# What cannot be compared.


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ([1, math.nan], [1, 0], "1 of 2 items of BEFORE are not finite numbers"),
        ([1, 0], [math.inf, math.nan], "2 of 2 items of AFTER are not finite numbers"),
        ([], [], "BEFORE has no items"),
        ([1, 0], [], "AFTER has no items"),
        ([1, 0, 1], [1, 0], "it has 3 items before and 2 after"),
        ([[1, 0], [1, 0]], [1, 0], "BEFORE has a table where one number an item belongs"),
    ],
)
def test_items_that_cannot_be_paired(before, after, reason):
    items = [ItemScore(np.array(x, float)) for x in (before, after)]
    assert compare(("t", "accuracy"), items[:1], items[1:], [0]) == reason


def test_scores_of_opposite_directions_are_not_compared():
    one, other = ItemScore(np.ones(3)), ItemScore(np.ones(3), better="lower")
    assert "higher is better on one side" in compare(("t", "s"), [one], [other], [0])


# The mean over tasks.


def test_mean_over_tasks_is_that_of_the_bootstrap():
    rng = np.random.default_rng(3)
    pairs = [rng.integers(0, 2, (2, n)).astype(float) for n in (60, 200, 400)]
    result = judged([row(a, b, task=f"{n}") for n, (a, b) in enumerate(pairs)])
    mean = result.comparisons[0].mean
    d = [a - b for a, b in pairs]
    assert mean.drop == pytest.approx(np.mean([x.mean() for x in d]))
    resampled = [rng.choice(x, (8000, len(x))).mean(axis=1) for x in d]
    ends = np.quantile(np.mean(resampled, axis=0), [0.025, 0.975])
    assert mean.interval == pytest.approx(ends, abs=0.006)


def test_a_task_with_three_scores_counts_once():
    rows = [row(*table(10, 0, 20), task="law", score=s) for s in "abc"]
    result = judged([*rows, row(*table(0, 0, 20), task="math", score="d")])
    assert result.comparisons[0].mean.drop == pytest.approx(0.25)


def test_there_is_no_mean_of_points_and_nats_nor_of_one_task():
    one, other = row(*table(10, 0, 40)), loss(np.ones(9), np.arange(9.0), task="u")
    assert judged([one, other]).comparisons[0].mean is None
    assert judged([one]).comparisons[0].mean is None
    assert judged([one, row(*table(1, 0, 40), task="u")]).comparisons[0].mean.tasks == 2


# A limit.


@pytest.mark.parametrize(
    ("lost", "won", "n", "limit", "strict", "state", "code"),
    [
        (60, 10, 200, 0.02, False, "exceeded", 1),  # 25 points
        (60, 10, 200, 0.02, True, "exceeded", 1),
        (2, 0, 20, 0.02, False, "undecided", 3),  # 10 points of 20 items
        (5, 0, 20, 0.0, False, "undecided", 3),
        (6, 0, 20, 0.0, False, "exceeded", 1),
        (60, 10, 200, 0.24, False, "undecided", 3),  # beyond, but not for sure
        (1, 0, 100, 0.02, False, "within", 0),
        (1, 0, 100, 0.02, True, "undecided", 3),  # 1 point, perhaps 6
        (1, 0, 1000, 0.02, True, "within", 0),
        (10, 40, 200, 0.0, True, "within", 0),  # learned
    ],
)
def test_a_limit_on_one_task(lost, won, n, limit, strict, state, code):
    result = judged([row(*table(lost, won, n))], Limit(limit, strict))
    (one,) = result.judged
    assert (one.check.state, result.exit_code) == (state, code)


def test_a_limit_is_in_nats_for_losses():
    old = np.random.default_rng(4).gamma(4, 0.5, 100)
    worse = loss(old, old + np.random.default_rng(5).normal(0.1, 0.05, 100))
    assert judged([worse], Limit(0.05)).exit_code == 1
    assert judged([worse], Limit(0.2, strict=True)).exit_code == 0
    assert judged([loss(old, old - 0.5)], Limit(0.0, strict=True)).exit_code == 0


def test_one_task_that_fails_fails_all():
    rows = [
        row(*table(60, 10, 200)),
        row(*table(2, 0, 20), task="u"),
        row(*table(0, 9, 50), task="v"),
    ]
    result = judged(rows, Limit(0.02))
    assert [one.check.state for one in result.judged] == ["exceeded", "undecided", "within"]
    assert result.exit_code == 1
    assert judged(rows[1:], Limit(0.02)).exit_code == 3


def test_the_number_of_items_needed_is_enough():
    """As many as it says, in the same proportions: then the limit is told apart, mostly."""
    undecided = judged([row(*table(10, 4, 100))], Limit(0.02)).judged[0]
    needed = undecided.check.items_needed
    assert undecided.check.state == "undecided"
    rng = np.random.default_rng(6)
    draws = rng.multinomial(needed, [0.10, 0.04, 0.86], size=60)
    codes = [judged([row(*table(a, b, needed))], Limit(0.02)).exit_code for a, b, _ in draws]
    assert 0.7 < np.mean([code == 1 for code in codes]) <= 0.95


def test_less_than_six_items_fail_no_limit():
    """Forty problems each pass a tenth less often: 4 items' worth, however certain it looks."""
    rng = np.random.default_rng(8)
    before = rng.choice([0.3, 0.5, 0.8], 40)
    (one,) = judged([row(before, before - 0.1)], Limit(0.0)).judged
    assert one.check.p_corrected < 0.025
    assert (one.verdict, one.check.state) == ("too few items", "undecided")


def test_what_could_not_be_compared_is_no_pass():
    fine = row(*table(0, 0, 100))
    gone = Left("law", "accuracy", "AFTER has no such score", judged=True)
    new = Left("code", "accuracy", "BEFORE has no such score", judged=False)
    assert judged([fine], Limit(0.02), [gone]).exit_code == 3
    assert judged([fine], Limit(0.02), [new]).exit_code == 0
    assert judged([fine], None, [gone]).exit_code == 0


def test_without_a_limit_nothing_fails():
    assert judged([row(*table(50, 0, 50))]).exit_code == 0
