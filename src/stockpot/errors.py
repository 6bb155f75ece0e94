"""The errors that stockpot raises on purpose: each says what is wrong and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DamagedRecordError",
    "DiskFullError",
    "NonFiniteError",
    "StockpotError",
    "first_line",
    "nearest",
]


class StockpotError(Exception):
    """Something the user can mend; its message is meant to be read without a traceback."""


class CheckpointError(StockpotError):
    """A checkpoint that cannot be read or merged: the message names the file or the tensor."""


class ConfigError(StockpotError):
    """A setting that cannot be used: the message names its place, the reason and the remedy."""


class NonFiniteError(StockpotError):
    """A loss or a weight became NaN or infinite; nothing of it was averaged in or saved."""


class DamagedRecordError(StockpotError):
    """A file of the record is missing, half written or changed since it was written."""


class DiskFullError(StockpotError):
    """A write failed for want of space; what had been finished before is intact."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, on one line: its first, or its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, valid: Iterable[str]) -> str:
    """``" (did you mean 'epochs'?)"``, or the list of valid names when none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else f" (valid: {', '.join(names)})"
