"""What the files of a record must be like; what is not like it is damaged.

A line that does not fit is of no use, whatever is wrong with it: a score that is ``NaN``, a task
that is a list. Of the files that hold one mapping, only what does not fit is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, JsonValue, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

__all__ = [
    "DESCRIBED",
    "ENVIRONMENT",
    "LINES",
    "PLAN",
    "PLANNED_RUN",
    "SUMMARY_RUN",
    "fits",
    "fitting",
]

_MOST_STEPS = 10**12

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=_MOST_STEPS)]
Stage = Annotated[int, Field(ge=0, le=_MOST_STEPS)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Better = Literal["higher", "lower"]
Scalar = str | bool | Annotated[int, Field(ge=-(2**63), lt=2**64)] | Number | None
Settings = dict[str, Scalar | list[Scalar]]


def _trained(line: ScoreLine) -> ScoreLine:
    if line["stage"] >= 0 and line.get("trained") is None:
        raise ValueError("it does not say after which task")
    return line


class ScoreLine(TypedDict):
    """Of scores.jsonl."""

    run: str
    stage: Annotated[int, Field(ge=-1, le=_MOST_STEPS)]
    trained: NotRequired[str | None]
    task: str
    value: Number
    evaluation: NotRequired[str]
    metric: NotRequired[str]
    better: NotRequired[Better]
    headline: NotRequired[bool]


class StageLine(TypedDict):
    """Of stages.jsonl."""

    run: str
    stage: Stage
    tasks: NotRequired[list[str]]
    row: NotRequired[Stage]
    steps: NotRequired[Count]
    seconds: NotRequired[Number | None]
    peak_memory: NotRequired[Number | None]
    l2_to_anchor: NotRequired[Number | None]
    kl_from_anchor: NotRequired[Number | None]
    trained_examples: NotRequired[Number | None]
    extra_examples: NotRequired[Number | None]
    stored: NotRequired[dict[str, Number] | None]
    losses: NotRequired[list[tuple[Count, Number | None]]]


class MergeLine(TypedDict):
    """Of merges.jsonl."""

    run: str
    stage: Stage
    step: Count
    beta: Number
    distance_before: Number
    distance_after: Number


class CurveLine(TypedDict):
    """Of curves.jsonl."""

    run: str
    stage: Stage
    step: Count
    moment: NotRequired[Literal["step", "before merge", "after merge"]]
    task: str
    value: Number


class LineLine(TypedDict):
    """Of lines.jsonl."""

    run: str
    stage: Stage
    alpha: Number
    task: str
    metric: str
    value: Number | None  # None: it was not finite


LINES: Mapping[str, TypeAdapter[Any]] = {
    "scores": TypeAdapter(Annotated[ScoreLine, AfterValidator(_trained)]),
    "stages": TypeAdapter(StageLine),
    "merges": TypeAdapter(MergeLine),
    "curves": TypeAdapter(CurveLine),
    "lines": TypeAdapter(LineLine),
}
"""By the log's name."""


class PlannedStage(TypedDict):
    """One training of a run, in plan.json."""

    tasks: list[str]
    row: Stage
    steps: Count


class PlannedRun(TypedDict):
    """One run, in plan.json."""

    run: str
    method: str
    settings: Settings
    label: str
    seed: Seed
    stages: list[PlannedStage]


def _unique(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("a name is there twice")
    return names


Names = Annotated[list[str], Field(min_length=1), AfterValidator(_unique)]


class Plan(TypedDict):
    """plan.json; its runs are looked at one by one."""

    stream: str
    scenario: str
    tasks: Names
    runs: Annotated[list[Any], Field(min_length=1)]


def _square(run: SummaryRun) -> SummaryRun:
    size = len(run["tasks"])
    rows = [run["b"], *(row for row in run["R"] if row is not None)]
    last = run["R"][-1] if run["R"] else None
    square = len(run["R"]) == size and all(len(row) == size for row in rows)
    if not square or last is None or None in last:
        raise ValueError("R or b has not one score a task")
    return run


class SummaryRun(TypedDict):
    """One finished run, in summary.json."""

    run: NotRequired[str]
    stream: NotRequired[str]
    scenario: NotRequired[str]
    method: str
    settings: Settings
    label: str
    seed: Seed
    tasks: Names
    metric: NotRequired[str]
    better: NotRequired[Better]
    R: list[list[Number | None] | None]
    b: list[Number | None]
    metrics: dict[str, Number | None]


PLAN: TypeAdapter[Any] = TypeAdapter(Plan)
PLANNED_RUN: TypeAdapter[Any] = TypeAdapter(PlannedRun)
SUMMARY_RUN: TypeAdapter[Any] = TypeAdapter(Annotated[SummaryRun, AfterValidator(_square)])

DESCRIBED: Mapping[str, TypeAdapter[Any]] = {
    "name": TypeAdapter(str),
    "planned": TypeAdapter(Annotated[int, Field(ge=0, le=10**6)]),
    "data": TypeAdapter(str),
    "left out": TypeAdapter(list[str]),
    **{
        section: TypeAdapter(dict[str, JsonValue])
        for section in ("stream", "model", "training", "evaluation")
    },
}
"""The keys of experiment.json that the report uses."""
ENVIRONMENT: Mapping[str, TypeAdapter[Any]] = {
    "command": TypeAdapter(str),
    "notes on the data": TypeAdapter(list[str]),
}


def fits(shape: TypeAdapter[Any], value: Any) -> bool:
    """Whether a value that was read from JSON is as it must be."""
    try:
        shape.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def fitting(
    value: Mapping[str, Any], shapes: Mapping[str, TypeAdapter[Any]]
) -> tuple[dict[str, Any], list[str]]:
    """What of a mapping is as it must be, and the keys that are not."""
    bad = [key for key, shape in shapes.items() if key in value and not fits(shape, value[key])]
    return {key: item for key, item in value.items() if key not in bad}, bad
