r"""The report's page of 20 tasks, 10 methods and 3 seeds: its size, and how soon it can be read.

    python benchmarks/report_page.py --write benchmarks/results/report_page.md

The record is made up, with all that a record can hold: scores ten times a task and around every
merge event (`evaluation.every: 0.1`, `merges: true`), and eleven points on the line from the anchor
after every task (`line: 11`). Opening is from the navigation's start to the first figure on the
screen, in a Chromium that has not seen the page before; the whole page is drawn when all figures
are, having scrolled through it. Needs Chromium and playwright; quote it from an idle machine.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TASKS, SEEDS = 20, (0, 1, 2)

_FIRST_FIGURE = """
  new MutationObserver((changes, observer) => {
    if (document.querySelector(".plot[data-drawn]")) {
      observer.disconnect();
      const painted = () => { window.opened = performance.now(); };
      requestAnimationFrame(() => requestAnimationFrame(painted));
    }
  }).observe(document, { subtree: true, childList: true, attributes: true });
"""


def make(folder: Path) -> tuple[Path, float]:
    """Write the record and its report; the page, and the seconds that the report took."""
    from stockpot.report.write import write_report
    from support.records import TEN, write_made_up

    names = [f"task {n}" for n in range(1, TASKS + 1)]
    write_made_up(folder, tasks=names, methods=TEN, seeds=SEEDS, every=10, line=11)
    begin = time.perf_counter()
    page = write_report(folder)
    return page, time.perf_counter() - begin


def visit(browser: Any, path: Path, width: int) -> tuple[float, float]:
    """Seconds to the first figure, and to draw all others."""
    from support.pages import Opened

    context = browser.new_context(viewport={"width": width, "height": 1000})
    page = context.new_page()
    page.add_init_script(_FIRST_FIGURE)
    page.goto(path.as_uri())
    page.wait_for_function("window.opened !== undefined")
    opened = page.evaluate("window.opened") / 1000
    begin = time.perf_counter()
    Opened(page, path).draw_all()
    drawn = time.perf_counter() - begin
    context.close()
    return opened, drawn


def measure(rounds: int) -> str:
    """The table."""
    from support.pages import chromium, find_chromium

    chosen = find_chromium()
    if chosen is None:
        raise SystemExit("there is no Chromium on this machine; apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        path, seconds = make(Path(folder) / "run")
        with chromium(chosen) as browser:
            version = browser.version
            visits = {
                width: [visit(browser, path, width) for _ in range(rounds)] for width in (1600, 400)
            }
        text = path.read_text(encoding="utf-8")
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    sizes = {
        "size of the file": len(text.encode()),
        "of it the numbers": len(data[1].encode()),
    }
    machine = f"{platform.machine()}, Chromium {version.split('.')[0]}"
    lines = [
        "# The page of a large report",
        "",
        f"`python benchmarks/report_page.py`, {machine}, Python {platform.python_version()}: "
        f"{TASKS} tasks, 10 methods, {len(SEEDS)} seeds, scores ten times a task, eleven points on "
        f"the line after every task; medians of {rounds}.",
        "",
        "| | |",
        "|---|---:|",
        *(f"| {name} | {size / 1e6:.2f} MB |" for name, size in sizes.items()),
        f"| making it, with tables and figures | {seconds:.1f} s |",
    ]
    for width, times in visits.items():
        opened, drawn = ([t[n] for t in times] for n in (0, 1))
        spread = f"({min(opened):.2f} to {max(opened):.2f})"
        lines += [
            f"| opening it, {width} pixels wide | {statistics.median(opened):.2f} s {spread} |",
            f"| drawing the rest, {width} pixels wide | {statistics.median(drawn):.2f} s |",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    text = measure(options.rounds)
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
