"""The number formats of safetensors: their sizes, and which of them have a mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["BYTES", "FLOATING", "QUANTISED", "torch_dtype"]

BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
}
FLOATING = ("F64", "F32", "BF16", "F16")
QUANTISED = ("F8_E4M3", "F8_E5M2", "F8_E8M0")
"""Codes whose scales are elsewhere: an average of codes means nothing."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype to read a floating format with.

    Raises:
        KeyError: for a format that is not merged but copied byte by byte.
    """
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
    }[name]
