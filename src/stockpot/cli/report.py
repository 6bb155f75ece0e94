"""``stockpot report``: table, figures and page of a run folder, finished or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    folder: Annotated[Path, typer.Argument(help="A run folder that `stockpot run` wrote.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout.")
    ] = False,
) -> None:
    """Write the tables, figures and report.html of a run folder again, and print the table."""
    from rich.console import Console
    from rich.markup import escape

    from stockpot.cli.table import print_results
    from stockpot.report.write import read_summary, write_report

    console = Console(stderr=True)
    with console.status("drawing the figures"):
        page = write_report(folder)
    summary = read_summary(folder)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    print_results(summary)
    console.print(f"Report: [bold]{escape(str(page))}[/]")
