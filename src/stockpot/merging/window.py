"""A window of units: what one rule must know of it before any of them is merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from stockpot.merging.arrays import Array, ops_for
from stockpot.merging.checkpoint import CheckpointError
from stockpot.merging.formulas import Facts, Part, Rule
from stockpot.merging.plan import Entry
from stockpot.merging.survey import (
    InnerProducts,
    OrderStatistics,
    check_norms,
    kth_smallest_magnitude,
    vectors_of,
)

__all__ = ["Survey", "Unit"]


@dataclass(frozen=True)
class Unit:
    """Elements ``start`` to ``stop`` of one entry."""

    entry: int
    start: int
    stop: int


class Survey:
    """What one rule must know about a window of units."""

    def __init__(self, rule: Rule, entries: Sequence[Entry], units: Sequence[Unit]) -> None:
        self._rule = rule
        self._global = rule.passes_over_whole_model
        numbers = sorted({unit.entry for unit in units})
        floating = [entries[number] for number in numbers if not entries[number].copied]
        self._sizes: dict[str, int] = {}
        self._members: dict[str, set[str]] = {}
        for entry in floating:
            scope = self._scope(entry.name)
            self._sizes[scope] = self._sizes.get(scope, 0) + entry.numel
            self._members.setdefault(scope, set()).add(entry.name)
        self._models = len(floating[0].models) if floating else 0
        self._ranks = {scope: rule.ranks(size) for scope, size in self._sizes.items()}
        self.ranked = any(self._ranks.values())
        self.needed = bool(floating) and (self.ranked or rule.products_of is not None)
        self._samples: dict[tuple[int, str], list[np.ndarray]] = {}
        self._orders: dict[tuple[int, str], OrderStatistics] = {}
        self._products: dict[str, InnerProducts] = {
            scope: InnerProducts() for scope in self._sizes if rule.products_of is not None
        }

    def _scope(self, name: str) -> str:
        return "" if self._global else name

    def elements_of(self, name: str) -> int:
        """Length of the vector that a tensor belongs to."""
        return self._sizes[self._scope(name)]

    def sample(self, part: Part) -> None:
        """Take in some places of a tensor."""
        for model, delta in enumerate(part.deltas()):
            magnitudes = _magnitudes(delta)
            self._samples.setdefault((model, self._scope(part.name)), []).append(magnitudes)

    def begin(self, pool: Executor) -> None:
        """The sample is complete."""

        def order(item: tuple[tuple[int, str], list[np.ndarray]]) -> OrderStatistics:
            (_, scope), parts = item
            sample = np.concatenate(parts)
            return OrderStatistics(self._sizes[scope], self._ranks[scope], sample)

        items = [item for item in self._samples.items() if self._ranks[item[0][1]]]
        self._orders = dict(zip((key for key, _ in items), pool.map(order, items), strict=True))
        self._samples.clear()

    def add(self, part: Part) -> None:
        """Take in a part; every part once, in any order, from any thread."""
        scope = self._scope(part.name)
        if (kind := self._rule.products_of) is not None:
            self._products[scope].add(vectors_of(kind, part), diagonal=kind == "fishers")
        if self._ranks[scope]:
            for model, delta in enumerate(part.deltas()):
                self._orders[model, scope].add(_magnitudes(delta))

    def facts(self, pool: Executor, parts: Callable[[set[str]], Iterator[Part]]) -> Facts:
        """The result; what a sample misjudged is found by reading its tensors again."""
        thresholds = [{scope: list[float]() for scope in self._sizes} for _ in range(self._models)]
        facts = Facts(thresholds, looked=self.needed)
        found = pool.map(lambda key: self._orders[key].result(), self._orders)
        for (model, scope), magnitudes in zip(self._orders, found, strict=True):
            facts.thresholds[model][scope] = (
                self._thresholds(model, scope, parts) if magnitudes is None else magnitudes
            )
        for scope in self._sizes:
            if scope in self._products:
                facts.products[scope] = self._products[scope].matrix(self._models)
                try:
                    check_norms(self._rule, facts.products[scope])
                except ValueError as error:
                    raise CheckpointError(str(error)) from error
        return facts

    def _thresholds(
        self, model: int, scope: str, parts: Callable[[set[str]], Iterator[Part]]
    ) -> list[float]:
        """By radix, which needs no sample but reads two times or more."""

        def vectors() -> Iterator[np.ndarray]:
            for part in parts(self._members[scope]):
                yield _magnitudes(part.models[model] - part.base)

        return [kth_smallest_magnitude(vectors, rank) for rank in self._ranks[scope]]


def _magnitudes(delta: Array) -> np.ndarray:
    magnitudes: np.ndarray = ops_for(delta).to_numpy(abs(delta))
    return magnitudes
