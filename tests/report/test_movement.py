"""Distance against forgetting (Fig. 10), against numbers worked out here."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stockpot.report.movement import movement
from stockpot.report.table import group_runs


def run(
    R: Any, l2: Any, method: str = "sfa", seed: int = 0, better: str = "higher", kl: Any = None
) -> dict[str, Any]:
    stages = [
        {"stage": n, "row": n, "l2_to_anchor": x, "kl_from_anchor": None if kl is None else kl[n]}
        for n, x in enumerate(l2)
    ]
    return {
        "method": method,
        "label": method,
        "settings": {},
        "seed": seed,
        "better": better,
        "R": R,
        "trained": stages,
    }


R1 = [[0.9, 0.1, 0.1], [0.6, 0.8, 0.1], [0.5, 0.7, 0.9]]
R2 = [[0.7, 0.1, 0.1], [0.6, 0.8, 0.1], [0.6, 0.2, 0.9]]


def points(*runs: dict[str, Any], kind: str = "l2") -> list[tuple[int, int, float, float, int]]:
    found = movement(group_runs(runs))[kind]["points"]
    return [(p["group"], p["row"], p["x"], p["lost"], p["n"]) for p in found]


def test_by_hand():
    """After task 2: .9 - .6. After task 3: ((.6 - .5) + (.8 - .7)) / 2."""
    found = points(run(R1, [3.0, 2.0, 1.0]))
    assert found == [
        (0, 1, 2.0, pytest.approx(0.3), 1),
        (0, 2, 1.0, pytest.approx(0.1), 1),
    ]


def test_a_point_is_the_mean_over_a_settings_runs():
    found = points(run(R1, [3.0, 2.0, 1.0]), run(R2, [9.0, 4.0, 2.0], seed=1))
    assert found == [
        (0, 1, 3.0, pytest.approx((0.3 + 0.1) / 2), 2),
        (0, 2, 1.5, pytest.approx((0.1 + (0.0 + 0.6) / 2) / 2), 2),
    ]


def test_a_loss_that_rises_is_forgetting():
    losses = [[1.0, 3.0], [1.5, 0.5]]
    assert points(run(losses, [1.0, 2.0], better="lower")) == [(0, 1, 2.0, pytest.approx(0.5), 1)]


def test_kl_is_a_figure_of_its_own_and_what_is_not_known_has_no_point():
    both = [run(R1, [3.0, 2.0, 1.0]), run(R2, [9.0, None, 2.0], "ewc", kl=[0.5, 0.25, 0.125])]
    assert [p[:3] for p in points(*both)] == [(0, 1, 2.0), (0, 2, 1.0), (1, 2, 2.0)]
    assert [p[:3] for p in points(*both, kind="kl")] == [(1, 1, 0.25), (1, 2, 0.125)]


def test_joint_training_has_no_point():
    joint = run([None, None, [0.9, 0.9, 0.9]], [], "multitask")
    joint["trained"] = [{"stage": 0, "row": 2, "l2_to_anchor": 5.0, "kl_from_anchor": 1.0}]
    assert points(joint) == []


def test_rows_with_holes_have_no_point():
    holes = [[0.9, 0.1, 0.1], [None, 0.8, 0.1], [0.5, 0.7, 0.9]]
    assert points(run(holes, [3.0, 2.0, 1.0])) == []


@pytest.mark.parametrize("row", [None, 7, -1])
def test_a_row_that_is_not_there_has_no_point(row):
    damaged = run(R1, [3.0, 2.0, 1.0])
    damaged["trained"][1]["row"] = row
    assert [p[1] for p in points(damaged)] == [2]


def test_one_task_has_nothing_earlier():
    assert points(run([[0.9]], [1.0])) == []


def note(*runs: dict[str, Any]) -> str:
    return str(movement(group_runs(runs))["l2"]["note"])


def test_the_correlation_is_spearmans():
    generator = np.random.default_rng(0)
    size = 6
    runs = [
        run(generator.random((size, size)).tolist(), generator.random(size).tolist(), name)
        for name in ("sfa", "l2")
    ]
    x, lost = [], []
    for made in runs:
        R = np.array(made["R"])
        for t in range(1, size):
            x.append(made["trained"][t]["l2_to_anchor"])
            lost.append(np.mean(R[t - 1, :t] - R[t, :t]))
    rho = stats.spearmanr(x, lost).statistic
    text = note(*runs)
    assert f"{rho:.2f}" in text
    assert "10 points" in text
    assert "no test" in text


def test_no_correlation_of_few_or_equal_points():
    assert "correlation" not in note(run(R1, [3.0, 2.0, 1.0]))
    flat = [[0.5] * 6] * 6
    assert "correlation" not in note(run(flat, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    varied = np.random.default_rng(1).random((6, 6)).tolist()
    assert "correlation" not in note(run(varied, [1.0] * 6))


@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_against_numpy(size, seeds, seed):
    generator = np.random.default_rng(seed)
    R = generator.random((seeds, size, size))
    l2 = generator.random((seeds, size))
    found = points(*(run(R[n].tolist(), l2[n].tolist(), seed=n) for n in range(seeds)))
    expected = [
        (0, t, l2[:, t].mean(), (R[:, t - 1, :t] - R[:, t, :t]).mean(), seeds)
        for t in range(1, size)
    ]
    assert [p[:2] for p in found] == [p[:2] for p in expected]
    np.testing.assert_allclose([p[2:] for p in found], [p[2:] for p in expected])
    numbers = re.findall(r"(-?\d\.\d\d);", note(*(run(R[0].tolist(), l2[0].tolist()),)))
    assert len(numbers) == (size > 4)
