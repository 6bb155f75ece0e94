"""The LaTeX table, read back by a small reader of its own."""

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.report.latex import escape, to_latex
from stockpot.report.table import group_runs, result_columns, task_columns
from support.latex import parse, shown
from support.reports import T3, by_mean, made_up, two


def latex(summary: list[Any], tasks: list[str]) -> str:
    groups = group_runs([{**run, "tasks": tasks} for run in summary])
    columns = (*task_columns(groups, tasks), *result_columns(groups))
    return to_latex(groups, columns, tasks)


def test_rows_and_numbers():
    summary = by_mean("sfa", 0.8, 0.2, 3, {"p": 0.25, "beta": 0.5}) + by_mean("ewc", 0.7, 0, 1)
    heads, rows, caption = parse(latex(summary, ["even", "odd"]))
    first, second = (dict(zip(heads, row, strict=True)) for row in rows)
    half = T3 * 0.1 / math.sqrt(3) * 100
    assert first["method"] == "SFA p=0.25 beta=0.5"
    assert first["average (%)"] == rf"$80.0 \pm {half:.1f}$"
    assert first["BWT (% points)"] == r"$-12.5 \pm 0.0$"
    assert second["method"] == "EWC"
    assert second["average (%)"] == "$70.0$"
    assert "2 tasks" in caption
    assert "booktabs" in latex(summary, ["even", "odd"])


def test_columns_without_a_number_are_left_out_and_holes_are_dashes():
    without = dict.fromkeys(("fwt", "kl_from_anchor"))
    summary = [
        made_up("sequential", two((0.5, 0.6)), **without),
        made_up("multitask", [None, [0.9, 0.8]], bwt=None, **without),
    ]
    heads, rows, _ = parse(latex(summary, ["a", "b"]))
    assert not [head for head in heads if head.startswith(("FWT", "KL"))]
    cells = [row[heads.index("BWT (% points)")] for row in rows]
    assert cells == ["$-12.5$", "--"]


def test_the_caption_counts_runs():
    def caption(seeds: int) -> str:
        return parse(latex(by_mean("sfa", 0.8, 0.2, seeds), ["a", "b"]))[2]

    assert "one run" in caption(1)
    assert "mean over 5 runs" in caption(5)
    uneven = by_mean("sfa", 0.8, 0.2, 5) + by_mean("ewc", 0.8, 0.2, 2)
    assert "mean over 2 to 5 runs" in parse(latex(uneven, ["a", "b"]))[2]


HOSTILE = r"a_b & 50 % of $x^2$ {\input{x}} #1 ~ <b>"


def test_names_are_set_as_they_are():
    summary = [made_up("sequential", two((0.5, 0.6))), made_up("[h]*", two((0.5, 0.6)))]
    heads, rows, _ = parse(latex(summary, [HOSTILE, "b"]))
    assert heads[1] == f"{HOSTILE} (%)"
    assert [shown(row[0]) for row in rows] == ["sequential", "[h]*"]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=30))
def test_escape_round_trips(text):
    assert shown(escape(text)) == text


@pytest.mark.parametrize("space", ["\n", "\r\n", "\r", "\u2028", "\n\n"])
def test_a_line_break_in_a_name_is_a_space(space):
    heads, rows, _ = parse(latex([made_up("sequential", two((0.5, 0.6)))], [f"a{space}b", "c"]))
    assert re.fullmatch(r"a +b \(%\)", heads[1])
    assert len(rows) == 1
