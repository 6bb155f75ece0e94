"""``stockpot plan``: what an experiment would do, and the jobs that would do it on Slurm."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stockpot.errors import ConfigError

if TYPE_CHECKING:
    from stockpot.evaluation.settings import Programs
    from stockpot.experiment import Experiment
    from stockpot.experiment.plan import Plan
    from stockpot.streams.data import Stream

__all__ = ["plan", "print_plan"]


def plan(
    experiment: Annotated[
        Path,
        typer.Argument(help="The experiment: stream, model, training, methods, seeds, as YAML."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, by dotted path."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Run folder, as of [bold]stockpot run[/]."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    slurm: Annotated[
        bool,
        typer.Option(
            "--slurm",
            help="Print a bash script that submits the runs as an array of Slurm jobs, with what "
            "they share before them and the report after them.",
        ),
    ] = False,
    partition: Annotated[
        str | None, typer.Option("--partition", help="With --slurm: where the jobs run.")
    ] = None,
    time: Annotated[
        str | None,
        typer.Option("--time", help="With --slurm: time limit of one run, such as 04:00:00."),
    ] = None,
    account: Annotated[
        str | None, typer.Option("--account", help="With --slurm: who is charged.")
    ] = None,
    max_parallel: Annotated[
        int | None,
        typer.Option("--max-parallel", min=1, help="With --slurm: jobs that run at a time."),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            "--sbatch", help="With --slurm: more options of sbatch, such as '--qos=high'. Repeat."
        ),
    ] = None,
    run_programs: Annotated[
        bool, typer.Option("--run-programs", help="As of [bold]stockpot run[/].")
    ] = False,
    allow_weak_isolation: Annotated[
        bool, typer.Option("--allow-weak-isolation", help="As of [bold]stockpot run[/].")
    ] = False,
) -> None:
    """Say what an experiment would do: its runs, what they share, the optimizer steps.

    With --slurm, print the script that has it done on a cluster. What one run asks for (cores,
    GPUs, memory) stands in the file under [bold]resources[/].
    """
    from stockpot.evaluation.settings import Programs
    from stockpot.experiment import load_experiment

    given = {"partition": partition, "time": time, "account": account}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    options += [word for line in sbatch or [] for word in _words(line)]
    if not slurm and (options or max_parallel is not None):
        raise ConfigError(
            "--partition, --time, --account, --max-parallel and --sbatch need --slurm"
        )
    if slurm and as_json:
        raise ConfigError("--slurm prints a script, --json the plan: give one of them")
    checked = load_experiment(experiment, overrides or [], output)
    with redirect_stdout(sys.stderr):
        from stockpot.experiment.environment import quiet_libraries

        quiet_libraries()
        stream = checked.load_stream()
    if slurm:
        programs = Programs(run_programs, allow_weak_isolation)
        command = _command(experiment, overrides or [], checked.output)
        typer.echo(_script(checked, stream, programs, command, options, max_parallel), nl=False)
    else:
        print_plan(checked, stream, as_json)


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"--sbatch {line}: {error}. Quote it as in a shell") from error


def _command(experiment: Path, overrides: list[str], output: Path) -> tuple[str, ...]:
    return (str(experiment), *overrides, "-o", str(output))


def _script(
    experiment: Experiment,
    stream: Stream,
    programs: Programs,
    opening: tuple[str, ...],
    options: list[str],
    at_a_time: int | None,
) -> str:
    from stockpot.experiment.plan import make_plan
    from stockpot.experiment.slurm_script import Submission, slurm_script

    consent = {
        "--run-programs": programs.run,
        "--allow-weak-isolation": programs.allow_weak,
    }
    flags = tuple(flag for flag, given in consent.items() if given)
    folder = experiment.output
    submission = Submission(
        title=experiment.name,
        opening=(*opening, *flags),
        command=(str(folder / "experiment.yaml"), "-o", str(folder), *flags),
        python=sys.executable,
        directory=Path.cwd(),
        logs=folder.absolute() / "slurm",
        resources=experiment.resources,
        options=tuple(options),
        at_a_time=at_a_time,
    )
    return slurm_script(make_plan(experiment, stream), submission)


def _rows(laid_out: Plan, stream: Stream) -> list[dict[str, Any]]:
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for run in laid_out.runs:
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
    return rows


def print_plan(experiment: Experiment, stream: Stream, as_json: bool) -> None:
    """Print the runs, what they share and the optimizer steps."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stockpot.cli.output import counted
    from stockpot.experiment.plan import make_plan

    laid_out = make_plan(experiment, stream)
    rows = _rows(laid_out, stream)
    total = {
        "runs": len(laid_out.runs),
        "steps": laid_out.steps,
        "steps_to_train": laid_out.steps_to_train,
        "steps_saved": laid_out.steps - laid_out.steps_to_train,
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
        f"{total['steps_to_train']:,}. Nothing was run; `stockpot run` writes the record to "
        f"{experiment.output}.",
        highlight=False,
        markup=False,
    )
