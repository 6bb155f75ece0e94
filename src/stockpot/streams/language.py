"""The paper's language tasks: Math, Law and Code (section 4), and the instructions of A.4.

Rows in which something is empty are left out, and no prompt is both trained and tested on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stockpot.errors import StockpotError
from stockpot.streams.draws import held_out, limited, shuffled
from stockpot.streams.language_sets import (
    BENCHMARKS,
    DOMAINS,
    INSTRUCTIONS,
    PROBLEMS,
    Item,
    PublicSet,
    chosen_columns,
)
from stockpot.streams.own import examples_of
from stockpot.streams.rows import open_data_set, read_file, rows_of_split
from stockpot.streams.text import (
    Benchmark,
    Choices,
    MathProblem,
    MathProblems,
    ProgramProblem,
    ProgramProblems,
    TextStream,
    TextTask,
)

__all__ = ["Limits", "load_domains", "load_instructions"]


class Limits(NamedTuple):
    """How much of each task is used; None: all."""

    train: int | None = None
    test: int | None = None
    benchmark: int | None = None


def load_domains(
    tasks: Sequence[str],
    benchmarks: Sequence[str] | None,
    limits: Limits,
    held: int | None,
    test_share: float,
    paths: Mapping[str, str],
    seed: int,
) -> TextStream:
    """Math, Law and Code, in the order given.

    Args:
        tasks: names of :data:`DOMAINS`.
        benchmarks: names of :data:`BENCHMARKS`; None: all that the tasks have. Data that only a
            benchmark needs is not read without it.
        limits: of each task and benchmark, drawn by the seed.
        held: rows of Math and of Code to hold out for the loss; None: 500 or 5 %, whichever
            is fewer.
        test_share: of the prompts of those sets of Law that have no test split, of each label in
            proportion.
        paths: folders to read instead of the hub, by hub id.
        seed: of all draws.

    Raises:
        StockpotError: if a data set cannot be had or is not what was expected.
    """
    made = []
    for name in tasks:
        train: list[Item] = []
        test: list[Item] = []
        scores: dict[str, Benchmark] = {}
        wanted = [b for b in BENCHMARKS[name] if benchmarks is None or b in benchmarks]
        for part, public in DOMAINS[name].items():
            splits = _opened(public, paths)
            share = held if public.test is None else test_share
            some, others = public.divided(splits, share, seed)
            _check_left(public.id, some, others)
            train += some
            test += others
            if part in wanted:
                questions = [item.question for item in others if item.question is not None]
                scores[part] = Choices(tuple(limited(questions, limits.benchmark, seed)))
        for benchmark in wanted:
            if benchmark in PROBLEMS:
                scores[benchmark] = _problems(benchmark, paths, limits.benchmark, seed)
        if len(DOMAINS[name]) > 1:
            train, test = shuffled(train, seed), shuffled(test, seed)
        made.append(_task(name, train, test, scores, limits, seed))
    return TextStream(f"domains/{'-'.join(tasks)}", tuple(made))


def load_instructions(
    tasks: Sequence[str],
    twitter: str | None,
    limits: Limits,
    test_share: float,
    paths: Mapping[str, str],
    seed: int,
) -> TextStream:
    """The instruction tasks of A.4 in the order given; they are scored by their held-out loss.

    Args:
        tasks: names of :data:`INSTRUCTIONS`, and ``twitter``.
        twitter: the file of Twitter stylometry, with the columns ``author`` and ``text`` (the
            prompt asks for a tweet in the author's style), or ``prompt`` and ``response``.
        limits: of each task, drawn by the seed.
        test_share: of the prompts, held out where a set has no test split.
        paths: folders to read instead of the hub, by hub id.
        seed: of all draws.

    Raises:
        StockpotError: if data cannot be had or is not what was expected.
    """
    made = []
    for name in tasks:
        if name == "twitter":
            assert twitter is not None
            train, test = _tweets(twitter, test_share, seed)
        else:
            public = INSTRUCTIONS[name]
            train, test = public.divided(_opened(public, paths), test_share, seed)
        _check_left(name, train, test)
        made.append(_task(name, train, test, {}, limits, seed))
    return TextStream(f"instructions/{'-'.join(tasks)}", tuple(made))


def _check_left(name: str, train: Sequence[Item], test: Sequence[Item]) -> None:
    for what, items in (("train", train), ("test", test)):
        if not items:
            raise StockpotError(f"{name}: no prompts are left to {what} on")


def _task(
    name: str,
    train: Sequence[Item],
    test: Sequence[Item],
    benchmarks: Mapping[str, Benchmark],
    limits: Limits,
    seed: int,
) -> TextTask:
    return TextTask(
        name,
        [item.example for item in limited(train, limits.train, seed)],
        [item.example for item in limited(test, limits.test, seed)],
        benchmarks,
    )


def _problems(name: str, paths: Mapping[str, str], limit: int | None, seed: int) -> Benchmark:
    source, config = PROBLEMS[name]
    splits = open_data_set(paths.get(source, source), config, f"stream.paths: {{{source}: FOLDER}}")
    kind = MathProblem if name == "gsm8k" else ProgramProblem
    rows = rows_of_split(source, splits, "test")
    values = chosen_columns(rows, {column: (column,) for column in kind._fields})
    for number, row in enumerate(values):
        for column, value in row.items():
            if not isinstance(value, str):
                raise StockpotError(
                    f"{rows.place(number)}: {column!r} is {type(value).__name__}; expected text"
                )
    if name == "gsm8k":
        return MathProblems(tuple(limited([MathProblem(**row) for row in values], limit, seed)))
    return ProgramProblems(tuple(limited([ProgramProblem(**row) for row in values], limit, seed)))


def _tweets(source: str, share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Tweets by author: many have one prompt, so here no whole example is on both sides."""
    rows = read_file(source)
    by_author = {"author", "text"} <= set(rows.columns)
    if by_author:
        columns = {"prompt": "author", "response": "text"}
    elif {"prompt", "response"} <= set(rows.columns):
        columns = {}
    else:
        raise StockpotError(
            f"{source} has the columns {', '.join(rows.columns)}; expected author and text, or "
            "prompt and response"
        )
    items = []
    for example in examples_of(rows, "prompt", columns):
        prompt, response = (message.content for message in example.messages)
        asked = f"Write a tweet in the style of {prompt}.\nTweet:" if by_author else prompt
        items.append(Item(asked, response, None, asked if by_author else ""))
    if not by_author:
        keys = [item.prompt for item in items]
    else:
        keys = [f"{item.prompt}\n{item.response}" for item in items]
    count = max(1, round(share * len(set(keys))))
    kept, out = held_out(keys, count, seed, [item.stratum for item in items])
    return [items[n] for n in kept], [items[n] for n in out]


def _opened(public: PublicSet, paths: Mapping[str, str]) -> Any:
    source = paths.get(public.id, public.id)
    return open_data_set(source, public.config, f"stream.paths: {{{public.id}: FOLDER}}")
