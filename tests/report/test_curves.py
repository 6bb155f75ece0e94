"""Which points are joined to a curve, and what it is called."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.report.figures import Curve, curves
from stockpot.report.table import Group, group_runs
from support.reports import Run, made_up, point_of, sfa

# Curves.


def described(summary: Sequence[Run]) -> list[tuple[str | None, dict[str, Any], list[Any]]]:
    """Along what, with which other settings, through which values."""
    result = []
    for curve in curves(group_runs(summary)):
        values = [point.group.settings.get(curve.along) for point in curve.points]
        fixed = {k: v for k, v in curve.fixed.items() if v is not None and k != "protect_base"}
        result.append((curve.along, fixed, values))
    return result


def test_a_grid_of_p_and_beta_gives_a_curve_along_p_for_every_beta():
    summary = [point_of(sfa(p, beta)) for p in (1.0, 0.05, 0.25) for beta in (0.3, 0.6)]
    assert described(summary) == [
        ("p", {"beta": 0.3}, [0.05, 0.25, 1.0]),
        ("p", {"beta": 0.6}, [0.05, 0.25, 1.0]),
    ]


def test_grids_along_every_and_beta_cross_in_one_point():
    summary = [point_of(sfa(None, 0.5, n)) for n in (20, 5, 100)]
    summary += [point_of(sfa(None, beta, 20)) for beta in (0.75, 0.25)]
    assert described(summary) == [
        ("every", {"beta": 0.5}, [5, 20, 100]),
        ("beta", {"every": 20}, [0.25, 0.5, 0.75]),
    ]


def test_p_and_every_are_never_on_one_curve():
    summary = [point_of(sfa(0.25, 0.5)), point_of(sfa(0.5, 0.5))]
    summary += [point_of(sfa(None, 0.5, n)) for n in (2, 3)]
    assert described(summary) == [
        ("p", {"beta": 0.5}, [0.25, 0.5]),
        ("every", {"beta": 0.5}, [2, 3]),
    ]


def test_a_curve_along_beta_where_there_is_one_p():
    summary = [point_of(sfa(0.25, beta)) for beta in (0.9, 0.1, 0.5)]
    assert described(summary) == [("beta", {"p": 0.25}, [0.1, 0.5, 0.9])]


def test_settings_that_no_curve_runs_along_are_never_mixed():
    summary = [
        point_of({"strength": s, "labels": labels, "samples": 9}, "ewc")
        for s in (100.0, 1.0)
        for labels in ("true", "exact")
    ]
    assert [(along, values) for along, _, values in described(summary)] == [
        ("strength", [1.0, 100.0]),
        ("strength", [1.0, 100.0]),
    ]
    for curve in curves(group_runs(summary)):
        assert len({point.group.settings["labels"] for point in curve.points}) == 1


def test_singles_stand_alone():
    summary = [
        point_of({}, "sequential"),
        point_of(sfa(0.25, 0.5)),
        point_of(sfa(0.5, 0.6)),  # differs in two settings
        point_of({"fraction": 0.05}, "rehearsal"),
        point_of({"labels": "exact", "samples": 5}, "fisher-merging"),
        point_of({"labels": "true", "samples": 5}, "fisher-merging"),
        made_up("multitask", [None, [0.9, 0.8]]),
        point_of({"depth": 3}, "not-of-ours"),
    ]
    found = curves(group_runs(summary))
    assert [len(curve.points) for curve in found] == [1] * 8
    assert all(curve.along is None for curve in found)


SETTINGS_GRID = [
    *(sfa(p, beta) for p in (0.1, 0.5, 1.0) for beta in (0.2, 0.5, 0.8)),
    *(sfa(None, beta, n) for n in (2, 5) for beta in (0.2, 0.5)),
    {**sfa(0.5, 0.5), "protect_base": True},
]


@given(st.lists(st.sampled_from(SETTINGS_GRID), min_size=1, max_size=14, unique_by=repr))
@settings(max_examples=150, deadline=None)
def test_every_group_is_on_the_plane_and_curves_are_honest(chosen):
    groups = group_runs([point_of(settings) for settings in chosen])
    found = curves(groups)
    shown = [point.group.label for curve in found for point in curve.points]
    assert set(shown) == {group.label for group in groups}
    covered: set[str] = set()
    for curve in found:
        labels = {point.group.label for point in curve.points}
        assert labels - covered  # no curve says nothing new
        covered |= labels
        if curve.along is None:
            assert len(curve.points) == 1
            continue
        values = [point.group.settings[curve.along] for point in curve.points]
        assert len(values) > 1
        assert values == sorted(set(values))
        for point in curve.points:
            rest = {k: v for k, v in point.group.settings.items() if k != curve.along}
            assert rest == curve.fixed


@pytest.mark.parametrize(
    "settings",
    [
        [
            {"strength": s, "labels": "sampled", "samples": n}
            for s in (1.0, 10.0)
            for n in (10, 100)
        ],
        [{**sfa(p, 0.5), "protect_base": base} for p in (0.25, 1.0) for base in (False, True)],
    ],
)
def test_curves_have_labels_of_their_own(settings):
    method = "ewc" if "samples" in settings[0] else "sfa"
    labels = [curve.label for curve in curves(group_runs([point_of(s, method) for s in settings]))]
    assert len(labels) == len(set(labels)) == 2


def test_a_curves_label_names_what_it_runs_along_and_what_is_fixed():
    summary = [point_of(sfa(p, beta)) for p in (0.25, 0.5) for beta in (0.3, 0.6)]
    summary += [point_of({"strength": s}, "l2") for s in (1.0, 2.0)] + [point_of({}, "sequential")]
    labels = [curve.label for curve in curves(group_runs(summary))]
    assert len(labels) == 4
    for label, words in zip(
        labels, (("SFA", "p", "0.3"), ("SFA", "p", "0.6"), ("L2", "strength"), ()), strict=True
    ):
        assert all(word in label for word in words)
    assert labels[3] == "sequential"


def test_a_point_alone_is_named_by_its_settings():
    group = Group("sfa", "sfa p=0.25 beta=0.5", sfa(0.25, 0.5), (point_of(sfa(0.25, 0.5)),))
    (curve,) = curves([group])
    assert isinstance(curve, Curve)
    assert curve.label == "SFA p=0.25 beta=0.5"
