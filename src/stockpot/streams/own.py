"""The user's own tasks: rows of files or data sets as examples, in one of three forms.

``prompt`` and ``response``: one exchange. ``messages``: a conversation, a list of turns with a
``role`` and a ``content``. ``text`` and ``label``: classification as text, the text as the prompt
and the label as the response; its benchmark chooses among the labels seen in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stockpot.errors import StockpotError
from stockpot.streams.draws import held_out, limited
from stockpot.streams.rows import (
    MISSING,
    Rows,
    is_file,
    open_data_set,
    read_file,
    rows_of_split,
)
from stockpot.streams.text import (
    Choices,
    Example,
    Message,
    Question,
    TextStream,
    TextTask,
    exchange,
)

__all__ = ["FORMS", "Form", "Source", "TaskSource", "examples_of", "load_own_tasks", "task_name"]

Form = Literal["prompt", "messages", "label"]

FORMS: dict[Form, tuple[str, ...]] = {
    "prompt": ("prompt", "response"),
    "messages": ("messages",),
    "label": ("text", "label"),
}
"""The columns of each form."""

_AFTER = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Which role may stand before each; "" is the beginning."""

_EXPECTED = {
    "prompt": "'prompt' and 'response', each text",
    "messages": "'messages', a list of turns, each with a 'role' and a 'content'",
    "label": "'text', text, and 'label', text or a whole number",
}


@dataclass(frozen=True)
class Source:
    """Where rows come from: a file, a folder or a hub id; a data set's split and configuration."""

    path: str
    split: str
    config: str | None
    option: str
    """The setting that says so, for errors."""

    def read(self) -> Rows:
        """The rows."""
        if is_file(self.path) or Path(self.path).is_file():
            return read_file(self.path)
        splits = open_data_set(self.path, self.config, self.option)
        return rows_of_split(self.path, splits, self.split, spell_labels=True)


@dataclass(frozen=True)
class TaskSource:
    """One task of the user's: where its rows are and how they are read."""

    name: str
    train: Source
    test: Source | None
    """None: a share of the training rows is held out."""
    columns: Mapping[str, str]
    """From our names to the user's, where they differ."""
    form: Form | None


def task_name(source: str) -> str:
    """The name of a task that is given by its path alone: the file's, without its ending."""
    return Path(source).stem if is_file(source) else Path(source).name


def load_own_tasks(
    sources: Sequence[TaskSource],
    test_share: float,
    train_limit: int | None,
    test_limit: int | None,
    seed: int,
) -> TextStream:
    """Read the user's tasks, in the order given.

    Args:
        sources: the tasks.
        test_share: of the prompts, held out where a task has no test rows; at least one, and of
            each label in proportion.
        train_limit: at most so many examples of a task, drawn by the seed; None: all.
        test_limit: the same for its test examples.
        seed: of the draws.

    Raises:
        StockpotError: naming file and line (or row), what is wrong and what was expected.
    """
    return TextStream(
        "tasks",
        tuple(_task(source, test_share, train_limit, test_limit, seed) for source in sources),
    )


def _task(
    source: TaskSource,
    test_share: float,
    train_limit: int | None,
    test_limit: int | None,
    seed: int,
) -> TextTask:
    rows = source.train.read()
    form = _form(rows, source.columns, source.form)
    train = examples_of(rows, form, source.columns)
    if source.test is None:
        train, test = _hold_out(rows.source, train, form, test_share, seed)
    else:
        test_rows = source.test.read()
        test = examples_of(test_rows, form, source.columns)
        if form == "label":
            _check_labels(rows.source, train, test_rows, test)
    labels = sorted({response_of(example) for example in train}) if form == "label" else []
    if len(labels) == 1:
        raise StockpotError(
            f"{rows.source}: every row has the label {labels[0]!r}; expected at least two labels"
        )
    train, test = limited(train, train_limit, seed), limited(test, test_limit, seed)
    benchmarks = {}
    if labels:
        place = {label: number for number, label in enumerate(labels)}
        benchmarks["labels"] = Choices(
            tuple(
                Question(prompt_of(item), tuple(labels), place[response_of(item)]) for item in test
            )
        )
    return TextTask(source.name, train, test, benchmarks)


def prompt_of(example: Example) -> str:
    """What comes before the last answer, as one text."""
    return "\n\n".join(message.content for message in example.messages[:-1])


def response_of(example: Example) -> str:
    """The last answer."""
    return example.messages[-1].content


def _hold_out(
    name: str, examples: Sequence[Example], form: Form, share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    prompts = [prompt_of(example) for example in examples]
    strata = [response_of(example) for example in examples] if form == "label" else None
    count = max(1, round(share * len(set(prompts))))
    train, test = held_out(prompts, count, seed, strata)
    if not test:
        raise StockpotError(
            f"{name}: there is no row to hold out for tests: "
            + (
                "every label has one text"
                if form == "label" and len(set(prompts)) > 1
                else "all rows have one prompt"
            )
            + "; add rows, or give 'test'"
        )
    return [examples[n] for n in train], [examples[n] for n in test]


def _check_labels(
    name: str, train: Sequence[Example], test_rows: Rows, test: Sequence[Example]
) -> None:
    known = {response_of(example) for example in train}
    for number, example in enumerate(test):
        if response_of(example) not in known:
            some = ", ".join(repr(label) for label in sorted(known)[:10])
            raise StockpotError(
                f"{test_rows.place(number)}: the label {response_of(example)!r} is not among those "
                f"of {name}: {some}{', ...' if len(known) > 10 else ''}"
            )


# From rows to examples.


def _form(rows: Rows, columns: Mapping[str, str], wanted: Form | None) -> Form:
    """Which form the rows have: the one asked for, or the only one whose columns are there."""
    for name, column in columns.items():
        if column not in rows.columns:
            raise StockpotError(
                f"{rows.source} has no column {column!r}, which columns.{name} names (it has "
                f"{', '.join(rows.columns)})"
            )
    there = {
        form: [name for name in names if columns.get(name, name) in rows.columns]
        for form, names in FORMS.items()
    }
    whole: list[Form] = [form for form, names in FORMS.items() if len(there[form]) == len(names)]
    if wanted is not None:
        if wanted not in whole:
            raise StockpotError(
                f"{rows.source} has the columns {', '.join(rows.columns)}; expected "
                + _EXPECTED[wanted]
            )
        return wanted
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise StockpotError(
            f"{rows.source} could be read in more than one way, as it has the columns "
            f"{', '.join(rows.columns)}; say form: {' or form: '.join(whole)}"
        )
    raise StockpotError(
        f"{rows.source} has the columns {', '.join(rows.columns)}; expected "
        f"{'; or '.join(_EXPECTED.values())}. Other names are told by columns, as in "
        "columns: {prompt: instruction, response: output}"
    )


def examples_of(
    rows: Rows, form: Form | None = None, columns: Mapping[str, str] | None = None
) -> list[Example]:
    """All rows as examples.

    Args:
        rows: from a file or a data set.
        form: None: found from the columns.
        columns: from our names to those of the rows, where they differ.

    Raises:
        StockpotError: for the first row that is not of the form.
    """
    columns = {} if columns is None else columns
    form = _form(rows, columns, form)
    names = [columns.get(name, name) for name in FORMS[form]]
    values = zip(*(rows.column(name) for name in names), strict=True)
    examples = []
    for number, row in enumerate(values):
        try:
            if form == "messages":
                examples.append(_conversation(row[0], names[0]))
            else:
                answer = (_label if form == "label" else _text)(row[1], names[1])
                examples.append(exchange(_text(row[0], names[0]), answer))
        except _BadValueError as error:
            raise StockpotError(
                f"{rows.place(number)}: {error}; expected {error.expected}"
            ) from None
    return examples


class _BadValueError(Exception):
    """What is wrong with a value, and what was expected."""

    def __init__(self, what: str, expected: str = "text") -> None:
        super().__init__(what)
        self.expected = expected


def _text(value: Any, name: str, blank: bool = False) -> str:
    """The value, if it is text that can be trained on."""
    if value is MISSING:
        raise _BadValueError(f"there is no {name!r}")
    if not isinstance(value, str):
        raise _BadValueError(f"{name!r} is {_kind(value)}")
    if not blank and not value.strip():
        raise _BadValueError(f"{name!r} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _BadValueError(
                f"{name!r} holds {value[error.start]!a}, half of a character"
            ) from None
    return value


def _label(value: Any, name: str) -> str:
    """Labels that are whole numbers or truth values become text, as JSON writes them."""
    if isinstance(value, int):
        value = str(value).lower()
    try:
        return _text(value, name)
    except _BadValueError as error:
        what = str(error).removesuffix(", not text")
        raise _BadValueError(what, "text or a whole number") from None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"{str(value).lower()}, not text"
    for kind, words in ((list, "a list"), (dict, "an object"), (bytes, "bytes")):
        if isinstance(value, kind):
            return f"{words}, not text"
    return f"{type(value).__name__}, not text"


def _conversation(turns: Any, name: str) -> Example:
    """The turns of one conversation: system first if at all, then user and assistant in turn."""
    if not isinstance(turns, list) or not turns:
        if turns is MISSING:
            what = f"there is no {name!r}"
        elif isinstance(turns, list | str):
            what = f"{name!r} is {'text' if turns else 'empty'}"
        else:
            what = f"{name!r} is {_kind(turns).removesuffix(', not text')}"
        raise _BadValueError(what, "a list of turns, each with a 'role' and a 'content'")
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        messages.append(_turn(turn, f"{name}[{number}]", messages[-1].role if messages else ""))
    if not any(message.role == "assistant" for message in messages):
        raise _BadValueError(
            f"{name!r} has no turn of the assistant", "at least one, which is what is learned"
        )
    if messages[-1].role != "assistant":
        raise _BadValueError(
            f"{name!r} ends with a turn of role {messages[-1].role!r}",
            "a turn of the assistant at the end",
        )
    return Example(tuple(messages))


def _turn(turn: Any, name: str, before: str) -> Message:
    if not isinstance(turn, dict):
        raise _BadValueError(f"{name} is no object", '{"role": "...", "content": "..."}')
    role = turn.get("role", MISSING)
    if role is MISSING:
        raise _BadValueError(f"{name} has no 'role'", '{"role": "...", "content": "..."}')
    if not isinstance(role, str) or role not in _AFTER:
        raise _BadValueError(f"{name}.role is {role!r}", "system, user, assistant or tool")
    # Arrow gives every turn every key; null is as good as absent.
    more = [key for key in turn if key not in ("role", "content") and turn[key] is not None]
    if more:
        raise _BadValueError(
            f"{name} has {more[0]!r}", "only 'role' and 'content': anything else would be lost"
        )
    if before not in _AFTER[role]:
        follows = [then for then, allowed in _AFTER.items() if before in allowed]
        raise _BadValueError(
            f"{name} is of role {role!r}" + (f" after {before!r}" if before else ""),
            " or ".join(follows) + (" there" if before else " first"),
        )
    try:
        content = turn.get("content", MISSING)
        return Message(role, _text(content, f"{name}.content", blank=role in ("system", "tool")))
    except _BadValueError as error:
        raise _BadValueError(str(error), "'content' to be text") from None
