"""Readable on a phone and on a wall, light and dark."""

import re
from pathlib import Path
from typing import Any

import pytest

from support.pages import Opened
from support.reading import write_page
from support.records import TEN, write_made_up

LOOKS = [
    *(("digits", width, scheme) for width in (400, 1600) for scheme in ("light", "dark")),
    ("twenty", 400, "light"),
    ("twenty", 1600, "dark"),
]

# Text that stands in the page: its colour on what lies behind it, blended where it is not opaque.
_CONTRASTS = """() => {
  const parse = (text) => {
    const m = text.match(/[\\d.]+/g);
    return m ? [+m[0], +m[1], +m[2], m[3] === undefined ? 1 : +m[3]] : [0, 0, 0, 0];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const behind = (node) => {
    const layers = [];
    for (let n = node; n; n = n.parentElement) {
      const c = parse(getComputedStyle(n).backgroundColor);
      if (c[3] > 0) layers.push(c);
      if (c[3] === 1) break;
    }
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = (c) => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.textContent.trim() || !node) continue;
    if (node.closest("script, noscript, style, option")) continue;
    const box = node.getBoundingClientRect();
    if (!box.width || !box.height) continue;
    if (node.closest(".heatmap-label, .hoverlayer")) continue; // on the colour of its cell
    const style = getComputedStyle(node);
    const inSvg = Boolean(node.closest("svg"));
    const ink = parse(inSvg ? style.fill : style.color);
    let opacity = 1;
    for (let n = node; n; n = n.parentElement) opacity *= +getComputedStyle(n).opacity;
    const ground = behind(node.closest("svg") ? node.closest("section, body") : node);
    const seen = over([ink[0], ink[1], ink[2], ink[3] * opacity], ground);
    const [a, b] = [luminance(seen), luminance(ground)].sort((p, q) => q - p);
    found.push([text.textContent.trim().slice(0, 60), (a + 0.05) / (b + 0.05), node.tagName]);
  }
  return found;
}"""

_CUT = """() => {
  const cut = [];
  for (const plot of document.querySelectorAll(".plot")) {
    const frame = plot.getBoundingClientRect();
    const ticks = ".xtick text, .ytick text, .cbtitle, .cbaxis text";
    const texts = ".xtitle, .ytitle, .annotation-text, .legendtext";
    for (const node of plot.querySelectorAll(`${ticks}, ${texts}`)) {
      const r = node.getBoundingClientRect();
      if (!r.width) continue;
      const across = Math.max(frame.left - r.left, r.right - frame.right);
      const out = Math.max(across, frame.top - r.top, r.bottom - frame.bottom);
      if (out > 1.5) cut.push([plot.id, node.textContent, Math.round(out)]);
    }
  }
  return cut;
}"""

_OVERLAPPING = """() => {
  const found = [];
  for (const plot of document.querySelectorAll(".plot")) {
    for (const axis of ["xtick", "ytick"]) {
      const turned = (n) => /rotate\\((?!0[,)])/.test(n.getAttribute("transform") || "");
      const boxes = [...plot.querySelectorAll(`.${axis} text`)].filter((n) => !turned(n))
        .map((n) => [n.textContent, n.getBoundingClientRect()]);
      for (let i = 0; i < boxes.length; i++) {
        for (let k = i + 1; k < boxes.length; k++) {
          const [a, b] = [boxes[i][1], boxes[k][1]];
          const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
          const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
          if (w > 2 && h > 3) found.push([plot.id, boxes[i][0], boxes[k][0]]);
        }
      }
    }
  }
  return found;
}"""


@pytest.fixture(scope="module", params=LOOKS, ids=lambda look: "-".join(map(str, look)))
def look(request, visit) -> Opened:
    name, width, scheme = request.param
    folder: Path = request.getfixturevalue(name)
    page: Opened = visit(folder / "report.html", width, scheme)
    page.draw_all()
    return page


def test_nothing_is_wider_than_the_screen(look):
    width, screen = look.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= screen
    for figure in look.page.locator(".plot").all():
        box = figure.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= screen + 1


def test_no_text_of_a_figure_is_cut_off(look):
    assert look.page.evaluate(_CUT) == []


def test_numbers_at_the_axes_do_not_overlap(look):
    assert look.page.evaluate(_OVERLAPPING) == []


def test_all_text_has_contrast(look):
    """WCAG 2.1 asks for 4.5."""
    found = look.page.evaluate(_CONTRASTS)
    assert len(found) > 200
    assert [row for row in found if row[1] < 4.5] == []


def test_text_has_contrast_when_a_method_stands_alone(look):
    look.chip("sfa")
    try:
        assert [row for row in look.page.evaluate(_CONTRASTS) if row[1] < 4.5] == []
    finally:
        look.chip("sfa")


def test_axes_have_units(look):
    """Each number's axis says what it is; of a share, a loss or a cost also in what."""
    for figure, axis, unit in (
        ("average", "x", "(%)"),
        ("plane", "x", "(%)"),
        ("plane", "y", "(%)"),
        ("curves-a", "y", "(%)"),
        ("training-loss", "y", "(nats)"),
        ("distance-l2", "y", "(% points)"),
        ("distance-kl", "x", "(nats)"),
        ("line", "y", "(nats)"),
        ("cost-seconds", "x", "s"),
        ("cost-peak-memory", "x", "MB"),
    ):
        assert unit in look.title(figure, axis), (figure, axis)
    for figure in ("curves-a", "one-task", "training-loss"):
        assert "step" in look.title(figure, "x")


def test_buttons_are_within_reach(look):
    """Every control can be seen whole and pressed."""
    screen = look.page.evaluate("window.innerWidth")
    for control in look.page.locator("section button, section select, section input").all():
        if control.locator("xpath=ancestor::*[contains(@class, 'scroll')]").count():
            continue
        box = control.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= screen + 1


def test_the_scheme_follows_the_reader(digits, visit):
    page: Opened = visit(digits / "report.html")
    page.draw_all()

    def ground() -> Any:
        return page.page.evaluate(
            """() => [getComputedStyle(document.body).backgroundColor,
              getComputedStyle(document.querySelector("#plot-average .xtick text")).fill]"""
        )

    light = ground()
    page.page.emulate_media(color_scheme="dark")
    page.page.wait_for_timeout(200)
    dark = ground()
    assert light[0] == "rgb(255, 255, 255)"
    assert sum(map(int, re.findall(r"\d+", dark[0]))) < 100
    assert light[1] != dark[1]
    assert [row for row in page.page.evaluate(_CONTRASTS) if row[1] < 4.5] == []


def test_from_a_wide_window_to_a_narrow_one(digits, visit):
    page: Opened = visit(digits / "report.html")
    page.draw_all()
    page.page.set_viewport_size({"width": 400, "height": 900})
    page.page.wait_for_timeout(400)
    page.draw_all()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.page.evaluate(_CUT) == []


def test_long_names_fit_on_a_phone(tmp_path, visit):
    tasks = [f"an unusually long name of a task, {word} {n}" for n, word in enumerate(["one"] * 4)]
    folder = write_made_up(tmp_path / "run", tasks=tasks, methods=TEN, name="A long name " * 12)
    page: Opened = visit(write_page(folder), 400)
    page.draw_all()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.page.evaluate(_CUT) == []
