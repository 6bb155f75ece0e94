"""``stockpot distance``: how far one checkpoint is from another."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stockpot.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stockpot.merging.distance import Distance, Measure

__all__ = ["distance"]

_FORMATS = (".png", ".svg", ".pdf")


def distance(
    first: Annotated[str, typer.Argument(help="Folder, safetensors file or hub id.")],
    second: Annotated[str, typer.Argument(help="Another of the same architecture.")],
    figure: Annotated[
        Path | None, typer.Option(help="Write a figure of the layers: PNG, SVG or PDF.")
    ] = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="One row per tensor, not per layer.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.")
    ] = False,
) -> None:
    """L2 distance and cosine of two checkpoints: in all, and layer by layer."""
    from rich.console import Console

    from stockpot.merging.distance import distance as measure
    from stockpot.merging.on_disk import Settings

    if figure is not None and figure.suffix.lower() not in _FORMATS:
        raise ConfigError(f"--figure {figure}: the name must end in {', '.join(_FORMATS)}")
    errors = Console(stderr=True)
    with errors.status("reading"):
        found = measure(first, second, Settings(threads=threads))
    if as_json:
        typer.echo(json.dumps(_as_json(found), indent=2))
    else:
        _print(found, found.tensors if tensors else found.layers, first, second)
    if figure is not None:
        from stockpot.report.distances import draw_distances

        with errors.status("drawing"):
            draw_distances(found, first, second, figure)
        errors.print(f"Figure: {figure}", highlight=False, markup=False)


def _as_json(found: Distance) -> dict[str, object]:
    return {
        "total": found.total.as_json(),
        "layers": [each.as_json() for each in found.layers],
        "tensors": [each.as_json() for each in found.tensors],
        "skipped": list(found.skipped),
    }


def _print(found: Distance, rows: Sequence[Measure], first: str, second: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer" if rows is found.layers else "tensor", overflow="fold")
    for title in ("numbers", "L2", "of the first's norm", "cosine"):
        table.add_column(title, justify="right")
    for each in rows:
        table.add_row(*_cells(each))
    table.add_section()
    table.add_row(*_cells(found.total), style="bold")
    console.print(f"from {escape(first)} to {escape(second)}", highlight=False)
    console.print(table, highlight=False)
    if found.skipped:
        names = ", ".join(found.skipped[:3])
        more = f" and {len(found.skipped) - 3} more" if len(found.skipped) > 3 else ""
        console.print(
            f"left out, not floating or not in both: {names}{more}",
            highlight=False,
            markup=False,
            style="dim",
        )


def _cells(each: Measure) -> tuple[str, ...]:
    relative = "-" if math.isnan(each.relative) else f"{each.relative:.2%}"
    cosine = "-" if math.isnan(each.cosine) else f"{each.cosine:.6f}"
    return each.name, f"{each.elements:,}", f"{each.l2:.4g}", relative, cosine
