"""The figures: the trade-off plane and the accuracy matrices, as PNG and SVG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from stockpot.files import space_errors
from stockpot.methods import METHODS
from stockpot.methods.base import short
from stockpot.report.style import colour, literal, marker, title
from stockpot.report.table import Group, Interval, Measure, measure_of, method_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "Point", "accuracy_matrices", "curves", "save_figure", "trade_off_plane"]

_SVG_SALT = "stockpot"
_NAMED = 10
"""Tasks of which each has its name at a matrix; of more, there is a number."""
_LONGEST = 24
"""Letters of a task's name there."""


@dataclass(frozen=True)
class Point:
    """A method and setting on the plane: score on the newest task, and on the earlier ones."""

    group: Group
    new: Interval
    old: Interval


@dataclass(frozen=True)
class Curve:
    """One method along one setting, all other settings the same."""

    method: str
    along: str | None
    fixed: dict[str, Any]
    points: tuple[Point, ...]

    @property
    def label(self) -> str:
        """``SFA along p (beta 0.5)``."""
        if self.along is None:
            return method_title(self.points[0].group)
        given = _given(self.method, self.points[0].group.settings)
        rest = ", ".join(f"{k} {short(v)}" for k, v in given.items() if k != self.along)
        return f"{title(self.method)} along {self.along}" + (f" ({rest})" if rest else "")


def _given(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a label names; all of them where this version does not know them."""
    try:
        return METHODS[method].model_validate(settings).given()
    except ValidationError:
        return {key: value for key, value in settings.items() if value not in (None, False)}


def curves(groups: Sequence[Group]) -> list[Curve]:
    """Every method's points, joined along its settings; points on no curve stand alone.

    The plane has the last task's final score across and the mean final score of the tasks before it
    upwards; for two tasks, task B and task A as in the paper. A method's first curves run along the
    setting that it names for that; points that those do not reach are joined along its others.
    """
    points = [point for group in groups if (point := _point(group)) is not None]
    found: list[Curve] = []
    for method in dict.fromkeys(point.group.method for point in points):
        own = [point for point in points if point.group.method == method]
        left = list(own)
        for along in _axes_of(method):
            for curve in _joined(own, along):
                if any(point in left for point in curve.points):
                    found.append(curve)
                    left = [point for point in left if point not in curve.points]
        found += [Curve(method, None, point.group.settings, (point,)) for point in left]
    return found


def _point(group: Group) -> Point | None:
    new = Interval.of([run["R"][-1][-1] for run in group.runs])
    old = Interval.of([_mean(run["R"][-1][:-1] or run["R"][-1]) for run in group.runs])
    return None if new is None or old is None else Point(group, new, old)


def _axes_of(method: str) -> tuple[str, ...]:
    """The settings that curves may run along, the method's own choice first."""
    if method not in METHODS:
        return ()
    kind = METHODS[method]
    return tuple(dict.fromkeys([*([kind.curve] if kind.curve else []), *kind.headline]))


def _joined(points: Sequence[Point], along: str) -> list[Curve]:
    """The points that differ in nothing but ``along``, two or more of them."""
    bundles: dict[str, list[Point]] = {}
    for point in points:
        settings = point.group.settings
        if isinstance(settings.get(along), int | float):
            fixed = sorted((k, str(v)) for k, v in settings.items() if k != along)
            bundles.setdefault(str(fixed), []).append(point)
    result = []
    for bundle in bundles.values():
        if len(bundle) > 1:
            bundle.sort(key=lambda point: point.group.settings[along])
            settings = bundle[0].group.settings
            fixed_settings = {k: v for k, v in settings.items() if k != along}
            result.append(Curve(bundle[0].group.method, along, fixed_settings, tuple(bundle)))
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def trade_off_plane(groups: Sequence[Group], tasks: Sequence[str], subtitle: str = "") -> Figure:
    """What was kept against what was learned: one curve per method along its setting (Fig. 9)."""
    all_curves = curves(groups)
    # Tall enough for the legend: a line of it takes about 0.2 inches.
    figure, grid = _figure(8.4, max(5.6, 0.2 * len(all_curves) + 0.8))
    axes = grid[0, 0]
    dashes = ("-", "--", ":", "-.")
    drawn: dict[str, int] = {}
    labelled: set[str] = set()
    measure = measure_of(groups[0].runs)
    for curve in all_curves:
        line = "none" if curve.along is None else dashes[drawn.get(curve.method, 0) % 4]
        drawn[curve.method] = drawn.get(curve.method, 0) + (curve.along is not None)
        _draw(axes, curve, line, measure.scale)
        _label_points(axes, curve, labelled, measure.scale)
    tasks = [literal(_clip(task, 60)) for task in tasks]
    earlier = tasks[0] if len(tasks) == 2 else f"mean of the {len(tasks) - 1} earlier tasks"
    name, unit = measure.name, measure.unit
    axes.set_xlabel(f"{name} on the last task, {tasks[-1]} ({unit})")
    axes.set_ylabel(f"{name} on {earlier} ({unit})" if len(tasks) > 1 else f"{name} ({unit})")
    axes.set_title(f"Kept against learned{subtitle}", loc="left", fontsize=11)
    axes.grid(alpha=0.25, linewidth=0.6)
    if measure.unit == "%":
        # Intervals may reach where no share can be; the axes need not.
        left, right = axes.get_xlim()
        low, high = axes.get_ylim()
        axes.set_xlim(max(left, -2), min(right, 102))
        axes.set_ylim(max(low, -2), min(high, 102))
    if measure.better == "lower":  # up and right stay the better sides
        axes.invert_xaxis()
        axes.invert_yaxis()
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, labelspacing=0.7
    )
    return figure


def _draw(axes: Axes, curve: Curve, line: str, scale: float) -> None:
    x = [point.new.mean * scale for point in curve.points]
    y = [point.old.mean * scale for point in curve.points]
    width = [(point.new.half_width or 0) * scale for point in curve.points]
    height = [(point.old.half_width or 0) * scale for point in curve.points]
    star = curve.method == "multitask"
    shade = colour(curve.method)
    axes.errorbar(x, y, xerr=width, yerr=height, fmt="none", ecolor=shade, alpha=0.28, elinewidth=1)
    axes.plot(
        x,
        y,
        color=shade,
        linestyle=line,
        linewidth=1.6,
        marker=marker(curve.method),
        markersize=15 if star else 6.5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        label=curve.label,
        zorder=4 if star else 3,
    )


def _label_points(axes: Axes, curve: Curve, labelled: set[str], scale: float) -> None:
    """The setting's value at every point of a curve; a point on two curves has its first's."""
    if curve.along is None:
        return
    for point in curve.points:
        if point.group.label not in labelled:
            labelled.add(point.group.label)
            axes.annotate(
                f"{point.group.settings[curve.along]:g}",
                (point.new.mean * scale, point.old.mean * scale),
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=6.5,
                color=colour(curve.method),
                zorder=5,
            )


def accuracy_matrices(groups: Sequence[Group], tasks: Sequence[str]) -> Figure:
    """R as a heat map: each method at its best setting by the average, mean over seeds."""
    best: dict[str, Group] = {}
    measure = measure_of(groups[0].runs)
    for group in groups:
        held = best.get(group.method)
        if held is None or _average(group, measure) > _average(held, measure):
            best[group.method] = group
    columns = min(4, len(best))
    rows = -(-len(best) // columns)
    side = max(1.6, min(4.2, 0.36 * len(tasks) + 0.9))
    if len(tasks) <= _NAMED:  # long names take room beside the cells
        side += 0.06 * max(0, min(_LONGEST, max(map(len, tasks))) - 8)
    figure, grid = _figure(side * columns + 1.6, (side + 0.45) * rows + 0.6, rows, columns)
    panels = list(grid.flat)
    image = None
    limits = _limits(best.values(), measure)
    for axes, group in zip(panels, best.values(), strict=False):
        image = _heat_map(axes, group, tasks, int(11 * side), measure, limits)
    for axes in panels[len(best) :]:
        axes.set_visible(False)
    if image is not None:
        bar = figure.colorbar(image, ax=panels, shrink=0.75, pad=0.02)
        bar.set_label(f"{measure.name} ({measure.unit})", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.supxlabel("scored on", fontsize=9)
    figure.supylabel("after training through", fontsize=9)
    return figure


def _average(group: Group, measure: Measure) -> float:
    interval = group.metric("average")
    return -math.inf if interval is None else measure.sign * interval.mean


def _limits(groups: Iterable[Group], measure: Measure) -> tuple[float, float]:
    """The ends of the colour scale: 0 and 100 %, else the range of the numbers."""
    if measure.unit == "%":
        return 0.0, 100.0
    values = [v * measure.scale for g in groups for row in g.matrix() for v in row if v is not None]
    return min(values), max(values)


def _heat_map(
    axes: Axes,
    group: Group,
    tasks: Sequence[str],
    letters: int,
    measure: Measure,
    limits: tuple[float, float],
) -> Any:
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    matrix = group.matrix()
    scale = measure.scale
    values = np.array([[np.nan if v is None else v * scale for v in row] for row in matrix])
    colours = "viridis" if measure.better == "higher" else "viridis_r"
    low, high = limits
    image = axes.imshow(values, vmin=low, vmax=high, cmap=colours, aspect="equal")
    axes.set_facecolor("#eeeeee")  # rows that were never trained
    lines = textwrap.wrap(method_title(group), width=letters)
    axes.set_title("\n".join(lines), fontsize=7.5)
    own = group.runs[0]["tasks"]
    tasks = own if set(own) == set(tasks) else tasks  # it may have been trained in another order
    upright = len(tasks) <= 3 and max(map(len, tasks)) <= 8
    tasks = [literal(_clip(task, _LONGEST)) for task in tasks]
    if len(tasks) <= _NAMED:
        for (t, i), value in np.ndenumerate(values):
            if not np.isnan(value):
                bright = (value - low) / ((high - low) or 1.0)
                ink = "white" if (bright < 0.6) == (measure.better == "higher") else "black"
                shown = f"{value:.{0 if measure.unit == '%' else 2}f}"
                axes.text(i, t, shown, ha="center", va="center", fontsize=7, color=ink)
        axes.set_xticks(
            range(len(tasks)),
            tasks,
            rotation=0 if upright else 45,
            ha="center" if upright else "right",
            fontsize=7,
        )
        axes.set_yticks(range(len(tasks)), tasks, fontsize=7)
    else:
        axes.tick_params(labelsize=6)
        for axis in (axes.xaxis, axes.yaxis):  # tasks have whole numbers
            axis.set_major_locator(MaxNLocator(integer=True))
    return image


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure and its axes, an array (rows, columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no window system, no global state, nothing to close.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG, the same bytes for the same numbers."""
    import matplotlib

    paths = []
    for kind in ("png", "svg"):
        path = folder / f"{name}.{kind}"
        scratch = folder / f".{name}.tmp.{kind}"
        with space_errors(path), matplotlib.rc_context({"svg.hashsalt": _SVG_SALT}):
            try:
                metadata = {"Date": None} if kind == "svg" else {"Software": None}
                figure.savefig(scratch, dpi=160, metadata=metadata)
                scratch.replace(path)
            finally:
                scratch.unlink(missing_ok=True)
        paths.append(path)
    return paths
