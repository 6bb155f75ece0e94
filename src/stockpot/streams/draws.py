"""Seeded draws of examples: at most so many, in another order, or held out for tests.

An item's place in a draw is the SHA-256 of the seed and what identifies the item: the same on
every machine and with every version of every library, and a smaller draw is part of a larger one.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

__all__ = ["held_out", "limited", "shuffled"]

_Item = TypeVar("_Item")


def _rank(seed: int, key: Any) -> bytes:
    return hashlib.sha256(f"{seed} {key}".encode()).digest()


def limited(items: Sequence[_Item], limit: int | None, seed: int) -> list[_Item]:
    """At most ``limit`` of the items (None: all), drawn without replacement, in their order."""
    if limit is None or len(items) <= limit:
        return list(items)
    chosen = heapq.nsmallest(limit, range(len(items)), key=lambda number: _rank(seed, number))
    return [items[number] for number in sorted(chosen)]


def shuffled(items: Sequence[_Item], seed: int) -> list[_Item]:
    """The items in an order that the seed decides."""
    order = sorted(range(len(items)), key=lambda number: _rank(seed, number))
    return [items[number] for number in order]


def held_out(
    prompts: Sequence[str],
    count: int,
    seed: int,
    strata: Sequence[Hashable] | None = None,
) -> tuple[list[int], list[int]]:
    """Which rows to train on and which to test on, so that no prompt is in both.

    Args:
        prompts: of each row; rows of one prompt stay together, on one side.
        count: prompts to hold out. The first row of each is tested on; its other rows are neither
            trained nor tested on.
        seed: of the draw.
        strata: of each row, its label for one: each is held out in proportion to its prompts (by
            largest remainders), and at least one of its prompts is trained on.

    Returns:
        Numbers of rows, both in order. Fewer than ``count`` are held out where there are not
        enough prompts, none if all rows have one.
    """
    first: dict[str, int] = {}
    for number, prompt in enumerate(prompts):
        first.setdefault(prompt, number)
    groups: dict[Hashable, list[str]] = {}
    for prompt, number in first.items():
        groups.setdefault(None if strata is None else strata[number], []).append(prompt)
    parts = [groups[key] for key in sorted(groups, key=str)]
    exact = [count * len(part) / len(first) for part in parts]
    sizes = [int(size) for size in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda n: sizes[n] - exact[n])
    for number in by_remainder[: max(0, count - sum(sizes))]:
        sizes[number] += 1
    chosen: set[str] = set()
    for size, part in zip(sizes, parts, strict=True):
        size = min(size, len(part) - 1)
        chosen.update(heapq.nsmallest(size, part, key=lambda prompt: _rank(seed, prompt)))
    test = sorted(first[prompt] for prompt in chosen)
    train = [number for number, prompt in enumerate(prompts) if prompt not in chosen]
    return train, test
