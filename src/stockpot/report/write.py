"""From run folders to their tables, figures and page."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from stockpot import __version__
from stockpot.errors import StockpotError
from stockpot.files import space_errors, write_text
from stockpot.report.document import describe_pool
from stockpot.report.figures import accuracy_matrices, save_figure, trade_off_plane
from stockpot.report.latex import to_latex
from stockpot.report.pooling import Pool, pool_records
from stockpot.report.reading import experiment_folders, read_record
from stockpot.report.table import Group, result_columns, task_columns, to_csv, to_markdown

__all__ = ["read_pools", "write_pools", "write_report"]

_SCRIPTS = ("base.js", "figures.js", "plane.js", "stream.js", "tables.js", "main.js")


def read_pools(folders: Sequence[Path]) -> list[Pool]:
    """The experiments in ``folders``; those that belong together are one.

    Raises:
        StockpotError: if a folder is no run folder, or there is no score in any of them.
    """
    found = experiment_folders(folders)
    pools = pool_records([read_record(folder) for folder in found])
    if not any(row for pool in pools for run in pool.runs for row in run["R"]):
        where = found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more folders"
        gaps = [gap for pool in pools for gap in pool.gaps][:3]
        raise StockpotError(
            f"{where}: no task of any run is trained and scored yet, so there is nothing to report"
            + (f" ({'; '.join(gaps)})" if gaps else "")
        )
    return pools


def write_report(
    folders: Path | Sequence[Path], output: Path | None = None, refresh: int | None = None
) -> Path:
    """Write ``report.html`` and, of each experiment, its tables and figures, from the record.

    Args:
        folders: run folders, finished or not, or folders that hold some.
        output: the folder to write to; default: the run folder, or ``report`` for several.
        refresh: seconds after which an open page loads itself again; None: never.

    Returns:
        The page's path.

    Raises:
        StockpotError: if a folder is no run folder, or there is nothing to report yet.
    """
    given = [folders] if isinstance(folders, Path) else list(folders)
    return write_pools(read_pools(given), output, refresh)


def write_pools(
    pools: Sequence[Pool], output: Path | None = None, refresh: int | None = None
) -> Path:
    """The same of records that are read already."""
    if output is None:
        single = len(pools) == 1 and len(pools[0].records) == 1
        output = pools[0].records[0].folder if single else Path("report")
    _make_folder(output)
    for number, pool in enumerate(pools, 1):
        _write_tables(pool, output if len(pools) == 1 else output / f"experiment-{number}")
    page = output / "report.html"
    described = [describe_pool(pool) for pool in pools]
    write_text(page, render_page(described, _last_change(pools), refresh))
    return page


def _make_folder(output: Path) -> None:
    """The folder to write to; refused before anything is drawn.

    Raises:
        StockpotError: if it cannot be made or written to.
    """
    try:
        with space_errors(output):
            output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise StockpotError(
            f"the report cannot be written to {output}: {error.strerror}. Choose another folder "
            "with --output"
        ) from error


def _write_tables(pool: Pool, folder: Path) -> None:
    """``results.md``, ``.csv``, ``.tex`` and ``figures/`` of what is finished."""
    groups, tasks = pool.groups, pool.tasks
    if not groups:
        return
    drawn = folder / "figures"
    with space_errors(drawn):
        drawn.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.md", to_markdown(groups, tasks))
    write_text(folder / "results.csv", to_csv(groups, tasks))
    columns = (*task_columns(groups, tasks), *result_columns(groups))
    write_text(folder / "results.tex", to_latex(groups, columns, tasks))
    _draw(groups, tasks, drawn)


def _draw(groups: Sequence[Group], tasks: Sequence[str], folder: Path) -> None:
    if len(tasks) > 1:
        save_figure(trade_off_plane(groups, tasks), folder, "plane")
    save_figure(accuracy_matrices(groups, tasks), folder, "accuracy_matrix")


def _last_change(pools: Sequence[Pool]) -> str:
    """When the records were last written to."""
    logs = [
        path
        for pool in pools
        for record in pool.records
        for name in ("scores.jsonl", "stages.jsonl", "summary.json", "experiment.json")
        if (path := record.folder / name).exists()
    ]
    latest = max((path.stat().st_mtime for path in logs), default=0.0)
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(latest))


def render_page(
    experiments: Sequence[dict[str, Any]], made: str, refresh: int | None = None
) -> str:
    """The whole page: one file that needs nothing else.

    Args:
        experiments: as :func:`describe_pool` gives them.
        made: when the records were last written to.
        refresh: seconds after which an open page loads itself again.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape
    from markupsafe import Markup

    folder = files("stockpot.report").joinpath("page")

    def part(name: str) -> Markup:
        return Markup(folder.joinpath(name).read_text(encoding="utf-8"))

    template = Environment(
        loader=PackageLoader("stockpot.report", "page"), autoescape=select_autoescape(default=True)
    ).get_template("page.html.jinja")
    names = [experiment["name"] for experiment in experiments]
    return template.render(
        title=names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more",
        style=part("page.css"),
        refresh=refresh,
        plotly=part("plotly-cartesian.min.js"),
        scripts=[part(name) for name in _SCRIPTS],
        data=Markup(
            _inline_json({"experiments": experiments, "made": made, "version": __version__})
        ),
        plain=[table["md"] for experiment in experiments for table in experiment["tables"]],
    )


def _inline_json(value: Any) -> str:
    """JSON that may stand in a script element, whatever names it holds."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
