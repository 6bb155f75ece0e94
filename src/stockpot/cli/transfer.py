"""Progress of work that is bound by bytes: a bar with a rate, or a line now and then."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

__all__ = ["transfer_progress"]

_LINE_SECONDS = 5.0
_VERBS = {"survey": "surveying", "merge": "merging", "hash": "hashing"}


@contextlib.contextmanager
def transfer_progress(console: Console) -> Iterator[Callable[[str, int], None]]:
    """A function to tell of ``(phase, bytes)``; a phase of a negative count states its total."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    lock = threading.Lock()
    if console.is_terminal and not console.quiet:
        with Progress(
            TextColumn("{task.description:9}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as bars:
            tasks: dict[str, TaskID] = {}

            def show(phase: str, count: int) -> None:
                with lock:
                    if phase not in tasks:
                        tasks[phase] = bars.add_task(_VERBS.get(phase, phase), total=None)
                    task = tasks[phase]
                if count < 0:
                    bars.update(task, total=-count)
                else:
                    bars.advance(task, count)

            yield show
        return
    began = said = time.monotonic()
    done: dict[str, int] = {}
    totals: dict[str, int] = {}

    def say(phase: str, count: int) -> None:
        nonlocal said
        with lock:
            if count < 0:
                totals[phase] = -count
                return
            done[phase] = done.get(phase, 0) + count
            now = time.monotonic()
            if phase == "hash" or now - said < _LINE_SECONDS:
                return
            said = now
            gigabytes, total = done[phase] / 1e9, totals.get(phase, 0) / 1e9
        of = f" of {total:.2f}" if total else ""
        rate = sum(done.values()) / 1e9 / max(1e-9, now - began)
        console.print(
            f"{_VERBS.get(phase, phase)}: {gigabytes:.2f}{of} GB, {rate:.2f} GB/s, "
            f"{now - began:.0f} s",
            highlight=False,
            soft_wrap=True,
        )

    yield say
