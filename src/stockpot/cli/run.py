"""``stockpot run``: the main job."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from stockpot.cli.workers import Workers
    from stockpot.evaluation.settings import Programs
    from stockpot.experiment import Experiment, Outcome
    from stockpot.experiment.jobs import MakeExecutor
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
    jobs: Annotated[
        str,
        typer.Option(
            "--jobs",
            "-j",
            metavar="N|auto",
            help="Runs at a time, each in a process of its own; auto: as many as fit here.",
        ),
    ] = "1",
    on: Annotated[
        str | None,
        typer.Option(
            "--on", metavar="ray[://ADDRESS]", help="Do the runs on Ray, here or on a cluster."
        ),
    ] = None,
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
    part: Annotated[
        str | None,
        typer.Option("--job", hidden=True, help="One run, :open or :gather (plan --slurm)."),
    ] = None,
    until: Annotated[
        int | None,
        typer.Option("--until", hidden=True, help="With --job: its first stages alone."),
    ] = None,
) -> None:
    """Train every method, setting and seed of an experiment over its stream of tasks.

    Every task is scored after every task. The same command goes on where an earlier one was
    stopped, by Ctrl-C or worse.
    """
    from stockpot.cli.part import do_part, is_finished
    from stockpot.cli.workers import Workers
    from stockpot.evaluation.settings import Programs
    from stockpot.experiment import load_experiment

    checked = load_experiment(experiment, overrides or [], output, smoke=smoke)
    if part is not None and is_finished(part, checked.output):
        typer.echo(f"{part} is finished", err=True)
        return
    programs = Programs(run_programs, allow_weak_isolation, skip=smoke)
    try:
        with Workers(jobs, on, begin=not dry_run) as workers:
            done = None if part is None else partial(do_part, part, until)
            _load_and_run(checked, dry_run, as_json, quiet, smoke, programs, workers, done)
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
    workers: Workers,
    part: Callable[[Experiment, Stream, Programs, Console], Outcome | None] | None = None,
) -> None:
    from rich.console import Console

    from stockpot.cli.output import waiting
    from stockpot.cli.plan import print_plan
    from stockpot.processes import launched, leave, processes

    main = launched() == 1 or os.environ.get("RANK", "0") == "0"
    console = Console(stderr=True, quiet=quiet or not main)
    if not dry_run:
        from stockpot.tracking.trackers import check_trackers

        check_trackers(checked.training.report_to)
    # stdout holds the result alone: what libraries and the user's own streams print goes to
    # stderr (DeepSpeed, where it is installed, writes a line to stdout when it is imported).
    with redirect_stdout(sys.stderr):
        with waiting(console, "loading PyTorch and Transformers"):
            from stockpot.experiment.environment import quiet_libraries

            quiet_libraries()
        with waiting(console, f"loading {checked.stream.name}"):
            among = processes()
            quiet, as_json = quiet or not among.main, as_json and among.main
            with among.main_first():
                if smoke:
                    from stockpot.experiment.smoke import with_tiny_model

                    checked, stream = with_tiny_model(checked, among.main)
                else:
                    stream = checked.load_stream()
    for note in (*stream.notes, *_left_out(stream, programs)):
        console.print(f"note: {note}", style="dim", highlight=False, markup=False)
    if dry_run:
        if among.main:
            print_plan(checked, stream, as_json)
        return
    if part is None:
        executor = workers.executor(checked)
        outcome: Outcome | None = _run(checked, stream, console, quiet, programs, executor)
    else:
        outcome = part(checked, stream, programs, console)
    if outcome is not None:
        _show(outcome, console, as_json, quiet)
    leave()


def _left_out(stream: Stream, programs: Programs) -> list[str]:
    from stockpot.evaluation.tasks import needs_programs

    if programs.run or not programs.skip:
        return []
    return [f"{name} is left out; --run-programs lets it run" for name in needs_programs(stream)]


def _run(
    experiment: Experiment,
    stream: Stream,
    console: Console,
    quiet: bool,
    programs: Programs,
    executor: MakeExecutor | None,
) -> Outcome:
    from stockpot.cli.progress import progress_observer
    from stockpot.experiment import run_experiment
    from stockpot.experiment.observer import Observer

    watcher: Any = Observer() if quiet else progress_observer(console, experiment.name)
    with redirect_stdout(sys.stderr):
        try:
            return run_experiment(
                experiment, watcher, stream=stream, programs=programs, executor=executor
            )
        finally:
            if not quiet:
                watcher.close()


def _show(outcome: Outcome, console: Console, as_json: bool, quiet: bool) -> None:
    """The report, the table, and what failed."""
    from stockpot.cli.output import complain, waiting
    from stockpot.cli.table import print_report, print_results
    from stockpot.processes import processes
    from stockpot.report.write import write_report

    page = None
    if outcome.summary:
        with redirect_stdout(sys.stderr), waiting(console, "drawing the figures"):
            page = write_report(outcome.folder)
    if as_json:
        typer.echo(json.dumps(outcome.summary, indent=2))
    elif not quiet:
        print_results(outcome.summary)
        if page is not None:
            print_report(console, page, outcome.summary)
    if outcome.failures:
        among = processes()
        for run_id, reason in outcome.failures.items():
            if among.main:
                complain(reason, head=f"failed: {run_id}")
        among.wait()  # the launcher ends the main process, too, when another has failed
        raise typer.Exit(1)
