"""``stockpot``: assembles the verbs and turns errors into messages and exit codes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from stockpot import __version__
from stockpot.cli import compare as compare_verb
from stockpot.cli import distance as distance_verb
from stockpot.cli import fisher as fisher_verb
from stockpot.cli import list_ as list_verb
from stockpot.cli import merge as merge_verb
from stockpot.cli import plan as plan_verb
from stockpot.cli import report as report_verb
from stockpot.cli import run as run_verb
from stockpot.cli.output import complain
from stockpot.errors import ConfigError, StockpotError
from stockpot.processes import let_main_end, said_by_main

__all__ = ["app", "main"]

app = typer.Typer(
    name="stockpot",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Fine-tune a model on one task after another without it forgetting the earlier ones.",
    epilog="Start with: stockpot run recipes/digits.yaml (real images, no download)",
)
app.command(
    "run",
    no_args_is_help=True,
    epilog="The least that an experiment needs: [green]{stream: digits, model: mlp, methods: "
    "\\[sequential, sfa]}[/]. `stockpot list` shows all that may stand in one.",
)(run_verb.run)
app.command(
    "plan",
    no_args_is_help=True,
    epilog="On a cluster: [green]stockpot plan X.yaml --slurm --time 04:00:00 > submit.sh; bash "
    "submit.sh[/]",
)(plan_verb.plan)
app.command("list")(list_verb.list_)
app.command(
    "merge",
    no_args_is_help=True,
    epilog="For example: [green]stockpot merge ties --base BASE A B:0.5 --density 0.2 -o OUT[/]",
)(merge_verb.merge)
app.command(
    "compare",
    cls=compare_verb.CompareCommand,
    no_args_is_help=True,
    epilog=compare_verb.EPILOG,
)(compare_verb.compare)
app.command("distance", no_args_is_help=True)(distance_verb.distance)
app.command("fisher", no_args_is_help=True)(fisher_verb.fisher)
app.command("report", no_args_is_help=True)(report_verb.report)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"stockpot {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> None:
    """Run the command line.

    Exit codes: 0 done; 1 something failed (what was finished is kept); 2 the command or the
    experiment file is wrong; 130 stopped by Ctrl-C.
    """
    try:
        app()
    except StockpotError as error:
        if said_by_main(error):
            let_main_end()  # which ends this process too; if not, nobody else has met the error
        complain(str(error))
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        sys.exit(1)
