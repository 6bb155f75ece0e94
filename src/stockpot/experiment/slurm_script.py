"""An experiment as Slurm jobs: a bash script that submits them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stockpot.errors import ConfigError

if TYPE_CHECKING:
    from stockpot.experiment.plan import Plan
    from stockpot.experiment.resources import ResourceSettings

__all__ = ["Submission", "prefix_waves", "slurm_script"]

_LONGEST_ARRAY = 1000
"""Slurm's ``MaxArraySize`` is 1001 unless a cluster says otherwise."""
_UNTIL = ' --until "${stages[SLURM_ARRAY_TASK_ID]}"'
_END = "END_OF_THE_STOCKPOT_JOB"

Part = tuple[str, int]
"""A run's id and the number of its stages to do."""


@dataclass(frozen=True)
class Submission:
    """What is submitted, and how."""

    title: str
    opening: tuple[str, ...]
    """The arguments of ``stockpot`` that say which experiment it is and where its record goes."""
    command: tuple[str, ...]
    """The same once the record is open, by what that says: the file may change meanwhile."""
    python: str
    """The interpreter that has stockpot."""
    directory: Path
    """Where the command is run."""
    logs: Path
    """A folder."""
    resources: ResourceSettings
    options: tuple[str, ...] = ()
    """More options of ``sbatch``."""
    at_a_time: int | None = None
    """How many jobs of an array may run at a time."""


def prefix_waves(plan: Plan) -> list[list[Part]]:
    """Which runs to take how far before the others, so that nothing shared is trained twice.

    What several runs train alike is trained by the first of them in the plan. Where that one
    itself waits for another, it comes in a later wave.
    """
    uses = plan.uses()
    owners: dict[str, tuple[str, int, int]] = {}
    waves: dict[int, dict[str, int]] = {}
    for run in plan.runs:
        wave = 0
        for stage in run.stages:
            if uses[stage.trained] < 2:
                continue
            owner, _, owned_in = owners.get(stage.trained, (run.id, 0, wave))
            wave = wave if owner == run.id else max(wave, owned_in + 1)
            owners.setdefault(stage.trained, (run.id, stage.number, wave))
    for run_id, number, wave in owners.values():
        parts = waves.setdefault(wave, {})
        parts[run_id] = max(parts.get(run_id, 0), number + 1)
    return [list(waves[wave].items()) for wave in sorted(waves)]


def slurm_script(plan: Plan, submission: Submission) -> str:
    """A bash script that submits an array of jobs for all runs, and what goes before and after.

    Raises:
        ConfigError: if something cannot be written into a script.
    """
    s = submission
    words = (s.title, s.python, str(s.directory), str(s.logs), *s.opening, *s.command, *s.options)
    if any(character in word for word in words for character in "\n\r\0"):
        raise ConfigError("a Slurm script cannot hold names or settings with line breaks in them")
    waves = prefix_waves(plan)
    everything = [(run.id, len(run.stages)) for run in plan.runs]
    text = [_head(s, len(plan.runs))]
    before = ""
    for wave in waves:
        text += _arrays(s, "What several runs train alike, once.", wave, before, _UNTIL)
        before = '"--dependency=afterok:$jobs" --kill-on-invalid-dep=yes '
    text += _arrays(s, "The runs.", everything, before, "")
    text.append(_gathering(s))
    return "\n".join(text)


def _head(s: Submission, runs: int) -> str:
    options = " ".join(map(shlex.quote, _options(s)))
    return f"""#!/bin/bash
# {s.title}: {runs} runs as Slurm jobs.
# Submit them: bash THIS_FILE. After a failure or a time limit the same again goes on from there.
set -euo pipefail
cd -- {shlex.quote(str(s.directory))}
options=({options})

# The record is opened here, so that a wrong setting is found before anything waits in a queue.
{_command(s, s.opening, 1)} --job :open
mkdir -p -- {shlex.quote(str(s.logs))}
jobs=
"""


def _options(s: Submission) -> list[str]:
    r = s.resources
    options = ["--nodes=1", "--ntasks=1", f"--cpus-per-task={r.cpus * r.processes}"]
    if r.gpus:
        options.append(f"--gres=gpu:{math.ceil(r.gpus)}")
    if r.memory_bytes:
        options.append(f"--mem={math.ceil(r.memory_bytes / 2**20)}M")
    name = "stockpot-" + "".join(c if c.isalnum() else "-" for c in s.title).strip("-")
    return [f"--job-name={name}", *options, *s.options]


def _command(s: Submission, arguments: Sequence[str], processes: int) -> str:
    """The command line, quoted."""
    words: Sequence[str] = ["-m", "stockpot", "run", *arguments]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        words = [*launch, *words]
    return " ".join(map(shlex.quote, [s.python, *words]))


def _log(s: Submission, pattern: str) -> str:
    """Where a job's output goes; Slurm fills in what follows a percent sign."""
    folder = str(s.logs).replace("%", "%%")
    return shlex.quote(f"--output={folder}/{pattern}.log")


def _arrays(
    s: Submission, comment: str, parts: Sequence[Part], dependency: str, more: str
) -> list[str]:
    """The submission of an array with a job per part, or of several where there are too many."""
    texts = [f"# {comment}", "submitted="]
    throttle = "" if s.at_a_time is None else f"%{s.at_a_time}"
    log = _log(s, "%A_%a")
    for begin in range(0, len(parts), _LONGEST_ARRAY):
        some = parts[begin : begin + _LONGEST_ARRAY]
        runs = " ".join(shlex.quote(run) for run, _ in some)
        stages = f"\nstages=({' '.join(str(until) for _, until in some)})" if more else ""
        texts.append(
            f"""job=$(sbatch --parsable "${{options[@]}}" --array=0-{len(some) - 1}{throttle} \\
  {log} {dependency}<<'{_END}'
#!/bin/bash
cd -- {shlex.quote(str(s.directory))} || exit 1
runs=({runs}){stages}
exec {_command(s, s.command, s.resources.processes)} \\
  --job "${{runs[SLURM_ARRAY_TASK_ID]}}"{more}
{_END}
)
submitted=$submitted:${{job%%;*}}"""
        )
    return [*texts, "jobs=${submitted#:}\n"]


def _gathering(s: Submission) -> str:
    log = _log(s, "%j")
    return f"""# Summary, tables, figures and report, of what is finished if not all is.
last=$(sbatch --parsable "${{options[@]}}" {log} "--dependency=afterany:$jobs" <<'{_END}'
#!/bin/bash
cd -- {shlex.quote(str(s.directory))} || exit 1
exec {_command(s, s.command, 1)} --job :gather
{_END}
)
echo "submitted; job ${{last%%;*}} is the last and writes the report. Logs:" {_display(s.logs)}
"""


def _display(path: Path) -> str:
    return shlex.quote(str(path))
