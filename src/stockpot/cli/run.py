"""``stockpot run``: the main job."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from stockpot.evaluation.settings import Programs
    from stockpot.experiment import Experiment
    from stockpot.streams.data import Stream

__all__ = ["run"]


def run(
    experiment: Annotated[
        Path,
        typer.Argument(help="The experiment: stream, model, training, methods, seeds, as YAML."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings to change, by dotted path: training.epochs=1 methods.sfa.p=[0.25,0.5]",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Run folder. Default: the file's [bold]output[/], else runs/<file name>.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the runs, what they share and the optimizer steps; run nothing.",
        ),
    ] = False,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="The same in seconds: a tiny model of the same family, a few examples a task.",
        ),
    ] = False,
    run_programs: Annotated[
        bool,
        typer.Option(
            "--run-programs",
            help="Allow HumanEval to run programs that the model writes, isolated.",
        ),
    ] = False,
    allow_weak_isolation: Annotated[
        bool,
        typer.Option(
            "--allow-weak-isolation",
            help="Run them with limits alone where the machine offers no isolation.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
) -> None:
    """Train every method, setting and seed of an experiment over its stream of tasks.

    Every task is scored after every task. The same command goes on where an earlier one was
    stopped, by Ctrl-C or worse.
    """
    from stockpot.evaluation.settings import Programs
    from stockpot.experiment import load_experiment

    checked = load_experiment(experiment, overrides or [], output, smoke=smoke)
    programs = Programs(run_programs, allow_weak_isolation, skip=smoke)
    try:
        _load_and_run(checked, dry_run, as_json, quiet, smoke, programs)
    except KeyboardInterrupt:
        from stockpot.cli.output import complain

        complain("Everything finished is kept: the same command goes on from there.", "stopped")
        # An interrupt inside an exec'd string (dataclasses, pydantic) leaves a mark in CPython that
        # makes `python -m` die of SIGINT whatever its exit code; the next exec wipes it.
        exec("")
        raise typer.Exit(130) from None


def _load_and_run(
    checked: Experiment,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    smoke: bool,
    programs: Programs,
) -> None:
    from rich.console import Console

    from stockpot.cli.output import waiting

    console = Console(stderr=True, quiet=quiet)
    if not dry_run:
        from stockpot.tracking.trackers import check_trackers

        check_trackers(checked.training.report_to)
    # stdout holds the result alone: what libraries and the user's own streams print goes to
    # stderr (DeepSpeed, where it is installed, writes a line to stdout when it is imported).
    with redirect_stdout(sys.stderr):
        with waiting(console, "loading PyTorch and Transformers"):
            _quiet_libraries()
        with waiting(console, f"loading {checked.stream.name}"):
            if smoke:
                from stockpot.experiment.smoke import with_tiny_model

                checked, stream = with_tiny_model(checked)
            else:
                stream = checked.load_stream()
    for note in (*stream.notes, *_left_out(stream, programs)):
        console.print(f"note: {note}", style="dim", highlight=False, markup=False)
    if dry_run:
        _dry_run(checked, stream, as_json)
        return
    _run(checked, stream, console, as_json, quiet, programs)


def _left_out(stream: Stream, programs: Programs) -> list[str]:
    from stockpot.evaluation.tasks import needs_programs

    if programs.run or not programs.skip:
        return []
    return [f"{name} is left out; --run-programs lets it run" for name in needs_programs(stream)]


def _quiet_libraries() -> None:
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers.trainer
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    del transformers


def _run(
    experiment: Experiment,
    stream: Stream,
    console: Console,
    as_json: bool,
    quiet: bool,
    programs: Programs,
) -> None:
    from stockpot.cli.output import complain, waiting
    from stockpot.cli.progress import progress_observer
    from stockpot.cli.table import print_report, print_results
    from stockpot.experiment import run_experiment
    from stockpot.experiment.observer import Observer
    from stockpot.report.write import write_report

    watcher: Any = Observer() if quiet else progress_observer(console, experiment.name)
    page = None
    with redirect_stdout(sys.stderr):
        try:
            outcome = run_experiment(experiment, watcher, stream=stream, programs=programs)
        finally:
            if not quiet:
                watcher.close()
        if outcome.summary:
            with waiting(console, "drawing the figures"):
                page = write_report(outcome.folder)
    if as_json:
        typer.echo(json.dumps(outcome.summary, indent=2))
    elif not quiet:
        print_results(outcome.summary)
        if page is not None:
            print_report(console, page, outcome.summary)
    if outcome.failures:
        for run_id, reason in outcome.failures.items():
            complain(reason, head=f"failed: {run_id}")
        raise typer.Exit(1)


def _dry_run(experiment: Experiment, stream: Stream, as_json: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stockpot.cli.output import counted
    from stockpot.experiment.plan import make_plan

    plan = make_plan(experiment, stream)
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for run in plan.runs:
        own = sum(stage.steps for stage in run.stages if stage.trained not in seen)
        shared = [stage.tasks for stage in run.stages if stage.trained in seen]
        seen |= {stage.trained for stage in run.stages}
        steps = sum(stage.steps for stage in run.stages)
        rows.append(
            {
                "run": run.id,
                "method": run.method.name,
                "settings": run.method.settings(),
                "seed": run.seed,
                "steps": steps,
                "steps_to_train": own,
                "shared_tasks": [stream.tasks[task].name for group in shared for task in group],
            }
        )
    total = {
        "runs": len(plan.runs),
        "steps": plan.steps,
        "steps_to_train": plan.steps_to_train,
        "steps_saved": plan.steps - plan.steps_to_train,
    }
    if as_json:
        typer.echo(json.dumps({"tasks": [t.name for t in stream.tasks], **total, "plan": rows}))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, justify in (("run", "left"), ("steps", "right"), ("to train", "right")):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("trained already by an earlier run")
    for row in rows:
        table.add_row(
            Text(row["run"]),
            f"{row['steps']:,}",
            f"{row['steps_to_train']:,}",
            Text(", ".join(row["shared_tasks"])),
        )
    console = Console()
    sizes = ", ".join(
        f"{task.name} ({len(task.train):,} to train, {len(task.test):,} to test)"
        for task in stream.tasks[:6]
    )
    more = f" and {len(stream.tasks) - 6} more" if len(stream.tasks) > 6 else ""
    console.print(f"{stream.name}, {stream.scenario}: {sizes}{more}", highlight=False, markup=False)
    console.print(table)
    console.print(
        f"{counted(total['runs'], 'run')}, {total['steps']:,} optimizer steps; what runs share is "
        f"trained once, which saves {total['steps_saved']:,} and leaves "
        f"{total['steps_to_train']:,}. Nothing was run; without --dry-run the record goes to "
        f"{experiment.output}.",
        highlight=False,
        markup=False,
    )
