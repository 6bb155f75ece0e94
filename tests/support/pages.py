"""A report's page in a real browser: opening it, using it, and what is drawn on it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page, sync_playwright

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    """The browser of this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium(path: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@dataclass
class Mark:
    """One thing drawn for a number: where it is on the screen, in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass
class Drawn:
    """One trace as it stands in the page's SVG."""

    kind: str
    """``scatter`` or ``bars``."""
    name: str
    meta: dict[str, Any]
    points: list[Mark]
    across: list[float]
    """Lengths of the error bars, in pixels."""
    up: list[float]
    lines: int
    texts: list[str]
    colours: list[str]
    """Of the points, else of the line."""


_TRACES = """(id) => {
  const box = (node) => {
    const r = node.getBoundingClientRect();
    return { x: r.x + r.width / 2, y: r.y + r.height / 2, width: r.width, height: r.height };
  };
  const root = document.getElementById(id);
  return [...root.querySelectorAll(".scatterlayer .trace, .barlayer .trace")].map((node) => {
    const trace = node.__data__[0].trace;
    const points = [...node.querySelectorAll(".point")];
    const of = (selector) => [...node.querySelectorAll(selector)].map(box);
    const painted = points.length ? points.map((p) => p.querySelector("path") || p)
      : [...node.querySelectorAll(".js-line")];
    return {
      kind: node.closest(".barlayer") ? "bars" : "scatter",
      name: trace.name || "", meta: trace.meta || {}, points: points.map(box),
      across: of(".xerror").map((b) => b.width), up: of(".yerror").map((b) => b.height),
      lines: node.querySelectorAll("path.js-line").length,
      texts: [...node.querySelectorAll(".textpoint text")].map((t) => t.textContent),
      colours: painted.map((p) => {
        const style = getComputedStyle(p);
        const fill = /open/.test(String((trace.marker || {}).symbol)) ? "none" : style.fill;
        return p.closest(".barlayer") || fill === "none" ? style.stroke : fill;
      }),
    };
  });
}"""

_NO_LABEL = "id => !document.querySelector(`#${id} .hoverlayer .hovertext`)"
_TICKS = """([id, axis]) => [...document.querySelectorAll(`#${CSS.escape(id)} .${axis}tick text`)]
  .map((node) => {
    const r = node.getBoundingClientRect();
    return [node.textContent, r.x + r.width / 2, r.y + r.height / 2];
  })"""


@dataclass
class Opened:
    """An open page, and what went wrong on it."""

    page: Page
    path: Path
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def draw_all(self) -> list[str]:
        """Scroll through the page, so that every figure is drawn; their ids."""
        self.page.evaluate(
            """async () => {
              const next = (done) => {
                requestAnimationFrame(() => setTimeout(done));
                setTimeout(done, 1000);  // a busy machine's browser may leave out a frame
              };
              const frame = () => new Promise(next);
              for (let n = 0; n < 200 && document.querySelector(".plot.pending"); n++) {
                document.querySelector(".plot.pending").scrollIntoView({ block: "center" });
                await frame();
                await frame();
              }
              window.scrollTo(0, 0);
            }"""
        )
        assert self.page.locator(".plot.pending").count() == 0
        return [
            str(name)
            for name in self.page.eval_on_selector_all(".plot", "all => all.map((p) => p.id)")
        ]

    def traces(self, figure: str) -> list[Drawn]:
        """What is drawn in a figure, by its name on the page."""
        found = self.page.evaluate(_TRACES, f"plot-{figure}")
        return [
            Drawn(**{**trace, "points": [Mark(**point) for point in trace["points"]]})
            for trace in found
        ]

    def into_view(self, figure: str) -> None:
        self.page.locator(f"#plot-{figure}").evaluate(
            "node => node.scrollIntoView({block: 'center'})"
        )
        self.page.wait_for_selector(f"#plot-{figure}[data-drawn]")

    def hover(self, figure: str, at: Mark) -> str:
        """Move the mouse onto something; the text that appears, a line a row."""
        label = self.page.locator(f"#plot-{figure} .hoverlayer .hovertext")
        self.page.mouse.move(1, 1)
        self.page.wait_for_function(_NO_LABEL, arg=f"plot-{figure}")
        self.page.mouse.move(at.x, at.y)
        label.first.wait_for(state="attached", timeout=5000)
        rows = label.first.locator("tspan.line").all_text_contents()
        return "\n".join(rows or label.first.all_text_contents())

    def ticks(self, figure: str, axis: str) -> list[tuple[float, float]]:
        """An axis' numbers, and where on the screen they stand, in pixels."""
        found = self.page.evaluate(_TICKS, [f"plot-{figure}", axis])
        place = 1 if axis.startswith("x") else 2
        return [
            (float(text[0].replace("\u2212", "-").replace(",", "")), text[place]) for text in found
        ]

    def value_at(self, figure: str, axis: str, pixel: float) -> float:
        """What a reader takes a place to mean, from the numbers at the axis."""
        ticks = self.ticks(figure, axis)
        (first, low), (last, high) = ticks[0], ticks[-1]
        return first + (pixel - low) / (high - low) * (last - first)

    def title(self, figure: str, axis: str) -> str:
        """What an axis is said to show."""
        node = self.page.locator(f"#plot-{figure} .{axis}title")
        rows = node.locator("tspan.line").all_text_contents()
        return " ".join(rows) if rows else node.text_content() or ""

    def pixels_per_unit(self, figure: str, axis: str) -> float:
        ticks = self.ticks(figure, axis)
        (first, low), (last, high) = ticks[0], ticks[-1]
        return abs((high - low) / (last - first))

    def control(self, section: str, label: str) -> Locator:
        """The select or checkbox of a section by its label."""
        begins = re.compile(f"^{re.escape(label)}")
        found = self.page.locator(f"#{section} .controls label").filter(has_text=begins)
        return found.first.locator("select, input")

    def choose(self, section: str, label: str, value: str) -> None:
        self.control(section, label).select_option(value)

    def chip(self, method: str) -> None:
        self.page.locator(f'#legend button[data-method="{method}"]').click()

    def quiet(self) -> None:
        """Nothing was complained of, and nothing asked for but the page itself."""
        assert not self.problems, self.problems[:5]
        local = (self.path.as_uri(), "data:", "blob:")  # the page itself, and what it makes
        assert [url for url in self.requests if not url.startswith(local)] == []


def open_page(
    browser: Browser, path: Path, width: int = 1600, scheme: str = "light", height: int = 1000
) -> Opened:
    """Open a report; every complaint and request is written down."""
    page = browser.new_page(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        accept_downloads=True,
    )
    page.set_default_timeout(15_000)
    opened = Opened(page, path)
    page.on("console", lambda message: opened.problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: opened.problems.append(f"error: {error}"))
    page.on("request", lambda request: opened.requests.append(request.url))
    page.on("dialog", lambda dialog: opened.problems.append(f"dialog: {dialog.message}"))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    return opened
