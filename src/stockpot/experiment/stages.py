"""One run, stage by stage: start, train, end, score, write."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import set_seed

from stockpot.arithmetic import fingerprint, l2_distance
from stockpot.errors import ConfigError
from stockpot.evaluation.score import Score
from stockpot.evaluation.tasks import Evaluator
from stockpot.experiment.config import Experiment
from stockpot.experiment.measuring import Between
from stockpot.experiment.observer import Observer, Row
from stockpot.experiment.plan import Plan, Run, Stage
from stockpot.experiment.prefixes import PrefixStore
from stockpot.experiment.record import Record
from stockpot.experiment.tracking import StageLines, Tracking
from stockpot.methods.base import Memory, Method, TaskRun
from stockpot.models.learner import Learner, check_finite, check_learner
from stockpot.streams.data import Stream
from stockpot.training.trainer import Trained, Watch, train_task

__all__ = ["RunLoop"]

TaskScores = tuple[str, list[Score]]
"""A task's name and its scores."""

_GENERAL = "lm-eval"
"""Stands for the task of scores that belong to none of the stream."""


class RunLoop:
    """Takes runs of one experiment through their stages, one run at a time.

    Args:
        experiment: what the runs share.
        stream: its tasks.
        plan: all runs.
        record: where their results go.
        prefixes: what several runs train alike.
        observer: is told how it goes.
        evaluator: scores the models.
    """

    def __init__(
        self,
        experiment: Experiment,
        stream: Stream,
        plan: Plan,
        record: Record,
        prefixes: PrefixStore,
        observer: Observer,
        evaluator: Evaluator,
    ) -> None:
        self.experiment, self.stream, self.plan = experiment, stream, plan
        self.record, self.prefixes, self.observer = record, prefixes, observer
        self.evaluator = replace(evaluator, progress=self._scoring)
        self.between = Between(experiment, stream, plan, self.evaluator)
        self.tracking = Tracking(experiment, self.record, [task.name for task in stream.tasks])
        self.device = evaluator.device
        self.scored: dict[str, list[TaskScores]] = {}
        """Scores by the key of the deployed weights, so that shared weights are scored once."""
        self.learner: Learner | None = None
        self.start: dict[str, Tensor] = {}
        self.start_seed: int | None = None
        self.current: Run | None = None

    def _scoring(self, what: str, done: int, total: int) -> None:
        if self.current is not None:
            self.observer.scoring(self.current, what, done, total)

    def run(self, run: Run) -> None:
        """One run, from its first unfinished stage."""
        self.current = run
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
            partial(self.observer.step, run),
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
