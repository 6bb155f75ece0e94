"""The trade-off plane as a file, against numbers worked out here."""

import hashlib
import inspect
import json
import os
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from stockpot.report.figures import accuracy_matrices, curves, save_figure, trade_off_plane
from stockpot.report.style import colour
from stockpot.report.table import group_runs
from support.reports import T2, Run, made_up, point_of, sfa, two

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


def test_long_names_leave_room_for_the_figures(tmp_path):
    names = ["an unusually long name of a task " * 4 + str(n) for n in range(3)]
    groups = group_runs(PLANE)
    for make in (trade_off_plane, accuracy_matrices):
        figure = make(groups, names)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_figure(figure, tmp_path, "figure")
        axes = figure.axes[0]
        assert axes.get_window_extent().width > 60
        assert axes.get_window_extent().height > 60


def test_dollars_in_task_names_are_dollars(tmp_path):
    figure = trade_off_plane(group_runs([made_up("sequential", two((0.5, 0.6)))]), ["a", "$x^$"])
    paths = save_figure(figure, tmp_path, "plane")
    assert all(path.stat().st_size > 2000 for path in paths)
    assert figure.axes[0].get_xlabel() == r"accuracy on the last task, \$x^\$ (%)"
