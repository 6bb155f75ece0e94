"""Tables, figures and the page, against numbers worked out here from made-up summaries."""

import csv
import hashlib
import inspect
import io
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from scipy import stats

from stockpot.errors import DamagedRecordError, StockpotError
from stockpot.experiment import load_experiment, run_experiment
from stockpot.experiment.observer import Observer
from stockpot.methods import METHODS
from stockpot.report.figures import (
    Curve,
    accuracy_matrices,
    curves,
    save_figure,
    trade_off_plane,
)
from stockpot.report.findings import headline
from stockpot.report.style import METHOD_COLOURS, METHOD_MARKERS, METHOD_TITLES, colour, marker
from stockpot.report.table import Group, Interval, group_runs, to_csv, to_markdown
from stockpot.report.write import write_report
from support.experiments import run_file, write_experiment

Run = dict[str, Any]
T2, T3 = 12.706204736, 4.302652730
"""Student's t, 97.5 %, for two and three seeds: from a printed table."""


# Summaries made up by hand.


def made_up(
    method: str, R: list[list[float] | None], seed: int = 0, settings: Any = None, **metrics: Any
) -> Run:
    """One object of summary.json."""
    given = {} if settings is None else settings
    label = " ".join(
        [method, *(f"{k}={v}" for k, v in given.items() if v is not None and v is not False)]
    )
    last = R[-1]
    assert last is not None
    numbers = {
        "average": sum(last) / len(last),
        "forgetting": 0.125,
        "forgetting_vs_best": 0.25,
        "bwt": -0.125,
        "fwt": -0.0001,
        "l2_to_anchor": 1.5,
        "kl_from_anchor": 0.25,
        "seconds": 2.0,
        "peak_memory": 3_000_000,
        "steps": 7,
    }
    return {
        "run": f"{label}-seed{seed}".replace(" ", "-"),
        "method": method,
        "settings": given,
        "label": label,
        "seed": seed,
        "tasks": [f"task {n}" for n in range(len(R))],
        "R": R,
        "b": [0.1] * len(R),
        "metrics": {**numbers, **metrics},
    }


def two(last: tuple[float, float], before: tuple[float, float] = (0.9, 0.1)) -> Any:
    """R of a stream of two tasks by its rows."""
    return [list(before), list(last)]


def sfa(p: float | None, beta: float, every: int | None = None, **other: Any) -> dict[str, Any]:
    return {"p": p, "every": every, "beta": beta, "protect_base": False, **other}


def point_of(settings: dict[str, Any], method: str = "sfa") -> Run:
    """A run somewhere on the plane; where follows from its settings."""
    digits = int(hashlib.sha256(repr(settings).encode()).hexdigest(), 16)
    return made_up(method, two((digits % 97 / 100, digits % 89 / 100)), settings=settings)


def by_mean(method: str, mean: float, spread: float, seeds: int, settings: Any = None) -> list[Run]:
    """Seeds whose average accuracies have this mean, ``spread`` apart from first to last."""
    offsets = [0.0] if seeds == 1 else [spread * (n / (seeds - 1) - 0.5) for n in range(seeds)]
    return [
        made_up(method, two((mean + o, mean + o)), seed=n, settings=settings)
        for n, o in enumerate(offsets)
    ]


# Intervals.


@pytest.mark.parametrize(
    ("values", "mean", "half_width"),
    [
        ([0.7, 0.8, 0.9], 0.8, T3 * 0.1 / math.sqrt(3)),
        ([0.2, 0.6], 0.4, T2 * 0.4 / 2),
        ([0.5, 0.5, 0.5, 0.5], 0.5, 0.0),
        ([0.25], 0.25, None),
    ],
)
def test_interval_by_hand(values, mean, half_width):
    interval = Interval.of(values)
    assert interval is not None
    assert interval.n == len(values)
    assert interval.mean == pytest.approx(mean)
    if half_width is None:
        assert interval.half_width is None
    else:
        assert interval.half_width == pytest.approx(half_width, rel=1e-9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_interval_is_students(values):
    interval = Interval.of(values)
    assert interval is not None
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert interval.mean == pytest.approx(np.mean(values), abs=1e-9)
    expected = stats.t.isf(0.025, len(values) - 1) * error
    assert interval.half_width == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_interval_of_what_is_missing_is_none():
    assert Interval.of([]) is None
    assert Interval.of([None]) is None
    assert Interval.of([0.5, None, 0.7]) is None  # not the mean of those that are there


# Groups.


def test_runs_are_grouped_by_method_and_setting_in_order():
    summary = [
        made_up("sfa", two((0.5, 0.6)), seed, sfa(p, 0.5)) for seed in (0, 1) for p in (0.25, 1.0)
    ]
    # The same settings, their keys in another order.
    moved = dict(reversed(sfa(0.25, 0.5).items()))
    summary += [made_up("sequential", two((0.1, 0.9))), made_up("sfa", two((1, 1)), 2, moved)]
    groups = group_runs(summary)
    assert [(g.method, g.settings.get("p"), [r["seed"] for r in g.runs]) for g in groups] == [
        ("sfa", 0.25, [0, 1, 2]),
        ("sfa", 1.0, [0, 1]),
        ("sequential", None, [0]),
    ]


def test_methods_with_the_same_settings_are_different_groups():
    summary = [made_up(m, two((0.5, 0.5)), settings={"strength": 1.0}) for m in ("l1", "l2")]
    assert [group.method for group in group_runs(summary)] == ["l1", "l2"]


def test_matrix_is_the_mean_over_seeds_and_knows_rows_that_are_not_there():
    one = made_up("sfa", [[0.2, 0.4, 0.0], [0.5, 0.5, 0.5], [1.0, 0.0, 0.5]])
    other = made_up("sfa", [[0.4, 0.0, 0.1], [0.7, 0.5, 0.5], [0.0, 0.0, 0.1]], 1)
    (group,) = group_runs([one, other])
    expected = [[0.3, 0.2, 0.05], [0.6, 0.5, 0.5], [0.5, 0.0, 0.3]]
    assert group.matrix() == [pytest.approx(row) for row in expected]
    (joint,) = group_runs([made_up("multitask", [None, None, [0.5, 0.6, 0.7]])])
    assert joint.matrix() == [[None] * 3, [None] * 3, [0.5, 0.6, 0.7]]
    final = joint.final(1)
    assert final == Interval(0.6, None, 1)


# The table.


TABLE = [
    *(made_up("sfa", two((a, 0.9)), n, sfa(0.25, 0.5)) for n, a in enumerate((0.5, 0.6, 0.7))),
    made_up("multitask", [None, [0.95, 0.85]], forgetting=None, forgetting_vs_best=None, bwt=None),
]


def cells(line: str) -> list[str]:
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [cell.strip() for cell in line[1:-1].split("|")]


def test_markdown_is_one_table_with_units_intervals_and_no_minus_zero():
    text = to_markdown(group_runs(TABLE), ["even", "odd"])
    lines = text.splitlines()
    assert text.endswith("|\n")
    head, rule, *rows = lines
    assert len({line.count("|") for line in lines}) == 1
    assert re.fullmatch(r"\|(:?-+:?\|)+", rule)
    named = [dict(zip(cells(head), cells(row), strict=True)) for row in rows]
    first, second = named
    half = T3 * 0.1 / math.sqrt(3) * 100
    assert first["method"] == "sfa p=0.25 beta=0.5"
    assert first["even (%)"] == f"60.0 ±{half:.1f}"
    assert first["odd (%)"] == "90.0 ±0.0"
    assert first["average (%)"] == f"75.0 ±{half / 2:.1f}"
    assert first["BWT (% points)"] == "-12.5 ±0.0"
    assert first["FWT (% points)"] == "0.0 ±0.0"  # -0.01 rounds to no minus
    assert first["peak memory (MB)"] == "3 ±0"
    assert second["even (%)"] == "95.0"  # one seed: no interval
    assert second["BWT (% points)"] == "-"
    assert "±" not in rows[1]


def test_csv_round_trips_to_the_same_numbers():
    groups = group_runs(TABLE)
    rows = list(csv.DictReader(io.StringIO(to_csv(groups, ["even", "odd"]))))
    assert [row["method"] for row in rows] == ["sfa", "multitask"]
    assert [int(row["seeds"]) for row in rows] == [3, 1]
    assert rows[0]["setting"] == "sfa p=0.25 beta=0.5"
    for row, group in zip(rows, groups, strict=True):
        wanted = {f"final.{name}": group.final(n) for n, name in enumerate(("even", "odd"))}
        for key in group.runs[0]["metrics"]:
            if key in row:
                wanted[key] = group.metric(key)
        assert {"average", "forgetting", "bwt", "fwt", "peak_memory"} <= wanted.keys()
        # Every column is accounted for.
        assert len(row) == 3 + 2 * len(wanted)
        for key, interval in wanted.items():
            cell, half = row[key], row[f"{key}.half_width_95"]
            if interval is None:
                assert (cell, half) == ("", "")
            else:
                assert float(cell) == interval.mean  # to the last bit
                assert (float(half) if half else None) == interval.half_width
    assert float(rows[0]["final.even"]) == pytest.approx(0.6)
    assert float(rows[0]["average"]) == pytest.approx(0.75)


def test_csv_quotes_task_names():
    names = ['cats, "small"', "dogs\nlarge"]
    (row,) = csv.DictReader(io.StringIO(to_csv(group_runs(TABLE[:1]), names)))
    assert float(row[f"final.{names[0]}"]) == 0.5
    assert float(row[f"final.{names[1]}"]) == 0.9


def test_markdown_survives_a_bar_in_a_task_name():
    lines = to_markdown(group_runs(TABLE), ["cats|dogs", "birds"]).splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


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


# The plane.


def drawn(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """The data of every line on the plane, by its label in the legend."""
    (axes,) = figure.axes
    lines = {}
    for line in axes.lines:
        label = str(line.get_label())
        assert label not in lines
        lines[label] = [(float(x), float(y)) for x, y in line.get_xydata()]
    return lines


def bars(axes: Axes) -> list[tuple[float, float, float, float]]:
    """Every error bar's (x, y, half width, half height), read off the segments that are drawn."""
    result = []
    for container in axes.containers:
        assert isinstance(container, ErrorbarContainer)
        across, up = container.lines[2]
        for a, u in zip(across.get_segments(), up.get_segments(), strict=True):
            assert a[0][1] == a[1][1]
            assert u[0][0] == u[1][0]
            x, y = (a[0][0] + a[1][0]) / 2, (u[0][1] + u[1][1]) / 2
            result.append((x, y, (a[1][0] - a[0][0]) / 2, (u[1][1] - u[0][1]) / 2))
    return result


PLANE = [
    *(
        made_up("sfa", [[0.9, 0, 0], [0.8, 0.8, 0], [a, b, c]], n, sfa(p, 0.5))
        for p, rows in (
            (0.5, [(0.5, 0.6, 0.7), (0.6, 0.7, 0.9)]),
            (0.25, [(0.2, 0.4, 0.8), (0.3, 0.5, 0.6)]),
        )
        for n, (a, b, c) in enumerate(rows)
    ),
    made_up("multitask", [None, None, [0.96, 0.98, 0.99]]),
    made_up("sequential", [[0.9, 0, 0], [0.4, 0.8, 0], [0.1, 0.3, 1.0]]),
]


@pytest.fixture(scope="module")
def plane() -> Figure:
    return trade_off_plane(group_runs(PLANE), ["one", "two", "three"])


def test_points_are_where_the_numbers_are(plane):
    """Across: the last task. Up: the mean of the earlier ones. p = 0.25 comes before 0.5."""
    lines = drawn(plane)
    assert len(lines) == 3
    (curve,) = [points for label, points in lines.items() if label.startswith("SFA")]
    assert curve == [pytest.approx((70, 35)), pytest.approx((80, 60))]
    assert lines["multitask"] == [pytest.approx((99, 97))]
    assert lines["sequential"] == [pytest.approx((100, 20))]


def test_error_bars_have_the_intervals_sizes(plane):
    (axes,) = plane.axes
    expected = {
        (70, 35): (T2 * 10, T2 * 5),  # n = 2: t * |a - b| / 2
        (80, 60): (T2 * 10, T2 * 5),
        (99, 97): (0, 0),
        (100, 20): (0, 0),
    }
    found = {(round(x), round(y)): (w, h) for x, y, w, h in bars(axes)}
    assert found.keys() == expected.keys()
    for key, sizes in expected.items():
        assert found[key] == pytest.approx(sizes, rel=1e-6, abs=1e-9)


def test_axes_say_what_and_in_which_unit(plane):
    (axes,) = plane.axes
    assert "three" in axes.get_xlabel()
    assert axes.get_xlabel().endswith("(%)")
    assert "2 earlier tasks" in axes.get_ylabel()
    assert axes.get_ylabel().endswith("(%)")


def test_two_tasks_are_both_named():
    summary = [made_up("sequential", two((0.3, 0.8)))]
    (axes,) = trade_off_plane(group_runs(summary), ["even", "odd"]).axes
    assert "odd" in axes.get_xlabel()
    assert "even" in axes.get_ylabel()
    assert drawn(axes.figure)["sequential"] == [pytest.approx((80, 30))]


def test_one_task_has_a_plane_too():
    (axes,) = trade_off_plane(group_runs([made_up("sequential", [[0.7]])]), ["all"]).axes
    assert drawn(axes.figure)["sequential"] == [pytest.approx((70, 70))]
    assert "0 earlier" not in axes.get_ylabel()


def test_legend_is_complete_and_shows_the_lines_own_look(plane):
    (axes,) = plane.axes
    legend = axes.get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == [line.get_label() for line in axes.lines]
    assert texts == [curve.label for curve in curves(group_runs(PLANE))]
    for handle, line in zip(legend.legend_handles, axes.lines, strict=True):
        for look in ("get_color", "get_marker", "get_linestyle"):
            assert getattr(handle, look)() == getattr(line, look)()


def test_points_of_a_curve_are_joined_and_singles_are_not(plane):
    (axes,) = plane.axes
    joined = {line.get_label(): line.get_linestyle() != "None" for line in axes.lines}
    assert sum(joined.values()) == 1
    assert all(label.startswith("SFA along p") for label, is_joined in joined.items() if is_joined)


def test_curves_carry_their_settings_values_where_the_points_are(plane):
    (axes,) = plane.axes
    notes = {note.get_text(): note.xy for note in axes.texts}
    assert notes == {"0.25": pytest.approx((70, 35)), "0.5": pytest.approx((80, 60))}


def test_no_point_is_outside_the_axes(plane):
    """Not even with intervals far beyond 0 and 100 %."""
    wide = [
        made_up("sfa", two((a, a)), n, sfa(p, 0.5))
        for p, values in ((0.25, (0.0, 0.1)), (0.5, (1.0, 0.98)), (1.0, (0.0, 0.0)))
        for n, a in enumerate(values)
    ]
    for figure in (plane, trade_off_plane(group_runs(wide), ["a", "b"])):
        (axes,) = figure.axes
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        for points in drawn(figure).values():
            assert all(left < x < right and low < y < high for x, y in points)
        assert -5 < left < right < 105
        assert -5 < low < high < 105


def test_a_single_seed_has_no_bars():
    summary = [point_of(sfa(p, 0.5)) for p in (0.25, 0.5)] + [point_of({}, "sequential")]
    (axes,) = trade_off_plane(group_runs(summary), ["a", "b"]).axes
    assert [(w, h) for _, _, w, h in bars(axes)] == [(0, 0)] * 3


def test_two_curves_of_a_method_differ_in_their_line():
    summary = [point_of(sfa(p, beta)) for p in (0.25, 0.5) for beta in (0.2, 0.4, 0.6)]
    (axes,) = trade_off_plane(group_runs(summary), ["a", "b"]).axes
    assert len({line.get_linestyle() for line in axes.lines}) == 3
    assert {to_hex(line.get_color()) for line in axes.lines} == {colour("sfa").lower()}


def test_forty_curves_leave_room_for_the_plane():
    betas = [n / 100 for n in range(2, 82, 2)]
    summary = [point_of(sfa(p, beta)) for p in (0.25, 0.5) for beta in betas]
    figure = trade_off_plane(group_runs(summary), ["a", "b"])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    assert axes.get_window_extent().height > 0.5 * figure.bbox.height
    assert legend.get_window_extent().height <= figure.bbox.height


# Colours.


# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
VISION = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
RGB_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
CURVES = ("sfa", "l2", "ewc", "wise-ft", "rehearsal", "task-arithmetic", "ties")


def cielab(colour: str, vision: str) -> np.ndarray:
    """How somebody with this vision sees the colour, in CIE L*a*b* (D65)."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    share = RGB_TO_XYZ @ seen / RGB_TO_XYZ.sum(axis=1)
    root = np.where(share > (6 / 29) ** 3, np.cbrt(share), share * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = root
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_simulation_does_what_is_known():
    """Grey stays grey; red and green of one lightness come together."""
    for vision in VISION:
        assert np.linalg.norm(cielab("#808080", vision)[1:]) < 0.5
    red_green = [
        np.linalg.norm(cielab("#CC4444", vision) - cielab("#777722", vision)) for vision in VISION
    ]
    assert red_green[2] < 0.5 * red_green[0]
    assert np.linalg.norm(cielab("#FFFFFF", "usual") - [100, 0, 0]) < 0.1


@pytest.mark.parametrize(
    "vision",
    [
        "usual",
        "protanopia",
        "deuteranopia",
    ],
)
def test_colours_of_curves_are_told_apart(vision):
    """At least 10 in CIE76, some four times what is just noticeable on large patches."""
    apart = {
        (a, b): float(
            np.linalg.norm(cielab(METHOD_COLOURS[a], vision) - cielab(METHOD_COLOURS[b], vision))
        )
        for a, b in combinations(CURVES, 2)
    }
    assert {pair: d for pair, d in apart.items() if d < 10} == {}


def test_every_method_has_a_look_of_its_own():
    for table in (METHOD_COLOURS, METHOD_MARKERS, METHOD_TITLES):
        assert table.keys() == METHODS.keys()
        assert len(set(table.values())) == len(METHODS)
    assert colour("not-of-ours").startswith("#")
    assert marker("not-of-ours")
    assert {name for name in METHODS if METHODS[name].curve} - {"l1"} == set(CURVES)


# Accuracy matrices.


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.images and axes.get_visible()]


def test_one_panel_per_method_at_its_best_average():
    summary = [
        made_up("sfa", two((0.5, 0.7)), settings=sfa(0.25, 0.5)),
        made_up("sfa", two((0.8, 0.7)), settings=sfa(0.25, 0.6)),
        made_up("sfa", two((0.1, 1.0)), settings=sfa(0.25, 0.7)),
        made_up("sequential", two((0.2, 0.9))),
        made_up("multitask", [None, [0.9, 0.8]]),
    ]
    figure = accuracy_matrices(group_runs(summary), ["even", "odd"])
    shown = panels(figure)
    assert [axes.get_title().split(" p=")[0] for axes in shown] == [
        "SFA",
        "sequential",
        "multitask",
    ]
    assert "beta=0.6" in shown[0].get_title()


def test_best_is_by_the_mean_over_seeds():
    """One lucky seed does not make a setting the best."""
    summary = [
        *by_mean("sfa", 0.70, 0.10, 2, sfa(0.25, 0.5)),
        *by_mean("sfa", 0.69, 0.60, 2, sfa(0.25, 0.9)),
    ]
    (panel,) = panels(accuracy_matrices(group_runs(summary), ["a", "b"]))
    assert "beta=0.5" in panel.get_title()


@pytest.mark.parametrize("count", [1, 2, 5, 10, 20])
def test_numbers_in_cells_for_any_number_of_tasks(count, tmp_path):
    generator = np.random.default_rng(count)
    first, second = generator.random((2, count, count))
    summary = [made_up("sfa", R.tolist(), n, sfa(0.25, 0.5)) for n, R in enumerate((first, second))]
    joint: list[Any] = [None] * (count - 1)
    summary += [made_up("multitask", [*joint, first[-1].tolist()])]
    tasks = [f"task {n}" for n in range(count)]
    figure = accuracy_matrices(group_runs(summary), tasks)
    one, joined = panels(figure)
    mean = (first + second) / 2 * 100
    np.testing.assert_allclose(one.images[0].get_array(), mean)
    assert one.images[0].get_clim() == joined.images[0].get_clim() == (0, 100)
    assert one.get_ylim()[0] > one.get_ylim()[1]  # the first task's row is on top
    written = {tuple(map(int, text.get_position())): text.get_text() for text in one.texts}
    if count <= 10:
        # x: the task scored; y: after training through.
        expected = {(i, t): f"{mean[t, i]:.0f}" for t in range(count) for i in range(count)}
        assert written == expected
        assert [text.get_text() for text in one.get_xticklabels()] == tasks
        assert [text.get_text() for text in one.get_yticklabels()] == tasks
        assert {text.get_position()[1] for text in joined.texts} == {count - 1}
    else:
        assert written == {}  # colours alone
    values = np.ma.masked_invalid(joined.images[0].get_array())
    assert values.count() == count
    assert figure.get_supxlabel()
    assert figure.get_supylabel()
    bar = next(axes for axes in figure.axes if not axes.images)
    assert "%" in bar.get_ylabel()
    if count in (1, 20):
        for path in save_figure(figure, tmp_path, "matrix"):
            assert path.stat().st_size > 1000


def test_eleven_methods_fit_on_one_figure():
    summary = [made_up(name, two((0.5, 0.6))) for name in METHODS]
    figure = accuracy_matrices(group_runs(summary), ["a", "b"])
    assert len(panels(figure)) == 11
    boxes = [axes.get_position().bounds for axes in panels(figure)]
    assert len(set(boxes)) == 11


def test_titles_of_panels_do_not_overlap():
    fisher = {"labels": "true", "samples": 500}
    summary = [point_of({"strength": 100, **fisher}, "ewc"), point_of(fisher, "fisher-merging")]
    figure = accuracy_matrices(group_runs(summary), ["a", "b"])
    figure.draw_without_rendering()
    one, other = (axes.title.get_window_extent() for axes in panels(figure))
    assert not one.overlaps(other)


# Files of figures.


def digests(summary: list[Run], folder: Path) -> list[str]:
    """SHA-256 of both figures as PNG and SVG."""
    groups, tasks = group_runs(summary), ["one", "two", "three"]
    figures = {"plane": trade_off_plane(groups, tasks), "matrix": accuracy_matrices(groups, tasks)}
    return [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for name, figure in figures.items()
        for path in save_figure(figure, folder, name)
    ]


def test_figures_are_the_same_bytes_for_the_same_numbers(tmp_path):
    """In this process and in another, whose hashes of strings differ."""
    for name in ("one", "other", "elsewhere"):
        (tmp_path / name).mkdir()
    one = digests(PLANE, tmp_path / "one")
    assert one == digests(PLANE, tmp_path / "other")
    script = f"""
import hashlib, json, sys
from pathlib import Path
from stockpot.report.figures import accuracy_matrices, save_figure, trade_off_plane
from stockpot.report.table import group_runs
Run = dict
{inspect.getsource(digests)}
print(json.dumps(digests(json.load(sys.stdin), Path({str(tmp_path / "elsewhere")!r}))))
"""
    elsewhere = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": "123"},
        input=json.dumps(PLANE),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(elsewhere.stdout) == one


def test_both_kinds_are_written_whole_and_nothing_else(tmp_path):
    paths = save_figure(trade_off_plane(group_runs(PLANE), ["a", "b", "c"]), tmp_path, "plane")
    assert [path.name for path in paths] == ["plane.png", "plane.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plane.png", "plane.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ET.parse(paths[1]).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_dollars_in_task_names_are_dollars(tmp_path):
    figure = trade_off_plane(group_runs([made_up("sequential", two((0.5, 0.6)))]), ["a", "$x^$"])
    paths = save_figure(figure, tmp_path, "plane")
    assert all(path.stat().st_size > 2000 for path in paths)
    assert figure.axes[0].get_xlabel() == r"accuracy on the last task, \$x^\$ (%)"


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
    said = re.search(r"tasks: ([\d.]+) %", text)
    assert said is not None
    assert float(said[1]) == pytest.approx(top, abs=0.0501)
    named = [METHOD_TITLES[method] for method in tops]
    assert any(f"Without old data, {name} number=" in text for name in named)
    if sum(np.mean(values) > top - 1e-9 for _, values in free) > 1:
        # Which of the equals is named is not for this test to say; equal methods are not apart.
        assert len(tops) == 1 or APART not in text
        return
    best = max(free, key=lambda pair: np.mean(pair[1]))
    # The rival is the best of another method, or of the same method's other settings.
    others = [pair for pair in free if pair[0] != best[0]]
    others = others or [pair for pair in free if pair is not best]
    if not others:
        assert claims(text) == set()
        return
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


# The page and the whole report.


VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source"}


class Page(HTMLParser):
    """Reads a page, insisting that every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.comments: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def text_of(self, tag: str) -> str:
        return "".join(text for where, text in self.texts if where == tag)


HOSTILE = 'a <b>&amp; "x" --> </style></svg><script src=//e.com/x.js></script>'


def write_record(folder: Path, summary: Any, name: str = "digits", **model: Any) -> Path:
    """The files of a run folder that a report reads."""
    folder.mkdir(parents=True, exist_ok=True)
    experiment = {
        "name": name,
        "stream": {"name": "digits", "split": "pairs", "scenario": "domain-incremental"},
        "model": {"name": "mlp", **model},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "experiment.json").write_text(json.dumps(experiment))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "cpu": name}))
    (folder / "experiment.yaml").write_text(f"name: {name}\n")
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A report whose every free text tries to break out."""
    summary = json.loads(json.dumps(PLANE))
    for run in summary:
        run["tasks"] = [f"{HOSTILE} {n}" for n in range(3)]
        if run["method"] == "sequential":
            run["label"] = f"sequential {HOSTILE}"
    folder = write_record(tmp_path_factory.mktemp("hostile"), summary, HOSTILE, id=HOSTILE)
    return write_report(folder)


def check_self_contained(text: str, page: Page) -> None:
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "img", "form"}
    for _, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "srcset", "data", "href", "xlink:href", "action"):
                assert (value or "").startswith(("#", "data:image/png;base64,"))
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target.strip("'\"").startswith("#")
    style = page.text_of("style")
    assert "@import" not in style
    assert "url(" not in style
    assert text.lower().startswith("<!doctype html>")
    assert ("meta", {"charset": "utf-8"}) in page.tags


def test_page_is_well_formed_and_loads_nothing_even_from_hostile_names(hostile):
    text = hostile.read_text(encoding="utf-8")
    page = Page(text)
    check_self_contained(text, page)
    assert page.text_of("h1") == HOSTILE
    assert any(HOSTILE in text for where, text in page.texts if where == "p")  # the model's id
    assert f"sequential {HOSTILE}" in [text for where, text in page.texts if where == "td"]
    assert HOSTILE in page.text_of("pre")
    assert "b" not in {tag for tag, _ in page.tags}
    assert page.text_of("title").startswith(HOSTILE)


def test_page_holds_both_figures_and_the_whole_table(hostile):
    page = Page(hostile.read_text(encoding="utf-8"))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == tags.count("figure") == tags.count("figcaption") == 2
    assert tags.count("table") == 1
    head, *rows = re.findall(r"<tr>(.*?)</tr>", hostile.read_text(), re.S)
    assert len(rows) == len(group_runs(PLANE)) == 4
    assert {row.count("<td>") for row in rows} == {head.count("<th>")} == {1 + 3 + 9}
    assert "2 seeds" in page.text_of("p")
    assert "6 of 6 runs" in page.text_of("p")


def test_figures_on_one_page_do_not_redefine_what_the_other_refers_to(hostile):
    """Both are inlined, so that an id means the first element of that name on the page."""
    found: dict[str, set[bytes]] = {}
    referred: set[str] = set()
    for name in ("plane", "accuracy_matrix"):
        text = (hostile.parent / "figures" / f"{name}.svg").read_text()
        referred |= set(re.findall(r'href="#([^"]+)"', text))
        referred |= set(re.findall(r"url\(#([^)]+)\)", text))
        for element in ET.fromstring(text.encode()).iter():
            if "id" in element.attrib:
                content = ET.tostring(element).strip()
                found.setdefault(element.attrib["id"], set()).add(content)
    assert referred <= found.keys()
    assert {name for name in referred if len(found[name]) > 1} == set()


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A record as the runner writes it."""
    folder = tmp_path_factory.mktemp("real")
    methods = "[sequential, multitask, {name: sfa, p: [0.5, 1], beta: 0.5}]"
    path = write_experiment(folder, methods, seeds="[0, 1]")
    assert not run_file(path, folder / "out").failures
    write_report(folder / "out")
    return folder / "out"


def test_report_of_a_real_record(real):
    summary = json.loads((real / "summary.json").read_text())
    groups = group_runs(summary)
    text = (real / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    check_self_contained(text, page)
    assert headline(groups) in page.text_of("p")
    for file in ("plane.png", "plane.svg", "accuracy_matrix.png", "accuracy_matrix.svg"):
        assert (real / "figures" / file).stat().st_size > 1000
    assert (real / "results.md").read_text() == to_markdown(groups, summary[0]["tasks"])
    rows = list(csv.DictReader((real / "results.csv").open()))
    for row in rows:
        seeds = [run for run in summary if run["label"] == row["setting"]]
        assert int(row["seeds"]) == len(seeds) == 2
        values = [run["R"][-1][0] for run in seeds]
        assert float(row["final.0-1"]) == pytest.approx(sum(values) / 2)
        half = T2 * abs(values[0] - values[1]) / 2
        assert float(row["final.0-1.half_width_95"]) == pytest.approx(half, abs=1e-9)
        memory = [run["metrics"]["peak_memory"] for run in seeds]
        assert float(row["peak_memory"]) == pytest.approx(sum(memory) / 2)


def test_report_twice_gives_the_same_files(real):
    def files() -> dict[str, bytes]:
        paths = [*(real / "figures").iterdir(), *real.glob("re*.*")]
        return {path.name: path.read_bytes() for path in paths}

    before = files()
    assert len(before) == 7
    write_report(real)
    assert files() == before


def test_report_of_one_task_and_one_seed_has_no_plane_and_no_intervals(tmp_path):
    nothing = dict.fromkeys(("forgetting", "forgetting_vs_best", "bwt", "fwt"))
    summary = [made_up("sequential", [[0.75]], **nothing)]
    page = Page(write_report(write_record(tmp_path / "one", summary)).read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("svg") == 1
    assert not (tmp_path / "one/figures/plane.svg").exists()
    assert "±" not in "".join(text for where, text in page.texts if where == "td")
    assert "1 seed " in page.text_of("p")
    assert "75.0" in page.text_of("td")


def test_missing_or_empty_summaries_are_refused_and_nothing_is_written(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(StockpotError, match=r"summary\.json"):
            write_report(folder)
    empty = write_record(tmp_path / "empty", [])
    before = sorted(empty.iterdir())
    with pytest.raises(StockpotError, match="no run"):
        write_report(empty)
    assert sorted(empty.iterdir()) == before


@pytest.mark.parametrize("text", ["", "[{", "\x00", '[{"method": "sfa"'])
def test_a_damaged_summary_is_named(text, tmp_path):
    folder = write_record(tmp_path / "run", PLANE)
    (folder / "summary.json").write_text(text)
    with pytest.raises(DamagedRecordError, match=r"summary\.json"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_summary_of_other_bytes_is_named(tmp_path):
    folder = write_record(tmp_path / "run", PLANE)
    (folder / "summary.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(DamagedRecordError, match=r"summary\.json"):
        write_report(folder)


@pytest.mark.parametrize("value", [[{}], [1], {"a": 1}, "runs", 3])
def test_a_summary_of_another_shape_is_damaged(value, tmp_path):
    folder = write_record(tmp_path / "run", value)
    with pytest.raises(DamagedRecordError, match=r"summary\.json"):
        write_report(folder)


@pytest.mark.parametrize("name", ["experiment.json", "environment.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_other_files_that_are_missing_or_damaged_are_named(name, damage, tmp_path):
    folder = write_record(tmp_path / "run", TABLE[-1:])
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_text((folder / name).read_text()[:9])
    with pytest.raises(DamagedRecordError, match=re.escape(name)):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_missing_experiment_file_is_named(tmp_path):
    folder = write_record(tmp_path / "run", TABLE[-1:])
    (folder / "experiment.yaml").unlink()
    with pytest.raises(DamagedRecordError, match=r"experiment\.yaml"):
        write_report(folder)


def test_the_page_says_how_many_runs_were_planned(tmp_path):
    path = write_experiment(tmp_path, "[sequential, {name: l2, strength: 1e30}]")
    outcome = run_file(path, tmp_path / "out", ["training.optimizer=sgd"])
    assert len(outcome.failures) == 1
    page = Page(write_report(tmp_path / "out").read_text(encoding="utf-8"))
    assert "1 of 2 runs finished" in page.text_of("p")


def test_an_interrupted_experiment_can_be_reported(tmp_path):
    """``stockpot report``: of a run folder, finished or not."""

    class Stop(Observer):
        def run_begins(self, run: Any, finished: int) -> None:
            if run.method.name == "multitask":
                raise KeyboardInterrupt

    path = write_experiment(tmp_path, "[sequential, multitask]")
    with pytest.raises(KeyboardInterrupt):
        run_experiment(load_experiment(path, output=tmp_path / "out"), Stop())
    assert (tmp_path / "out/runs/sequential-seed0/manifest.json").exists()
    assert write_report(tmp_path / "out").exists()


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
