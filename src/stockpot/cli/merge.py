"""``stockpot merge``: combine checkpoints on disk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stockpot.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stockpot.merging.on_disk import MergeResult, Settings
    from stockpot.merging.recipe import MergeRecipe

__all__ = ["merge"]

_SETTINGS = "Settings of methods"
_INPUTS = "Inputs"
_WORK = "How the work is done (the result is the same)"


def merge(
    what: Annotated[
        str, typer.Argument(metavar="METHOD|RECIPE", help="A method's name, or a recipe (YAML).")
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL[:WEIGHT]...",
            help="Folders, safetensors files or hub ids; a weight after a colon.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write. [required]")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The model that the others were tuned from.", rich_help_panel=_INPUTS),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=W1,W2",
            help="For tensors whose names match: one weight per model. First match counts.",
            rich_help_panel=_INPUTS,
        ),
    ] = None,
    fisher: Annotated[
        list[str] | None,
        typer.Option(
            help="A model's Fisher values; once per model, in their order.",
            rich_help_panel=_INPUTS,
        ),
    ] = None,
    missing: Annotated[
        str,
        typer.Option(
            help="Tensors that some inputs lack: error, base (theirs is the base's) or skip.",
            rich_help_panel=_INPUTS,
        ),
    ] = "error",
    tokenizers: Annotated[
        str,
        typer.Option(
            help="same: refuse models whose vocabularies differ; any: merge them all the same.",
            rich_help_panel=_INPUTS,
        ),
    ] = "same",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the output: float32, bfloat16, float16, float64. Default: as the base's."
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=A:B:STEP",
            help="Write a folder for each value (or KEY=A,B,C), reading the inputs once.",
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            help="wise-ft: share of the base; lines: what depth adds.", rich_help_panel=_SETTINGS
        ),
    ] = None,
    t: Annotated[
        float | None,
        typer.Option("--t", help="slerp: place on the arc.", rich_help_panel=_SETTINGS),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            "--scale",
            "--lambda",
            help="Factor of the merged task vector.",
            rich_help_panel=_SETTINGS,
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            help="ties, breadcrumbs: share of a task vector kept.", rich_help_panel=_SETTINGS
        ),
    ] = None,
    trim: Annotated[
        str | None,
        typer.Option(
            help="ties: global (the original) or per-tensor (mergekit, PEFT).",
            rich_help_panel=_SETTINGS,
        ),
    ] = None,
    drop_rate: Annotated[
        float | None,
        typer.Option(help="dare: probability p of being dropped.", rich_help_panel=_SETTINGS),
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(
            help="breadcrumbs: share of largest changes dropped.", rich_help_panel=_SETTINGS
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="lines: scale of the first layer.", rich_help_panel=_SETTINGS),
    ] = None,
    floor: Annotated[
        float | None,
        typer.Option(help="fisher: smallest Fisher value.", rich_help_panel=_SETTINGS),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="lora without a base: rank of the result.", rich_help_panel=_SETTINGS),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="Divide by the sum of the weights.",
            rich_help_panel=_SETTINGS,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="dare: of the draws.", rich_help_panel=_SETTINGS)
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Default: all cores.", rich_help_panel=_WORK),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1, help="Elements of each input in a worker's hands.", rich_help_panel=_WORK
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N.", rich_help_panel=_WORK)
    ] = "cpu",
    shard_size: Annotated[
        str, typer.Option(help="Largest output file.", rich_help_panel=_WORK)
    ] = "5GB",
    hashes: Annotated[
        str,
        typer.Option(
            "--hash",
            help="Hash of every input file, for the record: xxh3 (fast), sha256 or none.",
            rich_help_panel=_WORK,
        ),
    ] = "xxh3",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what would be read, computed and written; write nothing."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Combine checkpoints of one architecture into a new one, tensor by tensor.

    Methods: linear, wise-ft, slerp, task-arithmetic, ties, dare-linear, dare-ties, fisher, magmax,
    model-stock, breadcrumbs, lines, lora. The same command goes on where a merge was stopped.
    """
    given = {
        "beta": beta,
        "t": t,
        "scale": scale,
        "density": density,
        "trim": trim,
        "drop_rate": drop_rate,
        "gamma": gamma,
        "alpha": alpha,
        "floor": floor,
        "rank": rank,
        "normalize": normalize,
        "seed": seed,
    }
    parameters = {key: value for key, value in given.items() if value is not None}
    common = {"base": base, "missing": missing, "tokenizers": tokenizers, "dtype": dtype}
    recipe, notes = _recipe(
        what, models or [], parameters, common, weights or [], fisher or [], sweep or []
    )
    if output is None and not dry_run:
        raise ConfigError("-o: name the folder to write the merged model to")
    settings = _settings(threads, chunk, device, shard_size, hashes, overwrite)
    if dry_run:
        _dry_run(recipe, output, settings, notes, as_json)
        return
    assert output is not None
    _run(recipe, output, settings, notes, as_json, quiet)


def _recipe(
    what: str,
    models: list[str],
    parameters: dict[str, Any],
    common: dict[str, Any],
    weights: list[str],
    fishers: list[str],
    sweeps: list[str],
) -> tuple[MergeRecipe, list[str]]:
    from stockpot.merging.recipe import load_recipe, make_recipe, parse_model, parse_sweep

    swept = _once("--sweep", map(parse_sweep, sweeps))
    if what.endswith((".yaml", ".yml")):
        changed = {key for key, value in common.items() if value not in (None, "error", "same")}
        if models or parameters or weights or fishers or swept or changed:
            raise ConfigError(
                f"{what} holds the whole recipe: write models and settings there, not beside it"
            )
        return load_recipe(Path(what))
    entries = [parse_model(model) for model in models]
    if fishers:
        if len(fishers) != len(entries):
            raise ConfigError(f"--fisher: given {len(fishers)} times for {len(entries)} models")
        for entry, values in zip(entries, fishers, strict=True):
            entry["fisher"] = values
    if not entries:
        raise ConfigError("MODEL: name the models to merge, as in: stockpot merge linear A B -o C")
    base = common["base"]
    recipe: dict[str, Any] = {
        **common,
        "base": None if base is None else {"model": base},
        "method": what,
        "models": entries,
        "parameters": parameters,
        "weights": _once("--weights", map(_pattern, weights)),
        "sweep": swept,
    }
    return make_recipe(recipe), []


def _once(option: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"{option}: {key!r} is given twice")
        found[key] = value
    return found


def _pattern(text: str) -> tuple[str, list[float]]:
    pattern, equals, numbers = text.rpartition("=")
    try:
        if not equals or not pattern:
            raise ValueError
        return pattern, [float(number) for number in numbers.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--weights {text!r}: write a pattern and one weight per model, as in '*.mlp.*=0.2,0.8'"
        ) from error


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _settings(
    threads: int | None,
    chunk: int | None,
    device: str,
    shard_size: str,
    hashes: str,
    overwrite: bool,
) -> Settings:
    from stockpot.merging.on_disk import DEFAULT_CHUNK, Settings

    text = shard_size.strip().upper()
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    try:
        size = float(text.removesuffix(unit)) * _UNITS.get(unit, 1)
        if not 1 <= size <= 1e18:
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"--shard-size {shard_size!r}: write a size, as in 5GB") from error
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"--device {device!r}: write cpu, cuda or cuda:0")
    return Settings(threads, chunk or DEFAULT_CHUNK, device, int(size), hashes, overwrite)


def _run(
    recipe: MergeRecipe,
    output: Path,
    settings: Settings,
    notes: list[str],
    as_json: bool,
    quiet: bool,
) -> None:
    from rich.console import Console

    from stockpot.cli.transfer import transfer_progress
    from stockpot.merging.on_disk import merge_recipe

    console = Console(stderr=True, quiet=quiet)
    try:
        with transfer_progress(console) as progress:
            result = merge_recipe(recipe, output, settings, progress)
    except KeyboardInterrupt:
        from stockpot.cli.output import complain

        complain("What is merged so far is kept: the same command goes on from there.", "stopped")
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(_as_json(result, notes), indent=2))
    for note in (*notes, *result.notes):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if not as_json:
        rate = result.bytes_read / max(result.seconds, 1e-9)
        console.print(
            f"{recipe.method}: {result.tensors:,} tensors, {result.elements / 1e6:,.1f} M numbers "
            f"in {result.seconds:.1f} s ({_size(rate)}/s read, "
            f"{_size(result.bytes_written)} written)",
            highlight=False,
            soft_wrap=True,
        )
        for each in result.outputs:
            console.print(f"{each}", highlight=False, markup=False, style="bold", soft_wrap=True)


def _as_json(result: MergeResult, notes: list[str]) -> dict[str, Any]:
    return {
        "output": str(result.folder),
        "outputs": [str(each) for each in result.outputs],
        "tensors": result.tensors,
        "elements": result.elements,
        "bytes_read": result.bytes_read,
        "bytes_written": result.bytes_written,
        "seconds": round(result.seconds, 3),
        "notes": [*notes, *result.notes],
        "hashes": dict(result.hashes),
    }


def _size(count: float) -> str:
    for unit, size in reversed(_UNITS.items()):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _dry_run(
    recipe: MergeRecipe,
    output: Path | None,
    settings: Settings,
    notes: list[str],
    as_json: bool,
) -> None:
    from rich.console import Console

    from stockpot.merging.estimate import estimate

    found = estimate(recipe, output or Path("OUT"), settings)
    if as_json:
        typer.echo(json.dumps({**found.as_json(), "notes": [*notes, *found.notes]}, indent=2))
        return
    console = Console()
    for line in found.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for note in (*notes, *found.notes):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
