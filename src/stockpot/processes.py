"""The processes that share one run, as ``torchrun`` or ``accelerate launch`` started them.

Every process runs the same program over the same stream. What must be decided once is decided by
the main process (rank 0) and told to the others; only it writes. With one process all of this
costs nothing and communicates nothing.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Processes", "device_of", "launched", "processes"]

_T = TypeVar("_T")

_TIMEOUT = datetime.timedelta(hours=2)
"""How long processes wait for each other: scoring generated texts is uneven."""


def launched() -> int:
    """How many processes a launcher says there are; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Processes:
    """This process among those that share a run."""

    rank: int = 0
    """Its number, from 0."""
    world: int = 1
    """How many there are."""
    local_rank: int = 0
    """Its number on its machine: which GPU it takes."""

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world > 1

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.several:
            import torch.distributed as dist

            dist.barrier()

    def from_main(self, decide: Callable[[], _T]) -> _T:
        """What ``decide`` gives in the main process, in all of them. The value is pickled.

        An error that it raises in the main process is raised in all.
        """
        if not self.several:
            return decide()
        import torch.distributed as dist

        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = decide()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        value: _T = box[0]
        return value

    def gather(self, value: _T) -> list[_T]:
        """The values of all processes, by rank. They are pickled."""
        if not self.several:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over the processes."""
        if self.several:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def mine(self, items: Sequence[_T]) -> Sequence[_T]:
        """This process's share of ``items``: every ``world``-th from ``rank`` on."""
        return items[self.rank :: self.world]


def processes() -> Processes:
    """Join the processes that a launcher started, once; alone without a launcher."""
    if launched() == 1:
        return Processes()
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group(timeout=_TIMEOUT)
    local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    return Processes(dist.get_rank(), dist.get_world_size(), local)


def device_of(name: str, local_rank: int) -> torch.device:
    """The device of one process: with several GPUs each takes its own."""
    import torch

    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)
