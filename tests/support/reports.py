"""Summaries made up by hand, as what the tables and figures are made from."""

from __future__ import annotations

import hashlib
from typing import Any

Run = dict[str, Any]
T2, T3 = 12.706204736, 4.302652730
"""Student's t, 97.5 %, for two and three seeds: from a printed table."""


def made_up(
    method: str, R: list[list[float] | None], seed: int = 0, settings: Any = None, **metrics: Any
) -> Run:
    """One object of summary.json."""
    given = {} if settings is None else settings
    label = " ".join(
        [method, *(f"{k}={v}" for k, v in given.items() if v is not None and v is not False)]
    )
    last = R[-1]
    assert last is not None
    numbers = {
        "average": sum(last) / len(last),
        "forgetting": 0.125,
        "forgetting_vs_best": 0.25,
        "bwt": -0.125,
        "fwt": -0.0001,
        "l2_to_anchor": 1.5,
        "kl_from_anchor": 0.25,
        "seconds": 2.0,
        "peak_memory": 3_000_000,
        "steps": 7,
    }
    return {
        "run": f"{label}-seed{seed}".replace(" ", "-"),
        "method": method,
        "settings": given,
        "label": label,
        "seed": seed,
        "tasks": [f"task {n}" for n in range(len(R))],
        "R": R,
        "b": [0.1] * len(R),
        "metrics": {**numbers, **metrics},
    }


def two(last: tuple[float, float], before: tuple[float, float] = (0.9, 0.1)) -> Any:
    """R of a stream of two tasks by its rows."""
    return [list(before), list(last)]


def sfa(p: float | None, beta: float, every: int | None = None, **other: Any) -> dict[str, Any]:
    return {"p": p, "every": every, "beta": beta, "protect_base": False, **other}


def point_of(settings: dict[str, Any], method: str = "sfa") -> Run:
    """A run somewhere on the plane; where follows from its settings."""
    digits = int(hashlib.sha256(repr(settings).encode()).hexdigest(), 16)
    return made_up(method, two((digits % 97 / 100, digits % 89 / 100)), settings=settings)


def by_mean(method: str, mean: float, spread: float, seeds: int, settings: Any = None) -> list[Run]:
    """Seeds whose average accuracies have this mean, ``spread`` apart from first to last."""
    offsets = [0.0] if seeds == 1 else [spread * (n / (seeds - 1) - 0.5) for n in range(seeds)]
    return [
        made_up(method, two((mean + o, mean + o)), seed=n, settings=settings)
        for n, o in enumerate(offsets)
    ]
