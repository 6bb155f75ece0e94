"""The number formats of safetensors: which have a mean, and numpy's view of them.

numpy has no bfloat16; its numbers are read as 16-bit integers, the upper halves of float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = [
    "FLOATING",
    "QUANTISED",
    "as_bytes",
    "fits",
    "looks_finite",
    "narrow",
    "stored_as",
    "widen",
]

FLOATING = ("F64", "F32", "BF16", "F16")
QUANTISED = ("F8_E4M3", "F8_E5M2", "F8_E8M0")
"""Codes whose scales are elsewhere: an average of codes means nothing."""

_STORED: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
}


def stored_as(dtype: str) -> Any:
    """The numpy dtype that a floating format is read and written as."""
    return _STORED[dtype]


def as_bytes(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    view: Any = array
    return memoryview(view).cast("B") if array.size else memoryview(b"")


def looks_finite(stored: np.ndarray, dtype: str) -> bool:
    """False if there is NaN or infinity; may be False for sums that overflow."""
    if not stored.size:
        return True
    if dtype in ("BF16", "F16"):
        # Without the sign, codes from that of infinity on are infinity and NaN.
        infinity = 0x7F80 if dtype == "BF16" else 0x7C00
        return int((stored.view(np.uint16) & 0x7FFF).max()) < infinity
    # A sum meets every NaN and infinity at half the cost of a search for them.
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(float(stored.sum()))


def widen(stored: np.ndarray, dtype: str, out: np.ndarray) -> np.ndarray:
    """Numbers of a format into ``out``, float32 or float64, which holds each exactly."""
    if dtype != "BF16":
        np.copyto(out, stored)
    elif out.dtype == np.float32:
        bits = out.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, (stored.astype(np.uint32) << 16).view(np.float32))
    return out


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """Finite numbers in a format, rounded once: to the nearest, half-way to the even one."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(stored_as(dtype), copy=False)
    if values.dtype == np.float64:
        values = _to_odd(values)
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def fits(values: np.ndarray, dtype: str) -> bool:
    """Whether all numbers are finite in a format."""
    # The extremes tell: rounding keeps order, and numpy's pass on NaN.
    extremes = np.array([values.min(), values.max()])
    return bool(np.isfinite(widen(narrow(extremes, dtype), dtype, np.empty(2))).all())


def _to_odd(values: np.ndarray) -> np.ndarray:
    """float64 as float32, inexact ones with an odd last bit: a second rounding is then right."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    inexact = near != values
    # Towards zero, then the last bit set.
    away = np.abs(near.astype(np.float64)) > np.abs(values)
    bits = near.view(np.uint32).copy()
    bits -= away.astype(np.uint32)
    bits |= inexact.astype(np.uint32)
    return bits.view(np.float32)
