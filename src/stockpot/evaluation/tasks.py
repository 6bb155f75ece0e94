"""All scores of a model on a task: its held-out examples, and its benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from stockpot.evaluation.accuracy import accuracy
from stockpot.evaluation.score import Score
from stockpot.evaluation.settings import EvaluationSettings
from stockpot.models.learner import ImageLearner, Learner
from stockpot.processes import ALONE, Processes
from stockpot.streams.text import Choices, MathProblems, ProgramProblems

if TYPE_CHECKING:
    from stockpot.evaluation.sandbox import Sandbox
    from stockpot.models.language import TextLearner
    from stockpot.streams.data import Stream, Task, TaskData

__all__ = ["Evaluator", "needs_programs"]

_IMAGES, _TEXTS = 1000, 32


def needs_programs(stream: Stream) -> list[str]:
    """The benchmarks of a stream that run generated programs."""
    return [
        f"{task.name}: {name}"
        for task in stream.tasks
        for name, benchmark in task.benchmarks.items()
        if isinstance(benchmark, ProgramProblems)
    ]


@dataclass(frozen=True)
class Evaluator:
    """Scores a model as an experiment's settings say.

    Args:
        settings: how.
        device: where the model is.
        seed: of sampled programs.
        sandbox: what generated programs run in; None: they are not run, and not scored.
        skipped: the benchmarks that are left out, as programs may not be run.
        progress: called with what is scored, how many items are done, and of how many.
        processes: share the work; all get all scores.
        by_benchmarks: whether a task's score in R is that of its benchmarks; else it is that of its
            held-out examples.
    """

    settings: EvaluationSettings
    device: torch.device
    sandbox: Sandbox | None
    by_benchmarks: bool
    skipped: tuple[str, ...] = ()
    seed: int = 0
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    processes: Processes = ALONE

    def batch_size(self, learner: Learner) -> int:
        """Examples at a time."""
        default = _IMAGES if isinstance(learner, ImageLearner) else _TEXTS
        return self.settings.batch_size or default

    def scores(self, learner: Learner, task: Task) -> list[Score]:
        """Every score on one task; the headline ones make its entry in R."""
        held_out = self.held_out(learner, task.test, what=task.name)
        if not task.benchmarks:
            return [held_out]
        scores: list[Score] = []
        for name in task.benchmarks:
            with self._precision():
                scores += self._benchmark(learner, task, name)
        if self.by_benchmarks:
            return [*scores, held_out.aside()]
        return [held_out, *(score.aside() for score in scores)]

    def held_out(
        self, learner: Learner, data: TaskData, limit: int | None = None, what: str = "held out"
    ) -> Score:
        """Accuracy on images; on text the loss. Of at most ``limit`` examples, the first."""
        if limit is not None and limit < len(data):
            data = data.subset(torch.arange(limit))
        size, watched = self.batch_size(learner), partial(self.progress, what)
        among = self.processes
        watched(0, len(data))
        with self._precision():
            if isinstance(learner, ImageLearner):
                return accuracy(learner, data, size, self.device, watched, among)
            from stockpot.evaluation.language import held_out_loss

            return held_out_loss(learner, data, size, self.device, watched, among)

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast, if the settings ask for it."""
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _benchmark(self, learner: Learner, task: Task, name: str) -> Sequence[Score]:
        from stockpot.evaluation import benchmarks
        from stockpot.evaluation.language import choices

        text: TextLearner = learner  # type: ignore[assignment]
        benchmark, size = task.benchmarks[name], self.batch_size(learner)
        watched = partial(self.progress, name)
        if isinstance(benchmark, Choices):
            return choices(text, name, benchmark, size, self.device, watched, self.processes)
        settings, device, among = self.settings, self.device, self.processes
        if isinstance(benchmark, MathProblems):
            return benchmarks.gsm8k(text, name, benchmark, settings, size, device, watched, among)
        if self.sandbox is None:
            return []
        return benchmarks.humaneval(
            text,
            name,
            benchmark,
            settings,
            size,
            device,
            self.sandbox,
            self.seed,
            watched,
            among,
        )

    def lm_eval(self, learner: Learner) -> list[Score]:
        """The tasks of lm-evaluation-harness that the settings name; none are headline scores."""
        names = self.settings.lm_eval
        if not names:
            return []
        from stockpot.evaluation.lm_eval import run_lm_eval

        text: TextLearner = learner  # type: ignore[assignment]
        with self._precision():
            # The harness would split the work by its own launcher's rules; one process does it all.
            results = self.processes.from_main(
                lambda: run_lm_eval(
                    text.module,
                    text.form.tokenizer,
                    names,
                    limit=self.settings.lm_eval_limit,
                    num_fewshot=self.settings.lm_eval_shots,
                    include_path=self.settings.lm_eval_include,
                    batch_size=self.batch_size(learner),
                    device=self.device,
                    seed=self.seed,
                    apply_chat_template=text.form.template,
                )
            )
        return [
            Score(
                result.value,
                result.n,
                result.stderr or 0.0,
                result.metric,
                result.task,
                result.better,
                torch.tensor(result.items) if result.items else None,
                headline=False,
            )
            for result in results
        ]
