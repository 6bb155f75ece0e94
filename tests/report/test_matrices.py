"""The score matrices as a file."""

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stockpot.methods import METHODS
from stockpot.report.figures import accuracy_matrices, save_figure
from stockpot.report.table import group_runs
from support.reports import by_mean, made_up, point_of, sfa, two

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


def test_a_method_trained_in_another_order_has_its_own_labels():
    one = made_up("sfa", two((0.5, 0.7)))
    other = {**made_up("ewc", two((0.8, 0.6))), "tasks": ["task 1", "task 0"]}
    figure = accuracy_matrices(group_runs([one, other]), ["task 0", "task 1"])
    labels = [[text.get_text() for text in axes.get_xticklabels()] for axes in panels(figure)]
    assert labels == [["task 0", "task 1"], ["task 1", "task 0"]]
