"""What runs elsewhere on a Ray cluster: the workers, and the mailbox for what they tell.

Ray sends classes by name, so workers need stockpot as it is here.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from stockpot import __version__
from stockpot.errors import StockpotError, first_line
from stockpot.experiment.jobs import Event, Job, WorkerSettings
from stockpot.files import await_file

__all__ = ["Mailbox", "RayWorker"]

_LAST = ("finished", "failed", "fatal", "died")


class Mailbox:
    """Keeps what workers tell until it is taken."""

    def __init__(self) -> None:
        import asyncio

        self._told: list[Any] = []
        self._some = asyncio.Event()

    async def put(self, told: list[Any]) -> None:
        """Add to what is kept; nothing: an empty letter."""
        self._told += told
        self._some.set()

    async def take(self) -> list[Any]:
        """All there is; waits for something, or for an empty letter."""
        await self._some.wait()
        self._some.clear()
        told, self._told = self._told, []
        return told


class RayWorker:
    """A process that does one job after another."""

    def __init__(
        self, settings: WorkerSettings, seen: tuple[Path, float], mailbox: Any, version: str
    ) -> None:
        if version != __version__:
            raise StockpotError(
                f"this Ray worker has stockpot {__version__}, not {version}; install the same "
                "version on every machine of the cluster"
            )
        _check_seen(*seen)
        self._settings, self._mailbox = settings, mailbox
        self._worker: Any = None

    def work(self, job: Job, number: int) -> Event:
        """Do a job; returns its last event when all others have arrived."""
        import ray

        from stockpot.experiment.worker import Worker

        last: list[Event] = []
        sent: list[Any] = []

        def tell(event: Event) -> None:
            if event.kind in _LAST:
                last.append(event)
            else:
                sent[:] = [self._mailbox.put.remote([(number, event)])]

        try:
            if self._worker is None:
                self._worker = Worker(self._settings)
            self._worker.work(job, tell)
        except Exception as error:
            text = f"{type(error).__name__}: {first_line(error)}"
            last.append(Event("fatal", job.run, {"type": type(error).__name__}, text))
        if sent:
            ray.get(sent)
        return last[0] if last else Event("fatal", job.run, {}, "a worker ended without a word")


def _check_seen(token: Path, seconds: float) -> None:
    """Wait until a file that the scheduler made is seen; network folders may lag behind."""
    if await_file(lambda: token.exists() or None, token.parent, seconds) is None:
        raise StockpotError(
            f"the Ray worker on {socket.gethostname()} does not see the record's folder "
            f"{token.parent}: all machines of the cluster must see it under the same path. "
            "Choose a folder on storage that they share with --output, an absolute path"
        )
