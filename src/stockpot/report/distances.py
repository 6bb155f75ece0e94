"""The figure of ``stockpot distance``: how far each layer has moved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stockpot.files import space_errors
from stockpot.report.style import literal

if TYPE_CHECKING:
    from stockpot.merging.distance import Distance

__all__ = ["draw_distances"]

_MOST = 60


def draw_distances(found: Distance, first: str, second: str, path: Path) -> None:
    """Bars of the L2 distance and of the angle, layer by layer, as PNG, SVG or PDF.

    The angle is arccos of the cosine, in degrees: cosines of tuned models all look like 1.
    """
    import math

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    layers = found.layers[:_MOST]
    names = [literal(layer.name.removesuffix(".weight")) for layer in layers]
    height = 1.6 + 0.24 * len(layers)
    figure = Figure(figsize=(9.0, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(layers))
    left.barh(places, [layer.l2 for layer in layers], color="#0072B2")
    left.set_xlabel("L2 distance")
    angles = [
        math.degrees(math.acos(layer.cosine)) if layer.cosine == layer.cosine else 0.0
        for layer in layers
    ]
    right.barh(places, angles, color="#D55E00")
    right.set_xlabel("angle, degrees")
    left.set_yticks(list(places), names, fontsize=8)
    left.set_ylim(len(layers) - 0.4, -0.6)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    more = f", the first {_MOST} of {len(found.layers)} layers" if len(found.layers) > _MOST else ""
    figure.suptitle(
        literal(f"From {_short(first)} to {_short(second)}: L2 {found.total.l2:.4g}{more}"),
        fontsize=11,
    )
    with space_errors(path):
        figure.savefig(path, dpi=150)


def _short(source: str) -> str:
    return source if len(source) <= 40 else f"...{source[-37:]}"
