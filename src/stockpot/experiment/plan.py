"""What an experiment will do before it does it: runs, stages, and what they have in common."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from stockpot.evaluation.settings import EvaluationSettings
from stockpot.experiment.config import Experiment
from stockpot.methods import Method
from stockpot.methods.base import short
from stockpot.streams.data import Stream

__all__ = ["Plan", "Run", "Stage", "describe_plan", "make_plan"]

# Raised when the same settings would give other weights than before.
_ARITHMETIC_VERSION = 1


@dataclass(frozen=True)
class Stage:
    """One training of a run: of one task, or of all at once for multitask.

    ``trained`` and ``deployed`` are content keys: two stages with one key give the same weights,
    because everything that decides the weights is in the key.
    """

    number: int
    tasks: tuple[int, ...]
    row: int
    """The row of R that it fills."""
    steps: int
    starts: str
    trained: str
    deployed: str


@dataclass(frozen=True)
class Run:
    """One method, one setting, one seed over the stream."""

    id: str
    method: Method
    seed: int
    stages: tuple[Stage, ...]

    @property
    def label(self) -> str:
        """The method with the settings that were given for it."""
        return self.method.label


@dataclass(frozen=True)
class Plan:
    """All runs of an experiment, seed by seed."""

    runs: tuple[Run, ...]
    data: str
    """Fingerprint of the stream's examples."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """Which scores there will be."""

    def uses(self) -> Counter[str]:
        """How many stages need the weights of each trained key."""
        return Counter(stage.trained for run in self.runs for stage in run.stages)

    @property
    def steps(self) -> int:
        """Optimizer steps of all runs together, each counted as if it ran alone."""
        return sum(stage.steps for run in self.runs for stage in run.stages)

    @property
    def steps_to_train(self) -> int:
        """Optimizer steps when what runs share is trained once."""
        once = {stage.trained: stage.steps for run in self.runs for stage in run.stages}
        return sum(once.values())


def describe_plan(plan: Plan, stream: Stream) -> dict[str, Any]:
    """What plan.json holds: enough to read a record while its runs are not finished."""
    tasks = [task.name for task in stream.tasks]
    return {
        "stream": stream.name,
        "scenario": stream.scenario,
        "tasks": tasks,
        "runs": [
            {
                "run": run.id,
                "method": run.method.name,
                "settings": run.method.settings(),
                "label": run.label,
                "seed": run.seed,
                "stages": [
                    {
                        "tasks": [tasks[task] for task in stage.tasks],
                        "row": stage.row,
                        "steps": stage.steps,
                    }
                    for stage in run.stages
                ],
            }
            for run in plan.runs
        ],
    }


def make_plan(experiment: Experiment, stream: Stream, share: bool = True) -> Plan:
    """Lay out every run.

    Args:
        experiment: what to run.
        stream: its tasks.
        share: whether runs that agree so far share what they trained; without it every run trains
            everything itself, to the same weights.
    """
    data = stream.fingerprint()
    common = {
        "arithmetic": _ARITHMETIC_VERSION,
        "stream": data,
        "model": experiment.model.model_dump(mode="json"),
        "training": experiment.training.identity(),
    }
    for method in experiment.methods:
        method.check_tasks([task.name for task in stream.tasks])
    ids = _unique_ids(experiment.methods)
    runs = []
    for seed in experiment.seeds:
        for method, name in zip(experiment.methods, ids, strict=True):
            run_id = f"{name}-seed{seed}"
            own = {} if share else {"run": run_id}
            start = _key({**common, "seed": seed, **own})
            runs.append(Run(run_id, method, seed, _stages(experiment, stream, method, start)))
    return Plan(tuple(runs), data, experiment.evaluation)


def _stages(
    experiment: Experiment, stream: Stream, method: Method, start: str
) -> tuple[Stage, ...]:
    count = len(stream.tasks)
    groups = [_joint(stream, method)] if method.joint else [(task,) for task in range(count)]
    stages: list[Stage] = []
    for number, tasks in enumerate(groups):
        steps = sum(experiment.training.steps_for(len(stream.tasks[t].train)) for t in tasks)
        starts = stages[-1].deployed if stages and method.starts_from == "previous" else start
        during = method.training_identity(number)
        after = method.deploy_identity(number)
        # Penalties and experts remember more than the weights they start from: all that went
        # before them in this run.
        history = stages[-1].deployed if stages and (during or after) else None
        training = {"starts": starts, "tasks": tasks, "stage": number}
        trained = _key({**training, "during": during, "history": history} if during else training)
        deployed = trained
        if after:
            deployed = _key({"trained": trained, "after": after, "history": history})
        row = count - 1 if method.joint else number
        stages.append(Stage(number, tasks, row, steps, starts, trained, deployed))
    return tuple(stages)


def _joint(stream: Stream, method: Method) -> tuple[int, ...]:
    """The tasks that joint training is on."""
    out = method.left_out()
    return tuple(n for n, task in enumerate(stream.tasks) if task.name not in out)


def _key(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _unique_ids(methods: Iterable[Method]) -> list[str]:
    """Folder names: the label, made fit for a file system and unique."""
    ids: list[str] = []
    for method in methods:
        words = [method.name, *(f"{k}{short(v)}" for k, v in method.given().items())]
        name = re.sub(r"[^\w.+-]", "_", "-".join(words))
        while name in ids:
            name += "_"
        ids.append(name)
    return ids
