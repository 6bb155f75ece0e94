"""The loop over runs, stages and tasks: start, train, end, score, write."""

from __future__ import annotations

import gc
import os
import shutil
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from stockpot.arithmetic import fingerprint, l2_distance
from stockpot.errors import ConfigError, DamagedRecordError, DiskFullError, StockpotError
from stockpot.evaluation.score import Score
from stockpot.evaluation.settings import Programs
from stockpot.evaluation.tasks import Evaluator
from stockpot.experiment.config import Experiment
from stockpot.experiment.environment import describe_environment
from stockpot.experiment.measuring import Between, make_evaluator
from stockpot.experiment.observer import Observer, Row, There
from stockpot.experiment.plan import Plan, Run, Stage, describe_plan, make_plan
from stockpot.experiment.prefixes import PrefixStore
from stockpot.experiment.record import Record
from stockpot.experiment.summary import write_summary
from stockpot.experiment.tracking import StageLines, Tracking
from stockpot.files import write_text
from stockpot.methods.base import Memory, Method, TaskRun
from stockpot.models.learner import Learner, check_finite, check_learner
from stockpot.streams.data import Stream
from stockpot.tracking.trackers import check_trackers
from stockpot.training.trainer import Trained, Watch, train_task

__all__ = ["Outcome", "run_experiment"]


TaskScores = tuple[str, list[Score]]
"""A task's name and its scores."""

_GENERAL = "lm-eval"
"""Stands for the task of scores that belong to none of the stream."""

_SUMMARY_SECONDS = 2.0
"""How old summary.json may be while an experiment runs, so that a report can be had meanwhile."""


@dataclass(frozen=True)
class Outcome:
    """What became of an experiment."""

    folder: Path
    summary: list[dict[str, Any]]
    """One object per finished run, as in summary.json."""
    failures: dict[str, str]
    """Run ids and what stopped them."""


def run_experiment(
    experiment: Experiment,
    observer: Observer | None = None,
    *,
    stream: Stream | None = None,
    share_prefixes: bool = True,
    programs: Programs | None = None,
) -> Outcome:
    """Run every method, setting and seed of ``experiment``; go on where an earlier call stopped.

    A run that fails is reported and does not stop the others.

    Args:
        experiment: what to run; its ``output`` folder becomes the record.
        observer: is told how it goes.
        stream: the tasks, if they are loaded already (:meth:`Experiment.load_stream`).
        share_prefixes: whether runs that agree up to a task train it once. The weights are the
            same without it.
        programs: consent to run the programs that models write (HumanEval).

    Raises:
        StockpotError: if nothing can go on: another experiment's folder, a damaged record, a full
            disk.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "this release trains each run in one process; start `stockpot run` without torchrun or "
            "accelerate launch"
        )
    check_trackers(experiment.training.report_to)
    if experiment.training.threads is not None:
        torch.set_num_threads(experiment.training.threads)
    stream = experiment.load_stream() if stream is None else stream
    evaluator = make_evaluator(experiment, stream, programs or Programs())
    plan = make_plan(experiment, stream, share_prefixes)
    return _Runner(experiment, stream, plan, observer or Observer(), evaluator).run()


class _Runner:
    def __init__(
        self,
        experiment: Experiment,
        stream: Stream,
        plan: Plan,
        observer: Observer,
        evaluator: Evaluator,
    ) -> None:
        self.experiment, self.stream, self.plan, self.observer = experiment, stream, plan, observer
        self.evaluator = replace(evaluator, progress=observer.scoring)
        self.between = Between(experiment, stream, plan, self.evaluator)
        self.record = Record(experiment.output)
        self.tracking = Tracking(experiment, self.record, [task.name for task in stream.tasks])
        self.prefixes = PrefixStore(experiment.output / "prefixes", plan.uses())
        self.device = evaluator.device
        self.scored: dict[str, list[TaskScores]] = {}
        """Scores by the key of the deployed weights, so that shared weights are scored once."""
        self.learner: Learner | None = None
        self.start: dict[str, Tensor] = {}
        self.start_seed: int | None = None

    def run(self) -> Outcome:
        with self.record.held():
            return self._run_all()

    def _run_all(self) -> Outcome:
        environment = describe_environment(self.experiment.seeds)
        if self.evaluator.sandbox is not None:
            environment["isolation of generated programs"] = self.evaluator.sandbox.level
        environment["notes on the data"] = list(self.stream.notes)
        planned = len(self.plan.runs)
        self.record.open(
            self.experiment, self.plan.data, environment, planned, self.evaluator.skipped
        )
        names = tuple(task.name for task in self.stream.tasks)
        self.record.write_plan(describe_plan(self.plan, self.stream))
        # The trainer collects garbage at every task; what is alive now need not be searched.
        gc.collect()
        gc.freeze()
        self.observer.experiment_begins(self.plan, names, self._there())
        failures: dict[str, str] = {}
        self.record.write_failures(failures)  # those of an earlier call are tried again
        said: float | None = None
        try:
            for run in self.plan.runs:
                try:
                    self._run(run)
                except (ConfigError, DamagedRecordError, DiskFullError, OSError):
                    raise  # these concern all runs
                except Exception as error:  # a method, a model or a library: the others go on
                    failures[run.id] = self._failure(run, error)
                    self.record.write_failures(failures)
                    self.observer.run_failed(run, error)
                if said is None or time.monotonic() - said > _SUMMARY_SECONDS:
                    said = time.monotonic()
                    write_summary(self.record, self.plan, self.stream)
        except KeyboardInterrupt:
            write_summary(self.record, self.plan, self.stream)
            raise
        finally:
            gc.unfreeze()
        summary = write_summary(self.record, self.plan, self.stream)
        if not failures:
            shutil.rmtree(self.prefixes.folder, ignore_errors=True)
        shutil.rmtree(self.record.scratch, ignore_errors=True)
        return Outcome(self.record.folder, summary, failures)

    def _there(self) -> There:
        """What an earlier call left."""
        scores: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for line in self.record.scores():
            scores.setdefault((line["run"], line["stage"]), []).append(line)
        finished = [
            (run.id, number)
            for run in self.plan.runs
            for number in range(self.record.finished(run.id))
        ]
        keys = self.plan.uses()
        return There(
            {stage: Row.of(scores.get(stage, [])) for stage in finished},
            frozenset(key for key in keys if self.prefixes.has(key)),
        )

    def _failure(self, run: Run, error: Exception) -> str:
        """What to say of a run that failed; of errors not our own a traceback is kept."""
        if isinstance(error, StockpotError):
            return str(error)
        path = self.record.run_folder(run.id) / "error.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(traceback.format_exception(error)))
        return f"{type(error).__name__}: {error} (where: {path})"

    def _run(self, run: Run) -> None:
        """One run, from its first unfinished stage."""
        done = self.record.finished(run.id)
        self.observer.run_begins(run, done)
        for stage in run.stages[:done]:
            self.record.check_stage(run.id, stage.number, stage.deployed)
            self.prefixes.used(stage.trained)
        with self.tracking.run(run):
            if done < len(run.stages):
                self._start_from(run.seed)
                method = run.method.model_copy(deep=True)
                previous = self.record.weights(run.id, done - 1) if done else self.start
                for stage in run.stages[done:]:
                    previous = self._stage(run, method, stage, previous)
            self.record.finish_run(run.id, len(run.stages), self.experiment.record.weights)
        self.observer.run_ends(run)

    def _start_from(self, seed: int) -> None:
        """theta_0 of a seed: fresh weights, or a pre-trained model with a fresh head."""
        if self.start_seed == seed and self.learner is not None:
            return
        set_seed(seed)
        try:
            self.learner = self.experiment.model.build(self.stream)
            self.learner.module.to(self.device)
        except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
            raise ConfigError(
                f"the model cannot be built: {type(error).__name__}: {error}. See the settings "
                "under model:"
            ) from error
        logits = check_learner(self.learner, self.stream, self.device)
        self.start, self.start_seed = self.learner.weights(), seed
        # With what they answer: the same weights in another architecture are another start.
        self.record.check_start(seed, fingerprint({**self.start, "logits of theta_0": logits}))
        self.scored.clear()

    def _stage(
        self, run: Run, method: Method, stage: Stage, previous: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Train (or take from the store), end, score and write one stage."""
        context = self._context(run, stage, previous)
        self.observer.stage_begins(run, stage, context.merges)
        # Scoring may take hours: what a kill meanwhile left trained is not trained again.
        ready = self.record.ready(run.id, stage.number, stage.deployed)
        if ready is None:
            deployed, about = self._deploy(run, method, stage, context)
        else:
            deployed, about = ready
            context.load(deployed)
            context.merges[:], context.curve[:] = about["merges"], about["curve"]
        scores = self._scores(stage.deployed)
        self._save_items(run, stage, scores)
        floating = [name for name, weight in deployed.items() if weight.is_floating_point()]
        names = [self.stream.tasks[task].name for task in stage.tasks]
        line: dict[str, Any] = {
            "run": run.id,
            "stage": stage.number,
            "tasks": names,
            "row": stage.row,
            **{key: about[key] for key in ("steps", "seconds", "peak_memory", "trained_here")},
            "l2_to_anchor": l2_distance(
                (deployed[name] for name in floating), (previous[name] for name in floating)
            ),
            "kl_from_anchor": self.between.divergence(context, stage, deployed),
            "trained_examples": self.experiment.training.examples_in(
                stage.steps, sum(len(task.train) for task in context.tasks)
            ),
            **{key: about.get(key) for key in ("extra_examples", "stored")},
            **{key: about[key] for key in ("losses", "key", "sha256")},
        }
        if context.last and self.experiment.record.weights != "none":
            context.learner.describe(self.record.run_folder(run.id))
        at = {"run": run.id, "stage": stage.number}
        score_lines = self._score_lines(run, stage, scores)
        merges = [{**at, "task": names[-1], **merge} for merge in context.merges]
        curves = [{**at, "trained": names[-1], **point} for point in context.curve]
        between = self.between.line(run, stage, context, deployed)
        self.record.finish_stage(line, score_lines, merges, curves, between)
        self.tracking.stage_ends(StageLines(line, score_lines, merges, curves))
        self.prefixes.used(stage.trained)
        self._forget_weights(run, stage)
        row = Row.of(line for line in score_lines if line["stage"] == stage.number)
        self.observer.stage_ends(run, stage, about["trained_here"], row)
        return deployed

    def _deploy(
        self, run: Run, method: Method, stage: Stage, context: TaskRun
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Train and end one stage; the deployed weights are on disk when this returns."""
        trained, fresh = self._train(run, method, stage, context)
        begin = time.perf_counter()
        method.end_task(context)
        end_seconds = time.perf_counter() - begin
        where = f"run {run.id}, after task {self.stream.tasks[stage.row].name!r}"
        check_finite(context.model, where)

        deployed = context.weights()
        if context.learner.adapted:
            context.load(deployed)  # what is kept is scored: adapters merged in, and rounded
        same = stage.trained == stage.deployed and self.prefixes.has(stage.trained)
        digest = self.record.save_weights(
            run.id,
            stage.number,
            deployed,
            same_as=self.prefixes.path(stage.trained) if same else None,
        )
        about = {
            "steps": trained.steps,
            "seconds": trained.seconds + end_seconds,
            "peak_memory": trained.peak_memory,
            "trained_here": fresh,
            "extra_examples": context.extra_examples,
            "stored": asdict(method.stored(context)),
            "losses": trained.losses,
            "merges": context.merges,
            "curve": context.curve,
            "key": stage.deployed,
            "sha256": digest,
        }
        self.record.save_ready(run.id, stage.number, about)
        return deployed, about

    def _context(self, run: Run, stage: Stage, previous: Mapping[str, Tensor]) -> TaskRun:
        assert self.learner is not None
        tasks = self.stream.tasks
        return TaskRun(
            stage=stage.number,
            last=stage.number == len(run.stages) - 1,
            tasks=tuple(tasks[task] for task in stage.tasks),
            past=tuple(
                tasks[task] for before in run.stages[: stage.number] for task in before.tasks
            ),
            learner=self.learner,
            start=self.start,
            previous=previous,
            memory=Memory(self.record.run_folder(run.id) / "memory", stage.number),
            # The same for all methods: they see the same batches, and runs that agree can share.
            seed=run.seed * 1_000_003 + stage.number,
            total_steps=stage.steps,
            device=self.device,
        )

    def _train(
        self, run: Run, method: Method, stage: Stage, context: TaskRun
    ) -> tuple[Trained, bool]:
        """Leave the trained weights in the model; also says whether they were trained just now."""
        if self.prefixes.has(stage.trained):
            weights, about = self.prefixes.load(stage.trained)
            context.load(weights)
            context.merges[:] = about["merges"]
            context.curve[:] = about["curve"]
            losses = [(int(step), float(loss)) for step, loss in about["losses"]]
            return Trained(stage.steps, about["seconds"], about["peak_memory"], losses), False
        set_seed(context.seed % 2**32)
        method.start_task(context)
        data = method.training_data(context)
        names = ", ".join(task.name for task in context.tasks)
        trained = train_task(
            method,
            context,
            data,
            self.experiment.training,
            self.record.scratch / run.id / f"stage-{stage.number:04d}",
            self.observer.step,
            where=f"run {run.id}, task {names!r}",
            watch=self._watch(context, stage),
        )
        about = {
            "merges": context.merges,
            "curve": context.curve,
            "losses": trained.losses,
            "seconds": trained.seconds,
            "peak_memory": trained.peak_memory,
        }
        if self.prefixes.wants(stage.trained):
            self.prefixes.save(stage.trained, context.weights(), about)
        return trained, True

    def _watch(self, context: TaskRun, stage: Stage) -> Watch:
        """Scores on all tasks while one trains, as far as they are asked for."""
        settings = self.experiment.evaluation

        def probe(step: int, moment: str) -> None:
            for task in self.stream.tasks:
                score = self.evaluator.held_out(
                    context.learner, task.test, settings.during_limit, what=task.name
                )
                context.curve.append(
                    {
                        "step": step,
                        "moment": moment,
                        "task": task.name,
                        "metric": score.metric,
                        "value": score.value,
                        "n": score.n,
                        "stderr": score.stderr,
                    }
                )

        losses = self.tracking.watch(context.merges, context.curve)
        return Watch(probe, settings.steps_between(stage.steps), settings.merges, losses)

    def _scores(self, key: str) -> list[TaskScores]:
        """All scores of the weights in the model, task by task."""
        if key not in self.scored:
            assert self.learner is not None
            scores: list[TaskScores] = [
                (task.name, self.evaluator.scores(self.learner, task)) for task in self.stream.tasks
            ]
            if general := self.evaluator.lm_eval(self.learner):
                scores.append((_GENERAL, general))
            self.scored[key] = scores
        return self.scored[key]

    def _start_scores(self) -> list[TaskScores]:
        """b: the scores of theta_0."""
        if "start" not in self.scored:
            assert self.learner is not None
            now = self.learner.weights()
            self.learner.load(self.start)
            self._scores("start")
            self.learner.load(now)
        return self.scored["start"]

    def _save_items(self, run: Run, stage: Stage, scores: list[TaskScores]) -> None:
        """Keep what became of every item; the starting model's with the first stage."""
        if stage.number == 0:
            self.record.save_items(run.id, "start", self._start_scores())
        self.record.save_items(run.id, f"stage-{stage.number:04d}", scores)

    def _score_lines(
        self, run: Run, stage: Stage, scores: list[TaskScores]
    ) -> list[dict[str, Any]]:
        """The lines of scores.jsonl: this stage's, with those of theta_0 before the first."""
        rows: list[tuple[int, str | None, int, list[TaskScores]]] = [
            (stage.number, self.stream.tasks[stage.row].name, stage.steps, scores)
        ]
        if stage.number == 0:
            rows.insert(0, (-1, None, 0, self._start_scores()))
        return [
            {
                "run": run.id,
                "stage": number,
                "trained": trained,
                "step": steps,
                "task": task,
                "evaluation": score.evaluation,
                "metric": score.metric,
                "value": score.value,
                "n": score.n,
                "stderr": score.stderr,
                "better": score.better,
                "headline": score.headline,
            }
            for number, trained, steps, row in rows
            for task, own in row
            for score in own
        ]

    def _forget_weights(self, run: Run, stage: Stage) -> None:
        if self.experiment.record.weights != "all" and stage.number:
            self.record.stage_file(run.id, stage.number - 1).unlink(missing_ok=True)
