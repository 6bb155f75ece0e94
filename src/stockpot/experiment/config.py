"""An experiment as its YAML says it: typed, and refused before anything is loaded."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stockpot.errors import ConfigError, nearest
from stockpot.evaluation.settings import EvaluationSettings
from stockpot.experiment.overrides import apply_override
from stockpot.experiment.resources import ResourceSettings
from stockpot.experiment.smoke import shrink_values
from stockpot.methods import METHODS, Method
from stockpot.models import MODELS, ModelSettings, expand_model
from stockpot.settings_file import Key, Lines, explain, read_yaml
from stockpot.streams import STREAMS, StreamSettings
from stockpot.training import TrainingSettings

__all__ = ["Experiment", "RecordSettings", "load_experiment"]

if typing.TYPE_CHECKING:
    from stockpot.streams.data import Stream

_EXPECTED = "'stream:', 'model:', 'methods:' and so on (`stockpot run --help` shows an example)"

_Settings = TypeVar("_Settings", bound=BaseModel)


class RecordSettings(BaseModel):
    """What is kept on disk."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    weights: Literal["final", "all", "none"] = Field(
        "final",
        description="weights kept when a run is done: the final model, the model after every "
        "task, or none",
    )


@dataclass(frozen=True)
class Experiment:
    """A stream, a model, training settings, methods with their settings, and seeds."""

    name: str
    stream: StreamSettings
    model: ModelSettings
    training: TrainingSettings
    evaluation: EvaluationSettings
    record: RecordSettings
    methods: tuple[Method, ...]
    """One per method and setting, in the order given."""
    seeds: tuple[int, ...]
    output: Path
    resources: ResourceSettings = field(default_factory=ResourceSettings)

    def load_stream(self) -> Stream:
        """Read the data, as the model takes them."""
        return self.model.encode(self.stream.load())

    def common(self) -> dict[str, Any]:
        """What all runs share."""
        return {
            "stream": self.stream.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
            "evaluation": self.evaluation.model_dump(mode="json"),
        }

    def to_yaml(self) -> str:
        """The experiment with every default written out; it can be run as it is."""
        document = {
            "name": self.name,
            **self.common(),
            "record": self.record.model_dump(mode="json"),
            "resources": self.resources.model_dump(mode="json"),
            "methods": [{"name": method.name, **method.settings()} for method in self.methods],
            "seeds": list(self.seeds),
            "output": str(self.output),
        }
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


_KEYS = (
    "name",
    "stream",
    "model",
    "training",
    "evaluation",
    "record",
    "resources",
    "methods",
    "seeds",
    "output",
)


def load_experiment(
    path: str | Path,
    overrides: typing.Sequence[str] = (),
    output: str | Path | None = None,
    *,
    smoke: bool = False,
) -> Experiment:
    """Read and check an experiment file.

    Args:
        path: the YAML file.
        overrides: ``key=value`` with dotted keys, applied in order.
        output: the run folder; default: the file's ``output``, else ``runs/<file name>``.
        smoke: cut it down to seconds (:mod:`stockpot.experiment.smoke`); overrides come after.

    Raises:
        ConfigError: listing every wrong key and value with its place, the reason and, for a name,
            the nearest valid one.
    """
    path = Path(path)
    values, places = read_yaml(path, _EXPECTED)
    if smoke:
        shrink_values(values, path.stem)
    for override in overrides:
        apply_override(values, places, override)
    return _Checker(places, str(path)).experiment(values, path, output)


class _Checker:
    """Checks one document and collects everything that is wrong with it."""

    def __init__(self, places: Lines, file: str) -> None:
        self.places = places
        self.file = file
        self.problems: list[str] = []

    def experiment(
        self, values: dict[str, Any], path: Path, output: str | Path | None
    ) -> Experiment:
        for key in values:
            if key not in _KEYS:
                self.problem((key,), f"unknown key {key!r}{nearest(key, _KEYS)}")
        stream = self.chosen(values, "stream", STREAMS, values.get("stream"))
        model = self.chosen(values, "model", MODELS, expand_model(values.get("model")))
        training = self.section(TrainingSettings, ("training",), values.get("training"))
        evaluation = self.section(EvaluationSettings, ("evaluation",), values.get("evaluation"))
        record = self.section(RecordSettings, ("record",), values.get("record"))
        resources = self.section(ResourceSettings, ("resources",), values.get("resources"))
        methods = self.methods(values)
        self.fits(stream, model, methods)
        seeds = self.seeds(values)
        name = self.text(values, "name", path.stem)
        folder = self.text(values, "output", f"runs/{path.stem}")
        if self.problems:
            count = len(self.problems)
            head = "1 problem" if count == 1 else f"{count} problems"
            raise ConfigError(f"{head} in {self.file}:\n  " + "\n  ".join(self.problems))
        assert stream is not None
        assert model is not None
        assert training is not None
        assert evaluation is not None
        assert record is not None
        assert resources is not None
        return Experiment(
            name=name,
            stream=stream,
            model=model,
            training=training,
            evaluation=evaluation,
            record=record,
            resources=resources,
            methods=methods,
            seeds=seeds,
            output=Path(folder if output is None else output),
        )

    def problem(self, at: tuple[Key, ...], text: str) -> None:
        place = at
        while place and place not in self.places:
            place = place[:-1]
        where = self.places.get(place, self.file)
        dotted = ".".join(str(key) for key in at)
        self.problems.append(f"{where}: {dotted}: {text}" if dotted else f"{where}: {text}")

    def text(self, values: dict[str, Any], key: str, default: str) -> str:
        value = values.get(key, default)
        if not isinstance(value, str | int | float) or str(value) == "":
            self.problem((key,), f"{value!r} is no text")
            return default
        return str(value)

    def chosen(
        self,
        values: dict[str, Any],
        key: str,
        choices: Mapping[str, type[_Settings]],
        value: Any,
    ) -> _Settings | None:
        """A section whose ``name`` says which class it is of."""
        if key not in values:
            self.problem((), f"{key!r} is missing: name one of {', '.join(choices)}")
            return None
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            self.problem((key,), f"{value!r} is neither a name nor a mapping with a name")
            return None
        name = value.get("name")
        if not isinstance(name, str) or name not in choices:
            what = "has no name" if name is None else f"unknown {key} {name!r}"
            self.problem((key,), f"{what}{nearest(str(name), choices)}")
            return None
        return self.section(choices[name], (key,), value)

    def section(self, kind: type[_Settings], at: tuple[Key, ...], value: Any) -> _Settings | None:
        """One flat section, checked by its class."""
        value = {} if value is None else value
        if not isinstance(value, dict):
            self.problem(at, f"{value!r} is no mapping (valid keys: {', '.join(_valid(kind))})")
            return None
        count = len(self.problems)
        value = {key: _unbool(kind, key, item) for key, item in value.items()}
        for key, item in value.items():
            if isinstance(item, bool) and key in kind.model_fields and not _allows_bool(kind, key):
                self.problem((*at, key), f"{item} is not a number or a name")
        if len(self.problems) > count:
            return None
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            for item in error.errors():
                self.problem((*at, *item["loc"]), explain(kind, item))
            return None

    def seeds(self, values: dict[str, Any]) -> tuple[int, ...]:
        seeds = values.get("seeds", [0])
        if isinstance(seeds, int) and not isinstance(seeds, bool):
            seeds = [seeds]
        good = isinstance(seeds, list) and all(
            isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32
            for seed in seeds
        )
        if not good or not seeds or len(set(seeds)) != len(seeds):
            self.problem(
                ("seeds",), f"{seeds!r} is no list of different whole numbers from 0 to 2**32 - 1"
            )
            return ()
        return tuple(seeds)

    def methods(self, values: dict[str, Any]) -> tuple[Method, ...]:
        """Every method at every point of its grid: a list of values makes an axis."""
        items = values.get("methods")
        if not isinstance(items, list) or not items:
            self.problem(
                ("methods",) if "methods" in values else (),
                f"'methods' must be a list, of some of {', '.join(METHODS)}",
            )
            return ()
        result: list[Method] = []
        for number, item in enumerate(items):
            for method in self.grid(("methods", number), item):
                if not any(_same(method, other) for other in result):
                    result.append(method)
        return tuple(result)

    def fits(
        self, stream: StreamSettings | None, model: ModelSettings | None, methods: Iterable[Method]
    ) -> None:
        """Refuse methods that could not do what they say with this model or these tasks."""
        adapted = getattr(model, "lora", None) is not None
        of_text = stream is not None and stream.of_text
        if stream is not None and not of_text and model is not None:
            # By their values: a resolved experiment has every default written out.
            own = type(model).model_fields
            for key in sorted(k for k in model.of_text if getattr(model, k) != own[k].default):
                self.problem(("model", key), f"is for streams of text, and {stream.name} is none")
        works = ", ".join(name for name, kind in METHODS.items() if not kind.needs_weights)
        problems = []
        for method in methods:
            if adapted and method.needs_weights:
                problems.append(
                    f"{method.name} works on the weights that train, and with model.lora those are "
                    "the adapters, which begin anew at every task. Leave model.lora out, or use "
                    f"one of {works}"
                )
            if of_text and getattr(method, "labels", None) == "exact":
                problems.append(
                    f"{method.name}: labels = exact would sum over all texts; use labels: sampled "
                    "or labels: true"
                )
        for text in dict.fromkeys(problems):
            self.problem(("methods",), text)

    def grid(self, at: tuple[Key, ...], item: Any) -> list[Method]:
        item = {"name": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or "name" not in item:
            self.problem(at, f"{item!r} has no name (valid: {', '.join(METHODS)})")
            return []
        name = item["name"]
        if not isinstance(name, str) or name not in METHODS:
            self.problem((*at, "name"), f"unknown method {name!r}{nearest(str(name), METHODS)}")
            return []
        axes = {key: value for key, value in item.items() if key != "name"}
        for key, value in axes.items():
            if isinstance(value, list) and not value:
                self.problem((*at, key), "an empty list leaves nothing to run")
                return []
        points = itertools.product(
            *(value if isinstance(value, list) else [value] for value in axes.values())
        )
        methods = []
        known = set(self.problems)
        for point in points:
            method = self.section(METHODS[name], at, dict(zip(axes, point, strict=True)))
            if method is not None:
                methods.append(method)
        # A wrong key is wrong at every point of the grid; say it once.
        new = [problem for problem in self.problems if problem not in known]
        self.problems = [p for p in self.problems if p in known] + list(dict.fromkeys(new))
        return methods


def _same(one: Method, other: Method) -> bool:
    return one.name == other.name and one.settings() == other.settings()


def _unbool(kind: type[BaseModel], key: str, value: Any) -> Any:
    """``labels: true`` means the word: YAML reads it as a truth value."""
    if isinstance(value, bool) and key in kind.model_fields:
        word = str(value).lower()
        if word in typing.get_args(kind.model_fields[key].annotation):
            return word
    return value


def _valid(kind: type[BaseModel]) -> list[str]:
    return list(kind.model_fields)


def _allows_bool(kind: type[BaseModel], key: str) -> bool:
    annotation = kind.model_fields[key].annotation
    return annotation is bool or bool in typing.get_args(annotation) or annotation is dict[str, Any]
