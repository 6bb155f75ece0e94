"""The answer in words: it claims what the intervals allow, and no more."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stockpot.report.findings import headline, size_text
from stockpot.report.style import METHOD_TITLES
from stockpot.report.table import group_runs
from support.reports import T3, Run, by_mean, made_up, two

# The headline.


OVERLAP, APART, ONE_SEED = "intervals overlap", "do not overlap", "one seed"


def claims(text: str) -> set[str]:
    return {claim for claim in (OVERLAP, APART, ONE_SEED) if claim in text}


def say(*runs: list[Run]) -> str:
    return headline(group_runs([run for group in runs for run in group]))


def test_headline_names_the_best_the_next_and_sequential_with_their_numbers():
    text = say(
        by_mean("sequential", 0.5, 0.002, 3),
        by_mean("l2", 0.6, 0.002, 3, {"strength": 1.0}),
        by_mean("sfa", 0.8, 0.002, 3, {"p": 0.25, "beta": 0.5}),
        by_mean("ewc", 0.7, 0.002, 3, {"strength": 10.0}),
    )
    half = T3 * 0.1 / math.sqrt(3)  # in %, of 79.9, 80.0 and 80.1
    first, second = text.split(". ", 1)
    assert f"SFA p=0.25 beta=0.5 does best on average over the tasks: 80.0 % ± {half:.1f}" in first
    assert f"50.0 % ± {half:.1f} for sequential" in first
    assert f"EWC strength=10.0 with 70.0 % ± {half:.1f}" in second
    assert "L2" not in text
    assert claims(text) == {APART}


def test_headline_with_overlapping_intervals_does_not_decide():
    text = say(
        by_mean("sfa", 0.8, 0.1, 3, {"p": 0.25}), by_mean("ewc", 0.7, 0.1, 3, {"strength": 1.0})
    )
    assert claims(text) == {OVERLAP}
    assert "does not say which" in text


@pytest.mark.parametrize(("above", "below"), [(0.1, 0.001), (0.001, 0.1)])
def test_one_wide_interval_is_enough_to_overlap(above, below):
    """Seeds 0.1 apart: +- 12.4 %, whichever of the two has it."""
    assert claims(say(by_mean("sfa", 0.8, above, 3), by_mean("ewc", 0.7, below, 3))) == {OVERLAP}
    assert claims(say(by_mean("sfa", 0.9, above, 3), by_mean("ewc", 0.7, below, 3))) == {APART}


@pytest.mark.parametrize("seeds", [(1, 1), (3, 1), (1, 3)])
def test_headline_with_one_seed_calls_no_difference_real(seeds):
    text = say(by_mean("sfa", 0.99, 0.001, seeds[0]), by_mean("ewc", 0.01, 0.001, seeds[1]))
    assert claims(text) == {ONE_SEED}
    assert "no difference can be called real" in text


def test_intervals_that_touch_overlap():
    """Seeds that agree to the last bit: two intervals of no width, one above the other or equal."""
    assert claims(say(by_mean("sfa", 0.5, 0, 2), by_mean("ewc", 0.5, 0, 2))) == {OVERLAP}
    assert claims(say(by_mean("sfa", 0.75, 0, 2), by_mean("ewc", 0.5, 0, 2))) == {APART}


def test_what_sees_old_data_is_no_rival():
    text = say(
        by_mean("multitask", 0.99, 0.001, 2),
        by_mean("rehearsal", 0.98, 0.001, 2, {"fraction": 0.1}),
        by_mean("sfa", 0.5, 0.001, 2),
        by_mean("sequential", 0.3, 0.001, 2),
    )
    assert "SFA does best" in text
    assert "multitask" not in text
    assert "rehearsal" not in text


def test_nothing_to_say_about_yardsticks_alone():
    assert say(by_mean("multitask", 0.9, 0, 1), by_mean("rehearsal", 0.8, 0, 1)) == ""
    assert headline([]) == ""


def test_sequential_may_be_best():
    text = say(by_mean("sequential", 0.9, 0.001, 2), by_mean("sfa", 0.5, 0.001, 2))
    assert "sequential does best" in text
    assert "against" not in text
    assert "SFA with 50.0 %" in text


def test_settings_picked_on_the_scores_shown_are_said_to_be():
    grid = [by_mean("sfa", 0.8 + n / 100, 0.001, 2, {"p": p}) for n, p in enumerate((0.25, 0.5))]
    rival = by_mean("ewc", 0.5, 0.001, 2)
    assert "picked on these same scores" in say(*grid, rival)
    assert "picked" not in say(grid[0], rival)


@pytest.mark.parametrize(
    ("seconds", "stored", "price"),
    [
        (2.0, 0, "in about the same training time, keeping nothing between tasks"),
        (2.1, 1000, "in about the same training time, keeping 1 kB between tasks"),
        (3.0, 3_210_000, "in 1.5 times its training time, keeping 3.21 MB between tasks"),
        (300.0, 999, "in 150 times its training time, keeping 999 bytes between tasks"),
        (0.5, 999_600, "in 0.25 times its training time, keeping 1 MB between tasks"),
        (1.0, None, "in 0.5 times its training time"),
        (None, 5e9, "keeping 5 GB between tasks"),
        (None, None, None),
    ],
)
def test_the_price_is_told_in_time_and_storage(seconds, stored, price):
    cost = {"seconds": seconds, "stored_bytes": stored}
    best = [made_up("sfa", two((0.9, 0.9)), n, **cost) for n in (0, 1)]
    text = say(best, by_mean("sequential", 0.5, 0.1, 2))
    first = text.split(". The next")[0]
    assert first.split("for sequential fine-tuning")[1] == (f", {price}" if price else "")


@given(st.floats(0, 1e15))
def test_sizes_are_written_in_plain_digits(size):
    text = size_text(size)
    number, unit = text.split(" ")
    scale = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * scale == pytest.approx(size, rel=0.0051)
    assert unit == "TB" or float(number) < 1000
    if 1e-2 < size < 1e14:
        assert "e" not in number


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sfa", "ewc", "l2", "sequential", "multitask", "rehearsal"]),
            st.integers(0, 98).flatmap(
                lambda low: st.lists(st.integers(low, low + 2), min_size=1, max_size=4)
            ),
        ),
        min_size=1,
        max_size=7,
    )
)
@settings(max_examples=200, deadline=None)
def test_headline_claims_exactly_what_the_intervals_allow(drawn):
    summary = [
        made_up(method, two((value / 100, value / 100)), seed, {"number": number})
        for number, (method, values) in enumerate(drawn)
        for seed, value in enumerate(values)
    ]
    free = [(m, v) for m, v in drawn if m not in ("multitask", "rehearsal")]
    text = headline(group_runs(summary))
    if not free:
        assert text == ""
        return
    top = max(np.mean(values) for _, values in free)
    tops = {m for m, values in free if np.mean(values) > top - 1e-9}
    named = [METHOD_TITLES[method] for method in tops]
    if len(free) == 1:  # nothing is best that is alone
        assert text.startswith(f"{named[0]} number=")
        assert f" has {top:.1f} %" in text or abs(top * 10 % 1 - 0.5) < 1e-6
        assert "Without old data" not in text
        assert claims(text) == set()
        return
    said = re.search(r"(?:tasks:|has) ([\d.]+) %", text)
    assert said is not None
    assert float(said[1]) == pytest.approx(top, abs=0.0501)
    first = "" if len(free) == 1 else "Without old data, "
    assert any(text.startswith(f"{first}{name} number=") for name in named)
    if sum(np.mean(values) > top - 1e-9 for _, values in free) > 1:
        # Which of the equals is named is not for this test to say; equal methods are not apart.
        assert len(tops) == 1 or APART not in text
        return
    best = max(free, key=lambda pair: np.mean(pair[1]))
    # The rival is the best of another method, or of the same method's other settings.
    others = [pair for pair in free if pair[0] != best[0]]
    others = others or [pair for pair in free if pair is not best]
    second = max(np.mean(values) for _, values in others)
    candidates = [values for _, values in others if np.mean(values) > second - 1e-9]
    if len(candidates) > 1:  # which of the equals is named is not for this test to say
        return
    (rival,) = candidates
    if min(len(best[1]), len(rival)) == 1:
        assert claims(text) == {ONE_SEED}
        return
    reach = [
        stats.t.isf(0.025, len(v) - 1) * np.std(v, ddof=1) / math.sqrt(len(v))
        for v in (best[1], rival)
    ]
    gap = (top - reach[0]) - (second + reach[1])
    if abs(gap) > 1e-9:
        assert claims(text) == ({APART} if gap > 0 else {OVERLAP})


@pytest.mark.parametrize(("seeds", "claim"), [(1, ONE_SEED), (3, OVERLAP)])
def test_one_methods_settings_are_compared_with_the_same_caution(seeds, claim):
    """It names the best of a grid: one seed or overlapping intervals matter here as well."""
    text = say(
        *(by_mean("sfa", 0.7 + n / 100, 0.2, seeds, {"p": p}) for n, p in enumerate((0.25, 0.5))),
        by_mean("multitask", 0.9, 0.1, seeds),
    )
    assert "p=0.5 does best" in text
    assert claim in text
