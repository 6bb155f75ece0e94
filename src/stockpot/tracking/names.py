"""The names under which numbers are logged: the same in every tracker, and for good."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

__all__ = [
    "KL_FROM_ANCHOR",
    "L2_TO_ANCHOR",
    "LEARNING_RATE",
    "LOSS",
    "PEAK_MEMORY",
    "SECONDS",
    "STEP",
    "TASK",
    "before_merge",
    "detail",
    "during",
    "encoded",
    "merge_values",
    "score",
    "summary",
]

STEP = "train/global_step"
"""The step axis, for trackers that want it as a metric; the name that Trainer's callbacks give."""
LOSS = "train/loss"
LEARNING_RATE = "train/learning_rate"
TASK = "train/task"
L2_TO_ANCHOR = "distance/l2_to_anchor"
KL_FROM_ANCHOR = "distance/kl_from_anchor"
SECONDS = "cost/seconds"
PEAK_MEMORY = "cost/peak_memory"

_MERGE = ("beta", "distance_before", "distance_after", "seconds")
_LONGEST = 76
"""Characters of one part of a name, of which there are three at most: MLflow takes 250 in all."""


def encoded(name: str) -> str:
    """A task's name in the characters that every tracker takes: letters, digits, ``_`` and ``-``.

    Every other character becomes a dot and two hexadecimal digits for each byte of its UTF-8, so
    that different names stay different and can be read back: ``a b`` is ``a.20b``, ``v1.0`` is
    ``v1.2e0``. What is then longer than 76 characters keeps 58 of them, two dots and 16 digits of
    its SHA-256.
    """
    safe = re.sub(
        "[^A-Za-z0-9_-]",
        lambda found: "".join(f".{byte:02x}" for byte in found[0].encode("utf-8", "surrogatepass")),
        name,
    )
    if len(safe) <= _LONGEST:
        return safe
    return f"{safe[:58]}..{hashlib.sha256(safe.encode()).hexdigest()[:16]}"


def score(task: str) -> str:
    """A task's entry in R."""
    return f"scores/{encoded(task)}"


def detail(task: str, evaluation: str, metric: str) -> str:
    """One score of a task that has several, or that is no entry in R."""
    return f"detail/{encoded(task)}/{encoded(evaluation)}/{encoded(metric)}"


def during(task: str) -> str:
    """A task's score while another, or itself, trains."""
    return f"during/{encoded(task)}"


def before_merge(task: str) -> str:
    """A task's score just before an average."""
    return f"before_merge/{encoded(task)}"


def summary(metric: str) -> str:
    """A metric of :mod:`stockpot.metrics` over the tasks so far."""
    return f"summary/{metric}"


def merge_values(event: Mapping[str, float]) -> dict[str, float]:
    """What is logged of a merge event, by name."""
    return {f"merge/{key}": float(event[key]) for key in _MERGE if key in event}
