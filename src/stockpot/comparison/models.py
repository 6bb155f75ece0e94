"""Two models scored on the same tasks now, with the experiments' own evaluations."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockpot.comparison.recorded import pair, written
from stockpot.comparison.rows import ItemScore, Key, Left, Scored
from stockpot.comparison.tasks import image_tasks, stream_tasks, text_tasks
from stockpot.comparison.verdict import Pairing
from stockpot.errors import ConfigError, StockpotError, first_line

if TYPE_CHECKING:
    from stockpot.evaluation.settings import EvaluationSettings
    from stockpot.models.settings import HuggingFace
    from stockpot.streams.data import Stream, Task
    from stockpot.streams.text import TextStream, TextTask

__all__ = ["Options", "Plan", "plan_models", "score_models"]

_IMAGES, _TEXTS = "an image classifier", "a language model"

Progress = Callable[[str, int, int], None]
"""Called with what is scored, how many items are done, and of how many."""


@dataclass(frozen=True)
class Options:
    """How models are scored; None leaves the choice to the experiment, or to the defaults."""

    batch_size: int | None = None
    limit: int | None = None
    """At most so many test items of a task, drawn with a fixed seed."""
    max_length: int | None = None
    device: str = "auto"
    run_programs: bool = False


@dataclass(frozen=True)
class Plan:
    """What is scored, before any model is loaded."""

    models: tuple[HuggingFace, HuggingFace]
    stream: Stream | TextStream
    evaluation: EvaluationSettings
    options: Options


def plan_models(
    before: str,
    after: str,
    tasks: Sequence[str],
    experiment: Path | None,
    options: Options,
) -> Plan:
    """Read the tasks, and check that two models of one kind are named.

    Args:
        before: folder or hub id of a model of Transformers.
        after: another.
        tasks: files of the user's own, all rows of which are scored; or folders of images.
        experiment: a file whose stream's test items are scored instead.
        options: how.

    Raises:
        ConfigError: if a model, a file or a setting is wrong.
        StockpotError: if a row of a file is.
    """
    from stockpot.evaluation.settings import EvaluationSettings
    from stockpot.models.settings import resolve_model

    evaluation = EvaluationSettings.model_validate({})
    common: dict[str, Any] = {}
    if experiment is not None:
        from stockpot.experiment.config import load_experiment

        checked = load_experiment(experiment)
        evaluation = checked.evaluation
        kept = ("max_length", "chat_template", "dtype", "attention")
        common = {k: getattr(checked.model, k) for k in kept if hasattr(checked.model, k)}
    if options.batch_size is not None:
        evaluation = evaluation.model_copy(update={"batch_size": options.batch_size})
    if options.max_length is not None:
        common["max_length"] = options.max_length
    if resolve_model(before) == resolve_model(after):
        raise ConfigError(f"BEFORE and AFTER are the same model ({before})")
    models = (_model("BEFORE", before, common), _model("AFTER", after, common))
    kinds = [_kind(model) for model in models]
    if kinds[0] != kinds[1]:
        raise ConfigError(
            f"BEFORE {before} is {kinds[0]} and AFTER {after} is {kinds[1]}: they cannot be scored "
            "on the same tasks"
        )
    stream: Stream | TextStream
    if experiment is not None:
        stream = stream_tasks(checked.stream, options.limit)
    elif kinds[0] == _IMAGES:
        stream = image_tasks(tasks, options.limit, [_label_names(model) for model in models])
    else:
        stream = text_tasks(tasks, options.limit)
    _fits(stream, models, kinds[0])
    _device(options.device)
    return Plan(models, stream, evaluation, options)


def _model(side: str, source: str, common: dict[str, Any]) -> HuggingFace:
    from pydantic import ValidationError

    from stockpot.models.settings import HuggingFace

    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ConfigError(
            f"{side}: {source} holds no config.json, so it is no model of Transformers. Runs of "
            "the built-in networks are compared by the items they kept: leave out --task and "
            "--stream"
        )
    folder, colon, _ = source.rpartition(":")
    if colon and (Path(folder) / "experiment.json").is_file():
        raise ConfigError(
            f"{side}: {source} names a setting of an experiment. To score two models give the "
            f"folder of a run, {Path(folder) / 'runs' / 'RUN'}; to compare what the runs kept "
            "leave out --task and --stream"
        )
    try:
        return HuggingFace.model_validate({"id": source, **common})
    except ValidationError as error:
        reasons = "; ".join(str(item["msg"]) for item in error.errors())
        raise ConfigError(f"{side}: {reasons.replace('Value error, ', '')}") from error


def _config(model: HuggingFace) -> Any:
    from transformers import AutoConfig

    from stockpot.models.settings import resolve_model

    try:
        return AutoConfig.from_pretrained(resolve_model(model.id), revision=model.revision)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"cannot load the configuration of {model.id!r}: {first_line(error)}. Without a "
            "network, give a local folder that holds config.json and the weights"
        ) from error


def _kind(model: HuggingFace) -> str:
    """What a model takes, by the class that its config.json names, or else by its family."""
    from transformers.models.auto import modeling_auto

    config = _config(model)
    named = (getattr(config, "architectures", None) or [""])[0]
    families = (
        (_IMAGES, modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        (_TEXTS, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (_TEXTS, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    )
    for kind, classes in families:
        own = classes.get(config.model_type, ())
        if named in ((own,) if isinstance(own, str) else own):
            return kind
    if named:
        raise ConfigError(
            f"{model.id!r} is a {named}; a language model (causal or encoder-decoder) or an image "
            "classifier can be scored"
        )
    for kind, classes in families:
        if config.model_type in classes:
            return kind
    raise ConfigError(f"{model.id!r} is of the family {config.model_type!r}, which is not scored")


def _label_names(model: HuggingFace) -> list[str] | None:
    """What the model calls its labels, unless they are mere numbers."""
    names: dict[int, str] = _config(model).id2label
    ordered = [str(names[number]) for number in sorted(names)]
    return None if all(name.startswith("LABEL_") for name in ordered) else ordered


def _fits(stream: Stream | TextStream, models: Sequence[HuggingFace], kind: str) -> None:
    """Refuse images for language models, and heads that would have to be replaced by fresh ones."""
    from stockpot.streams.text import TextStream

    of_text = isinstance(stream, TextStream)
    if of_text != (kind == _TEXTS):
        raise ConfigError(
            f"the tasks are of {'text' if of_text else 'images'}, and the models are each {kind}"
        )
    if isinstance(stream, TextStream):
        return
    for model in models:
        labels = int(getattr(_config(model), "num_labels", 0))
        if labels != stream.labels:
            raise ConfigError(
                f"{model.id!r} has a head for {labels} labels and the tasks have {stream.labels}: "
                "it was not trained on them"
            )


# Scoring.


def score_models(plan: Plan, progress: Progress) -> tuple[Pairing, list[str]]:
    """Score both models, one after the other, and pair their items.

    Raises:
        StockpotError: if a model cannot be loaded or scored.
    """
    names = [model.id for model in plan.models]
    scored: list[Scored] = []
    prints: list[dict[str, str]] = []
    notes = _left_out(plan)
    for side, model in zip(("BEFORE", "AFTER"), plan.models, strict=True):
        stream = model.encode(plan.stream)
        # One example of each task stands for the training data that nobody asked for.
        about_training = tuple(f"{task.name} (train)" for task in stream.tasks)
        notes += [n for n in stream.notes if n not in notes and not n.startswith(about_training)]
        prints.append({task.name: task.test.fingerprint() for task in stream.tasks})
        with _named_errors(side, model.id):
            scores = _scores(model, stream, plan, partial(_said, progress, side))
        scored.append(Scored(model.id, scores))
    apart = [task for task in prints[0] if prints[0][task] != prints[1][task]]
    left = _without_losses(scored, apart)
    rows, more = pair([scored[0]], [scored[1]], [0])
    return Pairing(names[0], names[1], None, (), tuple(rows), (*left, *more)), notes


def _without_losses(scored: list[Scored], tasks: Sequence[str]) -> list[Left]:
    """Take out the losses per token of tasks that the models cut into different tokens.

    Where such a loss was the task's score, the task's next score takes its place.
    """
    left = []
    for task in tasks:
        loss = (task, "loss")
        if loss not in scored[0].scores:
            continue
        counts = scored[0].scores[loss].headline
        others = [key for key in scored[0].scores if key[0] == task and key != loss]
        for place, model in enumerate(scored):
            scores = {key: score for key, score in model.scores.items() if key != loss}
            if counts and others:
                scores[others[0]] = replace(scores[others[0]], headline=True)
            scored[place] = replace(model, scores=scores)
        reason = "the two models cut its texts into different tokens, and a loss is per token"
        left.append(Left(*loss, reason, counts and not others))
    return left


def _left_out(plan: Plan) -> list[str]:
    from stockpot.evaluation.tasks import needs_programs

    if plan.options.run_programs:
        return []
    stream: Any = plan.stream  # of text or of its tokens, the benchmarks are the same
    names = needs_programs(stream)
    return [f"{name} is left out; --run-programs lets it run programs" for name in names]


def _said(progress: Progress, side: str, what: str, done: int, total: int) -> None:
    progress(f"{side} {what}", done, total)


@contextmanager
def _named_errors(side: str, name: str) -> Iterator[None]:
    """Say which model it was: of two, one may be too large for the memory."""
    try:
        yield
    except StockpotError as error:
        raise type(error)(f"{side} {name}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        raise StockpotError(
            f"{side} {name} cannot be scored: {type(error).__name__}: {first_line(error)}"
        ) from error


def _device(name: str) -> Any:
    """Where models are scored, tried out: asking for what is not there is a wrong command."""
    import torch

    from stockpot.training.trainer import choose_device

    try:
        device = choose_device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} is not to be had: {first_line(error)}") from error
    return device


def _scores(
    model: HuggingFace, stream: Stream, plan: Plan, progress: Progress
) -> dict[Key, ItemScore]:
    from stockpot.evaluation.tasks import Evaluator, needs_programs

    device = _device(plan.options.device)
    programs = needs_programs(stream)
    sandbox = None
    if programs and plan.options.run_programs:
        from stockpot.evaluation.sandbox import Sandbox

        sandbox = Sandbox.strongest()
    skipped = () if sandbox is not None else tuple(programs)
    benchmarked = all(
        any(f"{task.name}: {name}" not in skipped for name in task.benchmarks)
        for task in stream.tasks
    )
    evaluator = Evaluator(plan.evaluation, device, sandbox, benchmarked, skipped, progress=progress)
    learner = model.build(stream)
    learner.module.to(device)
    found: dict[Key, ItemScore] = {}
    plain_tasks: Sequence[Any] = plan.stream.tasks  # as text, where they are
    for task, plain in zip(stream.tasks, plain_tasks, strict=True):
        for score in evaluator.scores(learner, task):
            assert score.items is not None
            found[task.name, score.name] = ItemScore(
                score.items.double().numpy(),
                score.better,
                score.headline,
                _prompts(plain, score.evaluation),
                tuple(map(written, score.texts)),
            )
    for score in evaluator.lm_eval(learner):
        if score.items is not None:
            items = score.items.double().numpy()
            found["lm-eval", score.name] = ItemScore(items, score.better, headline=False)
    del learner
    gc.collect()
    return found


def _prompts(task: Task | TextTask, evaluation: str) -> tuple[str, ...]:
    """What each item asks, with the right answer; nothing for images."""
    from stockpot.streams.own import prompt_of, response_of
    from stockpot.streams.text import Choices, MathProblems, ProgramProblems, TextTask

    if not isinstance(task, TextTask):
        return ()
    benchmark = task.benchmarks.get(evaluation)
    if isinstance(benchmark, Choices):
        return tuple(f"{q.prompt}\n(right: {q.choices[q.answer]})" for q in benchmark.questions)
    if isinstance(benchmark, MathProblems):
        return tuple(problem.question for problem in benchmark.problems)
    if isinstance(benchmark, ProgramProblems):
        return tuple(problem.prompt for problem in benchmark.problems)
    return tuple(f"{prompt_of(item)}\n(learned: {response_of(item)})" for item in task.test)
