"""The processes that share one run, as ``torchrun`` or ``accelerate launch`` started them.

Every process runs the same program over the same stream. What must be decided once is decided by
the main process (rank 0) and told to the others; only it writes. With one process all of this
costs nothing and communicates nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from stockpot.errors import ConfigError, NonFiniteError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "ALONE",
    "Processes",
    "check_one_process",
    "launched",
    "leave",
    "let_main_end",
    "meeting_place",
    "met_by_all",
    "processes",
    "said_by_main",
]

_T = TypeVar("_T")

_TIMEOUT = datetime.timedelta(days=2)
"""How long processes wait for each other: what one does alone (an evaluation suite, programs that
models wrote) may take long. That one is gone is the launcher's to notice, and it ends the others.
"""

_MAIN_SECONDS = 30.0
"""How far behind the others the main process may be, with an error that all of them meet."""


def launched() -> int:
    """How many processes a launcher says there are; 1 without one.

    Raises:
        ConfigError: if ``WORLD_SIZE`` is no number of processes.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE = {text!r} is no number of processes; unset it")
    return int(text)


def check_one_process() -> None:
    """Refuse several runs at a time where several processes share each.

    Raises:
        ConfigError: if a launcher started several processes.
    """
    if launched() > 1:
        raise ConfigError(
            "several runs at a time (--jobs, --on), each shared by several processes (torchrun, "
            "accelerate launch), do not go together: leave one of them out"
        )


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
            box[1].told_by_main = not self.main
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

            place = meeting_place()
            if place.type == "cpu" or tensor.is_cuda:
                dist.all_reduce(tensor)
            else:
                there = tensor.to(place)
                dist.all_reduce(there)
                tensor.copy_(there)
        return tensor

    def mine(self, items: Sequence[_T]) -> Sequence[_T]:
        """This process's share of ``items``: every ``world``-th from ``rank`` on."""
        return items[self.rank :: self.world]

    def share_size(self, items: int, largest: int) -> int:
        """How many of ``items`` to take at a time so that every process gets something to do."""
        return max(1, min(largest, math.ceil(items / self.world)))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through alone, the others after it: they find its caches."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()


ALONE = Processes()
"""No launcher: this process is all there is."""


def processes() -> Processes:
    """Join the processes that a launcher started, once; alone without a launcher.

    Raises:
        ConfigError: if the environment says that there are others but not how to find them.
    """
    if launched() == 1:
        return ALONE
    import torch.distributed as dist

    if not dist.is_initialized():
        needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if name not in os.environ]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE says that {launched()} processes share this run, but {missing[0]} is "
                "not set. Start it with torchrun or accelerate launch, or unset WORLD_SIZE"
            )
        dist.init_process_group(_backends(), timeout=_TIMEOUT)
    local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    return Processes(dist.get_rank(), dist.get_world_size(), local)


def _backends() -> str:
    """What carries tensors: numbers and objects meet in host memory, weights where they are."""
    import torch
    import torch.distributed as dist

    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return "gloo"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local < torch.cuda.device_count():  # before anything meets on a GPU
        torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def meeting_place() -> torch.device:
    """Where numbers of several processes are summed: in host memory, if something carries them.

    A group that another program made may have a backend for GPUs alone.
    """
    import torch
    import torch.distributed as dist

    if "cpu:" in str(dist.get_backend_config()) or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def let_main_end() -> None:
    """Before a process ends with an error that the main one says: let that one say it and end.

    A launcher ends all others, the main process too, as soon as one has failed; and it ends this
    one when the main process has. This returns after a while if none does: the main process may
    not have met the error, which is then this one's to say.
    """
    time.sleep(_MAIN_SECONDS)


def leave() -> None:
    """Part from the other processes, at the end of a program."""
    if launched() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def met_by_all(error: Exception) -> bool:
    """Whether all processes of a run meet this error, at the same place, and can go on from there.

    Of any other it is not known: those that have not met it would wait for one that has gone on.
    """
    return isinstance(error, NonFiniteError) or hasattr(error, "told_by_main")


def said_by_main(error: Exception) -> bool:
    """Whether the main process meets this error too and says it, so that it is not said twice.

    Before the processes have joined all do the same; afterwards it is known where an error is from.
    """
    if launched() == 1 or os.environ.get("RANK", "0") == "0":
        return False
    dist = sys.modules.get("torch.distributed")
    joined = dist is not None and dist.is_initialized()
    return not joined or getattr(error, "told_by_main", False)
