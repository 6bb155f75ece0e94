"""GSM8K and HumanEval on a model: what it writes, and which of it is right."""

from __future__ import annotations

import torch

from stockpot.evaluation import gsm8k as _gsm8k
from stockpot.evaluation import humaneval as _humaneval
from stockpot.evaluation.generation import generate
from stockpot.evaluation.sandbox import Sandbox
from stockpot.evaluation.score import Progress, Score, mean_score, silent
from stockpot.evaluation.settings import EvaluationSettings
from stockpot.models.language import TextLearner
from stockpot.processes import ALONE, Processes
from stockpot.streams.text import MathProblems, ProgramProblems

__all__ = ["gsm8k", "humaneval"]

_GSM8K_STOPS = ("Question:", "</s>", "<|im_end|>")
"""As lm-evaluation-harness's task has them."""


def gsm8k(
    learner: TextLearner,
    name: str,
    benchmark: MathProblems,
    settings: EvaluationSettings,
    batch_size: int,
    device: torch.device,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> list[Score]:
    """0-shot, greedy. The headline score takes the last number of the answer (``flexible``).

    The other, ``strict``, wants the form ``#### number`` of GSM8K's own answers, which models that
    were tuned on MetaMathQA ("The answer is: number") do not write.
    """
    problems = benchmark.problems
    answers = generate(
        learner,
        [_gsm8k.prompt(problem.question) for problem in problems],
        max_new_tokens=settings.max_new_tokens,
        stop=_GSM8K_STOPS,
        batch_size=batch_size,
        device=device,
        progress=progress,
        processes=processes,
    )
    right: dict[str, list[bool]] = {"flexible": [], "strict": []}
    texts = []
    for problem, answer in zip(problems, answers, strict=True):
        gold = _gsm8k.gold(problem.answer)
        found = {"flexible": _gsm8k.flexible(answer), "strict": _gsm8k.strict(answer)}
        for kind, number in found.items():
            right[kind].append(_gsm8k.is_correct(number, gold))
        texts.append({"answer": answer, "gold": gold, **found})
    flexible = torch.tensor(right["flexible"]).float()
    strict = torch.tensor(right["strict"]).float()
    return [
        mean_score(flexible, "flexible", name, texts=tuple(texts)),
        mean_score(strict, "strict", name, headline=False),
    ]


def humaneval(
    learner: TextLearner,
    name: str,
    benchmark: ProgramProblems,
    settings: EvaluationSettings,
    batch_size: int,
    device: torch.device,
    sandbox: Sandbox,
    seed: int,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> list[Score]:
    """pass@k over ``samples`` programs per problem, run in the sandbox; the first k is headline.

    The model continues raw code, without its chat template, after some solved problems. One program
    per problem is written greedily; several are drawn.
    """
    problems = benchmark.problems
    n = settings.samples
    prompts = [
        _humaneval.few_shot_prompt(problems, number, min(settings.shots, len(problems) - 1))
        for number in range(len(problems))
    ]
    written = generate(
        learner,
        [prompt for prompt in prompts for _ in range(n)],
        max_new_tokens=settings.max_new_tokens,
        stop=_humaneval.STOP,
        batch_size=batch_size,
        device=device,
        temperature=0.0 if n == 1 else settings.temperature,
        seed=seed,
        raw=True,
        progress=progress,
        processes=processes,
    )
    repeated = [problem for problem in problems for _ in range(n)]
    # On the main process's machine alone, which has said what isolation it offers.
    outcomes = processes.from_main(
        lambda: _humaneval.check_completions(repeated, written, sandbox, progress=progress)
    )
    passed = torch.tensor([outcome.passed for outcome in outcomes]).view(len(problems), n).sum(1)
    texts = tuple(
        {
            "task_id": problem.task_id,
            "completion": text,
            "passed": outcome.passed,
            "reason": outcome.reason,
        }
        for problem, text, outcome in zip(repeated, written, outcomes, strict=True)
    )
    scores = []
    for number, k in enumerate(settings.pass_at):
        items = torch.tensor([_humaneval.pass_at_k(n, c, k) for c in passed.tolist()])
        scores.append(
            mean_score(
                items.float(),
                f"pass@{k}",
                name,
                headline=number == 0,
                texts=texts if number == 0 else (),
            )
        )
    return scores
