"""``stockpot report``: tables, figures and page of run folders, finished or not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from stockpot.report.pooling import Pool

__all__ = ["report"]

_LOGS = ("trained", "merges", "curves", "lines", "planned_stages")
"""What the record holds line by line; too much for a summary."""


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="Run folders that `stockpot run` wrote, or folders that hold some. Those that "
            "differ only in methods, seeds or task order are reported as one experiment.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for report.html, tables and figures. Default: the run folder; for several "
            "[bold]report[/].",
        ),
    ] = None,
    watch: Annotated[
        float | None,
        typer.Option(
            "--watch",
            min=1,
            metavar="SECONDS",
            help="Make it again every so many seconds until all runs are finished; an open page "
            "reloads itself.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what the report shows as JSON on stdout.")
    ] = False,
) -> None:
    """Write report.html, one file that opens offline, with tables and figures of experiments.

    Works while they run, and from damaged records: what is missing is said.
    """
    from rich.console import Console

    from stockpot.cli.output import complain, waiting
    from stockpot.report.write import read_pools, write_pools

    console = Console(stderr=True)
    if watch is not None:
        _watch(folders, output, watch, console)
    with waiting(console, "drawing the figures"):
        pools = read_pools(folders)
        page = write_pools(pools, output)
    if as_json:
        document = {"report": str(page), "experiments": [_as_json(pool) for pool in pools]}
        typer.echo(json.dumps(document, indent=2))
    else:
        _print(pools, page, console)
    for pool in pools:
        for gap in pool.gaps:
            complain(gap, head=f"note: {pool.name}" if len(pools) > 1 else "note")


def _print(pools: list[Pool], page: Path, console: Console) -> None:
    from rich.markup import escape

    from stockpot.cli.table import print_report, print_results

    for pool in pools:
        if len(pools) > 1:
            console.print(f"\n[bold]{escape(pool.name)}[/]", highlight=False)
        print_results(pool.finished)
        for count, words in ((pool.left, "are not finished"), (len(pool.failed), "failed")):
            if count:
                console.print(f"{count} of {pool.planned} runs {words}.", highlight=False)
    print_report(console, page)


def _watch(folders: list[Path], output: Path | None, seconds: float, console: Console) -> None:
    """Make the page again and again; return when all runs are finished."""
    from stockpot.errors import StockpotError
    from stockpot.report.reading import experiment_folders
    from stockpot.report.write import read_pools, write_pools

    said = set()

    def say(kind: str, text: str) -> None:
        if kind not in said:
            said.add(kind)
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    while True:
        experiment_folders(folders)  # a wrong folder is an error; no score yet is not
        try:
            pools = read_pools(folders)
        except StockpotError as error:
            say("wait", f"{error}. Waiting for the first scores; Ctrl-C stops.")
        else:
            if all(pool.left <= 0 for pool in pools):
                return
            page = write_pools(pools, output, refresh=max(1, round(seconds)))
            say("made", f"{page} is made again every {seconds:g} s; Ctrl-C stops.")
        time.sleep(seconds)


def _as_json(pool: Pool) -> dict[str, Any]:
    from stockpot.report.findings import headline

    return {
        "name": pool.name,
        "folders": [str(record.folder) for record in pool.records],
        "task_orders": pool.orders,
        "planned": pool.planned,
        "finished": len(pool.finished),
        "failed": len(pool.failed),
        "answer": headline(pool.groups),
        "gaps": pool.gaps,
        "runs": [{k: v for k, v in run.items() if k not in _LOGS} for run in pool.runs],
    }
