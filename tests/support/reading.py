"""What a report reads from a run folder, and all numbers in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stockpot.report.document import describe_pool
from stockpot.report.pooling import Pool
from stockpot.report.write import read_pools, render_page

SFA = "sfa-p=0.25-beta=0.5-seed0"
LOGS = ("scores", "stages", "merges", "curves", "lines")
MAPPINGS = ("experiment", "environment", "plan", "summary")


def report(folder: Path) -> tuple[Pool, dict[str, Any]]:
    """What the page is made from, which must be plain JSON that UTF-8 can hold."""
    (pool,) = read_pools([folder])
    document = describe_pool(pool)
    json.dumps(document, allow_nan=False, ensure_ascii=False).encode()
    return pool, document


def numbers(pool: Pool) -> dict[str, Any]:
    """All numbers of every run."""
    keys = ("R", "b", "metrics", "trained", "merges", "curves", "lines", "scores", "finished")
    return {run["run"]: {key: run[key] for key in keys} for run in pool.runs}


def write_page(*folders: Path) -> Path:
    """The page alone, beside the first folder, without the tables and figures for papers."""
    page = folders[0].with_suffix(".html")
    documents = [describe_pool(pool) for pool in read_pools(folders)]
    page.write_text(render_page(documents, "now"), encoding="utf-8")
    return page
