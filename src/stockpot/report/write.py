"""From a run folder to its table, figures and page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stockpot.errors import DamagedRecordError, StockpotError
from stockpot.files import read_json, read_text, space_errors, write_text
from stockpot.report.figures import accuracy_matrices, save_figure, trade_off_plane
from stockpot.report.findings import headline
from stockpot.report.table import (
    Group,
    group_runs,
    result_columns,
    task_columns,
    to_csv,
    to_markdown,
)

__all__ = ["read_summary", "write_report"]


def write_report(folder: Path) -> Path:
    """Write ``results.md``, ``results.csv``, ``figures/`` and ``report.html`` from the record.

    Returns:
        The page's path.

    Raises:
        StockpotError: if the folder holds no finished run.
        DamagedRecordError: if a file that is needed is missing or damaged.
    """
    if not (folder / "summary.json").exists():
        raise StockpotError(
            f"{folder} holds no summary.json: it is no run folder, or no run of it is finished yet"
        )
    summary = read_summary(folder)
    if not summary:
        raise StockpotError(f"no run in {folder} is finished yet; there is nothing to report")
    groups = group_runs(summary)
    tasks = summary[0]["tasks"]
    write_text(folder / "results.md", to_markdown(groups, tasks))
    write_text(folder / "results.csv", to_csv(groups, tasks))
    drawn = folder / "figures"
    with space_errors(drawn):
        drawn.mkdir(exist_ok=True)
    figures = []
    seeds = max(len(group.runs) for group in groups)
    if len(tasks) > 1:
        save_figure(trade_off_plane(groups, tasks), drawn, "plane")
        caption = (
            "Each point is a method at one setting, mean over seeds; bars are 95 % intervals. "
            "Further up: less forgotten. Further right: more learned. Numbers on a curve are the "
            "values of the setting it runs along."
        )
        figures.append(("Kept against learned", "plane", caption))
    save_figure(accuracy_matrices(groups, tasks), drawn, "accuracy_matrix")
    caption = (
        "Rows: after training through that task. Columns: the task scored. Each method at the "
        "setting with its best average, chosen on the scores shown."
    )
    figures.append(("Score matrices", "accuracy_matrix", caption))
    page = _page(folder, summary, groups, tasks, figures, seeds)
    write_text(folder / "report.html", page)
    return folder / "report.html"


def read_summary(folder: Path) -> list[dict[str, Any]]:
    """The finished runs of a run folder.

    Raises:
        DamagedRecordError: if summary.json is not what this program writes.
    """
    path = folder / "summary.json"
    summary = read_json(path)
    needed = {"method", "label", "settings", "seed", "tasks", "R", "b", "metrics"}
    if not isinstance(summary, list) or any(
        not isinstance(run, dict) or not needed <= run.keys() for run in summary
    ):
        raise DamagedRecordError(
            f"{path} is damaged: it is no list of runs, each with {', '.join(sorted(needed))}. The "
            "`stockpot run` that made the folder writes it again"
        )
    return summary


def _page(
    folder: Path,
    summary: Sequence[dict[str, Any]],
    groups: Sequence[Group],
    tasks: Sequence[str],
    figures: Sequence[tuple[str, str, str]],
    seeds: int,
) -> str:
    from jinja2 import Environment, PackageLoader, select_autoescape
    from markupsafe import Markup

    held = read_json(folder / "experiment.json")
    columns = (*task_columns(groups, tasks), *result_columns(groups))
    template = Environment(
        loader=PackageLoader("stockpot.report", "."), autoescape=select_autoescape(default=True)
    ).get_template("page.html.jinja")
    return template.render(
        name=held["name"],
        stream=f"{held['stream']['name']}, {held['stream'].get('split', '')}".rstrip(", "),
        scenario=held["stream"].get("scenario", ""),
        model=held["model"].get("id") or held["model"].get("factory") or held["model"]["name"],
        tasks=tasks,
        seeds=seeds,
        runs=len(summary),
        planned=held.get("planned", len(summary)),
        answer=headline(groups),
        figures=[
            {
                "title": name,
                "svg": Markup(_svg(folder / "figures" / f"{file}.svg")),
                "caption": text,
            }
            for name, file, text in figures
        ],
        columns=columns,
        rows=[[group.label, *(column.text(group) for column in columns)] for group in groups],
        environment=json.dumps(read_json(folder / "environment.json"), indent=2),
        experiment=read_text(folder / "experiment.yaml"),
    )


def _svg(path: Path) -> str:
    """An SVG's element, without the document's head."""
    text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]
