"""What a merge will read and write, tensor by tensor: settled from headers before data is read.

Names, shapes and formats of all inputs are held against each other here; what differs is refused,
or settled by the recipe's rules and reported. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockpot import __version__
from stockpot.errors import ConfigError, nearest
from stockpot.merging.checkpoint import Checkpoint, CheckpointError, TensorInfo, open_checkpoint
from stockpot.merging.dtypes import FLOATING, QUANTISED
from stockpot.merging.recipe import DTYPES, MergeRecipe, Point
from stockpot.merging.settings import METHODS, Context

if TYPE_CHECKING:
    from stockpot.merging.formulas import Rule

__all__ = ["Entry", "MergePlan", "check_patterns", "make_plan", "method_of", "refuse_quantised"]


@dataclass(frozen=True)
class Entry:
    """One tensor of the output, and where its inputs are."""

    name: str
    dtype: str
    """Of the output, as safetensors spells it."""
    shape: tuple[int, ...]
    base: TensorInfo | None
    models: tuple[TensorInfo, ...]
    fishers: tuple[TensorInfo, ...] = ()

    @property
    def copied(self) -> bool:
        """Not floating: it has no mean and is copied from the last model."""
        return self.models[0].dtype not in FLOATING

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.models[0].numel

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """All inputs: the base first, if there is one."""
        return (*((self.base,) if self.base else ()), *self.models, *self.fishers)


@dataclass(frozen=True)
class MergePlan:
    """A checked merge."""

    recipe: MergeRecipe
    points: tuple[Point, ...]
    base: Checkpoint | None
    models: tuple[Checkpoint, ...]
    fishers: tuple[Checkpoint, ...]
    entries: tuple[Entry, ...]
    """In the order in which the first input's files hold them."""
    notes: tuple[str, ...] = ()
    """What the user should know: what was left out, taken as it is, or settled."""
    config_changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def donor(self) -> Checkpoint:
        """Whose config, tokenizer and generation config the output gets: always the same."""
        return self.base or self.models[0]

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        """All checkpoints that are read."""
        return (*((self.base,) if self.base else ()), *self.models, *self.fishers)

    @property
    def context(self) -> Context:
        """What rules are made from."""
        return Context(
            shares=self.recipe.shares(),
            names=tuple(entry.name for entry in self.entries),
            labels=_labels([model.model for model in self.recipe.models]),
        )

    def rules(self) -> list[Rule]:
        """The formula of each point."""
        context = self.context
        return [point.method.rule(context) for point in self.points]

    @property
    def nbytes(self) -> int:
        """Bytes of input that one pass reads."""
        return sum(info.nbytes for entry in self.entries for info in entry.sources)

    @property
    def wide(self) -> str:
        """The format to compute in: F64 if an input of a floating tensor is F64, else F32."""
        dtypes = {s.dtype for entry in self.entries if not entry.copied for s in entry.sources}
        return "F64" if "F64" in dtypes else "F32"

    def fingerprint(self) -> str:
        """Equal for merges of the same inputs (by path, size and time) by the same recipe."""
        files = [
            [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
            for checkpoint in self.inputs
            for path in checkpoint.files
        ]
        described = [__version__, self.recipe.model_dump(mode="json"), files]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _labels(sources: Sequence[str]) -> tuple[str, ...]:
    """The ends of the paths that tell models apart.

    Not the whole paths: a merge gives the same numbers wherever the models lie.
    """
    parts = [Path(os.path.abspath(source)).parts for source in sources]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-length:]) for each in parts]
        if len(set(labels)) == len(labels):
            break
    return tuple(labels)


def make_plan(recipe: MergeRecipe) -> MergePlan:
    """Open all inputs and hold them against each other.

    Raises:
        ConfigError: for settings that do not fit the inputs.
        CheckpointError: for inputs that cannot be merged.
    """
    if recipe.method == "lora":
        from stockpot.merging.adapters import make_adapter_plan

        return make_adapter_plan(recipe)
    base = open_checkpoint(recipe.base.model) if recipe.base else None
    models = tuple(open_checkpoint(model.model) for model in recipe.models)
    fishers = tuple(open_checkpoint(model.fisher) for model in recipe.models if model.fisher)
    points = tuple(recipe.points())
    if recipe.method == "slerp" and base is not None:
        models, base = (base, *models), None
    inputs = [*([base] if base else []), *models]
    for checkpoint in inputs:
        if checkpoint.is_adapter:
            raise CheckpointError(
                f"{checkpoint.source} is an adapter, whose factors have no mean of their own; use "
                "method 'lora', which merges products"
            )
        refuse_quantised(checkpoint)
    notes: list[str] = []
    tables = [dict(checkpoint.tensors) for checkpoint in inputs]
    changes = _settle_tied(inputs, tables, notes)
    names = _settle_missing(recipe, inputs, tables, notes)
    _check_layout(inputs, tables, names)
    _check_vocabulary(recipe, inputs, notes)
    dtype = DTYPES[recipe.dtype] if recipe.dtype else None
    entries = []
    for name in names:
        found = tuple(table[name] for table in tables)
        start, theta = (found[0], found[1:]) if base else (None, found)
        first = found[0]
        floating = first.dtype in FLOATING
        values = _fishers_for(name, first, fishers) if floating else ()
        wanted = dtype if dtype and floating else first.dtype
        entries.append(Entry(name, wanted, first.shape, start, theta, values))
    check_patterns(recipe, names)
    return MergePlan(recipe, points, base, models, fishers, tuple(entries), tuple(notes), changes)


def check_patterns(recipe: MergeRecipe, names: Sequence[str]) -> None:
    """Refuse weights by a pattern that no name matches: it is most likely misspelt.

    Raises:
        ConfigError: with the nearest name.
    """
    if unmatched := recipe.shares().unmatched(names):
        hint = nearest(unmatched[0].strip("*"), names)
        raise ConfigError(f"weights: no tensor's name matches {unmatched[0]!r}{hint}")


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse codes, which have no mean.

    Raises:
        CheckpointError: if the model is quantised, or a tensor's scales are elsewhere.
    """
    if checkpoint.config.get("quantization_config"):
        raise CheckpointError(
            f"{checkpoint.source} is quantised (config.json has quantization_config): its tensors "
            "are codes, which have no mean. Merge the weights it was made from"
        )
    for name, info in checkpoint.tensors.items():
        if info.dtype in QUANTISED or info.dtype == "C64":
            raise CheckpointError(
                f"{checkpoint.source}: tensor {name!r} has the dtype {info.dtype}, which is not "
                "merged; convert it to bfloat16, float16, float32 or float64 first"
            )


# How output layers that can share the embedding's weights are called; a name within a layer is not.
_HEAD = re.compile(r"(?:\w+\.)?(?:lm_head|embed_out|output|output_layer)\.weight")


def _head_and_embedding(checkpoint: Checkpoint, head: TensorInfo) -> TensorInfo | None:
    """The one tensor of the head's shape with a row per word: what a tied head is tied to."""
    candidates = [
        info
        for name, info in checkpoint.tensors.items()
        if info.shape == head.shape and len(info.shape) == 2 and name != head.name
    ]
    rows = checkpoint.config.get("vocab_size", head.shape[0] if head.shape else 0)
    candidates = [info for info in candidates if info.shape[0] == rows]
    return candidates[0] if len(candidates) == 1 else None


def _settle_tied(
    inputs: Sequence[Checkpoint], tables: list[dict[str, TensorInfo]], notes: list[str]
) -> dict[str, Any]:
    """Tied weights are merged once; where only some inputs untie, both are written.

    Returns what must change in the output's config.
    """
    tied = [bool(checkpoint.config.get("tie_word_embeddings")) for checkpoint in inputs]
    if not any(tied):
        return {}
    names = dict.fromkeys(name for table in tables for name in table)
    heads = [name for name in names if _HEAD.fullmatch(name)]
    for head in heads:
        holders = [table[head] for table in tables if head in table]
        partners = [_head_and_embedding(each, holders[0]) for each in inputs]
        if any(partner is None for partner in partners):
            continue
        embeddings = [partner for partner in partners if partner is not None]
        if all(tied) and all(
            head not in table or _same_bytes(table[head], embedding)
            for table, embedding in zip(tables, embeddings, strict=True)
        ):
            for table in tables:
                table.pop(head, None)
            notes.append(f"{head} is tied to {embeddings[0].name}: merged once, as the embedding")
            continue
        for table, embedding in zip(tables, embeddings, strict=True):
            table.setdefault(head, embedding)
        notes.append(
            f"{head} is tied to {embeddings[0].name} in some inputs only: both are written, and "
            "tie_word_embeddings becomes false"
        )
        return {"tie_word_embeddings": False}
    return {}


def _same_bytes(left: TensorInfo, right: TensorInfo) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    step = 1 << 22
    with left.path.open("rb") as one, right.path.open("rb") as two:
        one.seek(left.offset)
        two.seek(right.offset)
        for done in range(0, left.nbytes, step):
            size = min(step, left.nbytes - done)
            if one.read(size) != two.read(size):
                return False
    return True


def _settle_missing(
    recipe: MergeRecipe,
    inputs: Sequence[Checkpoint],
    tables: list[dict[str, TensorInfo]],
    notes: list[str],
) -> list[str]:
    """Names to merge; tables are filled from the base where the recipe says so."""
    names = list(dict.fromkeys(name for table in tables for name in table))
    kept = []
    for name in names:
        lacking = [each for each, table in zip(inputs, tables, strict=True) if name not in table]
        if not lacking:
            kept.append(name)
            continue
        where = ", ".join(checkpoint.source for checkpoint in lacking)
        if recipe.missing == "skip":
            notes.append(f"left out: {name} (not in {where})")
        elif recipe.missing == "base" and name in tables[0]:
            for table in tables:
                table.setdefault(name, tables[0][name])
            notes.append(f"taken from the base: {name} (not in {where})")
            kept.append(name)
        else:
            owner = next(each for each, table in zip(inputs, tables, strict=True) if name in table)
            remedy = (
                "the base lacks it, so 'base' cannot settle it; --missing skip leaves it out"
                if recipe.missing == "base"
                else "--missing base takes the base's where a model lacks it, --missing skip "
                "leaves it out"
            )
            hint = nearest(name, lacking[0].tensors)
            hint = hint if "did you mean" in hint else ""
            raise CheckpointError(
                f"tensor {name!r} is in {owner.source}, but not in {where}{hint}; {remedy}"
            )
    if not kept:
        raise CheckpointError("the inputs have no tensor in common")
    return kept


def _check_layout(
    inputs: Sequence[Checkpoint], tables: Sequence[dict[str, TensorInfo]], names: Iterable[str]
) -> None:
    for name in names:
        first = tables[0][name]
        for checkpoint, table in zip(inputs[1:], tables[1:], strict=True):
            info = table[name]
            if info.shape != first.shape:
                raise CheckpointError(
                    f"tensor {name!r} has the shape {list(info.shape)} in {checkpoint.source}, "
                    f"but {list(first.shape)} in {inputs[0].source}"
                    + _vocabulary_hint(info, first, checkpoint, inputs[0])
                )
            if (info.dtype in FLOATING) != (first.dtype in FLOATING) or (
                info.dtype not in FLOATING and info.dtype != first.dtype
            ):
                raise CheckpointError(
                    f"tensor {name!r} is {info.dtype} in {checkpoint.source}, but {first.dtype} "
                    f"in {inputs[0].source}"
                )


def _vocabulary_hint(
    info: TensorInfo, first: TensorInfo, checkpoint: Checkpoint, reference: Checkpoint
) -> str:
    """Differing first dimensions that are the vocabularies' sizes are the usual reason."""
    sizes = [each.config.get("vocab_size") for each in (checkpoint, reference)]
    rows = [list(each.shape[:1]) for each in (info, first)]
    if info.shape[1:] == first.shape[1:] and rows == [[size] for size in sizes]:
        return (
            f"; their vocabularies have {sizes[0]:,} and {sizes[1]:,} words. Resize the "
            "embeddings of one (model.resize_token_embeddings) and save it anew"
        )
    return "; merge models of one architecture"


def _check_vocabulary(recipe: MergeRecipe, inputs: Sequence[Checkpoint], notes: list[str]) -> None:
    """The same row of two embeddings must mean the same word."""
    known = [
        (checkpoint, words)
        for checkpoint in inputs
        if not checkpoint.single_file and (words := _words(checkpoint)) is not None
    ]
    for checkpoint, words in known[1:]:
        reference, expected = known[0]
        if words == expected:
            continue
        both = words.keys() | expected.keys()
        differing = sum(words.get(word) != expected.get(word) for word in both)
        text = (
            f"the tokenizers of {checkpoint.source} and {reference.source} differ: {differing:,} "
            f"of {len(both):,} words have another number, or none in one of them"
        )
        if recipe.tokenizers == "same":
            raise CheckpointError(
                f"{text}, so that rows of their embeddings mean different words; --tokenizers any "
                "merges them all the same"
            )
        notes.append(f"{text}; merged all the same")


def _words(checkpoint: Checkpoint) -> dict[str, int] | None:
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        words = described.get("model", {}).get("vocab", {})
        if isinstance(words, list):  # unigram models: pairs of word and score, by number
            words = {str(pair[0]): number for number, pair in enumerate(words)}
        added = described.get("added_tokens") or []
        return {**words, **{str(token["content"]): token["id"] for token in added}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error


def _fishers_for(
    name: str, first: TensorInfo, fishers: Sequence[Checkpoint]
) -> tuple[TensorInfo, ...]:
    found = []
    for values in fishers:
        info = values.tensors.get(name)
        if info is None:
            hint = nearest(name, values.tensors)
            raise CheckpointError(f"{values.source} has no Fisher values for {name!r}{hint}")
        if info.shape != first.shape or info.dtype not in FLOATING:
            raise CheckpointError(
                f"{values.source}: {name!r} is {info.dtype} of shape {list(info.shape)}, but the "
                f"models' is {list(first.shape)}"
            )
        found.append(info)
    return tuple(found)


def method_of(plan: MergePlan) -> str:
    """A line on the method and its reference, for people."""
    kind = METHODS[plan.recipe.method]
    return f"{kind.name} ({kind.reference})"
