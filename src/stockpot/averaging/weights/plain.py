"""Weights that are where they seem to be: in the parameters. The other writers build on this."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from stockpot.averaging.weights.names import aliases
from stockpot.processes import meeting_place

__all__ = ["Box", "Piece", "Region", "Span", "Weights"]


@dataclass(frozen=True)
class Span:
    """Elements ``start`` to ``stop`` of the flattened parameter (FSDP1, ZeRO)."""

    start: int
    stop: int


@dataclass(frozen=True)
class Box:
    """A block of the parameter: where it begins and its shape (DTensor: FSDP2, TP)."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


Region = Span | Box


@dataclass(frozen=True, eq=False)
class Piece:
    """What this process holds of one parameter's true values.

    Attributes:
        name: the parameter's plain name.
        values: the true values, detached; an average is written here, in place. Its shape is the
            parameter's, a ``Box``'s, or flat for a ``Span`` (possibly with padding at the end).
        shape: of the whole parameter.
        region: which part of the whole ``values`` is; None for all of it.
        copies: how many processes hold this same part; a sum over processes divides by it.
        parameter: the parameter of the model.
        also: other names under which a checkpoint may have it.
        key: what the optimizer files this piece's state under; None if it has none of its own.
    """

    name: str
    values: Tensor
    shape: torch.Size
    parameter: nn.Parameter
    region: Region | None = None
    copies: int = 1
    also: tuple[str, ...] = ()
    key: Tensor | None = None


class Weights:
    """Where a model's true weights live, and how to write them so that they stay written.

    This class writes plain parameters: float32, pure bf16 and fp16, autocast with and without
    GradScaler, DDP (every process does the same). A subclass overrides :meth:`_find` and, where the
    forward pass reads another copy, :meth:`publish` and :meth:`live`.
    """

    kind: ClassVar[str] = "plain"
    distributed: ClassVar[bool] = False
    """Whether processes hold different parts, so that sums are taken over all of them."""

    def __init__(self, model: nn.Module, optimizer: object | None = None) -> None:
        self.model = model
        self.optimizer = optimizer

    def pieces(self) -> dict[str, Piece]:
        """The true weights now. Ask again after each step: a trainer may move them."""
        return {piece.name: piece for piece in self._find()}

    def _find(self) -> Iterator[Piece]:
        for parameter, names in aliases(self.model).items():
            if parameter.requires_grad and parameter.is_floating_point():
                yield Piece(
                    names[0],
                    parameter.detach(),
                    parameter.shape,
                    parameter,
                    also=names,
                    key=parameter,
                )

    def publish(self, pieces: Mapping[str, Piece]) -> None:
        """Bring what was written into ``pieces`` to where forward passes read it."""

    def live(self, piece: Piece) -> Tensor:
        """What the next forward pass will read of ``piece``; the shape of ``piece.values``."""
        return piece.parameter.detach()

    def reset_moments(self, pieces: Mapping[str, Piece], factor: float) -> bool:
        """Scale the optimizer's state where it is not filed under the parameters.

        Args:
            pieces: those that were averaged.
            factor: 0 forgets all state; any other factor scales the first moments.

        Returns:
            False if this writer has nothing special to do, and the caller should do it.
        """
        return False

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, where they hold different parts. No weights travel."""
        import torch.distributed as dist

        if not (self.distributed and dist.is_available() and dist.is_initialized()):
            return list(values)
        sums = torch.tensor(list(values), dtype=torch.float64, device=meeting_place())
        dist.all_reduce(sums)
        return [float(value) for value in sums]


def numel(shape: Sequence[int]) -> int:
    """How many elements a tensor of this shape has."""
    return math.prod(shape)
