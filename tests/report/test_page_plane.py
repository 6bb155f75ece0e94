"""The trade-off plane: points, intervals, curves, Pareto set and hypervolume, for any two axes."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.oracle import Oracle, Setting, dominated_area, pareto_set, students
from support.pages import Drawn, Opened
from support.reading import write_page
from support.records import THREE, write_made_up

YARDSTICKS = ("multitask", "rehearsal")


@pytest.fixture
def both(both) -> tuple[Opened, Oracle]:
    """Each report with the plane as it is when it is opened."""
    page, oracle = both
    page.into_view("plane")
    page.choose("plane", "across", "last")
    page.choose("plane", "up", "earlier")
    return page, oracle


def points(page: Opened) -> list[Drawn]:
    """Each method's points, without lines and single runs."""
    return [t for t in page.traces("plane") if t.points and not t.meta.get("seeds")]


def places(page: Opened, trace: Drawn) -> list[tuple[float, float]]:
    """Where a reader sees the points, by the numbers at the axes."""
    return [
        (page.value_at("plane", "x", p.x), page.value_at("plane", "y", p.y)) for p in trace.points
    ]


def check_places(
    page: Opened, oracle: Oracle, across: Sequence[int], up: Sequence[int], scale: float = 100
) -> None:
    """Every setting's point is at its means over the runs, and has their intervals."""
    by_method = {trace.meta["method"]: trace for trace in points(page)}
    assert set(by_method) == set(oracle.methods)
    units = [page.pixels_per_unit("plane", axis) for axis in "xy"]
    for method, trace in by_method.items():
        own = oracle.of(method)
        assert len(trace.points) == len(own)
        expected = [
            [students(oracle.finals(setting, tasks)) for tasks in (across, up)] for setting in own
        ]
        seen = np.array(places(page, trace))
        means = np.array([[scale * mean for mean, _ in pair] for pair in expected])
        # Two pixels, and what the middle of a marker such as a triangle is off.
        np.testing.assert_allclose(seen[:, 0], means[:, 0], atol=2.5 / units[0])
        np.testing.assert_allclose(seen[:, 1], means[:, 1], atol=4 / units[1])
        halves = np.array([[scale * (half or 0) for _, half in pair] for pair in expected])
        np.testing.assert_allclose(trace.across, 2 * halves[:, 0] * units[0], rtol=0.02, atol=1)
        np.testing.assert_allclose(trace.up, 2 * halves[:, 1] * units[1], rtol=0.02, atol=1)


def test_last_task_against_the_earlier_ones(both):
    page, oracle = both
    last = len(oracle.tasks) - 1
    check_places(page, oracle, [last], range(last))
    assert oracle.tasks[last] in page.title("plane", "x")


def test_other_axes(both):
    page, oracle = both
    count = len(oracle.tasks)
    page.choose("plane", "across", "first")
    page.choose("plane", "up", "all")
    check_places(page, oracle, [0], range(count))
    page.choose("plane", "across", "1")
    page.choose("plane", "up", "0")
    check_places(page, oracle, [1], [0])
    titles = [page.title("plane", axis) for axis in "xy"]
    assert oracle.tasks[1] in titles[0]
    assert oracle.tasks[0] in titles[1]


def test_several_tasks_of_ones_own_choice(twenty_page, twenty):
    oracle, page = Oracle(twenty), twenty_page
    page.into_view("plane")
    page.choose("plane", "across", "several")
    page.choose("plane", "up", "several")
    lists = page.page.locator("#plane .several")
    assert lists.count() == 2
    for number, wanted in ((0, {2, 4, 7}), (1, {0, 19})):
        boxes = lists.nth(number).locator("input")
        assert boxes.count() == 20
        for task in range(20):
            boxes.nth(task).set_checked(task in wanted)
    check_places(page, oracle, [2, 4, 7], [0, 19])
    assert "mean of task 3, task 5, task 8" in page.title("plane", "x")
    page.choose("plane", "across", "last")
    assert page.page.locator("#plane .several").count() == 1


def test_intervals_can_be_left_out(both):
    page, _ = both
    box = page.control("plane", "intervals")
    box.uncheck()
    assert not any(trace.across or trace.up for trace in points(page))
    box.check()
    assert all(trace.across for trace in points(page))


def test_each_run_can_be_shown(both):
    page, oracle = both
    last = len(oracle.tasks) - 1
    box = page.control("plane", "each run")
    box.check()
    dots = [trace for trace in page.traces("plane") if trace.meta.get("seeds")]
    units = [page.pixels_per_unit("plane", axis) for axis in "xy"]
    for trace in dots:
        runs = [run for setting in oracle.of(trace.meta["method"]) for run in setting.runs]
        assert len(trace.points) == len(runs)
        seen = np.array(places(page, trace))
        expected = np.array(
            [[100 * oracle.R[r][-1, last], 100 * oracle.R[r][-1, :last].mean()] for r in runs]
        )
        np.testing.assert_allclose(seen[:, 0], expected[:, 0], atol=2.5 / units[0])
        np.testing.assert_allclose(seen[:, 1], expected[:, 1], atol=3 / units[1])
    assert {trace.meta["method"] for trace in dots} == set(oracle.methods)
    box.uncheck()
    assert not [trace for trace in page.traces("plane") if trace.meta.get("seeds")]


def test_everything_is_in_view(both):
    """No point, and no end of an interval within 0 and 100 %, lies outside the axes."""
    page, _ = both
    frame = page.page.locator("#plot-plane .plot-container .nsewdrag").first.bounding_box()
    assert frame is not None
    for trace in points(page):
        for point in trace.points:
            assert frame["x"] <= point.x <= frame["x"] + frame["width"]
            assert frame["y"] <= point.y <= frame["y"] + frame["height"]


def test_curves_run_along_a_setting(digits_page, digits):
    oracle = Oracle(digits)
    digits_page.into_view("plane")
    lines = [t for t in digits_page.traces("plane") if t.lines and not t.points]
    names = {t.name for t in lines} - {"Pareto set"}
    assert names == {
        "rehearsal along fraction",
        "SFA along p (beta 0.5)",
        "SFA along beta (p 0.5)",
        "L2 along strength",
        "WiSE-FT along beta",
        "task arithmetic along scale",
    }
    for trace in points(digits_page):
        wanted = {
            "sfa": ["0.25", "0.5", "1", "0.2"],
            "l2": ["0.1", "1"],
            "rehearsal": ["0.05", "0.1"],
            "wise-ft": ["0.2", "0.5"],
            "task-arithmetic": ["0.3", "0.8"],
        }.get(trace.meta["method"], [])
        assert [text for text in trace.texts if text] == wanted
        assert len(oracle.of(trace.meta["method"])) == len(trace.points)


def competitors(oracle: Oracle) -> list[Setting]:
    return [setting for setting in oracle.settings if setting.method not in YARDSTICKS]


def test_the_pareto_set(both):
    page, oracle = both
    last = len(oracle.tasks) - 1
    own = competitors(oracle)
    means = [
        (np.mean(oracle.finals(s, [last])), np.mean(oracle.finals(s, range(last)))) for s in own
    ]
    expected = {own[n].label for n in pareto_set(means)}
    (front,) = [t for t in page.traces("plane") if t.name == "Pareto set"]
    shown = page.page.evaluate(
        "g => g.map((n) => stockpot.page.now.groups[n].label)", front.meta["front"]
    )
    assert set(shown) == expected
    note = page.page.locator("#plane .caption").first.inner_text()
    assert f"({len(expected)} setting" in note
    box = page.control("plane", "Pareto set")
    box.uncheck()
    assert not [t for t in page.traces("plane") if t.name == "Pareto set"]
    box.check()


def test_the_hypervolume(both):
    page, oracle = both
    last = len(oracle.tasks) - 1
    text = page.page.locator("#hypervolume").inner_text()
    shown = {name: float(value) for name, value in re.findall(r"([^,]+?) (\d\.\d{3})", text)}
    titles = dict(
        page.page.evaluate(
            "() => Object.entries(stockpot.page.now.methods).map(([k, v]) => [k, v.title])"
        )
    )

    def volume(own: list[Setting]) -> float:
        return dominated_area(
            [
                (
                    float(np.mean(oracle.finals(s, [last]))),
                    float(np.mean(oracle.finals(s, range(last)))),
                )
                for s in own
            ]
        )

    own = competitors(oracle)
    expected = {"all of them": volume(own)}
    for method in dict.fromkeys(s.method for s in own):
        expected[titles[method]] = volume(oracle.of(method))
    assert {name.strip() for name in shown} == set(expected)
    for name, value in shown.items():
        assert value == pytest.approx(expected[name.strip()], abs=0.00051)


pairs = st.tuples(*2 * [st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))])


@given(drawn=st.lists(pairs, min_size=1, max_size=9), better=st.sampled_from(["higher", "lower"]))
@settings(max_examples=60, deadline=None)
def test_pareto_and_hypervolume_of_any_points(twenty_page, drawn, better):
    """The page's own functions against brute force; for losses, from a reference of 1 down to 0."""
    flip = better == "lower"
    raw = [(1 - x, 1 - y) if flip else (x, y) for x, y in drawn]
    front, volume = twenty_page.page.evaluate(
        """([raw, better, reference, ideal]) => {
          const all = raw.map(([x, y], group) => ({ group, x: { mean: x }, y: { mean: y } }));
          const front = stockpot.plane.pareto(all, better).map((p) => p.group);
          return [front, stockpot.plane.hypervolume(all, reference, ideal)];
        }""",
        [raw, better, [1, 1] if flip else [0, 0], [0, 0] if flip else [1, 1]],
    )
    seen = [(1 - x, 1 - y) if flip else (x, y) for x, y in raw]
    # A difference of 1e-17 may vanish in 1 - x; the page compares the raw numbers.
    sign = -1 if flip else 1
    assert set(front) == pareto_set([(sign * x, sign * y) for x, y in raw])
    assert volume == pytest.approx(dominated_area(seen), abs=1e-9)


# References: the starting model, and models trained on one task alone.


def shapes(page: Opened) -> list[tuple[str, float, float, float]]:
    """The straight lines on the plane: how dashed, and their middle and height, in pixels."""
    script = """() => [...document.querySelectorAll("#plot-plane .shapelayer path")].map((p) => {
      const r = p.getBoundingClientRect();
      return [getComputedStyle(p).strokeDasharray, r.x + r.width / 2, r.y + r.height / 2, r.height];
    })"""
    return [(dash, x, y, height) for dash, x, y, height in page.page.evaluate(script)]


def test_dotted_and_dashed_lines(digits_page, digits):
    """Dotted: the starting model. Dashed: a model of `even` alone, and of `odd` alone."""
    oracle, page = Oracle(digits), digits_page
    page.into_view("plane")
    page.choose("plane", "across", "last")
    page.choose("plane", "up", "earlier")
    start = 100 * np.mean(list(oracle.b.values()), axis=0)
    (alone,) = [s for s in oracle.of("multitask") if s.settings["without"]]
    odd = 100 * float(np.mean([oracle.R[run][-1, 1] for run in alone.runs]))
    (sequential,) = oracle.of("sequential")
    even = 100 * float(np.mean([oracle.R[run][0, 0] for run in sequential.runs]))
    upright = [page.value_at("plane", "x", x) for _, x, _, height in shapes(page) if height > 100]
    lying = [page.value_at("plane", "y", y) for _, _, y, height in shapes(page) if height < 100]
    assert sorted(upright) == pytest.approx(sorted([start[1], odd]), abs=0.4)
    assert sorted(lying) == pytest.approx(sorted([start[0], even]), abs=0.4)
    assert len({dash for dash, *_ in shapes(page)}) == 2
    assert "trained on that alone" in page.page.locator("#plane .caption").first.inner_text()


# Losses.


@pytest.fixture(scope="module")
def losses(tmp_path_factory, visit) -> tuple[Opened, Oracle]:
    folder = write_made_up(tmp_path_factory.mktemp("losses") / "run", metric="loss")
    page: Opened = visit(write_page(folder))
    page.draw_all()
    page.into_view("plane")
    return page, Oracle(folder)


def test_losses_are_better_up_and_right_too(losses):
    page, oracle = losses
    check_places(page, oracle, [2], [0, 1], scale=1)
    (left, first), (right, last) = page.ticks("plane", "x")[0], page.ticks("plane", "x")[-1]
    assert (right > left) != (last > first)
    assert "(nats)" in page.title("plane", "x")


def test_the_pareto_set_and_hypervolume_of_losses(losses):
    """From the starting model's loss down to 0."""
    page, oracle = losses
    own = competitors(oracle)
    means = [(np.mean(oracle.finals(s, [2])), np.mean(oracle.finals(s, [0, 1]))) for s in own]
    (front,) = [t for t in page.traces("plane") if t.name == "Pareto set"]
    shown = page.page.evaluate(
        "g => g.map((n) => stockpot.page.now.groups[n].label)", front.meta["front"]
    )
    assert set(shown) == {own[n].label for n in pareto_set([(-x, -y) for x, y in means])}
    start = np.mean(list(oracle.b.values()), axis=0)
    reference = (start[2], start[:2].mean())
    expected = dominated_area([(1 - x / reference[0], 1 - y / reference[1]) for x, y in means])
    text = page.page.locator("#hypervolume").inner_text()
    assert float(text.split("all of them ")[1][:5]) == pytest.approx(expected, abs=0.00051)
    assert len(THREE) == len(oracle.methods)
