"""Merging checkpoints on disk: from a recipe to a folder that loads.

Everything is checked before tensor data is read; the result is made in a hidden folder beside its
place and takes its name when it is complete, on the disk and verified. A merge that is stopped goes
on where it was when it is started again.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockpot import __version__
from stockpot.errors import ConfigError, StockpotError
from stockpot.merging.card import model_card, recipe_text
from stockpot.merging.checkpoint import Checkpoint, CheckpointError
from stockpot.merging.hashing import HASHES, Hasher
from stockpot.merging.output import (
    ModelFolder,
    absolute,
    clear,
    refuse_existing,
    refuse_inputs_in,
    staged,
)
from stockpot.merging.plan import MergePlan, make_plan
from stockpot.merging.recipe import Input, MergeRecipe, make_recipe

if TYPE_CHECKING:
    from stockpot.merging.engine import Progress

__all__ = ["MergeResult", "Settings", "merge", "merge_recipe"]

DEFAULT_CHUNK = 1 << 18


@dataclass(frozen=True)
class Settings:
    """How a merge is done, not what comes out: the bytes are the same for all."""

    threads: int | None = None
    """Workers; None: as many as the process may use cores."""
    chunk: int = DEFAULT_CHUNK
    """Elements that a worker holds of each input at a time."""
    device: str = "cpu"
    shard_bytes: int = 5_000_000_000
    """Largest output file; this does change how tensors are spread over files."""
    hashes: str = "xxh3"
    """Hash of all input files for the record: ``xxh3``, ``sha256`` or ``none``. A SHA-256 that the
    recipe states is always checked."""
    overwrite: bool = False

    @property
    def workers(self) -> int:
        """Number of threads."""
        return self.threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote."""

    folder: Path
    outputs: tuple[Path, ...]
    """One folder per point of a sweep; the folder itself without one."""
    tensors: int
    elements: int
    bytes_written: int
    bytes_read: int
    seconds: float
    notes: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Of the input files, by path: ``xxh3:...`` or ``sha256:...``."""


def merge(
    method: str,
    models: list[str | Mapping[str, Any]],
    output: str | os.PathLike[str],
    *,
    base: str | None = None,
    weights: list[float] | None = None,
    weights_by_name: Mapping[str, list[float]] | None = None,
    fishers: list[str] | None = None,
    dtype: str | None = None,
    missing: str = "error",
    tokenizers: str = "same",
    sweep: Mapping[str, list[Any]] | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> MergeResult:
    """Merge checkpoints on disk into a new folder.

    Args:
        method: one of `stockpot.merging.settings.METHODS`, such as ``"ties"``.
        models: folders, safetensors files or hub ids, or mappings as in a recipe.
        output: the folder to write; it must not exist yet, unless the settings allow it.
        base: the model that the others were tuned from.
        weights: one number per model, 1 each by default.
        weights_by_name: for tensors whose names match a pattern, one weight per model.
        fishers: one file of Fisher values per model.
        dtype: of the output, such as ``"bfloat16"``; default: as in the base or the first model.
        missing: what to do about tensors that only some inputs have.
        tokenizers: ``"any"`` merges models of different vocabularies all the same.
        sweep: settings with several values; each point becomes a folder in ``output``.
        settings: threads, memory, device.
        progress: called with a phase and the bytes read since the last call.
        parameters: the method's own settings, such as ``density=0.2``.

    Raises:
        ConfigError: for settings that cannot be used.
        StockpotError: for inputs that cannot be merged, and for a full disk.
    """
    inputs: list[dict[str, Any]] = [
        {"model": os.fspath(model)} if not isinstance(model, Mapping) else dict(model)
        for model in models
    ]
    for label, values in (("weight", weights), ("fisher", fishers)):
        if values is None:
            continue
        if len(values) != len(inputs):
            raise ConfigError(f"{label}s: has {len(values)} entries for {len(inputs)} models")
        for entry, value in zip(inputs, values, strict=True):
            entry[label] = value
    recipe = make_recipe(
        {
            "method": method,
            "base": None if base is None else {"model": os.fspath(base)},
            "models": inputs,
            "parameters": parameters,
            "weights": dict(weights_by_name or {}),
            "sweep": dict(sweep or {}),
            "dtype": dtype,
            "missing": missing,
            "tokenizers": tokenizers,
        }
    )
    return merge_recipe(recipe, Path(output), settings or Settings(), progress)


def merge_recipe(
    recipe: MergeRecipe,
    output: Path,
    settings: Settings,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge by a recipe; see `merge`."""
    began = time.monotonic()
    output = absolute(output)
    refuse_existing(output, settings.overwrite)
    _check_device(settings.device)
    if recipe.method == "lora" and recipe.base is None:
        from stockpot.merging.adapters import average_adapters

        return average_adapters(recipe, output, settings)
    plan = make_plan(recipe)
    refuse_inputs_in(output, plan.inputs)
    with make_hasher(recipe, plan.inputs, settings, progress) as hasher, staged(output) as staging:
        notes, written = _make(plan, staging, settings, hasher, progress)
    return MergeResult(
        folder=output,
        outputs=tuple(output / point.name if point.name else output for point in plan.points),
        tensors=len(plan.entries),
        elements=sum(entry.numel for entry in plan.entries),
        bytes_written=written,
        bytes_read=plan.nbytes,
        seconds=time.monotonic() - began,
        notes=(*plan.notes, *notes),
        hashes={str(path): digest for path, digest in hasher.result().items()},
    )


def _check_device(device: str) -> None:
    """Refuse a device that this machine has not, before anything is read."""
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else "torch cannot use it"
        raise ConfigError(f"device {device!r} cannot be used here: {reason}") from error


def _make(
    plan: MergePlan,
    staging: Path,
    settings: Settings,
    hasher: Hasher,
    progress: Progress | None,
) -> tuple[list[str], int]:
    """Fill the staging folder."""
    # The header's length must be known at once, the hashes are known last.
    outputs = output_folders(plan, staging, settings.shard_bytes, hasher.placeholders())
    before = plan.fingerprint()
    token = f"{before} {settings.shard_bytes}"
    if not _goes_on(staging / "merge-state.json", token):
        clear(staging)
    try:
        for each in outputs:
            each.open()
        from stockpot.merging.engine import Engine

        engine = Engine(
            plan,
            outputs,
            staging,
            token,
            settings.workers,
            settings.chunk,
            settings.device,
            hasher,
            progress,
        )
        notes = engine.run()
        hashes = hasher.result()
        if plan.fingerprint() != before:
            raise StockpotError("an input was changed while it was merged; nothing was kept")
        for number, each in enumerate(outputs):
            each.finish(metadata_of(plan, number, hashes))
            each.copy_companions(plan.donor, plan.config_changes, plan.recipe.dtype)
            each.write_text("merge.yaml", recipe_text(plan.recipe, plan.points[number]))
            each.write_text("README.md", model_card(plan, plan.points[number], hashes, notes))
        (staging / "merge-state.json").unlink(missing_ok=True)
    finally:
        for each in outputs:
            each.close()
    return notes, sum(each.nbytes for each in outputs)


def _goes_on(state: Path, token: str) -> bool:
    """Whether what lies in the staging folder is of this very merge."""
    try:
        return bool(json.loads(state.read_text())["plan"] == token)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def output_folders(
    plan: MergePlan, folder: Path, shard_bytes: int, hashes: Mapping[Path, str]
) -> list[ModelFolder]:
    """One folder per point, laid out but not yet on the disk."""
    return [
        ModelFolder(
            folder / point.name, plan.entries, shard_bytes, metadata_of(plan, number, hashes)
        )
        for number, point in enumerate(plan.points)
    ]


def metadata_of(plan: MergePlan, number: int, hashes: Mapping[Path, str]) -> dict[str, str]:
    """What stands in the header of each output file."""
    files = [
        {
            "model": checkpoint.source,
            "files": {path.name: hashes[path] for path in checkpoint.files if path in hashes},
        }
        for checkpoint in plan.inputs
    ]
    described = {
        "version": __version__,
        "method": plan.recipe.method,
        "parameters": plan.points[number].method.model_dump(mode="json"),
        "recipe": plan.recipe.model_dump(mode="json", exclude_defaults=True),
        "inputs": files,
    }
    return {"format": "pt", "stockpot": json.dumps(described)}


def make_hasher(
    recipe: MergeRecipe,
    checkpoints: tuple[Checkpoint, ...],
    settings: Settings,
    progress: Progress | None,
) -> Hasher:
    """What hashes the inputs, beside everything else; not started yet."""
    stated: dict[Path, str] = {}
    for given in (*((recipe.base,) if recipe.base else ()), *recipe.models):
        if given.sha256 is not None:
            checkpoint = next(each for each in checkpoints if each.source == given.model)
            stated |= _stated(given, checkpoint)
    paths = [path for checkpoint in checkpoints for path in checkpoint.files]
    if settings.hashes not in (*HASHES, "none"):
        raise ConfigError(f"hashes: {settings.hashes!r} is not one of xxh3, sha256, none")
    if settings.hashes == "none":
        paths = [path for path in paths if path in stated]
    told = functools.partial(progress, "hash") if progress else None
    return Hasher(paths, settings.hashes, stated, settings.workers, told)


def _stated(given: Input, checkpoint: Checkpoint) -> dict[Path, str]:
    by_name = {path.name: path for path in checkpoint.files}
    if isinstance(given.sha256, str):
        if len(by_name) != 1:
            raise ConfigError(
                f"sha256 of {given.model}: it has {len(by_name)} files; state one hash for each, "
                "by its name"
            )
        return {checkpoint.files[0]: given.sha256}
    assert given.sha256 is not None
    for name in given.sha256:
        if name not in by_name:
            raise CheckpointError(f"sha256 of {given.model}: it has no file {name!r}")
    return {by_name[name]: digest for name, digest in given.sha256.items()}
