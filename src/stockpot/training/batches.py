"""Which examples of a task make a batch, and the loader that fetches them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

__all__ = ["BatchLoader", "ShuffledBatches", "as_fetched"]

_GROUPED = 50
"""Batches whose examples are sorted by length together: random enough, and little padding."""


class ShuffledBatches(Sampler[Tensor]):
    """Batches of row numbers in an order that follows from the seed and the epoch alone.

    Args:
        examples: how many rows there are.
        batch_size: rows of a batch; the last may have fewer.
        seed: of the order.
        lengths: (examples,) if rows of similar length are to share a batch: of each
            ``_GROUPED`` shuffled batches the rows are sorted by length, and the batches shuffled.
    """

    def __init__(
        self, examples: int, batch_size: int, seed: int, lengths: Tensor | None = None
    ) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.lengths = lengths
        self.drop_last = False
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The order to come is that of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.examples / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.examples, generator=generator)
        if self.lengths is None:
            return iter(order.split(self.batch_size))
        pools = order.split(_GROUPED * self.batch_size)
        grouped = torch.cat([p[self.lengths[p].argsort(stable=True)] for p in pools])
        batches = grouped.split(self.batch_size)
        shuffled = torch.randperm(len(batches), generator=generator)
        return iter([batches[number] for number in shuffled.tolist()])


class BatchLoader(DataLoader[Any]):
    """A data loader over data that is fetched a batch at a time."""

    def set_epoch(self, epoch: int) -> None:
        """The order to come is that of this epoch."""
        sampler = self.batch_sampler
        assert isinstance(sampler, ShuffledBatches)
        sampler.set_epoch(epoch)


def as_fetched(batch: Any) -> Any:
    """A batch is collated by the data set that it came from."""
    return batch
