"""The arithmetic that formulas are written in, for numpy arrays and for torch tensors.

Both give the same bits: only operations that IEEE 754 rounds to one result are used (no fused
multiply-add, whose use depends on the processor). Files are merged with numpy, which starts ten
times faster than torch and is no slower at this; torch is for models in memory and for GPUs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["Array", "NumpyOps", "Ops", "Store", "lerp", "not_finite", "ops_for", "weighted_sum"]

Array: TypeAlias = Any
"""A numpy array or a torch tensor, of float32 or float64."""


class Store:
    """Small arrays that stay, in large blocks.

    Among the temporary arrays of a merge, a small one that stays splits the room that a large one
    had: memory grew by a megabyte for each few kilobytes kept.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._free: dict[Any, np.ndarray] = {}

    def keep(self, values: np.ndarray) -> np.ndarray:
        """A copy of ``values``; not for several threads at once."""
        room = self._free.get(values.dtype)
        if room is None or room.size < values.size:
            room = np.empty(max(self._block, values.size), values.dtype)
        kept, self._free[values.dtype] = room[: values.size], room[values.size :]
        kept[:] = values
        return kept


@dataclass
class Election:
    """What TIES elects, coordinate by coordinate."""

    total: Array
    """Sum of the entries that have the elected sign."""
    count: Array
    """Sum of their models' shares; at least the smallest share, where there are none."""
    balance: int
    """Positive minus negative sums."""
    undecided: Array | None
    """Not 0 where a sum is 0 but its entries are not; None if that is nowhere."""


class Ops(Protocol):
    """What the two kinds of arrays do not share by their operators."""

    def keep(self, values: Array, low: float, high: float) -> Array:
        """Entries whose magnitude is in [low, high], the others 0; consumes ``values``."""

    def elect(
        self,
        deltas: Sequence[Array],
        thresholds: Sequence[float],
        shares: Sequence[float],
        majority: int,
    ) -> Election:
        """Trim, elect signs by the sum, add up what agrees with them; consumes ``deltas``.

        Entries of a magnitude below the model's threshold count as 0.
        """

    def larger(self, best: Array, other: Array) -> Array:
        """Per entry the one of larger magnitude, of equals the positive."""

    def masked(self, values: Array, kept: np.ndarray) -> Array:
        """Entries where ``kept``, the others 0; consumes ``values``."""

    def floored(self, values: Array, floor: float) -> Array:
        """max(values, floor)."""

    def to_numpy(self, values: Array) -> np.ndarray:
        """On the CPU."""


class NumpyOps:
    """`Ops` for numpy arrays."""

    def keep(self, values: np.ndarray, low: float, high: float) -> np.ndarray:
        """See `Ops`."""
        magnitudes = np.abs(values)
        kept = magnitudes >= values.dtype.type(low)
        if high < math.inf:
            kept &= magnitudes <= values.dtype.type(high)
        np.multiply(values, kept, out=values)
        return values

    def elect(
        self,
        deltas: Sequence[np.ndarray],
        thresholds: Sequence[float],
        shares: Sequence[float],
        majority: int,
    ) -> Election:
        """See `Ops`; with masks, which take numpy a fraction of what arithmetic does."""
        signs = [
            (delta > 0, delta < 0) if low <= 0.0 else (delta >= low, delta <= -low)
            for delta, low in zip(deltas, map(deltas[0].dtype.type, thresholds), strict=True)
        ]
        sums = np.zeros_like(deltas[0])
        for delta, (above, below), share in zip(deltas, signs, shares, strict=True):
            sums += _scaled(delta * (above | below), share)
        positive = sums > 0
        negative = sums < 0
        balance = int(np.count_nonzero(positive)) - int(np.count_nonzero(negative))
        even = ~(positive | negative)
        if majority > 0:
            positive |= even
        else:
            negative |= even
        total = np.zeros_like(sums)
        # Whole numbers of models are counted in bytes, a quarter of the memory.
        counted = set(shares) == {1.0} and len(shares) < 256
        count = np.zeros_like(sums, dtype=np.uint8 if counted else None)
        for delta, (above, below), share in zip(deltas, signs, shares, strict=True):
            above &= positive
            below &= negative
            above |= below
            total += _scaled(np.multiply(delta, above, out=delta), share)
            count += above if counted else above * sums.dtype.type(share)
        even &= count > 0
        count = np.maximum(count, count.dtype.type(min(shares)))
        count = count.astype(sums.dtype, copy=False)
        return Election(total, count, balance, even if even.any() else None)

    def larger(self, best: np.ndarray, other: np.ndarray) -> np.ndarray:
        """See `Ops`."""
        ours, theirs = np.abs(best), np.abs(other)
        return np.where((theirs > ours) | ((theirs == ours) & (other > best)), other, best)

    def masked(self, values: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """See `Ops`."""
        np.multiply(values, kept, out=values)
        return values

    def floored(self, values: np.ndarray, floor: float) -> np.ndarray:
        """See `Ops`."""
        floored: np.ndarray = np.maximum(values, values.dtype.type(floor))
        return floored

    def to_numpy(self, values: np.ndarray) -> np.ndarray:
        """See `Ops`."""
        return values


def _scaled(values: np.ndarray, share: float) -> np.ndarray:
    if share != 1.0:
        values *= values.dtype.type(share)
    return values


class TorchOps:
    """`Ops` for torch tensors."""

    def keep(self, values: torch.Tensor, low: float, high: float) -> torch.Tensor:
        """See `Ops`."""
        import torch

        shrink = torch.nn.functional.hardshrink
        if high < math.inf:
            values = values.sub_(shrink(values, high))
        if low > 0.0:
            # hardshrink keeps what is greater than its bound: the number before the lowest kept.
            kind: Any = np.float32 if values.dtype == torch.float32 else np.float64
            values = shrink(values, float(np.nextafter(kind(low), kind(0.0))))
        return values

    def elect(
        self,
        deltas: Sequence[torch.Tensor],
        thresholds: Sequence[float],
        shares: Sequence[float],
        majority: int,
    ) -> Election:
        """See `Ops`; in floats, since torch is slow at masks of booleans."""
        import torch

        deltas = [
            self.keep(delta, low, math.inf).mul_(share)
            for delta, low, share in zip(deltas, thresholds, shares, strict=True)
        ]
        sums = functools.reduce(torch.add, deltas)
        sign = sums.sign()
        balance = int(sign.sum(dtype=torch.float64))
        even = 1.0 - sign.abs()
        sign += even if majority > 0 else -even
        total, count = torch.zeros_like(sums), torch.zeros_like(sums)
        for delta, share in zip(deltas, shares, strict=True):
            # |delta| where it has the elected sign; a product with 1 or -1 is exact.
            agreeing = delta.mul_(sign).clamp_(min=0.0)
            total += agreeing
            count += agreeing.sign_().mul_(share)
        undecided = even.mul_(count)
        total *= sign
        return Election(
            total,
            count.clamp_(min=min(shares)),
            balance,
            undecided if float(undecided.sum()) > 0.0 else None,
        )

    def larger(self, best: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """See `Ops`."""
        import torch

        ours, theirs = best.abs(), other.abs()
        return torch.where((theirs > ours) | ((theirs == ours) & (other > best)), other, best)

    def masked(self, values: torch.Tensor, kept: np.ndarray) -> torch.Tensor:
        """See `Ops`."""
        import torch

        return values.mul_(torch.from_numpy(kept).to(values.device))

    def floored(self, values: torch.Tensor, floor: float) -> torch.Tensor:
        """See `Ops`."""
        return values.clamp(min=floor)

    def to_numpy(self, values: torch.Tensor) -> np.ndarray:
        """See `Ops`."""
        array: np.ndarray = values.cpu().numpy()
        return array


@functools.cache
def _ops(numpy: bool) -> Ops:
    return NumpyOps() if numpy else TorchOps()


def ops_for(array: Array) -> Ops:
    """The operations for an array of this kind."""
    return _ops(isinstance(array, np.ndarray))


def weighted_sum(arrays: Sequence[Array], shares: Sequence[float]) -> Array:
    """sum_i share_i array_i, in a new array."""
    total = arrays[0] * shares[0]
    for array, share in zip(arrays[1:], shares[1:], strict=True):
        total += array if share == 1.0 else array * share
    return total


def lerp(start: Array, end: Array, weight: float) -> Array:
    """``(1 - weight) * start + weight * end``; exactly ``start`` at 0 and ``end`` at 1."""
    if weight in (0.0, 1.0):
        return (end if weight else start) * 1.0
    result = end - start
    # From the nearer end, as torch.lerp: monotonous, and exact where both are equal.
    result *= weight if weight < 0.5 else weight - 1.0
    result += start if weight < 0.5 else end
    # The difference may overflow where the mean does not.
    places = not_finite(result)
    if places is not None:
        result[places] = start[places] * (1.0 - weight) + end[places] * weight
    return result


def not_finite(array: Array) -> Array | None:
    """A mask of infinities and NaN; None, at the cost of a sum, if there are none."""
    if math.isfinite(float(array.sum())):
        return None
    return (array - array) != 0
