"""Reports to open, and the browser to open them with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from stockpot.report.write import write_report
from support.experiments import run_file
from support.oracle import Oracle
from support.pages import Opened, chromium, find_chromium, open_page
from support.reading import write_page
from support.records import TEN, write_made_up

DIGITS = Path(__file__).parents[2] / "recipes/digits.yaml"
METHODS = """[
  sequential, multitask, {name: multitask, without: even}, {name: rehearsal, fraction: [0.05, 0.1]},
  {name: sfa, p: [0.25, 0.5, 1], beta: 0.5}, {name: sfa, p: 0.5, beta: 0.2},
  {name: l1, strength: 0.01}, {name: l2, strength: [0.1, 1]},
  {name: ewc, strength: 100, samples: 20}, {name: wise-ft, beta: [0.2, 0.5]},
  {name: task-arithmetic, scale: [0.3, 0.8]}, {name: ties, density: 0.2},
  {name: fisher-merging, samples: 20}]"""
CUT_DOWN = (
    "training.epochs=2",
    "model.hidden=[16]",
    "stream.train_limit=320",
    "seeds=[0,1]",
    "evaluation.every=0.25",
    "evaluation.merges=true",
    "evaluation.line=5",
    "evaluation.kl=64",
    f"methods={METHODS}",
)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A real run of recipes/digits.yaml, cut down to some seconds, with its report."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert not run_file(DIGITS, folder, CUT_DOWN).failures
    write_report(folder)
    return folder


@pytest.fixture(scope="session")
def twenty(tmp_path_factory) -> Path:
    """Twenty tasks, ten methods, three seeds, with its report."""
    folder = write_made_up(
        tmp_path_factory.mktemp("twenty") / "run",
        tasks=[f"task {n}" for n in range(1, 21)],
        methods=TEN,
        seeds=(0, 1, 2),
        name="Twenty tasks",
    )
    shutil.move(write_page(folder), folder / "report.html")
    return folder


# Not for the whole session: while it is open, this thread can run no other event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("there is no Chromium; apt-get install chromium")
        pytest.skip("needs Chromium, which this machine has not")
    with chromium(path) as found:
        yield found


@pytest.fixture(scope="module")
def visit(browser) -> Iterator[Callable[..., Opened]]:
    """Open pages that are closed at the end; each must have been quiet all the while."""
    opened: list[Opened] = []

    def visit(path: Path, width: int = 1600, scheme: str = "light") -> Opened:
        opened.append(open_page(browser, path, width, scheme))
        return opened[-1]

    yield visit
    for page in opened:
        page.page.close()
    for page in opened:
        page.quiet()


@pytest.fixture(scope="module")
def digits_page(digits, visit) -> Opened:
    page: Opened = visit(digits / "report.html")
    page.draw_all()
    return page


@pytest.fixture(scope="module")
def twenty_page(twenty, visit) -> Opened:
    page: Opened = visit(twenty / "report.html")
    page.draw_all()
    return page


@pytest.fixture(params=["digits", "twenty"])
def both(request) -> tuple[Opened, Oracle]:
    """Each of the two reports: the real one and the large one."""
    folder: Path = request.getfixturevalue(request.param)
    return request.getfixturevalue(f"{request.param}_page"), Oracle(folder)
