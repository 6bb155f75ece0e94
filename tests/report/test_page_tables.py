"""The tables of the page: sorting, and what can be taken away."""

import csv
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from stockpot.report.style import METHOD_COLOURS
from support.latex import parse, shown
from support.oracle import Oracle, students
from support.pages import Opened
from support.reading import write_page
from support.records import THREE, write_made_up


@pytest.fixture(scope="module")
def digits_page(digits, visit) -> Opened:
    page: Opened = visit(digits / "report.html")
    page.draw_all()
    return page


def heads(page: Opened, table: str = "results") -> list[str]:
    return page.page.locator(f"#{table} thead button").evaluate_all(
        "all => all.map((b) => b.firstChild.textContent)"
    )


def column(page: Opened, head: str, table: str = "results") -> list[float | None]:
    """A column's means as they stand, from top to bottom."""
    number = heads(page, table).index(head) + 1
    texts = page.page.locator(f"#{table} tbody td:nth-child({number})").all_text_contents()
    found: list[float | None] = []
    for text in texts:
        match = re.match(r"\u2212?[\d.]+", text)
        found.append(None if match is None else float(match[0].replace("\u2212", "-")))
    return found


def press(page: Opened, head: str, table: str = "results") -> None:
    page.page.locator(f"#{table} thead button").nth(heads(page, table).index(head)).click()


def row_labels(page: Opened, table: str = "results") -> list[str]:
    return page.page.locator(f"#{table} tbody td:first-child").all_inner_texts()


def test_rows_are_all_settings_with_their_means_and_intervals(digits_page, digits):
    oracle = Oracle(digits)
    rows = digits_page.page.locator("#results tbody tr").all()
    assert len(rows) == len(oracle.settings)
    names = heads(digits_page)
    for row, setting in zip(rows, oracle.settings, strict=True):
        cells = row.locator("td").all_text_contents()
        assert setting.label.removeprefix(setting.method) in cells[0]
        for task in (0, 1):
            mean, half = students(oracle.finals(setting, [task]))
            written = cells[names.index(oracle.tasks[task])]
            assert written == f"{100 * mean:.1f} ±{100 * (half or 0):.1f}"
        mean, half = students(oracle.averages(setting))
        assert cells[names.index("average")] == f"{100 * mean:.1f} ±{100 * (half or 0):.1f}"


@pytest.mark.parametrize("head", ["even", "average", "forgotten since learned", "time", "stored"])
def test_sorting_by_a_column_both_ways_and_back(head, digits_page):
    page = digits_page
    press(page, "method")
    before, labels = column(page, head), row_labels(page)
    known = sorted(value for value in before if value is not None)
    holes = before.count(None)
    press(page, head)
    first = column(page, head)
    press(page, head)
    second = column(page, head)
    best_first = known if head not in ("even", "average") else known[::-1]
    assert first == [*best_first, *[None] * holes]
    assert second == [*best_first[::-1], *[None] * holes]
    sort = page.page.locator("#results th[aria-sort]")
    assert sort.count() == 1
    assert (sort.inner_text() or "").startswith(head)
    press(page, "method")
    assert (column(page, head), row_labels(page)) == (before, labels)


def test_rows_stay_whole_when_sorted(digits_page, digits):
    oracle = Oracle(digits)
    press(digits_page, "odd")
    odd = heads(digits_page).index("odd")
    for row in digits_page.page.locator("#results tbody tr").all():
        cells = row.locator("td").all_text_contents()
        (setting,) = [s for s in oracle.settings if titled(s.label) == cells[0].strip()]
        mean, _ = students(oracle.finals(setting, [1]))
        assert cells[odd].startswith(f"{100 * mean:.1f} ")
    press(digits_page, "method")


def titled(label: str) -> str:
    """A label as the page writes it: SFA, L2 and so on in capitals."""
    method, _, rest = label.partition(" ")
    written = {
        "sfa": "SFA",
        "l1": "L1",
        "l2": "L2",
        "ewc": "EWC",
        "ties": "TIES",
        "wise-ft": "WiSE-FT",
        "task-arithmetic": "task arithmetic",
        "fisher-merging": "Fisher merging",
    }.get(method, method)
    return f"{written} {rest}".strip()


def test_the_best_mean_of_a_column_is_bold(digits_page):
    page = digits_page
    press(page, "method")
    for head, best in (("average", max), ("forgotten since learned", min), ("time", min)):
        number = heads(page).index(head) + 1
        bold = page.page.locator(f"#results tbody td.best:nth-child({number})")
        values = [value for value in column(page, head) if value is not None]
        texts = [text.split(" ")[0].replace("\u2212", "-") for text in bold.all_text_contents()]
        assert texts
        assert {float(text) for text in texts} == {best(values)}


# What can be taken away.


def download(page: Opened, section: str, button: str, to: Path) -> Path:
    with page.page.expect_download() as event:
        page.page.locator(f"#{section} .tools button", has_text=button).first.click()
    path = to / event.value.suggested_filename
    event.value.save_as(path)
    return path


def test_csv(digits_page, digits, tmp_path):
    oracle = Oracle(digits)
    path = download(digits_page, "results", "CSV", tmp_path)
    assert path.name == "results.csv"
    assert path.read_bytes() == (digits / "results.csv").read_bytes()
    rows = list(csv.DictReader(path.open(newline="", encoding="utf-8")))
    assert [row["setting"] for row in rows] == [setting.label for setting in oracle.settings]
    for row, setting in zip(rows, oracle.settings, strict=True):
        for n, task in enumerate(oracle.tasks):
            mean, half = students(oracle.finals(setting, [n]))
            assert float(row[f"final.{task}"]) == pytest.approx(mean, rel=1e-12)
            assert float(row[f"final.{task}.half_width_95"]) == pytest.approx(half or 0, abs=1e-12)
        mean, half = students(oracle.averages(setting))
        assert float(row["average"]) == pytest.approx(mean, rel=1e-12)
        assert float(row["average.half_width_95"]) == pytest.approx(half or 0, abs=1e-12)
        assert int(row["seeds"]) == len(setting.runs)


def test_latex(digits_page, digits, tmp_path):
    oracle = Oracle(digits)
    path = download(digits_page, "results", "LaTeX", tmp_path)
    assert path.name == "results.tex"
    names, rows, caption = parse(path.read_text())
    assert [shown(row[0]) for row in rows] == [titled(s.label) for s in oracle.settings]
    for row, setting in zip(rows, oracle.settings, strict=True):
        mean, half = students(oracle.averages(setting))
        expected = rf"${100 * mean:.1f} \pm {100 * (half or 0):.1f}$"
        assert row[names.index("average (%)")] == expected
    assert "2 runs" in caption


def test_markdown_and_the_experiments_file(digits_page, digits, tmp_path):
    path = download(digits_page, "results", "Markdown", tmp_path)
    assert path.read_text() == (digits / "results.md").read_text()
    yaml = download(digits_page, "how", "YAML", tmp_path)
    assert yaml.read_text() == (digits / "experiment.yaml").read_text()


@pytest.mark.parametrize("figure", ["average", "plane", "distance-l2"])
def test_a_figure_as_png(figure, digits_page, tmp_path):
    path = download(digits_page, figure, "PNG", tmp_path)
    assert path.name == f"{figure}.png"
    image = Image.open(path).convert("RGB")
    assert image.width >= 2000
    pixels = np.asarray(image).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 20
    sfa = 255 * np.array(to_rgb(METHOD_COLOURS["sfa"]))  # markers of many are a little clear
    assert np.abs(pixels - sfa).max(axis=1).min() < 30
    assert tuple(pixels[0]) == (255, 255, 255)


@pytest.mark.parametrize("figure", ["average", "plane", "curves-a", "cost-seconds"])
def test_a_figure_as_svg(figure, digits_page, tmp_path):
    path = download(digits_page, figure, "SVG", tmp_path)
    root = ET.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = "".join(root.itertext())
    shown_title = digits_page.title(figure, "x").split(" (")[0].split(" ")[0]
    assert shown_title in text
    assert "Digits, even then odd" in text
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert "script" not in names
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 5


def test_a_matrix_as_png_and_svg(digits_page, tmp_path):
    for kind in ("PNG", "SVG"):
        with digits_page.page.expect_download() as event:
            digits_page.page.locator(".map .tools button", has_text=kind).first.click()
        path = tmp_path / event.value.suggested_filename
        event.value.save_as(path)
        assert path.name == f"matrix-0.{kind.lower()}"
        if kind == "PNG":
            assert len(Image.open(path).convert("RGB").getcolors(10**7) or []) > 20
        else:
            assert ET.parse(path).getroot().tag.endswith("svg")


def test_an_image_shows_what_the_page_shows(digits_page, tmp_path):
    """With a method alone, the image has that method alone."""
    digits_page.chip("sfa")
    try:
        text = "".join(
            ET.parse(download(digits_page, "plane", "SVG", tmp_path)).getroot().itertext()
        )
    finally:
        digits_page.chip("sfa")
    assert "SFA" in text
    assert "WiSE-FT" not in text


# The second table.


def test_benchmark_by_benchmark(tmp_path, visit):
    folder = write_made_up(tmp_path / "run", extra=["f1"], methods=THREE)
    page: Opened = visit(write_page(folder))
    oracle = Oracle(folder)
    names = heads(page, "benchmarks")
    assert names == [
        "method",
        *(f"{task}: {metric}" for task in oracle.tasks for metric in ("accuracy", "f1")),
    ]
    for row, setting in zip(
        page.page.locator("#benchmarks tbody tr").all(), oracle.settings, strict=True
    ):
        cells = row.locator("td").all_text_contents()
        for n, task in enumerate(oracle.tasks):
            mean, half = students(oracle.finals(setting, [n]))
            assert (
                cells[names.index(f"{task}: accuracy")]
                == f"{100 * mean:.1f} ±{100 * (half or 0):.1f}"
            )
            assert cells[names.index(f"{task}: f1")] == f"{50 * mean:.1f} ±{50 * (half or 0):.1f}"
    path = download(page, "benchmarks", "CSV", tmp_path)
    assert path.name == "benchmarks.csv"
    rows = list(csv.DictReader(path.open(newline="")))
    mean, _ = students(oracle.finals(oracle.settings[0], [1]))
    assert float(rows[0]["odd.test.f1"]) == pytest.approx(mean / 2)
    press(page, "odd: f1", "benchmarks")
    values = [value for value in column(page, "odd: f1", "benchmarks") if value is not None]
    assert values == sorted(values, reverse=True)
    page.chip("sfa")
    assert page.page.locator("#benchmarks tbody tr").count() == 1
