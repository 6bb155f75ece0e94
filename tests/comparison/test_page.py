"""docs/compare.md: what it lists is what there is, and its numbers are those of the code."""

import json
import re
from pathlib import Path

import pytest
import typer

from comparison.tables import row, table
from stockpot.cli.app import app
from stockpot.comparison.right_wrong import smallest_visible
from stockpot.comparison.verdict import Limit, Pairing, judge
from stockpot.comparison.wording import as_json

PAGE = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()


def test_every_option_is_on_the_page():
    command = typer.main.get_command(app).commands["compare"]
    for parameter in command.params:
        for name in parameter.opts:
            if name.startswith("--") and name != "--help":
                assert f"{name}" in PAGE, name


def test_every_key_of_the_json_is_on_the_page():
    pairing = Pairing("a", "b", None, (0,), tuple(row(*table(2, 1, 9), task=t) for t in "tu"), ())
    said = json.loads(json.dumps(as_json(judge([pairing], "a", "b", Limit(0.02)))))

    def keys(value):
        if isinstance(value, dict):
            for key, item in value.items():
                yield key
                yield from keys(item)
        elif isinstance(value, list):
            for item in value:
                yield from keys(item)

    for key in keys(said):
        assert f"`{key}`" in PAGE, key


def test_what_some_numbers_of_items_show_is_as_the_page_says():
    heads, points = (
        [cell.strip() for cell in line.strip("|").split("|")[1:]]
        for line in re.findall(r"^\| (?:items|changes from).*", PAGE, re.M)
    )
    for items, said in zip(heads, points, strict=True):
        found = smallest_visible(int(items.replace(",", "")), 0.2, 0.05)
        assert 100 * found == pytest.approx(float(said), abs=0.051)


def test_the_tables_on_the_page_are_what_the_items_give():
    """The rows of right and wrong, from the items lost and won that their numbers stand for."""
    rows = [row(*table(2, 0, 20, 18), task="even"), row(*table(0, 16, 20, 3), task="odd")]
    result = judge([Pairing("a", "b", None, (0,), tuple(rows), ())], "a", "b", Limit(0.02))
    from stockpot.comparison.wording import cells, limit_sentence

    shown = [re.split(r"\s{2,}", line.strip()) for line in PAGE.splitlines()]
    for judged in result.judged:
        own = [cell for cell in cells(judged) if cell != "accuracy"]
        assert [*own, judged.verdict] in shown
    assert limit_sentence(result) in PAGE.replace("\n", " ")
