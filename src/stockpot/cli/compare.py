"""``stockpot compare``: what was forgotten and what was learned, item by item."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from stockpot.cli.output import complain
from stockpot.errors import ConfigError, StockpotError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from stockpot.comparison.models import Options
    from stockpot.comparison.verdict import Comparison, Judged, Limit, Pairing, Result

__all__ = ["EPILOG", "CompareCommand", "compare"]

_STDOUT = "-"
_PAPER = 240
_LINE_SECONDS = 5.0
_SHORT = {"95 % interval": "95 %\ninterval", "visible from": "visible\nfrom"}
_DISPENSABLE = ("visible from", "p", "n")
"""What goes first where there is no room."""
_COLOURS = {"forgotten": "bold red", "learned": "bold green", "too few items": "yellow"}

EPILOG = (
    "Exit codes: 0 passed, or no limit was given; 1 with --max-forgetting: a task is forgotten by "
    "more than that, beyond chance; 2 nothing could be compared: a wrong command, a missing or "
    "damaged file; 3 the items cannot tell.\n\n"
    "For example: [green]stockpot compare runs/x/runs/sequential-seed0@0 "
    "runs/x/runs/sequential-seed0[/], [green]stockpot compare runs/x:sequential "
    "runs/x:sfa-p0.25-beta0.5 --max-forgetting 0.02[/], [green]stockpot compare BASE TUNED --task "
    "questions.jsonl[/]"
)


class CompareCommand(TyperCommand):
    """``--markdown`` may stand alone: then it means standard output."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a lone ``--markdown`` its value."""
        following = [*args[1:], "--"]
        alone = [
            word == "--markdown" and after.startswith("-") and after != _STDOUT
            for word, after in zip(args, following, strict=True)
        ]
        words = [
            f"{word}={_STDOUT}" if lone else word for word, lone in zip(args, alone, strict=True)
        ]
        return super().parse_args(ctx, words)


def compare(
    before: Annotated[
        str,
        typer.Argument(
            metavar="BEFORE",
            help="A run (FOLDER/runs/RUN), a setting with all its seeds (FOLDER:SETTING), an "
            "experiment (FOLDER), each with @STAGE or not (@start, @0, @TASK); or a model, with "
            "--task or --stream.",
        ),
    ],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="The same.")],
    max_forgetting: Annotated[
        float | None,
        typer.Option(
            help="Fail if a task is forgotten by more, in its score's unit: 0.02 is 2 points of "
            "accuracy, or 0.02 nats of loss.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Pass only if every interval ends within the limit; too few items then never do.",
        ),
    ] = False,
    every_score: Annotated[
        bool, typer.Option("--all", help="Show the scores that do not count for a task, too.")
    ] = False,
    same_items: Annotated[
        bool,
        typer.Option(
            "--same-items", help="The data differ, but I know that the test items do not."
        ),
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Score two models on all rows of this file; may be given several times."),
    ] = None,
    stream: Annotated[
        Path | None,
        typer.Option(
            metavar="EXPERIMENT.yaml", help="Score two models on the test items of its tasks."
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Items scored at a time.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many items a task.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Longest text in tokens; longer ones are cut.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    run_programs: Annotated[
        bool,
        typer.Option("--run-programs", help="Allow HumanEval to run what the models write."),
    ] = False,
    markdown: Annotated[
        str | None,
        typer.Option(
            metavar="[FILE]", help="Write Markdown for a pull request; alone: print it instead."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.")
    ] = False,
) -> None:
    """What AFTER has forgotten and what it has learned since BEFORE, task by task.

    The models are compared on the same test items, one by one, with tests that say whether it can
    be chance. Few items are called few.
    """
    if markdown == _STDOUT and as_json:
        raise ConfigError("--markdown and --json both print on stdout; give --markdown a file")
    models = bool(task) or stream is not None
    options = {
        "--batch-size": batch_size,
        "--limit": limit,
        "--max-length": max_length,
        "--run-programs": run_programs or None,
    }
    _check(models, task, stream, same_items, options)
    _check_markdown(markdown)
    try:
        bound = _limit(max_forgetting, strict)
        if models:
            from stockpot.comparison.models import Options

            how = Options(batch_size, limit, max_length, device, run_programs)
            result = _of_models(before, after, task or [], stream, how, bound)
        else:
            result = _of_runs(before, after, same_items, bound)
        _check_unit(result)
        _show(result, every_score, markdown, as_json)
    except KeyboardInterrupt:
        complain("nothing was compared", "stopped")
        raise typer.Exit(130) from None
    except StockpotError as error:
        # 1 is for forgetting: what cannot be compared has its own exit code.
        complain(str(error))
        raise typer.Exit(2) from None
    except OSError as error:
        complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        raise typer.Exit(2) from None
    except Exception:  # a fault of ours, or of a library, is no verdict either
        traceback.print_exc()
        raise typer.Exit(2) from None
    raise typer.Exit(result.exit_code)


def _check(
    models: bool,
    task: list[str] | None,
    stream: Path | None,
    same_items: bool,
    options: dict[str, Any],
) -> None:
    if task and stream is not None:
        raise ConfigError("--task and --stream both say what to score; give one of them")
    if models and same_items:
        raise ConfigError("--same-items is for runs; two models are scored on the same items")
    if not models:
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ConfigError(
                f"{', '.join(given)}: is for two models, with --task FILE or --stream "
                "EXPERIMENT.yaml; runs are compared by the items they kept"
            )


def _check_markdown(target: str | None) -> None:
    """Refuse what cannot be written before models are scored for an hour, not after."""
    if target is None or target == _STDOUT:
        return
    path = Path(target)
    if not target.strip():
        raise ConfigError("--markdown: the file's name is empty; give one, or --markdown alone")
    if path.is_dir():
        raise ConfigError(f"--markdown {target}: is a folder; give a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--markdown {target}: there is no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--markdown {target}: may not be written to {str(path.parent)!r}")


def _limit(value: float | None, strict: bool) -> Limit | None:
    if value is None:
        if strict:
            raise ConfigError("--strict says how to keep a limit: give --max-forgetting, too")
        return None
    from stockpot.comparison.verdict import Limit

    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"--max-forgetting {value}: give a number from 0")
    return Limit(value, strict)


def _check_unit(result: Result) -> None:
    """2 for 2 % is a likely mistake, and would let everything pass."""
    if result.limit is None or result.limit.value < 1:
        return
    shares = [judged.row.task for judged in result.judged if judged.row.share]
    if shares:
        value = result.limit.value
        raise ConfigError(
            f"--max-forgetting {value:g}: the score of {shares[0]} is a share, of which it is in "
            f"the unit: {value:g} points are {value / 100:g}"
        )


# The two ways to compare.


def _of_runs(before: str, after: str, same_items: bool, limit: Limit | None) -> Result:
    from rich.console import Console

    with Console(stderr=True).status("comparing"):
        from stockpot.comparison.recorded import pair_sides
        from stockpot.comparison.sides import read_side

        sides = read_side(before, "BEFORE"), read_side(after, "AFTER")
        pairs, notes = pair_sides(*sides, same_items)
        return _judged(pairs, before, after, limit, notes)


def _of_models(
    before: str,
    after: str,
    tasks: list[str],
    stream: Path | None,
    options: Options,
    limit: Limit | None,
) -> Result:
    from rich.console import Console

    from stockpot.experiment.environment import quiet_libraries

    console = Console(stderr=True)
    # What libraries print must not stand in the result.
    with contextlib.redirect_stdout(sys.stderr):
        with console.status("loading PyTorch and Transformers"):
            quiet_libraries()
            from stockpot.comparison.models import plan_models, score_models
        with console.status("reading the tasks"):
            plan = plan_models(before, after, tasks, stream, options)
        with _progress(console) as progress:
            pairing, notes = score_models(plan, progress)
        with console.status("comparing"):
            return _judged([pairing], before, after, limit, notes)


def _judged(
    pairs: list[Pairing], before: str, after: str, limit: Limit | None, notes: list[str]
) -> Result:
    from stockpot.comparison.verdict import judge

    if not any(row.headline for pair in pairs for row in pair.rows):
        reasons = [f"{x.task} {x.score}: {x.reason}" for pair in pairs for x in pair.left]
        raise StockpotError("nothing can be compared: " + "; ".join(reasons[:6]))
    if len(pairs) == 1:
        before, after = pairs[0].before, pairs[0].after
    return judge(pairs, before, after, limit, notes)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for what is scored on a terminal; elsewhere a line now and then."""
    if console.is_terminal:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            bar = bars.add_task("loading the models", total=None)
            now = ""

            def show(what: str, done: int, total: int) -> None:
                nonlocal now
                if what != now or done == 0:
                    now = what
                    bars.reset(bar, description=what, total=total)
                bars.update(bar, completed=done)

            yield show
        return
    said = time.monotonic()

    def say(what: str, done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > _LINE_SECONDS:
            said = time.monotonic()
            console.print(
                f"{what}: {done:,} of {total:,}", highlight=False, markup=False, soft_wrap=True
            )

    yield say


# Showing.


def _show(result: Result, every_score: bool, markdown: str | None, as_json: bool) -> None:
    from stockpot.comparison.markdown import to_markdown
    from stockpot.comparison.wording import as_json as json_of

    if markdown is not None:
        text = to_markdown(result, every_score)
        if markdown == _STDOUT:
            typer.echo(text, nl=False)
            return
        from stockpot.files import write_text

        write_text(Path(markdown), text)
    if as_json:
        typer.echo(json.dumps(json_of(result), indent=2, allow_nan=False))
    else:
        _print(result, every_score)


def _print(result: Result, every_score: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from stockpot.comparison.wording import (
        common_score,
        footnotes,
        limit_sentence,
        sentences,
    )

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PAPER
    for comparison in result.comparisons:
        pairing = comparison.pairing
        head = f"before: {pairing.before}\nafter:  {pairing.after}"
        if (measure := common_score(comparison.tasks)) and not every_score:
            head += f"\nscore:  {measure}"
        console.print(Text(head, style="bold"))
        if comparison.tasks:
            _print_table(console, comparison, every_score)
        for left in pairing.left:
            if every_score or left.judged:
                text = f"not compared: {left.task} {left.score} ({left.reason})"
                console.print(text, style="yellow", markup=False)
        console.print(" ".join(sentences(comparison)), markup=False)
    for note in footnotes(result):
        console.print(note, style="dim", markup=False)
    if result.limit is not None:
        style = {0: "bold green", 1: "bold red", 3: "bold yellow"}[result.exit_code]
        console.print(limit_sentence(result), style=style, markup=False)


def _print_table(console: Console, comparison: Comparison, every_score: bool) -> None:
    """As many columns as there is room for; JSON and Markdown have them all."""
    from stockpot.comparison.wording import HEADS, common_score

    rows = [*comparison.tasks, *(comparison.aside if every_score else ())]
    kept = [head for head in HEADS if head != "score" or common_score(rows) is None]
    unlimited = console.options.update(max_width=10 * _PAPER)
    gone = []
    for head in (*_DISPENSABLE, None):
        table = _table(rows, len(comparison.tasks), kept)
        if head is None or console.measure(table, options=unlimited).maximum <= console.width:
            break
        kept.remove(head)
        gone.append(head)
    console.print(table)
    if gone:
        console.print(f"no room for: {', '.join(gone)} (--json has it)", style="dim", markup=False)


def _table(rows: Sequence[Judged], tasks: int, heads: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from stockpot.comparison.wording import HEADS, cells

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for head in heads:
        left = head in ("task", "score")
        title = _SHORT.get(head, head)
        table.add_column(title, justify="left" if left else "right", overflow="fold")
    table.add_column("verdict")
    for number, judged in enumerate(rows):
        if number == tasks:
            table.add_section()
        own = dict(zip(HEADS, cells(judged), strict=True))
        verdict = Text(judged.verdict, style=_COLOURS.get(judged.verdict, ""))
        table.add_row(*(Text(own[head]) for head in heads), verdict)
    return table
