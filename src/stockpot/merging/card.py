"""What a merged folder says about itself: a model card, and the recipe that makes it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockpot import __version__
from stockpot.merging.checkpoint import Checkpoint
from stockpot.merging.plan import MergePlan
from stockpot.merging.recipe import MergeRecipe, Point
from stockpot.merging.settings import METHODS

if TYPE_CHECKING:
    from stockpot.merging.adapters import Adapter

__all__ = ["adapter_card", "model_card", "recipe_text"]


def _recipe_of(recipe: MergeRecipe, point: Point) -> dict[str, Any]:
    """The recipe of one point: that of a sweep has it as its parameters."""
    values = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"sweep"})
    values["parameters"] = point.method.model_dump(mode="json")
    return {key: value for key, value in values.items() if value != {}}


def recipe_text(recipe: MergeRecipe, point: Point) -> str:
    """The recipe as YAML, for ``stockpot merge merge.yaml -o FOLDER``."""
    import yaml  # only when there is something to write: it takes as long as a check

    return yaml.safe_dump(_recipe_of(recipe, point), sort_keys=False, allow_unicode=True)


def model_card(
    plan: MergePlan, point: Point, hashes: Mapping[Path, str], notes: Sequence[str]
) -> str:
    """README.md with the front matter that the hub reads."""
    ids = [each.source for each in plan.inputs if _is_hub_id(each.source)]
    head: dict[str, Any] = {"tags": ["merge", "stockpot"]}
    if ids:
        head["base_model"] = ids
    return _card(head, plan.inputs, plan.recipe, point, hashes, [*plan.notes, *notes])


def _card(
    head: Mapping[str, Any],
    inputs: Sequence[Checkpoint],
    recipe: MergeRecipe,
    point: Point,
    hashes: Mapping[Path, str],
    notes: Sequence[str],
) -> str:
    import yaml

    kind = METHODS[recipe.method]
    lines = [
        "---",
        yaml.safe_dump(dict(head), sort_keys=False).strip(),
        "---",
        "",
        f"# A merge by {kind.name}",
        "",
        f"Made with stockpot {__version__}. {kind.__doc__ or ''} ({kind.reference})",
        "",
        "| input | file | hash |",
        "|---|---|---|",
    ]
    for checkpoint in inputs:
        for path in checkpoint.files:
            lines.append(f"| {checkpoint.source} | {path.name} | {hashes.get(path, 'not taken')} |")
    lines += ["", "```yaml", recipe_text(recipe, point).strip(), "```"]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def adapter_card(
    recipe: MergeRecipe,
    point: Point,
    adapters: Sequence[Adapter],
    hashes: Mapping[Path, str],
    notes: Sequence[str],
) -> str:
    """README.md of an average of adapters."""
    checkpoints = [adapter.checkpoint for adapter in adapters]
    base = checkpoints[0].adapter_config.get("base_model_name_or_path")
    head: dict[str, Any] = {"tags": ["merge", "stockpot"], "library_name": "peft"}
    if base and _is_hub_id(base):
        head["base_model"] = base
    return _card(head, checkpoints, recipe, point, hashes, notes)


def _is_hub_id(source: str) -> bool:
    local = source.startswith((".", "/", "~")) or Path(source).exists()
    return source.count("/") == 1 and not local
