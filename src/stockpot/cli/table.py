"""The result as one table in the terminal."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from stockpot.cli.output import counted
from stockpot.report.findings import YARDSTICKS, headline
from stockpot.report.table import (
    Column,
    Group,
    group_runs,
    measure_of,
    result_columns,
    task_columns,
)

__all__ = ["print_report", "print_results"]

_MOST_TASKS = 6
_PAPER = 240
# What goes first when the terminal is too narrow for everything; the files keep all of it.
_TASKS = "final."
_DISPENSABLE = (
    "bwt",
    "peak_memory",
    "fwt",
    "forgetting_vs_best",
    "kl_from_anchor",
    "seconds",
    "l2_to_anchor",
)


def print_results(summary: Sequence[dict[str, Any]]) -> None:
    """Mean and 95 % interval per method and setting, and the answer in two sentences."""
    if not summary:
        return
    console = Console()
    if not sys.stdout.isatty():
        console.width = _PAPER  # a file or a pipe has room for everything
    groups = group_runs(summary)
    tasks = summary[0]["tasks"]
    shown = task_columns(groups, tasks) if len(tasks) <= _MOST_TASKS else ()
    columns: list[Column] = [*shown, *result_columns(groups)]
    left_out = []
    for key in (*_DISPENSABLE, _TASKS):
        if _width(console, groups, columns) <= console.width:
            break
        gone = [column for column in columns if column.key.startswith(key)]
        left_out += [column.title for column in gone] if key != _TASKS else ["the single tasks"]
        columns = [column for column in columns if column not in gone]
    first = summary[0]
    console.print(
        f"{first['stream']}, {first['scenario']}, {counted(len(tasks), 'task')}; final scores",
        style="bold",
        highlight=False,
        markup=False,
    )
    console.print(_table(groups, columns), highlight=False)
    seeds = max(len(group.runs) for group in groups)
    orders = len({tuple(run["tasks"]) for run in summary})
    over = f"{seeds} seeds" if orders == 1 else f"{seeds} runs, of {orders} task orders,"
    notes = [
        f"Mean over {over} ± half of a 95 % interval" if seeds > 1 else "One seed: no interval"
    ]
    if left_out:
        notes.append(f"no room for {', '.join(left_out)} (see results.md)")
    if len(tasks) > _MOST_TASKS:
        notes.append(f"the {len(tasks)} tasks one by one are in results.md")
    console.print("; ".join(notes) + ".", style="dim", highlight=False)
    answer = headline(groups)
    if answer:
        console.print(answer, highlight=False, markup=False)


def print_report(
    console: Console, page: Path, summary: Sequence[dict[str, Any]] | None = None
) -> None:
    """Where the report is, as a path that opens with a click in a terminal that can do so.

    Args:
        console: where to write.
        page: the report.
        summary: of the run folder that the report is in, to say how its settings are compared.
    """
    link = page.resolve().as_uri() if console.file.isatty() else None
    text = Text.assemble("Report: ", (str(page), Style(bold=True, link=link)))
    console.print(text, soft_wrap=True, highlight=False)
    if summary and _has_verb("compare") and (pair := _worth_comparing(summary)):
        sides = [shlex.quote(f"{page.parent}:{setting}") for setting in pair]
        line = Text(f"Task by task: stockpot compare {' '.join(sides)}")
        console.print(line, soft_wrap=True, highlight=False)


def _has_verb(name: str) -> bool:
    from stockpot.cli.app import app

    return any(command.name == name for command in app.registered_commands)


def _worth_comparing(summary: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    """Plain fine-tuning and the best of the others, as ``stockpot compare`` calls them."""
    groups = group_runs(summary)
    sign = measure_of(summary).sign
    plain = [group for group in groups if group.method == "sequential"]
    others = [group for group in groups if group.method not in ("sequential", *YARDSTICKS)]
    scored = [(score, group) for group in others if (score := group.metric("average"))]
    if not plain or not scored:
        return None
    _, best = max(scored, key=lambda pair: sign * pair[0].mean)
    names = [group.runs[0]["run"].rpartition("-seed")[0] for group in (plain[0], best)]
    return names[0], names[1]


def _head(column: Column) -> str:
    words = column.title.split(" since ")
    title = "\n".join([words[0], f"since {words[1]}"]) if len(words) == 2 else column.title
    return f"{title}\n{column.unit}" if column.unit else title


def _table(groups: Sequence[Group], columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(Text(_head(column)), justify="right", no_wrap=True)
    for group in groups:
        table.add_row(Text(group.label), *(column.text(group) for column in columns))
    return table


def _width(console: Console, groups: Sequence[Group], columns: Sequence[Column]) -> int:
    unlimited = console.options.update(max_width=10 * _PAPER)
    return console.measure(_table(groups, columns), options=unlimited).maximum
