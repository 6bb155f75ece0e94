"""Pages of unusual records: hostile names, unfinished, one task, losses, very many."""

import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from support.oracle import Oracle, students
from support.pages import Mark, Opened
from support.reading import write_page
from support.records import TEN, THREE, read_lines, write_made_up

SFA = "sfa-p=0.25-beta=0.5-seed0"

# Hostile names.

ALERT = "<script>alert(1)</script>"
HOSTILE = (
    f"{ALERT}<img src=x onerror=alert(2)>",
    "\"quoted\" 'twice' `thrice` & $x^2$ \\alpha",
    "%{x} %{customdata} ${1+1} {{7*7}} &lt;b&gt;",
    "\U0001f469\u200d\U0001f52c\U0001f600 \u202eRTL \u05e9\u05dc\u05d5 \u0645\u0631\u062d",
    "C:\\new\\table #1_a^b~c {d} % \\input{x}",
    "constructor",
    "__proto__",
    "<b>bold</b><br>below <a href='javascript:alert(3)'>link</a>",
    "a very long name " * 12,
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, visit) -> Opened:
    folder = write_made_up(
        tmp_path_factory.mktemp("hostile") / "run",
        tasks=HOSTILE,
        name=f"{ALERT} $&$ \u202e\U0001f600 </title>",
        labels={"sequential": f"sequential {ALERT}", "sfa": "sfa %{y} $x$ <i>p</i>"},
        described={"model": {"name": ALERT, "id": f"{ALERT}model"}},
        seeds=[0, 1],
    )
    environment = json.loads((folder / "environment.json").read_text())
    environment["command"] = f"stockpot run '{ALERT}'"
    environment["notes on the data"] = [f"note {ALERT}"]
    (folder / "environment.json").write_text(json.dumps(environment))
    page: Opened = visit(write_page(folder))
    page.draw_all()
    return page


def test_nothing_in_a_name_runs(hostile):
    hostile.quiet()
    assert hostile.page.locator("img, iframe, a[href^=javascript]").count() == 0
    assert hostile.page.locator("body script").count() == 9
    assert not hostile.page.evaluate("() => document.querySelector('main b i, main td b, h1 *')")


def test_names_are_shown_as_they_are(hostile):
    page = hostile.page
    assert page.locator("h1").inner_text() == f"{ALERT} $&$ \u202e\U0001f600 </title>"
    assert page.title().startswith(f"{ALERT} $&$")
    heads = page.locator("#results thead button").evaluate_all(
        "all => all.map((b) => b.firstChild.textContent)"
    )
    assert heads[1 : 1 + len(HOSTILE)] == list(HOSTILE)
    rows = page.locator("#results tbody td:first-child").all_text_contents()
    assert rows[0] == f"sequential {ALERT}"
    assert rows[2] == "SFA %{y} $x$ <i>p</i>"
    how = page.locator("#how").inner_text()
    assert f"note {ALERT}" in how
    assert f"$ stockpot run '{ALERT}'" in how
    assert f"{ALERT}model" in page.locator("header").inner_text()


def test_names_are_shown_as_they_are_at_axes_and_in_hovers(hostile):
    texts = hostile.page.locator("#plot-average .ytick text").all_text_contents()
    assert any(ALERT in text for text in texts)
    hostile.into_view("average")
    for trace in hostile.traces("average"):
        if trace.kind != "bars":
            continue
        (bar,) = trace.points
        text = hostile.hover("average", Mark(bar.x - bar.width * 0.4, bar.y, 1, 1))
        label = f"sequential {ALERT}" if trace.meta["method"] == "sequential" else "SFA %{y} $x$"
        assert label in text
        # Only the first six tasks, and of each its first thirty letters.
        for name in HOSTILE[:6]:
            clipped = name if len(name) <= 30 else f"{name[:29]}\u2026"
            assert f"{clipped.encode('utf-16-le')[:56].decode('utf-16-le', 'ignore')}" in text


def test_any_of_them_may_be_an_axis(hostile):
    """A name of JavaScript's own, such as constructor, is a task like any other."""
    hostile.into_view("plane")
    for number, name in enumerate(HOSTILE):
        hostile.choose("plane", "across", str(number))
        shown = hostile.title("plane", "x")
        start = re.sub(r"\s+", " ", name[:20]).strip()
        assert start in re.sub(r"\s+", " ", shown)
        points = [trace for trace in hostile.traces("plane") if trace.points]
        assert len(points) == 3
    hostile.page.mouse.move(1, 1)
    for number, name in enumerate(HOSTILE):
        hostile.choose("one-task", "task", str(number))
        assert name[:12].strip() in hostile.title("one-task", "y")
    hostile.quiet()


def test_names_of_curves_are_shown_as_they_are(hostile):
    hostile.into_view("curves-a")
    texts = hostile.page.locator("#plot-curves-a .legendtext").all_text_contents()
    assert [text[:12] for text in texts] == [name[:12] for name in HOSTILE]
    for kind in ("png", "svg"):
        with hostile.page.expect_download() as event:
            hostile.page.locator("#curves-a .tools button", has_text=kind.upper()).click()
        assert event.value.suggested_filename == f"curves-a.{kind}"
    hostile.quiet()


# Running.


@pytest.fixture(scope="module")
def running(tmp_path_factory, visit) -> tuple[Opened, Oracle]:
    """Of six runs one is finished, two have begun, one of them after its first task."""
    stages = {
        "sequential-seed0": 3,
        "multitask-seed0": 0,
        SFA: 2,
        "sequential-seed1": 1,
        "multitask-seed1": 0,
        f"{SFA[:-1]}1": 0,
    }
    folder = write_made_up(tmp_path_factory.mktemp("running") / "run", stages=stages)
    page: Opened = visit(write_page(folder))
    page.draw_all()
    return page, Oracle(folder)


def test_what_is_finished_is_counted_and_what_is_not_is_listed(running):
    page, oracle = running
    assert "1 of 6 runs finished" in page.page.locator("header").inner_text()
    assert "5 of 6 runs are not finished" in page.page.locator("#answer").inner_text()
    text = page.page.locator("#running").inner_text()
    assert f"{SFA}: 2 of 3 tasks" in text
    so_far = 100 * oracle.R[SFA][1, :2].mean()
    assert f"average so far {so_far:.1f} %" in text
    assert "sequential-seed1: 1 of 3 tasks" in text
    assert "3 more" in text
    bars = [t for t in page.traces("average") if not t.meta.get("seeds")]
    assert [(t.meta["method"], len(t.points)) for t in bars] == [("sequential", 1)]
    assert bars[0].across == [0.0]  # one run has no interval
    circles = [t for t in page.traces("average") if t.meta.get("seeds")]
    assert sum(len(t.points) for t in circles) == 1


def test_unfinished_runs_are_in_matrices_and_curves_as_far_as_they_went(running):
    page, oracle = running
    titles = page.page.locator(".map h3").all_text_contents()
    assert titles == ["sequential", "SFA p=0.25 beta=0.5"]
    sfa = page.page.locator(".map", has_text="SFA").locator(".plot")
    texts = [text for text in sfa.locator(".heatmap-label").all_text_contents() if text]
    assert [float(text) for text in texts] == [
        pytest.approx(100 * value, abs=0.5001) for value in oracle.R[SFA][:2].flat
    ]
    options = page.page.locator("#curves-a select option").all_text_contents()
    assert options == ["sequential", "SFA p=0.25 beta=0.5"]
    steps = page.page.evaluate(
        "() => document.getElementById('plot-curves-b').calcdata[0].map((p) => p.x)"
    )
    assert max(steps) == 200


def test_the_table_says_who_is_not_finished(running):
    page, _ = running
    rows = page.page.locator("#results tbody tr").all_inner_texts()
    assert [("not finished" in row) for row in rows] == [False, True, True]
    assert "\u2013" in rows[1]


def test_methods_without_a_finished_run_can_be_pressed(running):
    page, oracle = running
    for method in oracle.methods:
        page.chip(method)
        page.draw_all()
    page.page.get_by_role("button", name="show all").click()
    page.control("average", "all settings").check()
    page.quiet()


def test_nothing_finished_yet(tmp_path, visit):
    stages = {"sequential-seed0": 1, "multitask-seed0": 0, SFA: 0}
    folder = write_made_up(tmp_path / "run", seeds=[0], stages=stages)
    page: Opened = visit(write_page(folder))
    names = page.draw_all()
    assert "No run is finished yet" in page.page.locator("#answer").inner_text()
    assert "plot-average" not in names
    assert "plot-plane" not in names
    assert "plot-curves-a" in names
    assert "plot-matrix-0" in names
    page.quiet()


def test_gaps_are_said_at_the_top(tmp_path, visit):
    folder = write_made_up(tmp_path / "run")
    with (folder / "scores.jsonl").open("a") as file:
        file.write(f"{ALERT}\n")
    (folder / "environment.json").unlink()
    page: Opened = visit(write_page(folder))
    gaps = page.page.locator("#gaps li").all_inner_texts()
    count = len((folder / "scores.jsonl").read_text().splitlines())
    assert gaps == [
        "environment.json is missing",
        f"scores.jsonl: line {count} cannot be read and is left out",
    ]
    page.quiet()


def test_runs_that_failed_are_said_and_not_waited_for(tmp_path, visit):
    folder = write_made_up(tmp_path / "run", stages={SFA: 1})
    (folder / "failures.json").write_text(json.dumps({SFA: f"the loss is nan {ALERT}"}))
    page: Opened = visit(write_page(folder))
    page.draw_all()
    assert "5 of 6 runs finished, 1 failed" in page.page.locator("header").inner_text()
    gaps = page.page.locator("#gaps li").all_inner_texts()
    assert gaps == [f"run {SFA} failed: the loss is nan {ALERT}"]
    assert page.page.locator("#running").count() == 0
    page.quiet()


# Few.


def test_one_task(tmp_path, visit):
    folder = write_made_up(tmp_path / "run", tasks=["all"], line=0)
    page: Opened = visit(write_page(folder))
    names = page.draw_all()
    assert "plot-plane" not in names
    assert "plot-distance-l2" not in names
    assert "1 task" in page.page.locator("header").inner_text()
    assert page.page.locator("#plot-matrix-0 .heatmap-label").count() == 1
    page.quiet()


def test_one_seed_has_no_interval_and_says_so(tmp_path, visit):
    folder = write_made_up(tmp_path / "run", seeds=[7], methods=TEN)
    page: Opened = visit(write_page(folder))
    page.draw_all()
    assert "no difference can be called real" in page.page.locator("#answer").inner_text()
    assert "\u00b1" not in (page.page.locator("#results table").text_content() or "")
    for trace in page.traces("average"):
        assert set(trace.across) <= {0.0}
    page.into_view("average")
    bar = next(t for t in page.traces("average") if t.kind == "bars").points[0]
    text = page.hover("average", Mark(bar.x - bar.width * 0.4, bar.y, 1, 1))
    assert "1 run" in text
    assert "\u00b1" not in text
    page.quiet()


def test_one_method_needs_no_legend(tmp_path, visit):
    folder = write_made_up(tmp_path / "run", methods=THREE[:1])
    page: Opened = visit(write_page(folder))
    page.draw_all()
    assert page.page.locator("#legend button").count() == 0
    page.quiet()


# Other measures.


def test_losses_are_best_where_they_are_lowest(tmp_path, visit):
    folder = write_made_up(tmp_path / "run", metric="loss", methods=TEN)
    oracle = Oracle(folder)
    page: Opened = visit(write_page(folder))
    page.draw_all()
    height = {
        t.meta["method"]: t.points[0].y for t in page.traces("average") if not t.meta.get("seeds")
    }
    means = {m: float(np.mean(oracle.averages(oracle.best(m)))) for m in oracle.methods}
    assert sorted(height, key=lambda m: height[m]) == sorted(means, key=lambda m: means[m])
    assert "shorter is better" in page.page.locator("#average .caption").first.inner_text()
    assert "(nats)" in page.title("average", "x")
    names = page.page.locator("#results thead button").all_inner_texts()
    number = next(n for n, name in enumerate(names) if name.startswith("average")) + 1
    bold = page.page.locator(f"#results tbody td.best:nth-child({number})").inner_text()
    assert bold.startswith(f"{min(means.values()):.3f}")
    mean, half = students(oracle.averages(oracle.best("fisher-merging")))
    assert f"{mean:.3f} \u00b1{half or 0:.3f}" in page.page.locator("#results").inner_text()
    lower = page.page.evaluate(
        "() => document.querySelector('#plot-matrix-0').calcdata[0][0].trace.reversescale"
    )
    assert lower is True
    page.quiet()


def test_tasks_with_metrics_of_their_own(tmp_path, visit):
    folder = write_made_up(tmp_path / "run")
    lines = read_lines(folder / "scores.jsonl")
    names = {"even": "accuracy", "odd": "exact_match", "prime": "pass@1"}
    text = "".join(json.dumps({**line, "metric": names[line["task"]]}) + "\n" for line in lines)
    (folder / "scores.jsonl").write_text(text)
    page: Opened = visit(write_page(folder))
    page.draw_all()
    assert page.title("average", "x") == "average score at the end (%)"
    page.quiet()


def test_an_interval_beyond_a_hundred_per_cent_does_not_stretch_the_axis(tmp_path, visit):
    folder = write_made_up(tmp_path / "run", seeds=[0, 1])
    wild = {"sequential-seed0": 0.2, "sequential-seed1": 0.98}
    lines: list[dict[str, Any]] = [
        {**line, "value": wild.get(line["run"], line["value"])}
        for line in read_lines(folder / "scores.jsonl")
    ]
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").unlink()
    page: Opened = visit(write_page(folder))
    page.draw_all()
    for figure, axis in (("average", "x"), ("plane", "x"), ("plane", "y")):
        values = [value for value, _ in page.ticks(figure, axis)]
        assert max(values) <= 110
    frame = page.page.locator("#plot-average .nsewdrag").first.bounding_box()
    assert frame is not None
    right = page.value_at("average", "x", frame["x"] + frame["width"])
    assert 98 <= right <= 103


# Many.


def test_two_hundred_tasks(tmp_path, visit):
    tasks = [f"task {n}" for n in range(200)]
    folder = write_made_up(
        tmp_path / "run",
        tasks=tasks,
        methods=[*THREE[::2], *TEN[4:6]],
        seeds=[0],
        every=None,
        line=0,
        steps=2,
    )
    page: Opened = visit(write_page(folder))
    names = page.draw_all()
    assert len([name for name in names if name.startswith("plot-matrix")]) == 4
    assert len(page.page.locator("#plane select").first.locator("option").all()) == 205
    counts = Counter({t.meta["method"]: len(t.points) for t in page.traces("distance-l2")})
    assert counts == {"sequential": 199, "sfa": 199, "l2": 199, "ewc": 199}
    page.choose("plane", "across", "several")
    assert page.page.locator("#plane .several input").count() == 200
    page.chip("sfa")
    page.draw_all()
    page.quiet()


# Several.


def test_two_experiments_on_one_page(tmp_path, visit):
    one = write_made_up(tmp_path / "a", methods=THREE, name="the first")
    other = write_made_up(
        tmp_path / "b",
        methods=TEN,
        tasks=["x", "y"],
        name="the second",
        metric="loss",
        described={"model": {"name": "conv"}},
    )
    page: Opened = visit(write_page(one, other))
    page.draw_all()
    assert page.page.locator("h1").inner_text() == "the first"
    page.chip("sfa")
    page.page.locator("header select").select_option("1")
    names = page.draw_all()
    assert page.page.locator("h1").inner_text() == "the second"
    assert page.page.locator("#results tbody tr").count() == 10
    assert len([name for name in names if name.startswith("plot-matrix")]) == 10
    assert page.title("plane", "x") == "held-out loss on the last task, y (nats)"
    assert page.page.locator("#legend [data-method]").count() == 10
    page.page.locator("header select").select_option("0")
    page.draw_all()
    assert page.page.locator("#results tbody tr").count() == 3
    page.quiet()


def test_two_orders_of_the_tasks(tmp_path, visit):
    """Curves and matrices are of the first order, bars and the plane's named tasks of both."""
    one = write_made_up(tmp_path / "a", seeds=[0, 1])
    two = write_made_up(tmp_path / "b", seeds=[0, 1], tasks=("prime", "even", "odd"))
    page: Opened = visit(write_page(one, two))
    page.draw_all()
    assert "2 task orders" in page.page.locator("header").inner_text()
    first, second = Oracle(one), Oracle(two)
    page.choose("plane", "across", "1")
    page.choose("plane", "up", "2")
    (trace,) = [t for t in page.traces("plane") if t.points and t.meta["method"] == "sfa"]
    setting = first.of("sfa")[0]
    odd = first.finals(setting, [1]) + second.finals(setting, [2])
    prime = first.finals(setting, [2]) + second.finals(setting, [0])
    (point,) = trace.points
    assert page.value_at("plane", "x", point.x) == pytest.approx(100 * np.mean(odd), abs=0.3)
    assert page.value_at("plane", "y", point.y) == pytest.approx(100 * np.mean(prime), abs=0.3)
    unit = page.pixels_per_unit("plane", "x")
    assert trace.across == [pytest.approx(200 * (students(odd)[1] or 0) * unit, rel=0.02)]
    circles = [t for t in page.traces("average") if t.meta.get("seeds")]
    assert {len(t.points) for t in circles} == {4}
    R = np.mean([first.R[run] for run in setting.runs], axis=0)
    node = page.page.locator(".map", has_text="SFA").locator(".heatmap-label")
    texts = [float(text) for text in node.all_text_contents() if text]
    np.testing.assert_allclose(texts, 100 * R.ravel(), atol=0.5001)
    assert "task order 2: prime" in page.page.locator("#how").inner_text()
    page.quiet()


def test_a_method_that_only_the_second_order_has(tmp_path, visit):
    """It is shown for that order, under that order's names."""
    turned = ("prime", "even", "odd")
    one = write_made_up(tmp_path / "a", methods=THREE[:2])
    two = write_made_up(tmp_path / "b", methods=THREE[2:], tasks=turned)
    page: Opened = visit(write_page(one, two))
    page.draw_all()
    oracle = Oracle(two)
    (setting,) = oracle.of("sfa")
    R = 100 * np.mean([oracle.R[run] for run in setting.runs], axis=0)
    matrix = page.page.locator(".map", has_text="SFA")
    texts = [float(text) for text in matrix.locator(".heatmap-label").all_text_contents() if text]
    np.testing.assert_allclose(texts, R.ravel(), atol=0.5001)
    assert matrix.locator(".xtick text").all_text_contents() == list(turned)
    # The curve of `odd`, which this order trains last.
    ends = page.page.evaluate(
        """() => document.getElementById("plot-curves-b").calcdata
          .map((c) => [c[0].trace.name, c[c.length - 1].y])"""
    )
    shown = {name: y for name, y in ends if name in turned}
    assert shown == {task: pytest.approx(R[2, n], rel=1e-4) for n, task in enumerate(turned)}
    borders = page.page.locator("#plot-curves-b .annotation-text").all_text_contents()
    assert borders == list(turned)
    assert "of task order 2" in page.page.locator("#curves-b .caption").first.inner_text()
    lines = [x for x in oracle.lines("lines") if (x["stage"], x["task"]) == (2, "even")]
    expected = [
        np.mean([x["value"] for x in lines if x["alpha"] == alpha and x["metric"] == "loss"])
        for alpha in (0, 0.5, 1)
    ]
    (trace,) = [t for t in page.traces("line") if t.meta["method"] == "sfa"]
    at = [page.value_at("line", "y", point.y) for point in trace.points]
    np.testing.assert_allclose(at, expected, atol=3 / page.pixels_per_unit("line", "y"))
    for method in ("sfa", "sequential"):
        page.chip(method)
        page.draw_all()
    assert page.page.locator("#results tbody tr").count() == 1
    page.quiet()


def test_it_reads_without_scripts(tmp_path, browser):
    folder = write_made_up(tmp_path / "run", methods=THREE)
    path = write_page(folder)
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    text = page.locator("body").inner_text()
    assert "sfa p=0.25 beta=0.5" in text
    assert "average (%)" in text
    context.close()
