"""Intervals, groups and the tables, against numbers worked out here."""

import csv
import io
import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stockpot.report.table import Group, Interval, group_runs, result_columns, to_csv, to_markdown
from support.reports import T2, T3, made_up, sfa, two

# Intervals.


@pytest.mark.parametrize(
    ("values", "mean", "half_width"),
    [
        ([0.7, 0.8, 0.9], 0.8, T3 * 0.1 / math.sqrt(3)),
        ([0.2, 0.6], 0.4, T2 * 0.4 / 2),
        ([0.5, 0.5, 0.5, 0.5], 0.5, 0.0),
        ([0.25], 0.25, None),
    ],
)
def test_interval_by_hand(values, mean, half_width):
    interval = Interval.of(values)
    assert interval is not None
    assert interval.n == len(values)
    assert interval.mean == pytest.approx(mean)
    if half_width is None:
        assert interval.half_width is None
    else:
        assert interval.half_width == pytest.approx(half_width, rel=1e-9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_interval_is_students(values):
    interval = Interval.of(values)
    assert interval is not None
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert interval.mean == pytest.approx(np.mean(values), abs=1e-9)
    expected = stats.t.isf(0.025, len(values) - 1) * error
    assert interval.half_width == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_interval_of_what_is_missing_is_none():
    assert Interval.of([]) is None
    assert Interval.of([None]) is None
    assert Interval.of([0.5, None, 0.7]) is None  # not the mean of those that are there


# Groups.


def test_runs_are_grouped_by_method_and_setting_in_order():
    summary = [
        made_up("sfa", two((0.5, 0.6)), seed, sfa(p, 0.5)) for seed in (0, 1) for p in (0.25, 1.0)
    ]
    # The same settings, their keys in another order.
    moved = dict(reversed(sfa(0.25, 0.5).items()))
    summary += [made_up("sequential", two((0.1, 0.9))), made_up("sfa", two((1, 1)), 2, moved)]
    groups = group_runs(summary)
    assert [(g.method, g.settings.get("p"), [r["seed"] for r in g.runs]) for g in groups] == [
        ("sfa", 0.25, [0, 1, 2]),
        ("sfa", 1.0, [0, 1]),
        ("sequential", None, [0]),
    ]


def test_methods_with_the_same_settings_are_different_groups():
    summary = [made_up(m, two((0.5, 0.5)), settings={"strength": 1.0}) for m in ("l1", "l2")]
    assert [group.method for group in group_runs(summary)] == ["l1", "l2"]


def test_matrix_is_the_mean_over_seeds_and_knows_rows_that_are_not_there():
    one = made_up("sfa", [[0.2, 0.4, 0.0], [0.5, 0.5, 0.5], [1.0, 0.0, 0.5]])
    other = made_up("sfa", [[0.4, 0.0, 0.1], [0.7, 0.5, 0.5], [0.0, 0.0, 0.1]], 1)
    (group,) = group_runs([one, other])
    expected = [[0.3, 0.2, 0.05], [0.6, 0.5, 0.5], [0.5, 0.0, 0.3]]
    assert group.matrix() == [pytest.approx(row) for row in expected]
    (joint,) = group_runs([made_up("multitask", [None, None, [0.5, 0.6, 0.7]])])
    assert joint.matrix() == [[None] * 3, [None] * 3, [0.5, 0.6, 0.7]]
    final = joint.final("task 1")
    assert final == Interval(0.6, None, 1)


# The table.


TABLE = [
    *(made_up("sfa", two((a, 0.9)), n, sfa(0.25, 0.5)) for n, a in enumerate((0.5, 0.6, 0.7))),
    made_up("multitask", [None, [0.95, 0.85]], forgetting=None, forgetting_vs_best=None, bwt=None),
]


NAMES = ("even", "odd")


def table(names: Sequence[str] = NAMES) -> list[Group]:
    """The groups of TABLE, whose two tasks have these names."""
    return group_runs([{**run, "tasks": list(names)} for run in TABLE])


def cells(line: str) -> list[str]:
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [cell.strip() for cell in line[1:-1].split("|")]


def test_markdown_is_one_table_with_units_intervals_and_no_minus_zero():
    text = to_markdown(table(), NAMES)
    lines = text.splitlines()
    assert text.endswith("|\n")
    head, rule, *rows = lines
    assert len({line.count("|") for line in lines}) == 1
    assert re.fullmatch(r"\|(:?-+:?\|)+", rule)
    named = [dict(zip(cells(head), cells(row), strict=True)) for row in rows]
    first, second = named
    half = T3 * 0.1 / math.sqrt(3) * 100
    assert first["method"] == "sfa p=0.25 beta=0.5"
    assert first["even (%)"] == f"60.0 ±{half:.1f}"
    assert first["odd (%)"] == "90.0 ±0.0"
    assert first["average (%)"] == f"75.0 ±{half / 2:.1f}"
    assert first["BWT (% points)"] == "-12.5 ±0.0"
    assert first["FWT (% points)"] == "0.0 ±0.0"  # -0.01 rounds to no minus
    assert first["peak memory (MB)"] == "3 ±0"
    assert second["even (%)"] == "95.0"  # one seed: no interval
    assert second["BWT (% points)"] == "-"
    assert "±" not in rows[1]


def test_csv_round_trips_to_the_same_numbers():
    groups = table()
    rows = list(csv.DictReader(io.StringIO(to_csv(groups, NAMES))))
    assert [row["method"] for row in rows] == ["sfa", "multitask"]
    assert [int(row["seeds"]) for row in rows] == [3, 1]
    assert rows[0]["setting"] == "sfa p=0.25 beta=0.5"
    for row, group in zip(rows, groups, strict=True):
        wanted = {f"final.{name}": group.final(name) for name in NAMES}
        for key in group.runs[0]["metrics"]:
            if key in row:
                wanted[key] = group.metric(key)
        assert {"average", "forgetting", "bwt", "fwt", "peak_memory"} <= wanted.keys()
        # Every column is accounted for.
        assert len(row) == 3 + 2 * len(wanted)
        for key, interval in wanted.items():
            cell, half = row[key], row[f"{key}.half_width_95"]
            if interval is None:
                assert (cell, half) == ("", "")
            else:
                assert float(cell) == interval.mean  # to the last bit
                assert (float(half) if half else None) == interval.half_width
    assert float(rows[0]["final.even"]) == pytest.approx(0.6)
    assert float(rows[0]["average"]) == pytest.approx(0.75)


def test_csv_quotes_task_names():
    names = ['cats, "small"', "dogs\nlarge"]
    (row,) = csv.DictReader(io.StringIO(to_csv(table(names)[:1], names)))
    assert float(row[f"final.{names[0]}"]) == pytest.approx(0.6)
    assert float(row[f"final.{names[1]}"]) == pytest.approx(0.9)


def test_markdown_survives_a_bar_in_a_task_name():
    names = ("cats|dogs", "big\r\nbirds\u2028")
    lines = to_markdown(table(names), names).splitlines()
    assert len(lines) == 4
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


# Costs.


def test_costs_have_columns_where_they_are_known():
    """Records of earlier versions say nothing of storage and passes."""
    old = group_runs(TABLE)
    assert not {"stored_bytes", "extra_share"} & {column.key for column in result_columns(old)}
    costs = {"stored_bytes": 2_500_000, "extra_examples": 50, "trained_examples": 200}
    new = group_runs(
        [
            made_up("rehearsal", two((0.5, 0.5)), 0, **costs),
            made_up("rehearsal", two((0.5, 0.5)), 1, **{**costs, "extra_examples": 70}),
            made_up("ewc", two((0.5, 0.5)), 0, stored_bytes=0, extra_examples=0),
        ]
    )
    by_key = {column.key: column for column in result_columns(new)}
    assert by_key["stored_bytes"].text(new[0]) == "2.50 ±0.00"
    share = by_key["extra_share"].value(new[0])
    assert share is not None
    assert share.mean == pytest.approx(0.3)
    assert share.half_width == pytest.approx(T2 * 0.1 / 2)
    assert by_key["extra_share"].unit == "%"
    assert by_key["extra_share"].text(new[1]) == "-"  # a share of what is not known


def test_a_column_with_a_hole_has_no_mean_over_the_rest():
    runs = [made_up("sfa", two((0.5, 0.5)), n, kl_from_anchor=k) for n, k in enumerate((1.0, None))]
    (group,) = group_runs(runs)
    by_key = {column.key: column for column in result_columns([group])}
    assert by_key["kl_from_anchor"].text(group) == "-"
