"""Items that `stockpot run` kept, and how two models' are paired."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stockpot.comparison.rows import ItemScore, Key, Left, Row, Scored, compare
from stockpot.comparison.sides import Side, Stage, listed
from stockpot.comparison.verdict import Pairing
from stockpot.errors import ConfigError, DamagedRecordError
from stockpot.experiment.record import Record
from stockpot.files import read_json

__all__ = ["pair", "pair_sides", "written"]


def pair_sides(before: Side, after: Side, same_items: bool) -> tuple[list[Pairing], list[str]]:
    """Pair the runs of both sides: by setting and seed, or as they are if each side is one run.

    Args:
        before: one side.
        after: the other.
        same_items: whether the user vouches that other data have the same test items.

    Returns:
        The pairs with their rows, and what the user should know.

    Raises:
        ConfigError: if nothing can be paired, or the sides are one and the same.
        DamagedRecordError: if items cannot be read.
    """
    notes = _check_data(before, after, same_items)
    lines = {folder: _score_lines(folder) for folder in {before.folder, after.folder}}
    pairs = []
    for old, new in _settings_in_common(before, after):
        stages, seeds = _by_seed(before, after, old, new, notes)
        if all(one.file.resolve() == other.file.resolve() for one, other in stages):
            raise ConfigError(
                f"BEFORE and AFTER are the same ({stages[0][0].name}); give one of them another "
                "stage, as in RUN@start, or another run"
            )
        models = [tuple(_read(stage, lines[stage.folder]) for stage in pair) for pair in stages]
        named = old if old == new and len(before.settings) > 1 else None
        name_old, name_new = _names(stages, old, new)
        rows, left = pair([m[0] for m in models], [m[1] for m in models], seeds)
        pairs.append(Pairing(name_old, name_new, named, tuple(seeds), tuple(rows), tuple(left)))
    return pairs, notes


def _check_data(before: Side, after: Side, same_items: bool) -> list[str]:
    """Items are paired by their place, so both sides must have been scored on the same data."""
    if before.folder.resolve() == after.folder.resolve():
        return []
    one, other = (read_json(side.folder / "experiment.json") for side in (before, after))
    if not isinstance(one, dict) or not isinstance(other, dict):
        raise DamagedRecordError(f"{before.folder} or {after.folder}: experiment.json is damaged")
    if one.get("data") == other.get("data"):
        return []
    changed = [
        f"{section}.{key}: {a.get(key)!r} before, {b.get(key)!r} after"
        for section in ("stream", "model")
        if isinstance(a := one.get(section), dict) and isinstance(b := other.get(section), dict)
        for key in sorted({*a, *b})
        if a.get(key) != b.get(key)
    ]
    why = f" ({'; '.join(changed[:4])})" if changed else ""
    if not same_items:
        raise ConfigError(
            f"{before.folder} and {after.folder} were made with different data{why}, and items are "
            "compared one by one. If you know that the test items are the same and in the same "
            "order, say --same-items"
        )
    return [f"the data of the two folders differ{why}; you said that their test items are the same"]


def _settings_in_common(before: Side, after: Side) -> list[tuple[str, str]]:
    if len(before.settings) == 1 and len(after.settings) == 1:
        return [(next(iter(before.settings)), next(iter(after.settings)))]
    common = [setting for setting in before.settings if setting in after.settings]
    if not common:
        many = max(before, after, key=lambda side: len(side.settings))
        raise ConfigError(
            f"{before.given} and {after.given} have no setting in common"
            f"{listed(f'{many.given} has', many.settings)}. Name one: {many.folder}:SETTING"
        )
    if before.folder.resolve() == after.folder.resolve() and before.given == after.given:
        raise ConfigError(
            f"BEFORE and AFTER are the same ({before.given}). Name two settings, as in "
            f"{before.folder}:{common[0]}, or two stages, as in {before.folder}@start"
        )
    return [(setting, setting) for setting in common]


def _by_seed(
    before: Side, after: Side, old: str, new: str, notes: list[str]
) -> tuple[list[tuple[Stage, Stage]], list[int]]:
    """The pairs of one setting, seed by seed."""
    ours, theirs = before.settings[old], after.settings[new]
    if before.single and after.single:
        ((seed, one),) = ours.items()
        return [(one, next(iter(theirs.values())))], [seed]
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ConfigError(
            f"{before.given} has the seeds {sorted(ours)} and {after.given} {sorted(theirs)}: no "
            "seed is in both. Two single runs may have different seeds: FOLDER/runs/RUN"
        )
    if alone := sorted(ours.keys() ^ theirs.keys()):
        which = f"seed {alone[0]} is" if len(alone) == 1 else f"seeds {str(alone)[1:-1]} are"
        names = old if old == new else f"{old} and {new}"
        notes.append(f"{names}: {which} on one side only and left out")
    return [(ours[seed], theirs[seed]) for seed in seeds], seeds


def _names(stages: Sequence[tuple[Stage, Stage]], old: str, new: str) -> tuple[str, str]:
    """What to call the two: the run with its stage, or the setting with its stage and seeds."""
    if len(stages) == 1:
        return stages[0][0].name, stages[0][1].name
    return tuple(
        f"{setting}{stage.name.removeprefix(stage.run)}"
        for setting, stage in zip((old, new), stages[0], strict=True)
    )  # type: ignore[return-value]


# Reading.


def _score_lines(folder: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The lines of scores.jsonl by run and stage."""
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in Record(folder).scores():
        lines.setdefault((line["run"], line["stage"]), []).append(line)
    return lines


def _read(stage: Stage, lines: Mapping[tuple[str, int], list[dict[str, Any]]]) -> Scored:
    """One model's items, with what scores.jsonl says of them."""
    if not stage.file.parent.is_dir():
        raise ConfigError(
            f"run {stage.run!r} in {stage.folder} has no items: it was made by an older version, "
            "which did not keep them, or they were deleted. Run the experiment again with another "
            "--output"
        )
    tensors = _tensors(stage.file)
    texts = _texts(stage.file.with_suffix(".jsonl"))
    scores: dict[Key, ItemScore] = {}
    for line in lines.get((stage.run, stage.number), []):
        key = (str(line.get("task")), _score_name(line))
        scores[key] = ItemScore(
            tensors.get("/".join(key), np.zeros(0)),
            str(line.get("better", "higher")),
            bool(line.get("headline", True)),
            texts=texts.get(key, ()),
        )
    if not any(len(score.items) for score in scores.values()):
        raise DamagedRecordError(
            f"{stage.file} has no items of the scores that {stage.folder / 'scores.jsonl'} lists "
            f"for run {stage.run!r}, stage {stage.number}"
        )
    return Scored(stage.name, scores)


def _score_name(line: Mapping[str, Any]) -> str:
    """As :attr:`stockpot.evaluation.score.Score.name` has it."""
    metric, evaluation = str(line.get("metric")), line.get("evaluation", "test")
    return metric if evaluation == "test" else f"{evaluation} {metric}"


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise DamagedRecordError(f"{path} is missing from the record")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DamagedRecordError(f"{path} is damaged: {error}") from error


def _texts(path: Path) -> dict[Key, list[str]]:
    """What was written for every item, where something was; of several programs the first."""
    found: dict[Key, list[str]] = {}
    problems: dict[Key, set[Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for text in map(json.loads, lines):
            key = (text["task"], text["score"])
            if (problem := text.get("task_id")) is not None:
                if problem in problems.setdefault(key, set()):
                    continue
                problems[key].add(problem)
            found.setdefault(key, []).append(written(text))
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # they only illustrate
    return found


def written(text: Mapping[str, Any]) -> str:
    """A generated answer, with what would have been right or why it failed."""
    answer = str(text.get("answer", text.get("completion", "")))
    if text.get("gold") is not None:
        return f"{answer}\n(right: {text['gold']})"
    return f"{answer}\n({text['reason']})" if text.get("reason") else answer


def pair(
    before: Sequence[Scored], after: Sequence[Scored], seeds: Sequence[int]
) -> tuple[list[Row], list[Left]]:
    """All scores of two models (or of several seeds of two), and those that do not pair."""
    rows: list[Row] = []
    left: list[Left] = []
    keys = dict.fromkeys(key for model in (*before, *after) for key in model.scores)
    for key in keys:
        sides = [[m.scores[key] for m in models if key in m.scores] for models in (before, after)]
        lacking = [
            name
            for name, scores, models in zip(
                ("BEFORE", "AFTER"), sides, (before, after), strict=True
            )
            if len(scores) < len(models)
        ]
        found: Row | str
        if lacking:
            verb = "has" if len(lacking) == 1 else "have"
            found = f"{' and '.join(lacking)} {verb} no such score"
        else:
            found = compare(key, sides[0], sides[1], seeds)
        if isinstance(found, Row):
            rows.append(found)
        else:
            left.append(Left(*key, found, any(score.headline for score in sides[0])))
    return rows, left
