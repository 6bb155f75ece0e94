"""HumanEval: what to ask, where an answer ends, and how many of the answers are right.

Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374. A model continues
the beginning of a function; the continuation is right if the problem's tests pass. Answers are cut
as by the task ``humaneval`` of lm-evaluation-harness, and judged like by the authors' own checker.
Programs see Python's standard library alone: what imports anything else fails here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from stockpot.errors import StockpotError
from stockpot.evaluation.sandbox import Outcome, Sandbox
from stockpot.streams.text import ProgramProblem

__all__ = ["STOP", "check_completions", "few_shot_prompt", "pass_at_k", "program", "truncate"]

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""What comes after the function and not in it: a line that begins at its margin."""


def few_shot_prompt(problems: Sequence[ProgramProblem], index: int, shots: int) -> str:
    """The prompt of one problem, after solved ones: the first others, in their order.

    The problem's own prompt is at the end, unchanged.

    Raises:
        StockpotError: if there are not so many others.
    """
    others = [problem for number, problem in enumerate(problems) if number != index]
    if not 0 <= shots <= len(others):
        raise StockpotError(
            f"{shots} solved problems cannot be shown before one of {len(problems)}: choose 0 to "
            f"{len(others)} shots"
        )
    solved = [
        f"{problem.prompt}{problem.canonical_solution}".strip("\n") for problem in others[:shots]
    ]
    return "".join(f"{text}\n\n\n" for text in solved) + problems[index].prompt


def truncate(completion: str) -> str:
    """The completion up to the first of :data:`STOP`."""
    ends = [place for stop in STOP if (place := completion.find(stop)) >= 0]
    return completion[: min(ends, default=len(completion))]


def program(problem: ProgramProblem, completion: str) -> str:
    """What to run: the function with its completion, the tests, and the call that starts them."""
    return f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})"


def check_completions(
    problems: Sequence[ProgramProblem],
    completions: Sequence[str],
    sandbox: Sandbox,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Cut each completion, run it with its problem's tests, and say what became of it.

    Args:
        problems: one for each completion; a problem with many completions comes many times.
        completions: what the model wrote after the problem's prompt.
        sandbox: where the programs run.
        workers: how many at once; as many as there are usable cores by default.
        progress: called with the number finished and the number of all, after each.
    """
    pairs = zip(problems, completions, strict=True)
    programs = [program(problem, truncate(completion)) for problem, completion in pairs]
    return sandbox.run_many(programs, workers, progress)


def pass_at_k(n: int, c: int, k: int) -> float:
    r"""How often at least one of ``k`` answers is right, from ``n`` answers of which ``c`` are.

    .. math:: \mathrm{pass@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k}

    Unbiased (Chen et al., eq. 1). Computed in whole numbers and rounded once.

    Raises:
        StockpotError: if there are fewer than ``k`` answers.
    """
    if not 0 <= c <= n:
        raise StockpotError(f"{c} of {n} answers cannot be right")
    if not 1 <= k <= n:
        raise StockpotError(f"pass@{k} needs at least {max(k, 1)} answers to a problem, not {n}")
    drawn = math.comb(n, k)
    return (drawn - math.comb(n - c, k)) / drawn
