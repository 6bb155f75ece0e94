"""How much each model counts: one number, or numbers by the names of tensors."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Shares"]

# Dividing by a sum of weights that cancel to less than this share of their size multiplies the
# rounding error of float32 until nothing is left of the mean.
_SMALLEST_TOTAL = 1e-6
_LARGEST = 3.4e38  # of float32


@dataclass(frozen=True)
class Shares:
    """One weight per model, and others for tensors whose names match a pattern.

    Patterns are those of the shell (``*.mlp.*``), and the first that matches counts.
    """

    default: tuple[float, ...]
    patterns: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @classmethod
    def make(
        cls,
        weights: Sequence[float] | None,
        models: int,
        patterns: Mapping[str, Sequence[float]] | None = None,
    ) -> Shares:
        """Checked shares; 1 each where no weights are given.

        Raises:
            ValueError: a wrong count, or a number that float32 cannot hold.
        """
        rows = {"weights": [1.0] * models if weights is None else weights}
        rows |= {f"weights of {pattern!r}": row for pattern, row in (patterns or {}).items()}
        checked = []
        for label, row in rows.items():
            numbers = tuple(float(number) for number in row)
            if len(numbers) != models:
                raise ValueError(
                    f"{label}: has {len(numbers)} numbers for {models} models; one per model"
                )
            for i, number in enumerate(numbers):
                if not abs(number) <= _LARGEST:
                    raise ValueError(
                        f"{label}[{i}]: is {number}; give a number that is finite in float32"
                    )
            checked.append(numbers)
        return cls(checked[0], tuple(zip(patterns or {}, checked[1:], strict=True)))

    def of(self, name: str, normalize: bool) -> list[float]:
        """The weights for one tensor, divided by their sum if asked."""
        return list(_resolve(self, name, normalize))

    def check_totals(self) -> None:
        """Refuse weights that cannot be divided by their sum.

        Raises:
            ValueError: if a row sums to (almost) 0.
        """
        for row in self.rows():
            total = math.fsum(row)
            if abs(total) <= _SMALLEST_TOTAL * math.fsum(map(abs, row)):
                raise ValueError(
                    f"weights: {list(row)} sum to {total:g}; normalize needs a sum away from 0"
                )

    def check_one_sign(self) -> None:
        """Refuse weights of both signs, whose sum is no measure of their size.

        Raises:
            ValueError: if a row has both, or is all 0.
        """
        self.check_totals()
        for row in self.rows():
            if min(row) < 0.0 < max(row):
                raise ValueError(
                    f"weights: {list(row)} have both signs, and their sum {math.fsum(row):g} would "
                    "blow the rest up; leave normalize off, as task arithmetic does to forget"
                )

    def check_positive(self) -> None:
        """Refuse weights that a mean over a changing set of models cannot be divided by.

        Raises:
            ValueError: if a weight is 0 or negative.
        """
        for row in self.rows():
            if min(row) <= 0.0:
                raise ValueError(
                    f"weights: {list(row)} are not all above 0; the disjoint mean divides by the "
                    "sum over whichever models agree"
                )

    def rows(self) -> list[tuple[float, ...]]:
        """All sets of weights."""
        return [self.default, *(row for _, row in self.patterns)]

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Patterns that no name matches: most likely misspelt."""
        names = list(names)
        return [pattern for pattern, _ in self.patterns if not fnmatch.filter(names, pattern)]


@lru_cache(maxsize=65536)
def _resolve(shares: Shares, name: str, normalize: bool) -> tuple[float, ...]:
    row = shares.default
    for pattern, candidate in shares.patterns:
        if fnmatch.fnmatchcase(name, pattern):
            row = candidate
            break
    if not normalize:
        return row
    total = math.fsum(row)
    return tuple(share / total for share in row)
