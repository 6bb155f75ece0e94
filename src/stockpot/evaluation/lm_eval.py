"""Tasks of EleutherAI's lm-evaluation-harness, scored in process on a model that is held.

The harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness) defines what a task's
prompts, metrics and standard errors are; nothing of that is done again here. The numbers are those
that its command line ``lm_eval run --model hf --seed SEED`` gives for the saved model.
"""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import math
import os
import random
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import nn

from stockpot.errors import ConfigError, NonFiniteError, StockpotError

__all__ = ["TaskResult", "check_lm_eval_tasks", "run_lm_eval"]

_log = logging.getLogger("stockpot")
_NOISY = ("lm_eval", "transformers", "datasets", "evaluate", "httpx", "huggingface_hub")
_T = TypeVar("_T")


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, or of a group of tasks, as the harness reports it."""

    task: str
    metric: str
    """The metric's name, with its filter if it has one: ``acc``, ``exact_match,strict-match``."""
    value: float
    """In the metric's own unit: acc and exact_match are shares of the documents."""
    stderr: float | None
    """Standard error of the value as the harness gives it: None if it gives none."""
    n: int
    """How many documents have this metric."""
    better: Literal["higher", "lower"]
    items: tuple[float, ...]
    """Per document, in document order, the numbers whose mean is the value.

    Empty for groups and for metrics of the whole corpus: F1, BLEU, perplexity.
    """
    version: str
    """The task's version: numbers of different versions are not comparable."""


def check_lm_eval_tasks(
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    *,
    confirm_run_unsafe_code: bool = False,
) -> None:
    """Refuse names that the harness does not know, before any time is spent on training.

    Reads task definitions only, neither data nor a model: some six seconds the first time, when
    the harness's fourteen thousand definitions are read.

    Raises:
        ConfigError: lm_eval is not installed, ``include_path`` is not a folder, there are no tasks,
            a name is unknown, or a task runs code that a model wrote without
            ``confirm_run_unsafe_code``.
    """
    with _surroundings_kept():
        _checked_manager(_names(tasks), include_path, confirm_run_unsafe_code)


def run_lm_eval(
    module: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    seed: int = 0,
    apply_chat_template: bool = False,
    confirm_run_unsafe_code: bool = False,
) -> list[TaskResult]:
    """Score a causal or encoder-decoder language model of Transformers on tasks of the harness.

    ``tasks`` are names of tasks, of groups (each subtask's metrics, then the group's aggregate) and
    of tags; ``include_path`` is a folder with definitions of more. ``limit`` takes the first so
    many documents of each task, ``num_fewshot`` replaces a task's own number of examples unless
    that is 0, ``device`` is where the module is if None, and ``seed`` is that of Python, NumPy,
    PyTorch and the choice of examples.

    The module, the tokenizer, the random number generators, the environment and the loggers come
    out as they went in; what tasks print goes to stderr. Bootstrapped standard errors use one
    process per core unless the variable DISABLE_MULTIPROC is set. What the harness warned of while
    it scored, such as prompts that were cut to the model's length, is logged once per kind.

    Raises:
        ConfigError: As in `check_lm_eval_tasks`; or a number out of range, a module that is no
            language model, a tokenizer without an end token or without the chat template asked for,
            or a task with images or sound.
        NonFiniteError: A log-likelihood is not a number.
        StockpotError: A task's data cannot be loaded, or the harness refuses to go on; the message
            gives its reason in one line.
    """
    for option, number, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if number is not None and number < least:
            raise ConfigError(f"{option} is {number}, and must be at least {least}")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, and must be at least 1")
    names = _names(tasks)
    tokenizer = _copied(tokenizer, apply_chat_template)
    with ExitStack() as stack:
        stack.enter_context(_surroundings_kept())
        manager = _checked_manager(names, include_path, confirm_run_unsafe_code)
        place = stack.enter_context(_module_kept(module, device))
        stack.enter_context(_seeded(seed, place))
        loaded = _load(manager, names)
        for task in loaded["tasks"].values():
            _set_examples(task, num_fewshot, seed)
        scores = _score(
            _harness_model(module, tokenizer, batch_size),
            loaded,
            limit=limit,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
    return _results(scores)


def _names(tasks: Sequence[str]) -> list[str]:
    """The names without repetition, at least one."""
    names = list(dict.fromkeys([tasks] if isinstance(tasks, str) else tasks))
    if not names:
        raise ConfigError("there are no tasks for lm-evaluation-harness: name at least one")
    return names


def _import(use: Callable[[], _T]) -> _T:
    try:
        return use()
    except ImportError as error:
        raise ConfigError(
            f"lm-evaluation-harness cannot be imported ({_one_line(error)}): "
            "pip install 'stockpot[lm-eval]'"
        ) from error


def _one_line(error: BaseException) -> str:
    """The first line of an error that says something, with the error's kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# Which tasks


@functools.cache
def _builtin_tasks() -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    return dict(TaskManager().task_index)


def _checked_manager(names: list[str], include_path: str | Path | None, unsafe: bool) -> Any:
    """A TaskManager that knows the harness's tasks and those of a folder, which go first.

    The folder is read anew each time, the harness's own definitions once.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"include_path {include_path}: there is no such folder")

    def build() -> Any:
        from lm_eval.tasks import TaskManager

        folder = None if include_path is None else str(Path(include_path).resolve())
        manager = TaskManager(include_defaults=False, include_path=folder)
        for name, entry in _builtin_tasks().items():
            manager.task_index.setdefault(name, entry)
        return manager

    manager = _import(build)
    for name in names:
        if name not in manager.task_index:
            raise ConfigError(_unknown(name, manager.task_index, include_path))
        for task in [] if unsafe else _definitions(name, manager.task_index):
            if task.get("unsafe_code"):
                raise ConfigError(
                    f"the task {task.get('task', name)!r} runs code that the model wrote, on this "
                    "machine and unguarded; only the function's confirm_run_unsafe_code allows it"
                )
    return manager


def _unknown(name: str, index: Mapping[str, Any], include_path: str | Path | None) -> str:
    close = [repr(each) for each in difflib.get_close_matches(name, index, n=3)]
    hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists its names"
    where = (
        "a folder with definitions of more tasks can be given as include_path "
        "(evaluation.lm_eval_include)"
        if include_path is None
        else f"no readable definition of it is in {include_path} either"
    )
    return f"lm-evaluation-harness has no task {name!r} ({hint}); {where}"


def _definitions(member: Any, index: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The definitions of the tasks that a name, or an entry in a group's list, stands for."""
    if isinstance(member, list):
        for each in member:
            yield from _definitions(each, index)
    elif isinstance(member, dict):
        yield member
        yield from _definitions(member.get("group"), index)
        yield from _definitions(member.get("task"), index)
    elif isinstance(member, str) and member in index:
        entry = index[member]
        yield entry.cfg or {}
        if entry.kind.name == "TAG":
            yield from _definitions(sorted(entry.tags), index)
        elif entry.kind.name == "GROUP":
            yield from _definitions((entry.cfg or {}).get("task"), index)


def _load(manager: Any, names: list[str]) -> dict[str, Any]:
    """The harness's tasks and groups with their data."""
    built: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # a task's own code may raise anything
            hint = "; without a connection its data must be in the cache or in local files"
            raise StockpotError(
                f"the task {name!r} of lm-evaluation-harness cannot be loaded "
                f"({_one_line(error)}){hint if isinstance(error, OSError) else ''}"
            ) from error
        for each, task in loaded["tasks"].items():
            if getattr(task, "MULTIMODAL", False):
                raise ConfigError(f"the task {each!r} needs more than text: images or sound")
        group = loaded["groups"].get(name)
        built += list(loaded["tasks"].values()) if group is None else [group]
    try:
        return dict(manager.load(built))
    except ValueError as error:
        raise ConfigError(f"tasks for lm-evaluation-harness: {error}") from error


def _set_examples(task: Any, num_fewshot: int | None, seed: int) -> None:
    """How many examples a prompt shows: a task that says 0 means never."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)


# Scoring


def _copied(tokenizer: Any, apply_chat_template: bool) -> Any:
    """A copy of the tokenizer, for the harness to give a pad token and to turn its padding."""
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ConfigError(
            "the tokenizer has no end token, at which lm-evaluation-harness ends an answer: set "
            "its eos_token"
        )
    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("apply_chat_template: the tokenizer has no chat template")
    return copy.deepcopy(tokenizer)


def _harness_model(module: nn.Module, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    # HFLM ties weights anew, which would overwrite a head that was untied on purpose. What is put
    # on the instance here goes when the module's attributes are put back.
    vars(module)["tie_weights"] = lambda *arguments, **options: None
    return HFLM(pretrained=module, tokenizer=tokenizer, batch_size=batch_size)


def _score(model: Any, loaded: dict[str, Any], **options: Any) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    with _warnings_gathered():
        try:
            scores = evaluate(lm=model, task_dict=loaded, log_samples=True, **options)
        except (AssertionError, ValueError) as error:
            raise StockpotError(f"lm-evaluation-harness stopped: {_one_line(error)}") from error
    return dict(scores)


def _results(scores: Mapping[str, Any]) -> list[TaskResult]:
    """The harness's numbers in its own order: tasks, then groups.

    A metric whose value is not a number, which a task may define, is left out.
    """
    results = []
    for task, metrics in scores["results"].items():
        samples = scores["samples"].get(task, [])
        _refuse_non_finite(task, samples)
        for key, value in metrics.items():
            name, comma, filter_ = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, Real):
                continue
            outcomes = [
                sample[name]
                for sample in samples
                if sample["filter"] == filter_ and name in sample["metrics"]
            ]
            of_group = metrics.get("sample_count", {}).get(key, 0)
            higher = scores["higher_is_better"].get(task, {}).get(name)
            results.append(
                TaskResult(
                    task=task,
                    metric=name if filter_ == "none" else key,
                    value=float(value),
                    stderr=_finite(metrics.get(f"{name}_stderr,{filter_}")),
                    n=len(outcomes) or int(of_group),
                    better="lower" if higher is False else "higher",
                    items=_items(outcomes, float(value)),
                    version=str(scores["versions"].get(task, "N/A")),
                )
            )
    return results


def _refuse_non_finite(task: str, samples: list[dict[str, Any]]) -> None:
    for sample in samples:
        for answers in sample["resps"]:
            for answer in answers:
                number = answer[0] if isinstance(answer, tuple) else answer
                if isinstance(number, float) and math.isnan(number):
                    raise NonFiniteError(
                        f"the model's log-likelihoods on the task {task!r} are not numbers, so "
                        "it cannot be scored"
                    )


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _items(outcomes: list[Any], value: float) -> tuple[float, ...]:
    """The outcomes if they are numbers whose mean is the value.

    Some metrics keep pairs per document, and perplexity's items are log-likelihoods.
    """
    if not outcomes or not all(isinstance(each, (Real, np.bool_)) for each in outcomes):
        return ()
    items = tuple(float(each) for each in outcomes)
    mean = math.fsum(items) / len(items)
    return items if math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9) else ()


# Everything as it was


@contextmanager
def _module_kept(module: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """The module on the device, in eval mode once the harness has it; then as it was before.

    Every attribute of every part and of the configurations is put back, modes and buffers among
    them. Weights are moved if they must be, and moved back; nothing writes to them.
    """
    if not hasattr(module, "generate") or not hasattr(module, "config"):
        raise ConfigError(
            f"lm-evaluation-harness scores language models of Transformers, and a "
            f"{type(module).__name__} is none"
        )
    parts = [(vars(part), dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    configs = {
        id(attributes[key]): (vars(attributes[key]), dict(vars(attributes[key])))
        for attributes, _, _ in parts
        for key in ("config", "generation_config")
        if hasattr(attributes.get(key), "__dict__")
    }
    home = next(module.parameters()).device
    place = home if device is None else torch.device(device)
    away = place.type != home.type or place.index not in (None, home.index)
    try:
        if away:
            module.to(place)
        yield next(module.parameters()).device
    finally:
        if away:
            module.to(home)
        for attributes, before, buffers in parts:
            _put_back(attributes, before)
            _put_back(attributes["_buffers"], buffers)
        for attributes, before in configs.values():
            _put_back(attributes, before)


def _put_back(mapping: dict[str, Any], before: dict[str, Any]) -> None:
    mapping.clear()
    mapping.update(before)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """All generators that tasks draw from start at the seed, and afterwards go on as before.

    Only the CPU's and the device's generator of PyTorch are touched: `torch.manual_seed` would
    also seed those of devices that have not been started yet, which could not be undone.
    """
    python, numpy = random.getstate(), np.random.get_state()
    gpus = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _surroundings_kept() -> Iterator[None]:
    """No progress bars, nothing on stdout, libraries silent below errors; then as before."""
    environment = dict(os.environ)
    loggers = [logging.root, *map(logging.getLogger, _NOISY)]
    known = logging.root.manager.loggerDict.values()
    loggers += [each for each in known if isinstance(each, logging.Logger)]
    states = [(each, each.level, each.propagate, list(each.handlers)) for each in loggers]
    try:
        # Processes forked for bootstraps would otherwise be warned of by the tokenizers.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        with redirect_stdout(sys.stderr), _no_progress_bars():
            yield
    finally:
        for each, level, propagate, handlers in states:
            each.setLevel(level)
            each.propagate, each.handlers = propagate, handlers
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Every bar of tqdm disabled: the harness has no option for it, and tqdm none at run time."""
    from tqdm import tqdm

    start = tqdm.__init__

    @functools.wraps(start)
    def disabled(bar: Any, *arguments: Any, **options: Any) -> None:
        start(bar, *arguments, **{**options, "disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = start


@contextmanager
def _warnings_gathered() -> Iterator[None]:
    """What the harness warns of, once per place in its code, and how often, to stockpot's log."""
    seen: dict[tuple[str, int], list[str]] = {}

    class Gather(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            place = (record.pathname, record.lineno)
            message = textwrap.shorten(record.getMessage(), 300, placeholder=" [...]")
            seen.setdefault(place, []).append(message)

    logger = logging.getLogger("lm_eval")
    logger.handlers, logger.propagate = [Gather()], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers = []
        logger.setLevel(logging.ERROR)
        for messages in seen.values():
            more = f" (and {len(messages) - 1} times more)" if len(messages) > 1 else ""
            _log.warning("lm-evaluation-harness: %s%s", messages[0], more)
