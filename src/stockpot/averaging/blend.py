"""How two sets of weights become one: per tensor, in place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from stockpot.arithmetic import wide
from stockpot.averaging.anchor import Anchor
from stockpot.averaging.weights import Piece, Weights, find_weights
from stockpot.errors import NonFiniteError

__all__ = ["average_", "blend_", "check_beta", "check_finite"]

# Elements that are worked on at a time: the difference then stays in the processor's cache, so that
# the weights go through memory once.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}


def check_beta(beta: float) -> float:
    """Return ``beta`` if it is a usable share of the anchor.

    Raises:
        ValueError: if ``beta`` is not in [0, 1].
    """
    if not (isinstance(beta, Real) and 0.0 <= beta <= 1.0):
        raise ValueError(
            f"beta = {beta!r} is not in [0, 1]: beta is the anchor's share in each average "
            "(0 keeps the model as it is, 1 puts the anchor back)"
        )
    return float(beta)


@torch.no_grad()
def average_(
    model: nn.Module | Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    beta: float,
    optimizer: object | None = None,
) -> list[str]:
    """``theta <- beta * theta_o + (1 - beta) * theta`` in place (arXiv 2501.05559, Algorithm 1).

    Computed in float32 (float64 for float64 weights) and rounded once to the weight's dtype. beta 0
    and beta 1 are exact.

    Args:
        model: the model (its trainable floating-point parameters are averaged), or named weights.
        anchor: theta_o, by the same names.
        beta: the anchor's share, in [0, 1].
        optimizer: what trains the model; it may hold the true weights (DeepSpeed).

    Returns:
        The names that the anchor lacks, and those of integers; these weights are left alone.

    Raises:
        ValueError: if ``beta`` is not in [0, 1].
        StockpotError: if a shape differs between the model and the anchor.
        NonFiniteError: if a weight or the anchor is not finite; nothing has been written then.
    """
    beta = check_beta(beta)
    anchor = anchor if isinstance(anchor, Anchor) else Anchor(anchor)
    if isinstance(model, nn.Module):
        weights = find_weights(model, optimizer)
        pieces = weights.pieces()
    else:
        weights = Weights(nn.Module())
        pieces = {n: Piece(n, w, w.shape, nn.Parameter(w, False)) for n, w in model.items()}
    once: dict[tuple[int, torch.Size], str] = {}  # two names for one tensor: averaged once
    for name, piece in pieces.items():
        once.setdefault((piece.values.data_ptr() or id(piece), piece.values.shape), name)
    shared = {
        name: piece
        for name, piece in pieces.items()
        if anchor.name_of(piece) is not None and piece.values.is_floating_point()
    }
    different = {name: piece for name, piece in shared.items() if name in once.values()}
    anchor.keep(shared, "disk")  # checks shapes and values
    check_finite(shared, weights)
    blend_(different, anchor, beta)
    weights.publish(shared)
    return [name for name in pieces if name not in shared]


def check_finite(pieces: Mapping[str, Piece], weights: Weights) -> None:
    """Refuse to average a model that has diverged, on every process at once.

    Raises:
        NonFiniteError: naming the first bad weight here.
    """
    # A sum is the fastest look at all values; it overflows before they do, so look again then.
    bad = [
        name
        for name, piece in pieces.items()
        if piece.values.numel()
        and not math.isfinite(float(piece.values.sum()))
        and not bool(torch.isfinite(piece.values).all())
    ]
    (count,) = weights.total([len(bad)])
    if count:
        where = repr(bad[0]) if bad else "a weight of another process"
        raise NonFiniteError(
            f"{where} is not finite: the model has diverged. No weight was changed; lower the "
            "learning rate or go back to a checkpoint."
        )


@torch.no_grad()
def blend_(pieces: Mapping[str, Piece], anchor: Anchor, beta: float) -> tuple[float, float]:
    """Average ``pieces`` with ``anchor``, in place.

    Returns:
        The squared L2 distance of this process's part to the anchor, before and after.
    """
    before = after = 0.0
    scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for piece, values, part in _parts(pieces, anchor):
        first, second = _blend_tensor(values, part, beta, scratch)
        before += first / piece.copies
        after += second / piece.copies
    return before, after


def _parts(pieces: Mapping[str, Piece], anchor: Anchor) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    """Values to write and the anchor's, a part of a tensor at a time if those are on disk."""
    several = [piece for piece in pieces.values() if piece.values.numel()]
    if anchor.on_disk:  # a file is read from its beginning to its end
        order = {name: index for index, name in enumerate(anchor)}
        several.sort(key=lambda piece: order[anchor.name_of(piece) or ""])
    for piece in several:
        for begin, end, part in anchor.parts(piece):
            whole = part.shape == piece.values.shape
            yield piece, piece.values if whole else piece.values.view(-1)[begin:end], part


def _blend_tensor(
    values: Tensor,
    anchor: Tensor,
    beta: float,
    scratch: dict[tuple[torch.device, torch.dtype], Tensor],
) -> tuple[float, float]:
    size = values.numel()
    if values.is_contiguous() and anchor.is_contiguous():
        values, anchor = values.view(-1), anchor.view(-1)
        size = _CHUNK.get(values.device.type, 1 << 26)
    chunks = [(values, anchor)]
    if values.numel() > size:
        chunks = list(zip(values.split(size), anchor.split(size), strict=True))
    precise = values.dtype in (torch.float32, torch.float64)
    before = after = 0.0
    for w, a in chunks:
        if a.device != w.device:
            a = a.to(w.device, non_blocking=True)
        if precise:
            first = _lerp_wide(w, a.to(w.dtype), beta, scratch)
            second = (1.0 - beta) ** 2 * first
        else:
            average = wide(w)
            first = _lerp_wide(average, wide(a), beta, scratch)
            _store(w, average, a, beta)
            second = _squared(wide(w) - wide(a))  # rounding may keep it from moving
        before += first
        after += second
    return before, after


def _store(w: Tensor, average: Tensor, anchor: Tensor, beta: float) -> None:
    if beta == 1.0:
        w.copy_(anchor)
    elif beta:
        w.copy_(average)


def _lerp_wide(
    w: Tensor, a: Tensor, beta: float, scratch: dict[tuple[torch.device, torch.dtype], Tensor]
) -> float:
    """``w <- (1 - beta) w + beta a``, exact at both ends; the squared distance before."""
    key = (w.device, w.dtype)
    if key not in scratch or scratch[key].numel() < w.numel():
        scratch[key] = torch.empty(w.numel(), dtype=w.dtype, device=w.device)
    buffer = scratch[key]
    difference = torch.sub(a, w, out=buffer[: w.numel()].view(w.shape))
    squared = _squared(difference)
    if not math.isfinite(squared):  # the difference, or its square, overflows: go wider
        a64, w64 = a.double(), w.double()
        squared = _squared(a64 / 2 - w64 / 2) * 4
        if 0.0 < beta < 1.0:
            w.copy_((1.0 - beta) * w64 + beta * a64)
            return squared
    if beta == 1.0:
        w.copy_(a)
    elif beta >= 0.5:  # the form that is exact towards the nearer end, as torch.lerp has it
        torch.sub(a, difference, alpha=1.0 - beta, out=w)
    elif beta:
        w.add_(difference, alpha=beta)
    return squared


def _squared(difference: Tensor) -> float:
    if not difference.is_contiguous():
        return float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
    flat = difference.view(-1)
    return float(torch.dot(flat, flat))
