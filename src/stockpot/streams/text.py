"""Tasks of text before a tokenizer has seen them: examples, benchmarks, streams of both.

A stream of text is read without a model. The model's tokenizer, chat template and kind (causal or
encoder-decoder) then decide how an example becomes tokens: :mod:`stockpot.models.language`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stockpot.errors import StockpotError

__all__ = [
    "Benchmark",
    "Choices",
    "Example",
    "MathProblem",
    "MathProblems",
    "Message",
    "ProgramProblem",
    "ProgramProblems",
    "Question",
    "TextStream",
    "TextTask",
    "exchange",
]


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    content: str


class Example(NamedTuple):
    """What is trained on: a conversation of which the assistant's turns are learned."""

    messages: tuple[Message, ...]


def exchange(prompt: str, response: str) -> Example:
    """The example of one prompt and its response."""
    return Example((Message("user", prompt), Message("assistant", response)))


class Question(NamedTuple):
    """A prompt with possible answers, one of them right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    """Which choice is right, from 0."""


class MathProblem(NamedTuple):
    """A word problem of GSM8K: what to ask, and the worked answer that ends in ``#### number``."""

    question: str
    answer: str


class ProgramProblem(NamedTuple):
    """A problem of HumanEval, with its columns."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


@dataclass(frozen=True)
class Choices:
    """Scored by the log-likelihood of each choice after the prompt."""

    questions: Sequence[Question]

    def fingerprint(self) -> str:
        """SHA-256 of the questions."""
        return digest_of(self.questions)


@dataclass(frozen=True)
class MathProblems:
    """Scored by the number that a generated answer ends with (GSM8K)."""

    problems: Sequence[MathProblem]

    def fingerprint(self) -> str:
        """SHA-256 of the problems."""
        return digest_of(self.problems)


@dataclass(frozen=True)
class ProgramProblems:
    """Scored by running generated programs against tests (HumanEval)."""

    problems: Sequence[ProgramProblem]

    def fingerprint(self) -> str:
        """SHA-256 of the problems."""
        return digest_of(self.problems)


Benchmark = Choices | MathProblems | ProgramProblems


@dataclass(frozen=True)
class TextTask:
    """One task of text: what is trained on, what the loss is measured on, and its benchmarks."""

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)
    """By name, the most telling first; may be empty: then the held-out loss is the score."""


@dataclass(frozen=True)
class TextStream:
    """The ordered tasks of text."""

    name: str
    tasks: tuple[TextTask, ...]

    def __post_init__(self) -> None:
        """Refuse empty tasks and two tasks of one name."""
        if not self.tasks:
            raise StockpotError(f"stream {self.name!r} has no tasks")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise StockpotError(f"stream {self.name!r} has two tasks of one name: {names}")
        for task in self.tasks:
            for split, examples in (("training", task.train), ("test", task.test)):
                if not examples:
                    raise StockpotError(
                        f"stream {self.name!r}, task {task.name!r} has no {split} examples: every "
                        "task needs at least one"
                    )


def digest_of(items: Sequence[Any]) -> str:
    """SHA-256 of named tuples, for the fingerprint of a stream."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()
