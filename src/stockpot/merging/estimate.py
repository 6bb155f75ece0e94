"""What a merge would read, compute and write, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stockpot.errors import ConfigError
from stockpot.merging.formulas import Rule
from stockpot.merging.on_disk import Settings, make_hasher, output_folders
from stockpot.merging.output import absolute, staging_of
from stockpot.merging.plan import MergePlan, make_plan, method_of
from stockpot.merging.recipe import MergeRecipe

__all__ = ["Estimate", "estimate"]

_INTERPRETER = 60 << 20  # Python, numpy and the command line
_ALTERNATIVES = 64 << 20  # undecided coordinates of sign elections
_BRACKETS = 48 << 20  # counts of magnitudes, per survey


@dataclass(frozen=True)
class Estimate:
    """A merge that was not run."""

    method: str
    inputs: tuple[tuple[str, int, int], ...]
    """Name, tensors, bytes."""
    tensors: int
    elements: int
    copied: int
    passes: int
    bytes_read: int
    outputs: tuple[tuple[str, int, int], ...]
    """Folder, files, bytes."""
    peak_memory: int
    threads: int
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "method": self.method,
            "inputs": [
                {"model": name, "tensors": count, "bytes": size}
                for name, count, size in self.inputs
            ],
            "tensors": self.tensors,
            "elements": self.elements,
            "passes": self.passes,
            "bytes_to_read": self.bytes_read,
            "outputs": [
                {"folder": name, "files": count, "bytes": size}
                for name, count, size in self.outputs
            ],
            "peak_memory_bytes": self.peak_memory,
            "threads": self.threads,
        }

    def lines(self) -> list[str]:
        """For people."""
        found = [f"method   {self.method}"]
        for name, count, size in self.inputs:
            found.append(f"read     {name}: {count:,} tensors, {size / 1e9:.2f} GB")
        copied = f", {self.copied:,} of them copied as they are" if self.copied else ""
        found.append(
            f"merge    {self.tensors:,} tensors, {self.elements / 1e6:,.1f} M numbers{copied}, "
            f"in {self.passes} {'pass' if self.passes == 1 else 'passes'} over the inputs "
            f"({self.bytes_read / 1e9:.2f} GB)"
        )
        for name, count, size in self.outputs:
            files = f"{count} file" if count == 1 else f"{count} files"
            found.append(f"write    {name}: {files}, {size / 1e9:.2f} GB")
        found.append(
            f"memory   about {self.peak_memory / 1e6:,.0f} MB at most, with {self.threads} threads"
        )
        found.append("Nothing was written.")
        return found


def estimate(recipe: MergeRecipe, output: Path, settings: Settings) -> Estimate:
    """Check a merge and say what it would do.

    Raises:
        StockpotError: as the merge itself would.
    """
    if recipe.method == "lora" and recipe.base is None:
        raise ConfigError("--dry-run: adapters are small; averaging them is not planned ahead")
    plan = make_plan(recipe)
    hashes = make_hasher(recipe, plan.inputs, settings, None).placeholders()
    folders = output_folders(plan, staging_of(absolute(output)), settings.shard_bytes, hashes)
    rules = plan.rules()
    surveyed = any(rule.survey is not None for rule in rules)
    names = [str(output / point.name) if point.name else str(output) for point in plan.points]
    return Estimate(
        method=method_of(plan),
        inputs=tuple((each.source, len(each.tensors), each.nbytes) for each in plan.inputs),
        tensors=len(plan.entries),
        elements=sum(entry.numel for entry in plan.entries),
        copied=sum(entry.copied for entry in plan.entries),
        passes=2 if surveyed else 1,
        bytes_read=plan.nbytes * (2 if surveyed else 1),
        outputs=tuple(
            (name, len(folder.files), folder.nbytes)
            for name, folder in zip(names, folders, strict=True)
        ),
        peak_memory=_peak_memory(plan, rules, settings),
        threads=settings.workers,
        notes=plan.notes,
    )


def _peak_memory(plan: MergePlan, rules: Sequence[Rule], settings: Settings) -> int:
    """Buffers of all workers: each input as stored and widened, and the formula's temporaries."""
    sources: Sequence[Any] = max((entry.sources for entry in plan.entries), key=len, default=())
    width = 8 if plan.wide == "F64" else 4
    largest: int = max((entry.numel for entry in plan.entries), default=0)
    elements = min(settings.chunk, largest)
    arrays = len(sources) + max(rule.temporaries for rule in rules) + len(sources)
    workers = settings.workers * elements * (arrays * width + sum({s.itemsize for s in sources}))
    extra = _BRACKETS if any(rule.survey is not None for rule in rules) else 0
    extra += _ALTERNATIVES if any(rule.elects for rule in rules) else 0
    return int(_INTERPRETER + workers + extra)
