"""Where data sets are looked for: the hub, a local folder, or an offline mirror. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path

from stockpot.errors import StockpotError, first_line

__all__ = ["cannot_load", "resolve_source"]


def resolve_source(source: str) -> str:
    """Where to read ``source`` from.

    ``STOCKPOT_DATA`` names an offline mirror: if it holds ``<org>/<name>``, that folder is read
    instead of the hub, by the same code.
    """
    mirror = os.environ.get("STOCKPOT_DATA")
    if mirror and not Path(source).is_absolute() and (Path(mirror) / source).is_dir():
        return str((Path(mirror) / source).resolve())
    return source


def cannot_load(source: str, error: Exception, option: str) -> StockpotError:
    """What to say of a data set that cannot be had; ``option`` is the setting that names it."""
    mirror = os.environ.get("STOCKPOT_DATA")
    return StockpotError(
        f"cannot load the data set {source!r}: {first_line(error)}. It was looked for "
        + (f"under STOCKPOT_DATA={mirror} and " if mirror else "")
        + "on the hub; without a network, set STOCKPOT_DATA to a folder that holds "
        f"{source}/data/*.parquet, or give a local folder as {option}"
    )
