"""What an experiment may say about its tasks of text: typed, checked before data is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stockpot.errors import nearest
from stockpot.streams.base import StreamSettings, TasksByLabel
from stockpot.streams.language_sets import BENCHMARKS, DOMAIN_SETS, INSTRUCTION_SETS, INSTRUCTIONS
from stockpot.streams.rows import FILES, is_file

if TYPE_CHECKING:
    from stockpot.streams.own import TaskSource
    from stockpot.streams.text import TextStream

__all__ = ["Columns", "Domains", "Instructions", "OwnTask", "OwnTasks"]


class Columns(BaseModel):
    """Our names of columns, each with the user's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    prompt: str | None = Field(None, description="the column that is the prompt")
    response: str | None = Field(None, description="the column that is the response")
    messages: str | None = Field(None, description="the column of conversations")
    text: str | None = Field(None, description="the column of texts to classify")
    label: str | None = Field(None, description="the column of their labels")

    def given(self) -> dict[str, str]:
        """Those that are set."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class OwnTask(BaseModel):
    """One task of the user's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1, description="of the task; default: the file's")
    train: str = Field(
        min_length=1, description=f"a file ({', '.join(FILES)}), a data set's folder or its hub id"
    )
    test: str | None = Field(
        None, min_length=1, description="the same for the test rows; null: some are held out"
    )
    columns: Columns = Field(Columns(), description="from our names to the file's")
    config: str | None = Field(None, description="which configuration of the data set")
    split: str | None = Field(None, description="of the data set to train on; null: train")
    test_split: str | None = Field(
        None, description="of the data set to test on; null: test, where test is a data set"
    )
    form: Literal["prompt", "messages", "label"] | None = Field(
        None, description="prompt and response, messages, or text and label; null: what it has"
    )

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        from stockpot.streams.own import task_name

        if isinstance(value, str):
            value = {"train": value}
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is neither a path nor a mapping with a name and train")
        train = value.get("train")
        # Without a path there is one complaint, about the path.
        name = task_name(train) if isinstance(train, str) and train else "?"
        return {"name": name, **value}

    @model_validator(mode="after")
    def _splits_are_of_data_sets(self) -> Self:
        tested = self.test or self.train
        for option, value, source in (
            ("split", self.split, self.train),
            ("config", self.config, self.train),
            ("test_split", self.test_split, tested),
        ):
            if value is not None and is_file(source):
                raise ValueError(f"{option} = {value}: {source} is a file, which has none")
        return self

    def source(self, number: int) -> TaskSource:
        """Where its rows are."""
        from stockpot.streams.own import Source, TaskSource

        at = f"stream.tasks.{number}"
        test = None
        if self.test is not None or self.test_split is not None:
            path = self.test or self.train
            test = Source(path, self.test_split or "test", self.config, f"{at}.test")
        return TaskSource(
            self.name,
            Source(self.train, self.split or "train", self.config, f"{at}.train"),
            test,
            self.columns.given(),
            self.form,
        )


class OwnTasks(TasksByLabel):
    """Your own tasks: files (JSONL, JSON, CSV, TSV, parquet) or data sets of text."""

    of_text: ClassVar[bool] = True
    name: Literal["tasks"] = "tasks"
    tasks: tuple[OwnTask, ...] = Field(
        min_length=1, description="a path each, or a mapping with name, train, test, columns, ..."
    )
    test_share: float = Field(
        0.1, gt=0, lt=1, description="of a task's rows, held out if it has no test rows"
    )
    seed: int = Field(0, ge=0, description="seed of the draws (the same in every run)")

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: tuple[OwnTask, ...]) -> tuple[OwnTask, ...]:
        _once([task.name for task in tasks], "; give each its own name")
        return tasks

    def _task_count(self) -> int:
        return len(self.tasks)

    def load(self) -> TextStream:
        """Read the tasks in the order asked for."""
        from stockpot.streams.own import load_own_tasks

        order = range(len(self.tasks)) if self.order is None else self.order
        sources = [self.tasks[number].source(number) for number in order]
        return load_own_tasks(
            sources, self.test_share, self.train_limit, self.test_limit, self.seed
        )


class _PublicTasks(StreamSettings):
    """What the streams of public data sets of text share."""

    of_text: ClassVar[bool] = True
    train_limit: int | None = Field(
        None, ge=1, description="at most so many training examples a task, drawn; null: all"
    )
    test_limit: int | None = Field(
        None, ge=1, description="at most so many held-out examples a task, drawn; null: all"
    )
    paths: dict[str, str] = Field(
        default_factory=dict,
        description="folders to read instead of the hub, e.g. {openai/gsm8k: data/gsm8k}",
    )
    seed: int = Field(0, ge=0, description="seed of all draws (the same in every run)")


class Domains(_PublicTasks):
    """The paper's domains: Math, Law and Code, with GSM8K, three of law, and HumanEval."""

    name: Literal["domains"] = "domains"
    tasks: tuple[Literal["math", "law", "code"], ...] = Field(
        ("math", "law", "code"), min_length=1, description="in the order they are learned"
    )
    benchmarks: (
        tuple[Literal["gsm8k", "casehold", "tos", "overruling", "humaneval"], ...] | None
    ) = Field(
        None,
        description="what the tasks are scored on; null: all of theirs; []: only the held-out loss",
    )
    benchmark_limit: int | None = Field(
        None, ge=1, description="at most so many questions a benchmark, drawn; null: all"
    )
    held_out: int | None = Field(
        None, ge=1, description="rows of Math and of Code kept for the loss; null: 500, at most 5 %"
    )
    test_share: float = Field(
        0.2, gt=0, lt=1, description="held out of the sets of Law without a test split"
    )

    @field_validator("tasks")
    @classmethod
    def _once_each(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return _once(tasks)

    @field_validator("paths")
    @classmethod
    def _known(cls, paths: dict[str, str]) -> dict[str, str]:
        return _ids_among(paths, DOMAIN_SETS)

    @model_validator(mode="after")
    def _benchmarks_of_tasks(self) -> Self:
        for benchmark in self.benchmarks or ():
            task = next(task for task, names in BENCHMARKS.items() if benchmark in names)
            if task not in self.tasks:
                raise ValueError(f"benchmarks: {benchmark} is scored on {task}, not among tasks")
        return self

    def load(self) -> TextStream:
        """Read what the tasks and their benchmarks need."""
        from stockpot.streams.language import Limits, load_domains

        return load_domains(
            self.tasks,
            self.benchmarks,
            Limits(self.train_limit, self.test_limit, self.benchmark_limit),
            self.held_out,
            self.test_share,
            self.paths,
            self.seed,
        )


class Instructions(_PublicTasks):
    """The paper's instruction tasks (appendix A.4), scored by their held-out loss."""

    name: Literal["instructions"] = "instructions"
    tasks: (
        tuple[
            Literal[
                "simplification", "questions", "headlines", "covid-fact", "covid-qa", "twitter"
            ],
            ...,
        ]
        | None
    ) = Field(
        None,
        min_length=1,
        description="in the order they are learned; null: the paper's, twitter if it is given",
    )
    twitter: str | None = Field(
        None, description="your file of tweets: columns author and text, or prompt and response"
    )
    test_share: float = Field(0.1, gt=0, lt=1, description="held out of a set without a test split")

    @field_validator("tasks")
    @classmethod
    def _once_each(cls, tasks: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if tasks is None else _once(tasks)

    @field_validator("paths")
    @classmethod
    def _known(cls, paths: dict[str, str]) -> dict[str, str]:
        return _ids_among(paths, INSTRUCTION_SETS)

    @model_validator(mode="after")
    def _tweets_are_given(self) -> Self:
        if self.twitter is None and "twitter" in (self.tasks or ()):
            raise ValueError(
                "tasks: twitter needs your own file of tweets, as no public copy may be shared: "
                "give twitter: tweets.csv, with the columns author and text"
            )
        return self

    def load(self) -> TextStream:
        """Read the tasks' data sets."""
        from stockpot.streams.language import Limits, load_instructions

        tasks: tuple[str, ...] = self.tasks or tuple(INSTRUCTIONS)
        if self.tasks is None and self.twitter is not None:
            tasks += ("twitter",)
        return load_instructions(
            tasks,
            self.twitter,
            Limits(self.train_limit, self.test_limit),
            self.test_share,
            self.paths,
            self.seed,
        )


def _once(names: Iterable[str], remedy: str = "") -> tuple[str, ...]:
    names = tuple(names)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two tasks are named {name!r}{remedy}")
    return names


def _ids_among(paths: dict[str, str], known: Iterable[str]) -> dict[str, str]:
    known = tuple(known)
    for source in paths:
        if source not in known:
            raise ValueError(f"{source!r} is not read here{nearest(source, known)}")
    return paths
