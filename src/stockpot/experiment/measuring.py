"""How an experiment's models are measured: what scores them, and what lies between two of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from stockpot.errors import ConfigError
from stockpot.evaluation.divergence import kl_from
from stockpot.evaluation.line import scores_along_line, spread
from stockpot.evaluation.tasks import Evaluator, needs_programs
from stockpot.processes import ALONE, Processes
from stockpot.training.trainer import choose_device

if TYPE_CHECKING:
    from torch import Tensor

    from stockpot.evaluation.settings import EvaluationSettings, Programs
    from stockpot.experiment.config import Experiment
    from stockpot.experiment.plan import Plan, Run, Stage
    from stockpot.methods.base import TaskRun
    from stockpot.streams.data import Stream, Task

__all__ = ["Between", "make_evaluator", "tasks_during"]


def make_evaluator(
    experiment: Experiment, stream: Stream, programs: Programs, processes: Processes = ALONE
) -> Evaluator:
    """How models are scored; refuses early what could not be scored later."""
    settings = experiment.evaluation
    sandbox = None
    wanted = needs_programs(stream)
    if wanted and programs.run:
        from stockpot.evaluation.sandbox import Sandbox

        sandbox = Sandbox.strongest(allow_weak=programs.allow_weak)
    elif wanted and not programs.skip:
        raise ConfigError(
            f"{', '.join(wanted)} runs programs that the model writes. Allow it with "
            "--run-programs (they run isolated, as strongly as this machine can), or leave the "
            "benchmark out with stream.benchmarks"
        )
    if settings.lm_eval:
        if stream.labels is not None:
            raise ConfigError("evaluation.lm_eval scores language models; this stream is of images")
        from stockpot.evaluation.lm_eval import check_lm_eval_tasks

        check_lm_eval_tasks(settings.lm_eval, settings.lm_eval_include)
    skipped = () if sandbox is not None else tuple(wanted)
    benchmarked = all(
        any(f"{task.name}: {name}" not in skipped for name in task.benchmarks)
        for task in stream.tasks
    )
    device = _device(experiment.training.device, processes)
    return Evaluator(settings, device, sandbox, benchmarked, skipped, processes=processes)


def _device(name: str, processes: Processes) -> torch.device:
    """Where this process trains and scores: of several on a machine each takes a GPU of its own."""
    device = choose_device(name)
    if device.type != "cuda" or not processes.several:
        return device
    count = torch.cuda.device_count()
    if processes.local_rank >= count:
        raise ConfigError(
            f"process {processes.local_rank} of this machine finds no GPU of its own: there are "
            f"{count}. Start as many processes as there are GPUs (--nproc-per-node {count}), or "
            "set training.device: cpu"
        )
    torch.cuda.set_device(processes.local_rank)
    return torch.device("cuda", processes.local_rank)


class Between:
    """What is measured between a stage's anchor and its deployed weights.

    The anchor is what was deployed after the stage before, or the starting model.
    """

    def __init__(
        self, experiment: Experiment, stream: Stream, plan: Plan, evaluator: Evaluator
    ) -> None:
        self._settings = experiment.evaluation
        self._stream, self._evaluator = stream, evaluator
        # From fresh weights there is a way to every model, and nothing to be learned from it.
        self._starts_trained = bool(getattr(experiment.model, "pretrained", False))
        self._uses = Counter(_ends(run, stage) for run in plan.runs for stage in run.stages)
        self._lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
        """By their ends: a line that several runs share is measured once."""

    def divergence(
        self, context: TaskRun, stage: Stage, deployed: Mapping[str, Tensor]
    ) -> float | None:
        """Forward KL from the anchor on the held-out examples of what was trained last, in nats."""
        examples = self._settings.kl
        if not examples:
            return None
        data = self._stream.tasks[stage.tasks[-1]].test
        size, device = self._evaluator.batch_size(context.learner), context.device
        return kl_from(
            context.previous, deployed, context.learner, data, examples, size, device
        ).value

    def line(
        self, run: Run, stage: Stage, context: TaskRun, deployed: Mapping[str, Tensor]
    ) -> list[dict[str, Any]]:
        """The lines of ``lines.jsonl``: the loss from the anchor to what was deployed, by task."""
        settings = self._settings
        if not settings.line or not (stage.number or self._starts_trained):
            return []
        ends = _ends(run, stage)
        points = self._lines.get(ends)
        if points is None:
            chosen = tasks_during(run, stage, self._stream, settings)
            tasks = {task.name: spread(task.test, settings.line_limit) for task in chosen}
            found = scores_along_line(
                context.previous,
                deployed,
                context.learner,
                tasks,
                settings.line,
                self._evaluator.batch_size(context.learner),
                context.device,
                bfloat16=settings.precision == "bfloat16",
                progress=partial(self._evaluator.progress, "line from the anchor"),
                processes=self._evaluator.processes,
            )
            points = [asdict(point) for point in found]
            if self._uses[ends] > 1:
                self._lines[ends] = points
        at = {
            "run": run.id,
            "stage": stage.number,
            "trained": self._stream.tasks[stage.row].name,
        }
        return [{**at, **point} for point in points]


def tasks_during(
    run: Run, stage: Stage, stream: Stream, settings: EvaluationSettings
) -> list[Task]:
    """The tasks to score while a stage trains, and between its anchor and what it deploys.

    Training on all tasks at once has one stage, in which all are scored.
    """
    count = len(stream.tasks)
    numbers = settings.tasks_during(stage.row, count, run.seed)
    return [stream.tasks[task] for task in (range(count) if run.method.joint else numbers)]


def _ends(run: Run, stage: Stage) -> tuple[str, str]:
    """Content keys of the anchor and of the deployed weights."""
    anchor = run.stages[stage.number - 1].deployed if stage.number else stage.starts
    return anchor, stage.deployed
