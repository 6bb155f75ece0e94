"""Which rows of a micro-batch each process takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stockpot.processes import Processes
from stockpot.streams.data import TaskData

__all__ = ["Shares"]

_IDLE = "idle"
"""Marks a batch that counts for nothing."""


class Shares:
    """The data as one process sees it: of every batch asked for, its share.

    All processes ask for the same batches, in the same order. One that gets no row of a short
    batch takes the first, which another has as well, with weight 0: all of them have to come to the
    same collectives. (The row's own process finds what is not finite in it, so 0 * NaN is no new
    error.)

    Args:
        data: all of it.
        processes: those that share it.
    """

    def __init__(self, data: TaskData, processes: Processes) -> None:
        self.data, self.processes = data, processes

    def __len__(self) -> int:
        return len(self.data)

    def lengths(self) -> Tensor | None:
        """Of all examples: they decide the batches of all processes."""
        return self.data.lengths()

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Any:
        """This process's share of the batch of these examples."""
        rows = torch.as_tensor(indices)
        mine = rows[self.processes.rank :: self.processes.world]
        if len(mine):
            return self.data.__getitems__(mine)
        return {**self.data.__getitems__(rows[:1]), _IDLE: True}

    @staticmethod
    def counts(batch: dict[str, Any]) -> bool:
        """Whether the batch is a share, and not a row that only keeps this process busy."""
        return _IDLE not in batch

    @staticmethod
    def examples(batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as the learner takes it."""
        return {name: value for name, value in batch.items() if name != _IDLE}
