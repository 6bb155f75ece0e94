"""``stockpot run --job``: one part of an experiment, as a batch system runs it."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from stockpot.cli.progress import LineObserver, LiveObserver
    from stockpot.evaluation.settings import Programs
    from stockpot.experiment import Experiment, Outcome
    from stockpot.experiment.observer import Observer, There
    from stockpot.experiment.plan import Plan
    from stockpot.streams.data import Stream

__all__ = ["do_part", "is_finished"]


def is_finished(part: str, folder: Path) -> bool:
    """Whether a run has nothing left to do, without reading its data or loading PyTorch."""
    return (folder / "runs" / part / "manifest.json").exists()


def do_part(
    part: str,
    until: int | None,
    experiment: Experiment,
    stream: Stream,
    programs: Programs,
    console: Console,
) -> Outcome | None:
    """Open the record (``:open``), do a run, or gather what is finished (``:gather``).

    A run that fails of itself is an error, unless it is only done for others, ``until`` a stage:
    these then go on without it.
    """
    from stockpot.cli.output import complain
    from stockpot.experiment.slurm import Parts

    def watch(plan: Plan, there: There) -> Observer:
        from stockpot.cli.progress import progress_observer

        observer = progress_observer(console, experiment.name)
        watching.append(observer)
        observer.experiment_begins(plan, tuple(task.name for task in stream.tasks), there)
        return observer

    watching: list[LiveObserver | LineObserver] = []
    with redirect_stdout(sys.stderr):
        parts = Parts(experiment, stream, programs)
        if part == ":open":
            parts.open()
            return None
        if part == ":gather":
            return parts.gather()
        try:
            reason = parts.run(part, until, watch)
        finally:
            for observer in watching:
                observer.close()
    if reason is not None:
        if parts.processes.main:
            complain(reason, head=f"failed: {part}")
        if until is None:
            parts.processes.wait()  # the launcher ends the main process when another has failed
            raise typer.Exit(1)
    return None
