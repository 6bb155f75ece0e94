"""What a rule must know of a whole tensor or model before it merges a part of it.

Order statistics and inner products of vectors that do not fit in memory, exactly, and with the same
bits however the vectors are cut into parts.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stockpot.merging.arrays import Array, Store, ops_for
from stockpot.merging.formulas import Part, Rule

__all__ = [
    "BLOCK",
    "InnerProducts",
    "OrderStatistics",
    "check_norms",
    "kth_smallest_magnitude",
    "sample_places",
    "vectors_of",
]

BLOCK = 4096
"""Elements: parts begin at multiples of it, so that sums are made of the same blocks."""

_SAMPLE = 1 << 15
_LARGEST_SAMPLE = 1 << 22
_RUN = BLOCK  # consecutive elements per place of the sample: one read
_LONG = 1 << 26  # elements: numbers of a bracket are counted by code, not kept
_WIDEST_BRACKET = 1 << 22  # codes, 8 bytes each
_MANY = 1 << 13  # numbers of one part inside a bracket
_DEVIATIONS = 6.0


@dataclass
class InnerProducts:
    """Sums over x_i x_j for all pairs of vectors, exact to the last bit of float64.

    Products are taken in float64 and summed in blocks of `BLOCK` elements, and the blocks
    by `math.fsum`, which does not depend on order.
    """

    sums: dict[tuple[int, int], list[np.ndarray]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, vectors: Sequence[np.ndarray], diagonal: bool = False) -> None:
        """Take in the next part of each vector; parts begin at multiples of `BLOCK`."""
        for i, left in enumerate(vectors):
            for j in (i,) if diagonal else range(i + 1):
                # In float64: a float32 square overflows from 1e19 on, and is 0 below 1e-23.
                sums = _block_sums(left.astype(np.float64) * vectors[j])
                with self._lock:
                    self.sums.setdefault((i, j), []).append(sums)

    def matrix(self, count: int) -> list[list[float]]:
        """The symmetric matrix of inner products."""
        result = [[0.0] * count for _ in range(count)]
        for (i, j), parts in self.sums.items():
            total = math.fsum(number for part in parts for number in part.tolist())
            result[i][j] = result[j][i] = total
        return result


def _block_sums(values: np.ndarray) -> np.ndarray:
    whole = values.size // BLOCK * BLOCK
    sums = values[:whole].reshape(-1, BLOCK).sum(axis=1).astype(np.float64)
    return np.append(sums, np.float64(values[whole:].sum())) if whole < values.size else sums


@dataclass
class _Bracket:
    """Numbers between two bounds: kept one by one, or as counts where a vector is long."""

    low: np.floating[Any]
    high: np.floating[Any]
    below: int = 0
    kept: list[tuple[np.ndarray, np.ndarray | None]] = field(default_factory=list)
    store: Store = field(default_factory=lambda: Store(1 << 14))
    counts: np.ndarray | None = None
    """By code, from that of ``low`` on."""

    def add(self, inside: np.ndarray) -> None:
        """Take in numbers between the bounds."""
        if self.counts is None:
            if inside.size > _MANY:
                # Changes of bfloat16 weights take few values; one may be a third of a tensor.
                values, times = np.unique(inside, return_counts=True)
                self.kept.append((self.store.keep(values), self.store.keep(times)))
            else:
                self.kept.append((self.store.keep(inside), None))
            return
        codes = _codes(inside).astype(np.int64) - int(_codes(self.low))
        values, counts = np.unique(codes, return_counts=True)
        self.counts[values] += counts

    def smallest(self, rank: int) -> float | None:
        """The number of a rank among all, if it is between the bounds."""
        rank -= self.below
        if self.counts is None:
            return self._smallest_kept(rank)
        up_to = np.cumsum(self.counts)
        if not 1 <= rank <= int(up_to[-1]):
            return None
        code = _codes(self.low) + np.searchsorted(up_to, rank).astype(_codes(self.low).dtype)
        return float(code.view(self.low.dtype))

    def _smallest_kept(self, rank: int) -> float | None:
        singles = [values for values, times in self.kept if times is None]
        counted = [(values, times) for values, times in self.kept if times is not None]
        # Few distinct numbers make np.partition ten times slower than a sort.
        numbers = np.concatenate([*singles, *(values for values, _ in counted)] or [np.empty(0)])
        if not counted:
            if not 1 <= rank <= numbers.size:
                return None
            numbers.sort()
            return float(numbers[rank - 1])
        ones = np.ones(sum(values.size for values in singles), np.int64)
        times = np.concatenate([ones, *(times for _, times in counted)])
        order = np.argsort(numbers, kind="stable")
        up_to = np.cumsum(times[order])
        if not 1 <= rank <= int(up_to[-1]):
            return None
        return float(numbers[order[np.searchsorted(up_to, rank)]])


def _codes(numbers: Any) -> Any:
    """Non-negative numbers as integers of their width, which have the same order."""
    return numbers.view(f"i{numbers.dtype.itemsize}")


class OrderStatistics:
    """The k-th smallest magnitude of a vector that is seen in parts, for several k.

    A sample brackets each rank. One pass over all parts then counts what lies below the bracket and
    how often each number inside it occurs: as integers, the codes of non-negative IEEE 754 numbers
    have the order of the numbers, so that a table of counts is a sort. A rank outside its bracket
    (a sample can mislead) is `unresolved`, and the caller falls back to `kth_smallest_magnitude`.

    Args:
        elements: length of the vector.
        ranks: k, from 1.
        sample: some of the magnitudes, float32 or float64.
    """

    def __init__(self, elements: int, ranks: Sequence[int], sample: np.ndarray) -> None:
        self._ranks = tuple(ranks)
        self._elements = elements
        self._lock = threading.Lock()
        self._brackets = [self._bracket(rank, sample) for rank in self._ranks]

    def _bracket(self, rank: int, sample: np.ndarray) -> _Bracket | None:
        if sample.size == 0:
            return None
        share = rank / self._elements
        spread = _DEVIATIONS * math.sqrt(sample.size * max(share * (1 - share), 1 / sample.size))
        complete = sample.size == self._elements
        margin = 1.0 if complete else spread
        low = math.floor(share * sample.size - margin)
        high = math.ceil(share * sample.size + margin)
        places = sorted({min(max(place, 0), sample.size - 1) for place in (low, high)})
        parted = np.partition(sample, places)
        bounds = [parted[places[0]], parted[places[-1]]]
        if low < 0:
            bounds[0] = sample.dtype.type(0.0)
        if high >= sample.size and not complete:
            bounds[1] = sample.dtype.type(np.finfo(sample.dtype).max)
        bracket = _Bracket(bounds[0], bounds[1])
        if self._elements > _LONG:
            width = int(_codes(bracket.high)) - int(_codes(bracket.low)) + 1
            if width > _WIDEST_BRACKET:
                return None
            bracket.counts = np.zeros(width, dtype=np.int64)
        return bracket

    def add(self, magnitudes: np.ndarray) -> None:
        """Take in the next part."""
        for bracket in self._brackets:
            if bracket is None:
                continue
            below = int(np.count_nonzero(magnitudes < bracket.low))
            # By places: numpy takes three times as long to index by a mask.
            among = (magnitudes >= bracket.low) & (magnitudes <= bracket.high)
            inside = magnitudes[np.flatnonzero(among)]
            with self._lock:
                bracket.below += below
                bracket.add(inside)

    def result(self) -> list[float] | None:
        """The magnitudes at the ranks; None if the sample misled."""
        found = []
        for rank, bracket in zip(self._ranks, self._brackets, strict=True):
            value = None if bracket is None else bracket.smallest(rank)
            if value is None:
                return None
            found.append(value)
        return found


def vectors_of(kind: str, part: Part) -> list[np.ndarray]:
    """The vectors whose inner products a rule asks for."""
    vectors: Sequence[Array] = part.models
    if kind != "models":
        vectors = part.fishers if kind == "fishers" else part.deltas()
    return [ops_for(vector).to_numpy(vector) for vector in vectors]


def check_norms(rule: Rule, products: Sequence[Sequence[float]]) -> None:
    """Refuse vectors that have no angle, and Fisher information that has no norm to divide by.

    Raises:
        ValueError: if a product overflows, or all Fisher values of a model are 0.
    """
    if not all(math.isfinite(product) for row in products for product in row):
        raise ValueError("its numbers are too large: their squares overflow float64")
    if rule.products_of == "fishers":
        for i, row in enumerate(products):
            if not math.sqrt(row[i]) > 0.0:
                raise ValueError(
                    f"fishers[{i}]: all values are 0, so that it has no norm; pass normalize=False"
                )


def sample_places(elements: int, whole: int) -> Iterator[tuple[int, int]]:
    """Where to sample a tensor of so many elements, which is part of a vector of `whole`.

    Short runs at equal distances: an even share of every tensor, and the same at every call.
    """
    wanted = min(_LARGEST_SAMPLE, max(_SAMPLE, whole // 64))
    share = math.ceil(wanted * elements / whole) if whole > wanted else elements
    if share >= elements:
        yield 0, elements
        return
    runs = max(1, share // _RUN)
    length = min(_RUN, share)
    for run in range(runs):
        start = (elements - length) * run // max(1, runs - 1)
        yield start, start + length


def kth_smallest_magnitude(vectors: Callable[[], Iterable[np.ndarray]], k: int) -> float:
    """The k-th smallest magnitude (k from 1) of all entries of arrays of one dtype.

    Selects by radix, 16 bits at a time from the top: the bits of non-negative IEEE 754 numbers,
    read as integers, have the order of the numbers. `vectors` is called two times for float32,
    four times for float64, and memory stays that of the largest array, where sorting would need
    several times that of the model.
    """
    prefix = 0
    floating = next(iter(vectors())).dtype
    integer = np.dtype(f"u{floating.itemsize}")
    highest = 8 * floating.itemsize - 16
    for shift in range(highest, -1, -16):
        counts = np.zeros(1 << 16, dtype=np.int64)
        for vector in vectors():
            bits = np.abs(vector).view(integer)
            if shift < highest:
                bits = bits[(bits >> (shift + 16)) == prefix]
            counts += np.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)
        up_to = np.cumsum(counts)
        digit = int(np.searchsorted(up_to, k))
        k -= int(up_to[digit] - counts[digit])
        prefix = (prefix << 16) | digit
    return float(np.array(prefix, integer).view(floating))
