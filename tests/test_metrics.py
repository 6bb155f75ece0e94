"""Metrics against numbers worked out by hand and against the formulas in numpy."""

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stockpot.metrics import (
    all_metrics,
    average_accuracy,
    bwt,
    forgetting,
    forgetting_vs_best,
    fwt,
    learning_accuracy,
)
from stockpot.report.table import Interval

quick = settings(max_examples=150, deadline=None)
scores = st.floats(0.0, 1.0)


def matrices(least: int = 1) -> st.SearchStrategy[tuple[list[list[float]], list[float]]]:
    def of_size(size: int) -> st.SearchStrategy[tuple[list[list[float]], list[float]]]:
        row = st.lists(scores, min_size=size, max_size=size)
        return st.tuples(st.lists(row, min_size=size, max_size=size), row)

    return st.integers(least, 6).flatmap(of_size)


# By hand.

R = [[0.9, 0.1, 0.1], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]
B = [0.1, 0.1, 0.1]

# Task 0 gets better and better; task 1 peaks after task 2; task 2 is lost; chance levels differ.
R_4 = [
    [0.50, 0.20, 0.30, 0.10],
    [0.60, 0.40, 0.35, 0.15],
    [0.70, 0.60, 0.80, 0.05],
    [0.80, 0.30, 0.20, 0.90],
]
B_4 = [0.10, 0.25, 0.25, 0.05]


def test_the_worked_example_of_the_documentation() -> None:
    assert average_accuracy(R) == pytest.approx((0.5 + 0.7 + 0.9) / 3)
    assert learning_accuracy(R) == pytest.approx((0.9 + 0.8 + 0.9) / 3)
    assert forgetting(R) == pytest.approx(0.25)
    assert forgetting_vs_best(R) == pytest.approx(0.25)
    assert bwt(R) == pytest.approx(-0.25)
    assert fwt(R, B) == pytest.approx(0.05)


def test_four_tasks_by_hand() -> None:
    assert average_accuracy(R_4) == pytest.approx(2.20 / 4)
    # Just after learning: .5 - .8, .4 - .3, .8 - .2
    assert forgetting(R_4) == pytest.approx((-0.3 + 0.1 + 0.6) / 3)
    # Best before the end: .7 - .8, .6 - .3, .8 - .2
    assert forgetting_vs_best(R_4) == pytest.approx((-0.1 + 0.3 + 0.6) / 3)
    assert bwt(R_4) == pytest.approx((0.3 - 0.1 - 0.6) / 3)
    # .2 - .25, .35 - .25, .05 - .05
    assert fwt(R_4, B_4) == pytest.approx((-0.05 + 0.10 + 0.0) / 3)


def test_chaudhry_forgetting_may_be_negative() -> None:
    better = [[0.5, 0.1], [0.8, 0.9]]
    assert forgetting_vs_best(better) == pytest.approx(-0.3)
    assert forgetting(better) == pytest.approx(-0.3)
    assert bwt(better) == pytest.approx(0.3)


def test_scores_before_a_task_was_learned_are_not_its_best() -> None:
    # Task 1 was at .99 before it was trained: that is transfer, not something to forget.
    transfer = [[0.9, 0.99, 0.1], [0.9, 0.6, 0.1], [0.9, 0.5, 0.7]]
    assert forgetting_vs_best(transfer) == pytest.approx((0.0 + 0.1) / 2)


def test_nothing_forgotten_is_plainly_zero() -> None:
    kept = [[0.7, 0.1], [0.7, 0.6]]
    assert str(bwt(kept)) == str(forgetting(kept)) == "0.0"  # and not -0.0


def test_one_task_has_only_averages() -> None:
    assert all_metrics([[0.8]], [0.1]) == {
        "average": 0.8,
        "learned": 0.8,
        "forgetting": None,
        "forgetting_vs_best": None,
        "bwt": None,
        "fwt": None,
    }


def test_multitask_has_only_an_average() -> None:
    assert all_metrics([None, None, [0.6, 0.7, 0.8]], B) == {
        "average": pytest.approx(0.7),
        "learned": None,
        "forgetting": None,
        "forgetting_vs_best": None,
        "bwt": None,
        "fwt": None,
    }


def test_any_missing_row_leaves_out_what_it_is_needed_for() -> None:
    for missing in range(3):
        rows = [None if t == missing else row for t, row in enumerate(R_4)]
        assert average_accuracy(rows) == pytest.approx(0.55)
        assert forgetting(rows) is None
        assert forgetting_vs_best(rows) is None
        assert bwt(rows) is None
        assert fwt(rows, B_4) is None


@pytest.mark.parametrize("unfinished", [[], [[0.5, 0.5], None], [None]])
def test_a_stream_without_its_last_row_is_refused(unfinished: list[list[float] | None]) -> None:
    for metric in (average_accuracy, forgetting, forgetting_vs_best, bwt):
        with pytest.raises(ValueError, match="last row"):
            metric(unfinished)


# Against the formulas.


@quick
@given(matrices())
def test_average_accuracy_formula(given_scores: tuple[list[list[float]], list[float]]) -> None:
    matrix, _ = given_scores
    assert average_accuracy(matrix) == pytest.approx(np.array(matrix)[-1].mean(), abs=1e-12)


@quick
@given(matrices(least=2))
def test_the_other_formulas(given_scores: tuple[list[list[float]], list[float]]) -> None:
    matrix, baseline = given_scores
    table, b = np.array(matrix), np.array(baseline)
    size = len(table)
    ends, learned = table[-1, :-1], np.diag(table)[:-1]
    # Rows before a task was learned are out of the running for its best.
    since = np.where(np.arange(size)[:, None] >= np.arange(size)[None, :], table, -np.inf)
    best = since[:-1, :-1].max(axis=0)
    expected = {
        "average": table[-1].mean(),
        "learned": np.diag(table).mean(),
        "forgetting": (learned - ends).mean(),
        "forgetting_vs_best": (best - ends).mean(),
        "bwt": (ends - learned).mean(),
        "fwt": (np.diag(table, k=1) - b[1:]).mean(),
    }
    assert all_metrics(matrix, baseline) == pytest.approx(expected, abs=1e-12)


@quick
@given(matrices(least=2))
def test_how_the_metrics_hang_together(
    given_scores: tuple[list[list[float]], list[float]],
) -> None:
    matrix, baseline = given_scores
    drop, best_drop, transfer = forgetting(matrix), forgetting_vs_best(matrix), bwt(matrix)
    assert drop is not None
    assert best_drop is not None
    assert transfer == -drop
    assert best_drop >= drop - 1e-12
    # What is written above the diagonal is of no concern to what was kept, and b only to fwt.
    below = [[x if i <= t else 0.5 for i, x in enumerate(row)] for t, row in enumerate(matrix)]
    assert forgetting(below) == drop
    assert forgetting_vs_best(below) == best_drop
    moved = all_metrics(matrix, [x + 0.125 for x in baseline])
    before = all_metrics(matrix, baseline)
    assert moved.pop("fwt") == pytest.approx((before.pop("fwt") or 0.0) - 0.125, abs=1e-12)
    assert moved == before


@quick
@given(matrices(), st.integers(0, 5))
def test_inputs_are_not_changed(
    given_scores: tuple[list[list[float]], list[float]], missing: int
) -> None:
    matrix, baseline = given_scores
    rows: list[list[float] | None] = [
        None if t == missing and t < len(matrix) - 1 else row for t, row in enumerate(matrix)
    ]
    before = copy.deepcopy((rows, baseline))
    all_metrics(rows, baseline)
    assert (rows, baseline) == before


# With gaps: what was not scored (evaluation.tasks).


def test_a_thinned_matrix_by_hand() -> None:
    """Every second task all are scored: the diagonal and the last row are whole, b is not."""
    gaps = [
        [0.50, None, None, None],
        [0.60, 0.40, None, None],
        [None, None, 0.80, None],
        [0.80, 0.30, 0.20, 0.90],
    ]
    assert all_metrics(gaps, [0.1, None, None, None]) == {
        "average": pytest.approx(2.20 / 4),
        "learned": pytest.approx(2.60 / 4),
        "forgetting": pytest.approx((-0.3 + 0.1 + 0.6) / 3),
        "forgetting_vs_best": None,  # task 0 may have been better still after task 2
        "bwt": pytest.approx((0.3 - 0.1 - 0.6) / 3),
        "fwt": None,
    }


@quick
@given(matrices(), st.data())
def test_a_metric_is_right_or_none(
    given_scores: tuple[list[list[float]], list[float]], data: st.DataObject
) -> None:
    """In numpy what is unknown is nan, and so is whatever is computed from it."""
    matrix, baseline = given_scores
    size = len(matrix)
    table, b = np.array(matrix), np.array(baseline)
    cells = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1))
    for t, i in data.draw(st.lists(cells, max_size=size)):
        table[t, i] = np.nan
    for i in data.draw(st.lists(st.integers(0, size - 1), max_size=2)):
        b[i] = np.nan

    def of(values: np.ndarray) -> float:
        return float(values.mean()) if len(values) else math.nan

    ends, learned = table[-1, :-1], np.diag(table)[:-1]
    best = np.array([table[i:-1, i].max() for i in range(size - 1)])
    expected = {
        "average": of(table[-1]),
        "learned": of(np.diag(table)),
        "forgetting": of(learned - ends),
        "forgetting_vs_best": of(best - ends),
        "bwt": of(ends - learned),
        "fwt": of(np.diag(table, k=1) - b[1:]),
    }

    def none(values: np.ndarray) -> list[float | None]:
        return [None if np.isnan(value) else float(value) for value in values]

    found = all_metrics([none(row) for row in table], none(b))
    as_nan = {name: math.nan if value is None else value for name, value in found.items()}
    assert as_nan == pytest.approx(expected, abs=1e-12, nan_ok=True)
    lower = all_metrics([none(-row) for row in table], none(-b), "lower")
    turned = {"average": -1, "learned": -1}
    mirrored = {
        name: value if value is None else value * turned.get(name, 1)
        for name, value in lower.items()
    }
    assert mirrored == found


def test_tuples_will_do() -> None:
    as_tuples = tuple(tuple(row) for row in R_4)
    assert all_metrics(as_tuples, tuple(B_4)) == all_metrics(R_4, B_4)


# Over seeds.


@quick
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_interval_is_student_s_t(values: list[float]) -> None:
    interval = Interval.of(values)
    assert interval is not None
    assert interval.n == len(values)
    assert interval.half_width is not None
    assert interval.mean == pytest.approx(np.mean(values), abs=1e-11)
    error = stats.sem(values)
    if error < 1e-9:  # scipy has no interval of no width
        assert interval.half_width == pytest.approx(0.0, abs=1e-7)
        return
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
    assert interval.mean - interval.half_width == pytest.approx(low, rel=1e-7, abs=1e-7)
    assert interval.mean + interval.half_width == pytest.approx(high, rel=1e-7, abs=1e-7)


def test_interval_by_hand() -> None:
    # s = .1, t(.975, 2) = 4.302652...
    interval = Interval.of([0.7, 0.8, 0.9])
    assert interval is not None
    assert interval.mean == pytest.approx(0.8)
    assert interval.half_width == pytest.approx(4.302652729911275 * 0.1 / math.sqrt(3))
    two = Interval.of([0.0, 1.0])
    assert two is not None
    assert two.half_width == pytest.approx(12.706204736432095 / 2)


def test_interval_of_one_seed_has_no_width() -> None:
    assert Interval.of([0.25]) == Interval(0.25, None, 1)


@pytest.mark.parametrize("values", [[], [None], [0.5, None], [None, 0.5, 0.6]])
def test_interval_of_what_is_missing(values: list[float | None]) -> None:
    assert Interval.of(values) is None
