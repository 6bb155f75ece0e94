"""The page in a real browser: every figure with the right marks at the right places."""

import io
import json
import math
from base64 import b64decode
from collections import Counter
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from support.oracle import Oracle, Setting, students
from support.pages import Opened

T = 1.0
"""Pixels that a mark may be off."""


def shown(oracle: Oracle) -> list[Setting]:
    return [oracle.best(method) for method in oracle.methods]


def counted(page: Opened, figure: str, kind: str = "scatter") -> Counter[str]:
    """Marks by method."""
    found: Counter[str] = Counter()
    for trace in page.traces(figure):
        if trace.kind == kind and not trace.meta.get("seeds"):
            found[trace.meta.get("method", "")] += len(trace.points)
    return +found


def test_every_figure_is_there_and_drawn(both):
    page, oracle = both
    names = page.draw_all()
    fixed = [
        *("average", "plane", "curves-a", "curves-b", "one-task", "training-loss"),
        *("distance-l2", "distance-kl", "line"),
        *("cost-seconds", "cost-peak-memory", "cost-stored-bytes", "cost-extra-share"),
    ]
    matrices = [name for name in names if name.startswith("plot-matrix-")]
    assert sorted(set(names) - set(matrices)) == sorted(f"plot-{name}" for name in fixed)
    assert len(matrices) == len(oracle.methods)
    page.quiet()


# Fig. 1.


def test_bars_stars_and_circles(both):
    page, oracle = both
    bars = counted(page, "average", "bars")
    assert bars == {method: 1 for method in oracle.methods if method != "multitask"}
    assert counted(page, "average") == {"multitask": 1}
    circles = [t for t in page.traces("average") if t.meta.get("seeds")]
    assert {t.meta["method"]: len(t.points) for t in circles} == {
        setting.method: len(setting.runs) for setting in shown(oracle)
    }


def test_bars_are_as_long_as_the_means_and_their_lines_as_the_intervals(both):
    """From 0: a bar that begins elsewhere would lie about what it is a share of."""
    page, oracle = both
    scale = 100 * page.pixels_per_unit("average", "x")
    zero = page.value_at("average", "x", 0)
    for trace in page.traces("average"):
        if trace.meta.get("seeds"):
            continue
        (setting,) = [s for s in shown(oracle) if s.method == trace.meta["method"]]
        mean, half = students(oracle.averages(setting))
        (point,) = trace.points
        if trace.kind == "bars":
            assert point.width == pytest.approx(mean * scale, abs=T + 1)
            left = (point.x - point.width / 2) * scale / 100
            assert left == pytest.approx(-zero * (scale / 100) ** 2, abs=3)
        else:
            assert page.value_at("average", "x", point.x) == pytest.approx(100 * mean, abs=0.3)
        assert trace.across == [pytest.approx(2 * (half or 0) * scale, abs=4)]


def test_bars_go_from_best_to_worst(both):
    page, oracle = both
    height = {
        trace.meta["method"]: trace.points[0].y
        for trace in page.traces("average")
        if not trace.meta.get("seeds")
    }
    from_top = sorted(height, key=lambda method: height[method])
    means = [float(np.mean(oracle.averages(oracle.best(method)))) for method in from_top]
    assert means == sorted(means, reverse=True)


def test_a_share_has_an_axis_of_shares(both):
    """Intervals of two runs may reach beyond 100 %; the axis need not."""
    page, _ = both
    values = [value for value, _ in page.ticks("average", "x")]
    assert min(values) == 0
    assert max(values) <= 102
    frame = page.page.locator("#plot-average .nsewdrag").first.bounding_box()
    assert frame is not None
    assert page.value_at("average", "x", frame["x"]) == pytest.approx(0, abs=0.2)


def test_rehearsal_is_a_band(digits_page, digits):
    oracle = Oracle(digits)
    means = [100 * float(np.mean(oracle.averages(s))) for s in oracle.of("rehearsal")]
    box = digits_page.page.evaluate(
        """() => {
          const band = document.querySelector("#plot-average .shapelayer path");
          const r = band.getBoundingClientRect();
          return [r.x, r.x + r.width];
        }"""
    )
    ends = [digits_page.value_at("average", "x", x) for x in box]
    assert ends == pytest.approx([min(means), max(means)], abs=0.4)


# Fig. 2, 11 and 12: over the stream.


def calculated_for(page: Opened, figure: str) -> list[list[tuple[float, float]]]:
    """The points that lines are drawn through, which leave out what lies on the way."""
    script = "id => document.getElementById(id).calcdata.map((c) => c.map((p) => [p.x, p.y]))"
    return [[(x, y) for x, y in trace] for trace in page.page.evaluate(script, f"plot-{figure}")]


def moments(oracle: Oracle, run: str) -> list[tuple[int, int, str]]:
    """(stage, step of the whole stream, moment) at which a run was scored."""
    steps = [stage["steps"] for stage in oracle.runs[run]["stages"]]
    found = {(0, 0, "step")}  # the starting model
    for line in oracle.lines("curves"):
        if line["run"] == run:
            found.add((line["stage"], sum(steps[: line["stage"]]) + line["step"], line["moment"]))
    found |= {(n, sum(steps[: n + 1]), "end") for n in range(len(steps))}
    return sorted(found)


@pytest.mark.parametrize(("figure", "method"), [("curves-a", "sequential"), ("curves-b", "sfa")])
def test_a_curve_for_every_task_through_every_score(figure, method, both):
    page, oracle = both
    setting = oracle.best(method)
    times = moments(oracle, setting.runs[0])
    curves = [t for t in page.traces(figure) if "task" in t.meta]
    assert [t.name for t in curves] == oracle.tasks
    marks = len(times) if len(times) <= 30 else 0  # of more, the line alone
    for trace in curves:
        assert trace.lines == 1
        assert len(trace.points) == marks
    drawn = calculated_for(page, figure)
    for task, points in enumerate(drawn[: len(oracle.tasks)]):
        assert [x for x, _ in points] == [step for _, step, _ in sorted(times, key=in_order)]
        expected = curve_of(oracle, setting, task)
        np.testing.assert_allclose([y for _, y in points], expected, rtol=1e-4)


def in_order(moment: tuple[int, int, str]) -> tuple[int, int, int]:
    """As they were taken: at one step a task ends before the next begins."""
    stage, step, name = moment
    return step, stage, ("before merge", "after merge", "step", "end").index(name)


def curve_of(oracle: Oracle, setting: Setting, task: int) -> list[float]:
    """Mean over the runs of each score on a task, in the order they were taken, in %."""
    times = sorted(moments(oracle, setting.runs[0]), key=in_order)
    name = oracle.tasks[task]
    columns = []
    for run in setting.runs:
        plan = oracle.runs[run]["stages"]
        steps = [stage["steps"] for stage in plan]
        taken = {
            (line["stage"], sum(steps[: line["stage"]]) + line["step"], line["moment"]): line[
                "value"
            ]
            for line in oracle.lines("curves")
            if line["run"] == run and line["task"] == name
        }
        taken[0, 0, "step"] = oracle.b[run][task]
        for n, stage in enumerate(plan):
            taken[n, sum(steps[: n + 1]), "end"] = oracle.R[run][stage["row"], task]
        columns.append([taken[time] for time in times])
    return list(100 * np.mean(columns, axis=0))


def test_merge_marks(both):
    page, oracle = both
    (run, *_) = oracle.best("sfa").runs
    merges = [line for line in oracle.lines("merges") if line["run"] == run]
    (trace,) = [t for t in page.traces("curves-b") if t.meta.get("merges")]
    assert len(trace.points) == len(merges) > 0
    assert not [t for t in page.traces("curves-a") if t.meta.get("merges")]
    steps = oracle.runs[run]["stages"][0]["steps"]
    expected = [line["stage"] * steps + line["step"] for line in merges]
    at = [page.value_at("curves-b", "x", point.x) for point in trace.points]
    np.testing.assert_allclose(at, expected, atol=2 / page.pixels_per_unit("curves-b", "x"))


def test_one_task_under_every_method(both):
    page, oracle = both
    traces = page.traces("one-task")
    never_saw = [s for s in oracle.of("multitask") if s.settings.get("without")]
    expected = Counter(s.method for s in [*shown(oracle), *never_saw])
    assert Counter(trace.meta["method"] for trace in traces) == expected
    for trace in traces:
        own = [s for s in [*shown(oracle), *never_saw] if s.method == trace.meta["method"]]
        counts = {len(moments(oracle, setting.runs[0])) for setting in own}
        assert len(trace.points) in {0 if n > 30 else n for n in counts}
        assert trace.lines == 1
    for trace, points in zip(traces, calculated_for(page, "one-task"), strict=True):
        if trace.meta["method"] == "multitask":
            continue
        (setting,) = [s for s in shown(oracle) if s.method == trace.meta["method"]]
        expected_curve = curve_of(oracle, setting, 0)
        np.testing.assert_allclose([y for _, y in points], expected_curve, rtol=1e-4)


def test_training_loss(both):
    page, oracle = both
    traces = page.traces("training-loss")
    assert [t.meta["method"] for t in traces] == [
        t.meta["method"]
        for t in sorted(traces, key=lambda t: oracle.methods.index(t.meta["method"]))
    ]
    assert len(traces) == len(oracle.methods)
    calculated = calculated_for(page, "training-loss")
    stages = oracle.lines("stages")
    for trace, points in zip(traces, calculated, strict=True):
        expected: dict[int, list[float]] = {}
        for run in oracle.best(trace.meta["method"]).runs:
            passed = 0
            for stage in (line for line in stages if line["run"] == run):
                for step, loss in stage["losses"]:
                    expected.setdefault(passed + step, []).append(loss)
                passed += stage["steps"]
        assert [x for x, _ in points] == sorted(expected)
        means = [np.mean(expected[x]) for x in sorted(expected)]
        np.testing.assert_allclose([y for _, y in points], means, rtol=1e-4)
        assert trace.lines == 1


# Matrices.


def cells_of(page: Opened, name: str) -> tuple[np.ndarray, dict[str, float]]:
    """The picture of a heat map, and where it lies."""
    node = page.page.locator(f"#{name} .heatmaplayer image")
    data = node.get_attribute("href") or node.get_attribute("xlink:href") or ""
    picture = Image.open(io.BytesIO(b64decode(data.split(",", 1)[1]))).convert("RGBA")
    return np.asarray(picture), {"width": picture.width, "height": picture.height}


def test_matrices_have_the_colours_of_their_scores(both):
    """Each cell's colour against viridis from 0 to 100 %; cells that are not there are empty."""
    page, oracle = both
    size = len(oracle.tasks)
    viridis = mpl.colormaps["viridis"]
    names = [n for n in page.draw_all() if n.startswith("plot-matrix-")]
    titles = page.page.eval_on_selector_all(".map h3", "all => all.map((n) => n.textContent)")
    assert len(titles) == len(names)
    for name, setting in zip(names, shown(oracle), strict=True):
        pixels, box = cells_of(page, name)
        R = np.mean([oracle.R[run] for run in setting.runs], axis=0)
        count = 0
        for t in range(size):
            for i in range(size):
                y = int((t + 0.5) * box["height"] / size)
                x = int((i + 0.5) * box["width"] / size)
                if math.isnan(R[t, i]):
                    assert pixels[y, x, 3] == 0
                    continue
                count += 1
                wanted = np.array(viridis(R[t, i])[:3]) * 255
                assert np.abs(pixels[y, x, :3] - wanted).max() < 14, (name, t, i)
        assert count == (size if setting.method == "multitask" else size**2)


def test_numbers_in_the_cells_of_few_tasks(digits_page, digits):
    oracle = Oracle(digits)
    for name, setting in zip(
        [n for n in digits_page.draw_all() if n.startswith("plot-matrix-")],
        shown(oracle),
        strict=True,
    ):
        texts = digits_page.page.locator(f"#{name} .heatmap-label").all_text_contents()
        R = np.mean([oracle.R[run] for run in setting.runs], axis=0) * 100
        written = [text for text in texts if text.strip()]
        # By JavaScript's toFixed and Python's rounding, which may differ at a half.
        expected = [value for value in R.flat if not math.isnan(value)]
        assert len(written) == len(expected)
        assert all(abs(float(w) - v) <= 0.5001 for w, v in zip(written, expected, strict=True))


# Fig. 10, the line, and costs.


@pytest.mark.parametrize("kind", ["l2", "kl"])
def test_distance_against_forgetting(kind, both):
    page, oracle = both
    expected: dict[str, list[tuple[float, float]]] = {}
    lines = {(line["run"], line["stage"]): line for line in oracle.lines("stages")}
    key = {"l2": "l2_to_anchor", "kl": "kl_from_anchor"}[kind]
    for setting in oracle.settings:
        if setting.method == "multitask":
            continue
        for t in range(1, len(oracle.tasks)):
            x = np.mean([lines[run, t][key] for run in setting.runs])
            lost = [
                (oracle.R[run][t - 1, :t] - oracle.R[run][t, :t]).mean() for run in setting.runs
            ]
            expected.setdefault(setting.method, []).append((float(x), 100 * float(np.mean(lost))))
    traces = {t.meta["method"]: t for t in page.traces(f"distance-{kind}")}
    assert {m: len(t.points) for m, t in traces.items()} == {m: len(e) for m, e in expected.items()}
    name = f"distance-{kind}"
    across = 2 / page.pixels_per_unit(name, "x")
    up = 2 / page.pixels_per_unit(name, "y")
    for method, trace in traces.items():
        places = [
            (page.value_at(name, "x", p.x), page.value_at(name, "y", p.y)) for p in trace.points
        ]
        np.testing.assert_allclose(
            [x for x, _ in places], [x for x, _ in expected[method]], atol=across
        )
        np.testing.assert_allclose(
            [y for _, y in places], [y for _, y in expected[method]], atol=up + 0.3
        )


def test_the_line_from_the_anchor(both):
    page, oracle = both
    lines = oracle.lines("lines")
    last = len(oracle.tasks) - 1
    traces = page.traces("line")
    wanted = [m for m in oracle.methods if m != "multitask"]  # it has no task before it
    assert [t.meta["method"] for t in traces] == [
        m for m in wanted if m in {t.meta["method"] for t in traces}
    ] or {t.meta["method"] for t in traces} == set(wanted)
    for trace in traces:
        runs = oracle.best(trace.meta["method"]).runs
        own = [
            line
            for line in lines
            if (line["stage"], line["task"], line["metric"]) == (last, oracle.tasks[0], "loss")
            and line["run"] in runs
        ]
        alphas = sorted({line["alpha"] for line in own})
        means = [np.mean([x["value"] for x in own if x["alpha"] == a]) for a in alphas]
        assert len(trace.points) == len(alphas)
        at = [page.value_at("line", "y", point.y) for point in trace.points]
        np.testing.assert_allclose(at, means, atol=2.5 / page.pixels_per_unit("line", "y"))


COSTS = {
    "cost-seconds": ("seconds", sum, 1.0),
    "cost-peak-memory": ("peak_memory", max, 1e-6),
    "cost-extra-share": ("extra_examples", sum, 100.0),
}


@pytest.mark.parametrize("figure", COSTS)
def test_costs(figure, both):
    page, oracle = both
    key, together, scale = COSTS[figure]
    unit = page.pixels_per_unit(figure, "x")
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in oracle.lines("stages"):
        stages.setdefault(line["run"], []).append(line)

    def cost(run: str) -> float:
        total = together(line[key] for line in stages[run])
        if key == "extra_examples":
            total /= sum(line["trained_examples"] for line in stages[run])
        return float(total) * scale

    traces = page.traces(figure)
    assert Counter(t.meta["method"] for t in traces) == Counter(oracle.methods)
    for trace in traces:
        mean, _ = students([cost(run) for run in oracle.best(trace.meta["method"]).runs])
        assert [point.width for point in trace.points] == [pytest.approx(mean * unit, abs=2)]


def test_what_is_kept_between_tasks(both):
    page, oracle = both
    unit = page.pixels_per_unit("cost-stored-bytes", "x")
    for trace in page.traces("cost-stored-bytes"):
        run = oracle.best(trace.meta["method"]).runs[0]
        own = [line for line in oracle.lines("stages") if line["run"] == run]
        most = max(sum(line["stored"].values()) for line in own)
        assert [p.width for p in trace.points] == [pytest.approx(most * 1e-6 * unit, abs=2)]


# Looks that all figures share.


def test_a_method_has_one_colour_in_every_figure(both):
    page, oracle = both
    chips = page.page.eval_on_selector_all(
        "#legend [data-method]",
        "all => all.map((n) => [n.dataset.method, getComputedStyle(n.querySelector('path')).fill])",
    )
    colours = {method: {colour} for method, colour in chips}
    assert set(colours) == set(oracle.methods)
    assert len({min(colour) for colour in colours.values()}) == len(colours)
    for name in page.draw_all():
        for trace in page.traces(name.removeprefix("plot-")):
            method = trace.meta.get("method")
            if method is None or trace.meta.get("seeds"):
                continue
            found = set(trace.colours) - {"rgb(255, 255, 255)"}  # open markers are the page's
            assert found <= colours[method], (name, method)


def test_bars_and_matrices_are_apart(both):
    """No bar, panel or legend chip lies on another."""
    page, _ = both
    rows = sorted(t.points[0].y for t in page.traces("average") if t.kind == "bars")
    assert all(below - above > 15 for above, below in pairwise(rows))


# The whole page.


def test_the_answer_comes_first(both):
    page, oracle = both
    answer = page.page.locator("#answer").inner_text()
    free = [m for m in oracle.methods if m not in ("multitask", "rehearsal")]
    best = max(
        (setting for method in free for setting in oracle.of(method)),
        key=lambda s: np.mean(oracle.averages(s)),
    )
    mean, half = students(oracle.averages(best))
    assert f"{100 * mean:.1f} % ± {100 * (half or 0):.1f}" in answer
    first = page.page.evaluate(
        "() => document.getElementById('answer').getBoundingClientRect().bottom"
    )
    assert first < 500


def test_it_says_how_it_was_made(digits_page, digits):
    environment = json.loads((digits / "environment.json").read_text())
    text = digits_page.page.locator("#how").text_content() or ""
    assert environment["versions"]["torch"] in text
    assert environment["command"] in text
    assert (digits / "experiment.yaml").read_text() in text
    assert "domain-incremental" in text
    assert "seeds 0, 1" in text


def test_the_large_report_is_small(twenty):
    """20 tasks, 10 methods, 3 seeds: 8 MB, of which the library takes the better part of 2."""
    assert (twenty / "report.html").stat().st_size < 4e6
