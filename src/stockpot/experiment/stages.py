"""One run, stage by stage: start, train, end, score, write."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import set_seed

from stockpot.arithmetic import fingerprint, l2_distance
from stockpot.errors import ConfigError
from stockpot.evaluation.score import Score
from stockpot.evaluation.tasks import Evaluator
from stockpot.experiment.config import Experiment
from stockpot.experiment.measuring import Between, tasks_during
from stockpot.experiment.observer import Observer, Row
from stockpot.experiment.plan import Plan, Run, Stage
from stockpot.experiment.prefixes import PrefixStore
from stockpot.experiment.record import Record
from stockpot.experiment.tracking import StageLines, Tracking
from stockpot.files import await_file, read_tensors, write_tensors
from stockpot.methods.base import Memory, Method, TaskRun
from stockpot.models.learner import Learner, check_finite, check_learner
from stockpot.streams.data import Stream
from stockpot.training.costs import resident_memory
from stockpot.training.parallel import check_parallel, own_settings
from stockpot.training.trainer import Trained, Watch, train_task

__all__ = ["RunLoop"]

_T = TypeVar("_T")

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
        evaluator: scores the models; its processes share the runs. In all of them but the main one
            ``record`` and ``prefixes`` are those of a follower.
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
        self.processes = evaluator.processes
        self.device = evaluator.device
        self.scored: dict[str, list[TaskScores]] = {}
        """Scores by the key of the deployed weights, so that shared weights are scored once; those
        of weights that no other run has are not kept: with every item they are large."""
        self.deployed = Counter(stage.deployed for run in plan.runs for stage in run.stages)
        self.learner: Learner | None = None
        self.start: dict[str, Tensor] = {}
        self.start_seed: int | None = None
        self.current: Run | None = None

    def _scoring(self, what: str, done: int, total: int) -> None:
        if self.current is not None:
            self.observer.scoring(self.current, what, done, total)

    def run(self, run: Run, until: int | None = None) -> None:
        """One run, from its first unfinished stage up to (not including) ``until``."""
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
                previous = self._deployed(run, done - 1) if done else self.start
                for stage in run.stages[done:until]:
                    previous = self._stage(run, method, stage, previous)
            if until is not None and until < len(run.stages):
                return
            self.record.finish_run(run.id, len(run.stages), self.experiment.record.weights)
        self.observer.run_ends(run)

    def _deployed(self, run: Run, number: int) -> dict[str, Tensor]:
        """The weights that an earlier call has left."""
        path = self.record.stage_file(run.id, number)
        found = self._as_main(
            lambda: self.record.weights(run.id, number) if path.exists() else None, path
        )
        return self.record.weights(run.id, number) if found is None else found

    def _start_from(self, seed: int) -> None:
        """theta_0 of a seed: fresh weights, or a pre-trained model with a fresh head."""
        if self.start_seed == seed and self.learner is not None:
            return
        set_seed(seed)
        try:
            with own_settings(self.experiment.training, self.processes.world):
                self.learner = self.experiment.model.build(self.stream)
            self.learner.module.to(self.device)
        except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
            raise ConfigError(
                f"the model cannot be built: {type(error).__name__}: {error}. See the settings "
                "under model:"
            ) from error
        for method in {type(run.method): run.method for run in self.plan.runs}.values():
            check_parallel(
                method, self.learner.module, self.experiment.training, self.processes.world
            )
        logits = check_learner(self.learner, self.stream, self.device)
        path = self.record.scratch / f"start-{seed}.safetensors"

        def keep() -> None:
            assert self.learner is not None
            self.start = self.learner.weights()
            # With what they answer: the same weights in another architecture are another start.
            answers = fingerprint({**self.start, "logits of theta_0": logits})
            self.record.check_start(seed, answers)
            if self.processes.several:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tensors(path, self.start)

        self.processes.from_main(keep)
        self.start, self.start_seed = self._for_all(self.start, path), seed
        self.scored.clear()

    def _stage(
        self, run: Run, method: Method, stage: Stage, previous: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Train (or take from the store), end, score and write one stage."""
        begin = time.perf_counter()
        context = self._context(run, stage, previous)
        self.observer.stage_begins(run, stage, context.merges)
        # Scoring may take hours: what a kill meanwhile left trained is not trained again.
        ready = self._as_main(
            lambda: self.record.ready(run.id, stage.number, stage.deployed),
            self.record.stage_file(run.id, stage.number),
        )
        if ready is None:
            deployed, about = self._deploy(run, method, stage, context)
        else:
            deployed, about = ready
            context.load(deployed)
            context.merges[:], context.curve[:] = about["merges"], about["curve"]
        scores = self._scores(run, stage)
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
        if self.processes.main and context.last and self.experiment.record.weights != "none":
            context.learner.describe(self.record.run_folder(run.id))
        at = {"run": run.id, "stage": stage.number}
        score_lines = self._score_lines(run, stage, scores)
        merges = [{**at, "task": names[-1], **merge} for merge in context.merges]
        curves = [{**at, "trained": names[-1], **point} for point in context.curve]
        between = self.between.line(run, stage, context, deployed)
        line |= {
            "wall_seconds": time.perf_counter() - begin,
            "resident_memory": resident_memory(),
        }
        self.record.finish_stage(line, score_lines, merges, curves, between)
        self.tracking.stage_ends(StageLines(line, score_lines, merges, curves))
        self.prefixes.used(stage.trained)
        self.processes.wait()  # what later stages read is written, and all are done with the last
        self._forget_weights(run, stage)
        row = Row.of(line for line in score_lines if line["stage"] == stage.number)
        self.observer.stage_ends(run, stage, about["trained_here"], row)
        return deployed

    def _for_all(self, weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
        """The main process's weights, which it has written to ``path``, in all processes.

        They map the file: what several processes of a machine read of it is in memory once.
        """
        if not self.processes.several:
            return weights
        self.processes.wait()
        found = self._as_main(lambda: read_tensors(path) if path.exists() else None, path)
        assert found is not None
        return found

    def _as_main(self, look: Callable[[], _T | None], path: Path) -> _T | None:
        """What the main process finds at ``path``, found by this one too; None if it finds nothing.

        Raises:
            ConfigError: if it stays unseen here: they do not see the same files.
        """
        found: _T | None = None

        def there() -> bool:
            nonlocal found
            found = look()
            return found is not None

        if not self.processes.from_main(there) or self.processes.main:
            return found
        found = await_file(look, path.parent)
        if found is None:
            raise ConfigError(
                f"process {self.processes.rank} does not see {path}, which the main process has. "
                "All processes of a run must see the same run folder: put it on storage that they "
                "share (--output)"
            )
        return found

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

        main, unchanged = self.processes.main, stage.trained == stage.deployed
        same = main and unchanged and self.prefixes.has(stage.trained)
        deployed = context.weights() if main else {}
        digest = self.record.save_weights(
            run.id,
            stage.number,
            deployed,
            same_as=self.prefixes.path(stage.trained) if same else None,
        )
        deployed = self._for_all(deployed, self.record.stage_file(run.id, stage.number))
        if context.learner.adapted or not main:
            context.load(deployed)  # what is kept is scored: adapters merged in, and rounded
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
            memory=Memory(self.record.run_folder(run.id) / "memory", stage.number, self.processes),
            processes=self.processes,
            # The same for all methods: they see the same batches, and runs that agree can share.
            seed=run.seed * 1_000_003 + stage.number,
            total_steps=stage.steps,
            device=self.device,
            in_parts=self.processes.several and self.experiment.training.parallel != "ddp",
        )

    def _train(
        self, run: Run, method: Method, stage: Stage, context: TaskRun
    ) -> tuple[Trained, bool]:
        """Leave the trained weights in the model; also says whether they were trained just now."""
        key = stage.trained
        held = self._as_main(
            lambda: self.prefixes.load(key) if self.prefixes.has(key) else None,
            self.prefixes.path(key),
        )
        if held is not None:
            weights, about = held
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
            watch=self._watch(run, context, stage),
        )
        about = {
            "merges": context.merges,
            "curve": context.curve,
            "losses": trained.losses,
            "seconds": trained.seconds,
            "peak_memory": trained.peak_memory,
        }
        if self.processes.main and self.prefixes.wants(stage.trained):
            self.prefixes.save(stage.trained, context.weights(), about)
        return trained, True

    def _watch(self, run: Run, context: TaskRun, stage: Stage) -> Watch:
        """Scores while a task trains, as far as they are asked for."""
        settings = self.experiment.evaluation
        tasks = tasks_during(run, stage, self.stream, settings)

        def probe(step: int, moment: str) -> None:
            for task in tasks:
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

    def _scores(self, run: Run, stage: Stage) -> list[TaskScores]:
        """The scores of the deployed weights, which are in the model, task by task."""
        tasks = self.stream.tasks
        chosen = self.experiment.evaluation.tasks_after(stage.row, len(tasks), run.seed)
        if self.deployed[stage.deployed] == 1:
            return self._scores_on(chosen)
        return self._scored_once(stage.deployed, partial(self._scores_on, chosen))

    def _scored_once(self, key: str, score: Callable[[], list[TaskScores]]) -> list[TaskScores]:
        """Scores that several runs need: taken by the first, in whichever process it is."""
        if key not in self.scored:
            scores = self.processes.from_main(lambda: self.prefixes.scores(key))
            if scores is None:
                scores = score()
                if self.processes.main:
                    self.prefixes.save_scores(key, scores)
            self.scored[key] = scores
        return self.scored[key]

    def _scores_on(self, chosen: Sequence[int]) -> list[TaskScores]:
        """All scores of the weights in the model on some tasks."""
        assert self.learner is not None
        tasks = [self.stream.tasks[number] for number in chosen]
        scores = [(task.name, self.evaluator.scores(self.learner, task)) for task in tasks]
        if general := self.evaluator.lm_eval(self.learner):
            scores.append((_GENERAL, general))
        return scores

    def _start_scores(self) -> list[TaskScores]:
        """b: the scores of theta_0."""
        assert self.learner is not None
        learner = self.learner

        def score() -> list[TaskScores]:
            now = learner.weights()
            learner.load(self.start)
            chosen = self.experiment.evaluation.tasks_at_start(len(self.stream.tasks))
            scores = self._scores_on(chosen)
            learner.load(now)
            return scores

        return self._scored_once(f"start-seed{self.start_seed}", score)

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
        keeps = self.experiment.record.weights == "all"
        if self.processes.main and stage.number and not keeps:
            self.record.stage_file(run.id, stage.number - 1).unlink(missing_ok=True)
