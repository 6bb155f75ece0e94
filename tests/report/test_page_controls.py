"""Pointing at things, isolating a method, and choosing what is drawn."""

import math
import re
from collections import Counter

import numpy as np
import pytest

from support.oracle import students
from support.pages import Drawn, Mark, Opened

OWN_CHOICE = ("plot-curves-a", "plot-curves-b")
"""Figures of one method each, which have a list of their own to choose it from."""


def alone(traces: list[Drawn], most: int = 6) -> list[tuple[Drawn, int]]:
    """Points that no other is within 8 pixels of: what the mouse finds there is them."""
    everything = [(t, n, p) for t in traces for n, p in enumerate(t.points)]
    found = [
        (t, n)
        for t, n, p in everything
        if all(math.hypot(p.x - q.x, p.y - q.y) > 8 for _, _, q in everything if q is not p)
    ]
    return found[:: max(1, len(found) // most)][:most]


def at(mark: Mark) -> Mark:
    """A place on a bar that no other mark covers: near its beginning."""
    return Mark(mark.x - mark.width * 0.4, mark.y, 1, 1)


# Pointing.


def test_a_bar_tells_method_setting_interval_and_tasks(both):
    page, oracle = both
    page.into_view("average")
    for trace in page.traces("average"):
        if trace.kind != "bars":
            continue
        setting = oracle.best(trace.meta["method"])
        text = page.hover("average", at(trace.points[0]))
        mean, half = students(oracle.averages(setting))
        assert setting.label.removeprefix(setting.method).strip() in text
        assert f"average: {100 * mean:.1f} ± {100 * (half or 0):.1f} %" in text
        assert f"{len(setting.runs)} runs" in text
        first, width = students(oracle.finals(setting, [0]))
        assert f"{oracle.tasks[0]}: {100 * first:.1f} ± {100 * (width or 0):.1f} %" in text


def test_a_circle_tells_its_run(both):
    """One run: method, setting, seed, and its own scores."""
    page, oracle = both
    page.into_view("average")
    circles = [t for t in page.traces("average") if t.meta.get("seeds")]
    found = alone([t for t in page.traces("average") if t.kind == "scatter"], 12)
    own = [(trace, n) for trace, n in found if trace.meta.get("seeds")]
    assert len(own) > 2
    for trace, n in own:
        setting = oracle.best(trace.meta["method"])
        seeds = {oracle.runs[run]["seed"]: run for run in setting.runs}
        text = page.hover("average", trace.points[n])
        said = re.search(r"seed (\d+)", text)
        assert said is not None
        run = seeds[int(said[1])]
        assert run == setting.runs[n]
        assert f"average: {100 * oracle.R[run][-1].mean():.1f} %" in text
        assert f"{oracle.tasks[1]}: {100 * oracle.R[run][-1, 1]:.1f} %" in text
    assert len(circles) == len(oracle.methods)


def test_a_point_of_the_plane_tells_what_it_is(both):
    page, oracle = both
    page.into_view("plane")
    last = len(oracle.tasks) - 1
    traces = [t for t in page.traces("plane") if t.points]
    found = alone(traces)
    assert found
    for trace, n in found:
        setting = oracle.of(trace.meta["method"])[n]
        text = page.hover("plane", trace.points[n])
        x, half = students(oracle.finals(setting, [last]))
        y, _ = students(oracle.finals(setting, range(last)))
        assert f"across: {100 * x:.1f} ± {100 * (half or 0):.1f} %" in text
        assert f"up: {100 * y:.1f}" in text
        seeds = ", ".join(str(oracle.runs[run]["seed"]) for run in setting.runs)
        assert f"seed {seeds}" in text


def test_single_runs_on_the_plane_tell_their_seed(both):
    page, oracle = both
    page.into_view("plane")
    page.control("plane", "each run").check()
    try:
        last = len(oracle.tasks) - 1
        found = alone([t for t in page.traces("plane") if t.points], 10)
        own = [(trace, n) for trace, n in found if trace.meta.get("seeds")]
        assert own
        for trace, n in own:
            runs = [run for s in oracle.of(trace.meta["method"]) for run in s.runs]
            text = page.hover("plane", trace.points[n])
            assert f"seed {oracle.runs[runs[n]]['seed']}" in text
            assert f"across: {100 * oracle.R[runs[n]][-1, last]:.1f} %" in text
    finally:
        page.control("plane", "each run").uncheck()


def test_a_point_of_the_distance_tells_task_and_both_numbers(both):
    page, oracle = both
    page.into_view("distance-l2")
    stages = {(line["run"], line["stage"]): line for line in oracle.lines("stages")}
    found = alone(page.traces("distance-l2"))
    assert found
    rows = len(oracle.tasks) - 1
    for trace, n in found:
        setting, t = oracle.of(trace.meta["method"])[n // rows], n % rows + 1
        x = np.mean([stages[run, t]["l2_to_anchor"] for run in setting.runs])
        lost = np.mean(
            [(oracle.R[run][t - 1, :t] - oracle.R[run][t, :t]).mean() for run in setting.runs]
        )
        text = page.hover("distance-l2", trace.points[n])
        assert f"after {oracle.tasks[t]}, mean of {len(setting.runs)} runs" in text
        distance = re.search(r"anchor: ([\d.]+)", text)
        assert distance is not None
        assert float(distance[1]) == pytest.approx(x, rel=0.006)
        said = re.search(r"lost on earlier tasks: (\u2212?[\d.]+) % points", text)
        assert said is not None
        assert float(said[1].replace("\u2212", "-")) == pytest.approx(100 * lost, abs=0.051)


def test_a_merge_mark_tells_its_event(both):
    page, oracle = both
    page.into_view("curves-b")
    (trace,) = [t for t in page.traces("curves-b") if t.meta.get("merges")]
    (run, *_) = oracle.best("sfa").runs
    merges = [line for line in oracle.lines("merges") if line["run"] == run]
    text = page.hover("curves-b", trace.points[0])
    assert f"beta {merges[0]['beta']:g}" in text
    assert f"seed {oracle.runs[run]['seed']}" in text
    assert f"{merges[0]['distance_before']:.3g}" in text


def test_a_cell_of_a_matrix_tells_its_tasks_and_number(both):
    page, oracle = both
    page.into_view("matrix-0")
    box = page.page.locator("#plot-matrix-0 .heatmaplayer image").bounding_box()
    assert box is not None
    size = len(oracle.tasks)
    (setting,) = oracle.of(oracle.methods[0])
    R = np.mean([oracle.R[run] for run in setting.runs], axis=0)
    for t, i in ((0, 0), (size - 1, 0), (1, size - 1)):
        x = box["x"] + (i + 0.5) * box["width"] / size
        y = box["y"] + (t + 0.5) * box["height"] / size
        text = page.hover("matrix-0", Mark(x, y, 1, 1))
        assert f"after {oracle.tasks[t]}" in text
        assert f"on {oracle.tasks[i]}" in text
        assert f"{100 * R[t, i]:.1f} %" in text
        assert f"mean of {len(setting.runs)} runs" in text


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        ("curves-a", ["step", "mean of"]),
        ("one-task", ["step", "mean of"]),
        ("training-loss", ["step"]),
        ("line", ["% of the way", "nats"]),
        ("cost-seconds", ["Training time", "seed 0"]),
        ("cost-stored-bytes", ["Kept between tasks", "MB"]),
    ],
)
def test_other_figures_tell_too(figure, words, both):
    page, _ = both
    page.into_view(figure)
    box = page.page.locator(f"#plot-{figure} .nsewdrag").first.bounding_box()
    assert box is not None
    bars = [t for t in page.traces(figure) if t.kind == "bars" and t.points[0].width > 5]
    if bars:
        mark = at(bars[0].points[0])
    else:
        lines = page.page.evaluate(
            """(id) => {
              const path = document.querySelector(`#${id} .js-line`);
              const p = path.getPointAtLength(0);
              const m = path.getScreenCTM();
              return [p.x * m.a + m.e, p.y * m.d + m.f];
            }""",
            f"plot-{figure}",
        )
        mark = Mark(max(lines[0], box["x"] + 3), lines[1], 1, 1)  # not on the frame
    text = page.hover(figure, mark)
    for word in words:
        assert word in text


# Isolating a method.


def drawn_methods(page: Opened, figure: str) -> set[str]:
    traces = page.traces(figure.removeprefix("plot-"))
    return {t.meta["method"] for t in traces if t.meta.get("method") and (t.points or t.lines)}


def test_a_press_on_a_method_shows_it_alone_everywhere_and_again_all(both):
    page, oracle = both
    names = page.draw_all()
    before = {name: drawn_methods(page, name) for name in names if name not in OWN_CHOICE}
    rows = page.page.locator("#results tbody tr").count()
    assert rows == len(oracle.settings)
    assert before["plot-average"] == set(oracle.methods)
    page.chip("sfa")
    page.draw_all()
    for name in before:
        if name.startswith("plot-matrix-"):
            continue
        assert drawn_methods(page, name) <= {"sfa"}, name
        assert ("sfa" in before[name]) == ("sfa" in drawn_methods(page, name)), name
    own = oracle.of("sfa")
    bars = [t for t in page.traces("average") if t.kind == "bars"]
    assert sum(len(t.points) for t in bars) == len(own)
    assert page.page.locator("#results tbody tr").count() == len(own)
    assert page.page.locator(".map").count() == len(own)
    assert page.page.locator('#legend [data-method="sfa"]').get_attribute("aria-pressed") == "true"
    page.chip("sfa")
    page.draw_all()
    assert {name: drawn_methods(page, name) for name in before} == before
    assert page.page.locator("#results tbody tr").count() == rows
    assert page.page.locator("#legend [aria-pressed=true]").count() == 0
    page.quiet()


def test_from_one_method_to_another_and_show_all(both):
    page, oracle = both
    page.chip("l2")
    page.chip("ewc")
    assert drawn_methods(page, "plot-average") == {"ewc"}
    page.page.get_by_role("button", name="show all").click()
    assert drawn_methods(page, "plot-average") == set(oracle.methods)


def test_every_method_can_stand_alone(both):
    page, oracle = both
    for method in oracle.methods:
        page.chip(method)
        assert page.page.locator("#results tbody tr").count() == len(oracle.of(method))
        assert drawn_methods(page, "plot-plane") == {method}
    page.chip(oracle.methods[-1])
    page.draw_all()
    page.quiet()


# Choosing.


def test_bars_of_all_settings(both):
    page, oracle = both
    box = page.control("average", "all settings")
    box.check()
    try:
        marks = Counter(
            t.meta["method"]
            for t in page.traces("average")
            if not t.meta.get("seeds")
            for _ in t.points
        )
        assert marks == Counter(setting.method for setting in oracle.settings)
        circles = sum(len(t.points) for t in page.traces("average") if t.meta.get("seeds"))
        assert circles == len(oracle.runs)
        unit = page.pixels_per_unit("average", "x")
        widths = sorted(
            p.width for t in page.traces("average") if t.kind == "bars" for p in t.points
        )
        means = sorted(
            100 * float(np.mean(oracle.averages(s)))
            for s in oracle.settings
            if s.method != "multitask" or s.settings["without"]
        )
        np.testing.assert_allclose(widths, [unit * mean for mean in means], atol=2)
    finally:
        box.uncheck()


def test_curves_of_another_method(both):
    page, oracle = both
    section = page.page.locator("#curves-a")
    options = section.locator("select option").all_text_contents()
    assert len(options) == len(oracle.settings)
    l2 = next(n for n, setting in enumerate(oracle.settings) if setting.method == "l2")
    page.choose("curves-a", "method", str(l2))
    # The last point of each task's curve is its score at the end.
    ends = page.page.evaluate(
        "() => document.getElementById('plot-curves-a').calcdata.map((c) => c[c.length - 1].y)"
    )
    runs = oracle.settings[l2].runs
    expected = 100 * np.mean([oracle.R[run][-1] for run in runs], axis=0)
    np.testing.assert_allclose(ends, expected, rtol=1e-4)
    assert options[l2] in section.locator(".caption").first.inner_text()


def test_one_task_of_another_name(both):
    page, oracle = both
    last = len(oracle.tasks) - 1
    page.choose("one-task", "task", str(last))
    ends = page.page.evaluate(
        """() => document.getElementById("plot-one-task").calcdata
          .map((c) => [c[0].trace.meta.method, c[0].trace.line.dash, c[c.length - 1].y])"""
    )
    for method, dash, y in ends:
        if dash == "dash":
            continue  # a model that never saw a task
        runs = oracle.best(method).runs
        expected = 100 * np.mean([oracle.R[run][-1, last] for run in runs])
        assert y == pytest.approx(expected, rel=1e-4)
    title = page.title("one-task", "y")
    assert oracle.tasks[last] in title
    page.choose("one-task", "task", "0")


def test_the_line_of_another_task_and_metric(both):
    page, oracle = both
    lines = oracle.lines("lines")
    page.choose("line", "task scored", "1")
    page.choose("line", "as", "accuracy")
    page.choose("line", "after", "1")
    for trace in page.traces("line"):
        runs = oracle.best(trace.meta["method"]).runs
        own = [
            line
            for line in lines
            if (line["stage"], line["task"], line["metric"]) == (1, oracle.tasks[1], "accuracy")
            and line["run"] in runs
        ]
        alphas = sorted({line["alpha"] for line in own})
        means = [100 * np.mean([x["value"] for x in own if x["alpha"] == a]) for a in alphas]
        at = [page.value_at("line", "y", point.y) for point in trace.points]
        np.testing.assert_allclose(at, means, atol=3 / page.pixels_per_unit("line", "y"))
    assert "accuracy" in page.title("line", "y")
    page.quiet()
