"""Element-wise arithmetic that averaging and merging share: computed wide, rounded once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["fingerprint", "is_finite", "l2_distance", "lerp", "wide"]


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in the precision to compute in: float64 stays, every other float is float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """``(1 - weight) * start + weight * end`` in ``start``'s dtype, rounded once.

    Weight 0 gives ``start`` and 1 gives ``end``, bit for bit (if ``end`` has the same dtype).
    """
    # torch.lerp is exact at its ends but for the sign of zero and differences that overflow.
    if weight == 0.0:
        return start.clone()
    if weight == 1.0:
        return end.to(start.dtype, copy=True)
    left = wide(start)
    right = end.to(left.dtype)  # torch.lerp needs one dtype
    middle = torch.lerp(left, right, weight)
    if not is_finite(middle):  # it takes end - start, which may overflow where the mean does not
        middle = (1.0 - weight) * left + weight * right
    return middle.to(start.dtype)


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor infinity."""
    if tensor.numel() == 0:
        return True
    # Unlike torch.isfinite, this needs no memory; aminmax propagates NaN.
    return all(math.isfinite(bound) for bound in torch.aminmax(tensor.detach()))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: equal if and only if the tensors are."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def l2_distance(left: Iterable[Tensor], right: Iterable[Tensor]) -> float:
    """``||left - right||_2`` over all tensors together, accumulated in float64."""
    total = 0.0
    for a, b in zip(left, right, strict=True):
        difference = wide(a.detach()) - b.detach().to(a.device)
        total += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
    return math.sqrt(total)
