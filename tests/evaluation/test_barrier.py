"""Interpolation of weights and the height of a barrier: pure functions, against numpy."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stockpot.evaluation.line import barrier, interpolate

FLOATS = st.floats(-1e3, 1e3, width=32)


@given(
    st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=9),
    st.integers(0, 10),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_interpolation_is_that_of_numpy(pairs, tenths, kind):
    one, other = (torch.tensor(values).to(kind) for values in zip(*pairs, strict=True))
    alpha = tenths / 10
    made = interpolate(
        {"w": one, "count": torch.tensor(3)}, {"w": other, "count": torch.tensor(7)}, alpha
    )
    a, b = (tensor.double().numpy() for tensor in (one, other))
    expected = (1 - alpha) * a + alpha * b
    step = {torch.float32: 2.0**-22, torch.float64: 2.0**-50, torch.bfloat16: 2.0**-8}[kind]
    assert made["w"].dtype == kind
    assert np.all(
        np.abs(made["w"].double().numpy() - expected) <= step * (np.abs(a) + np.abs(b)) + 1e-30
    )
    assert made["count"] == 7
    if alpha in (0, 1):
        assert made["w"].equal(other if alpha else one)


def test_barrier_by_hand():
    # Between 1 and 3 the straight line has 1.5, 2, 2.5; the loss is above it by 1 at most.
    assert barrier([0, 0.25, 0.5, 0.75, 1], [1, 2, 3, 3, 3]) == 1.0
    assert barrier([0, 0.5, 1], [1, 0.5, 3]) == 0.0  # a valley is no barrier
    assert barrier([0, 0.5, 1], [4, 3, 2]) == 0.0  # nor is a slope
    assert barrier([0, 1], [4, 2]) == 0.0
    assert barrier([0, 0.9, 1], [0, 0, -10]) == pytest.approx(9)


LOSSES = st.lists(st.floats(0, 1e3), min_size=2, max_size=20)


@given(LOSSES, st.floats(-100, 100), st.floats(-100, 100))
def test_barrier_is_that_of_numpy_and_knows_no_slope(losses, height, slope):
    alphas = np.linspace(0, 1, len(losses))
    found = barrier(alphas.tolist(), losses)
    assert found >= 0
    line = np.interp(alphas, [0, 1], [losses[0], losses[-1]])
    assert found == pytest.approx(float(np.max(np.array(losses) - line)), abs=1e-9)
    tilted = (np.array(losses) + height + slope * alphas).tolist()
    assert barrier(alphas.tolist(), tilted) == pytest.approx(found, abs=1e-8)


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-5, 5), st.integers(3, 30))
def test_barrier_of_a_parabola(a, b, c, points):
    """Above its chord a parabola is by -a x (1 - x): a quarter of -a, if the middle is a point."""
    alphas = np.linspace(0, 1, points)
    found = barrier(alphas.tolist(), (a * alphas**2 + b * alphas + c).tolist())
    middle = 0.25 if points % 2 else 0.25 - 0.25 / (points - 1) ** 2
    assert found == pytest.approx(max(0.0, -a * middle), abs=1e-9)


@pytest.mark.parametrize(
    ("alphas", "losses"),
    [
        ([0, 1], [1]),
        ([0.0], [1.0]),
        ([0, 0.5], [1, 1]),
        ([0.1, 1], [1, 1]),
        ([0, 0.7, 0.5, 1], [1, 1, 1, 1]),
        ([0, 0.5, 1], [1, math.nan, 1]),
        ([0, 0.5, 1], [1, math.inf, 1]),
    ],
)
def test_no_barrier_of_what_is_no_line(alphas, losses):
    with pytest.raises(ValueError, match=r"ascend|finite losses"):
        barrier(alphas, losses)


def test_the_barrier_needs_no_torch():
    """A report derives it, and should open in a moment."""
    code = "import sys, stockpot.evaluation.line; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
