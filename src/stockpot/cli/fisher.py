"""``stockpot fisher``: Fisher information of a checkpoint, for Fisher merging and EWC."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from stockpot.errors import ConfigError, StockpotError

__all__ = ["fisher"]

_LABELS = ("sampled", "true", "exact")


def fisher(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the model.")],
    data: Annotated[
        str,
        typer.Argument(
            help="JSONL, CSV or parquet file, folder or hub id with text; prompt and response; "
            "text and label; or image and label."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors).")],
    samples: Annotated[
        int, typer.Option(min=0, help="Examples to use, drawn at random; 0: all.")
    ] = 256,
    labels: Annotated[
        str,
        typer.Option(
            help="sampled: from the model's distribution; true: the data's (empirical Fisher); "
            "exact: all labels, weighted (classifiers)."
        ),
    ] = "sampled",
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per sequence at most.")] = 512,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file if it exists.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.")
    ] = False,
) -> None:
    """Write the per-example Fisher values that Fisher merging and EWC weigh parameters by."""
    from stockpot.merging.checkpoint import open_checkpoint

    if labels not in _LABELS:
        raise ConfigError(f"--labels {labels!r} is not one of {', '.join(_LABELS)}")
    if output.suffix != ".safetensors":
        raise ConfigError(f"-o {output}: the name must end in .safetensors")
    if output.exists() and not overwrite:
        raise StockpotError(f"{output} exists and was not touched; --overwrite replaces it")
    if not output.parent.is_dir():
        raise ConfigError(f"-o {output}: there is no folder {output.parent}")
    open_checkpoint(model)  # what is wrong with it is told before libraries are loaded
    with redirect_stdout(sys.stderr):
        mean, count = _compute(
            model, data, output, samples, labels, max_length, split, seed, device
        )
    if as_json:
        typer.echo(json.dumps({"output": str(output), "examples": count, "mean": mean}))


def _compute(
    model: str,
    data: str,
    output: Path,
    samples: int,
    labels: str,
    max_length: int,
    split: str,
    seed: int,
    device: str,
) -> tuple[float, int]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    from stockpot.files import write_tensors

    console = Console(stderr=True)
    with console.status("loading PyTorch and Transformers"):
        from transformers.utils import logging

        from stockpot.methods.fisher_file import fisher_of_checkpoint

        logging.disable_progress_bar()
    seen = 0
    columns = (TextColumn("examples"), BarColumn(), MofNCompleteColumn(), Left())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("examples", total=None)

        def show(done: int, total: int) -> None:
            nonlocal seen
            seen = done
            bars.update(task, completed=done, total=total)

        values = fisher_of_checkpoint(
            model,
            data,
            samples=samples or None,
            labels=labels,  # type: ignore[arg-type]
            max_length=max_length,
            split=split,
            seed=seed,
            device=device,
            progress=show,
        )
    write_tensors(output, values)
    total = sum(float(each.double().sum()) for each in values.values())
    mean = total / max(1, sum(each.numel() for each in values.values()))
    console.print(
        f"Fisher values of {len(values):,} tensors from {seen:,} examples (mean {mean:.3g}): "
        f"{output}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return mean, seen
