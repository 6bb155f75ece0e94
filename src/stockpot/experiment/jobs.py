"""Runs as jobs: what is asked of a worker, what it tells, and what any place to run them offers.

A job is one run of an experiment, or its first stages. The scheduler decides what runs when; an
:class:`Executor` only knows how to start a job and how to hear of it. Workers write into the
record's folder (each run has a part of its own), so they must see it under the same path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stockpot.evaluation.settings import Programs

__all__ = ["Event", "Executor", "Job", "Told", "WorkerSettings"]


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs to know once, before its first job; plain values, it may be sent away."""

    experiment: Path
    """The resolved ``experiment.yaml`` in the record's folder, as an absolute path."""
    folder: Path
    """The record's folder, as an absolute path."""
    programs: Programs = field(default_factory=Programs)
    threads: int | None = None
    """CPU threads of one run; None: as the experiment says."""
    environment: Mapping[str, str] = field(
        default_factory=lambda: {k: v for k, v in os.environ.items() if k.startswith("STOCKPOT_")}
    )
    """Environment variables to set before anything is loaded."""


@dataclass(frozen=True)
class Job:
    """One run, from its first unfinished stage up to (not including) stage ``until``."""

    run: str
    """Its id in the plan."""
    until: int


@dataclass(frozen=True)
class Event:
    """Something a worker tells while it works; plain values only, so that it can be sent.

    Kinds: ``stage_begins``, ``step``, ``scoring`` and ``stage_ends`` as in the observer, which gets
    ``values`` as arguments; ``finished`` when the job is done; ``failed`` with ``error`` (one line)
    when the run stopped on an error of its own; ``fatal`` with ``error`` when the error concerns
    all runs; ``died`` with ``error`` when the worker is gone (the job may be tried again).
    """

    kind: str
    run: str
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


Told = Callable[[Event], None]
"""How a worker tells."""


class Executor(Protocol):
    """A place where jobs run: processes of this machine, a Ray cluster."""

    @property
    def slots(self) -> int:
        """How many jobs may be submitted at a time; may change as a cluster grows."""
        ...

    def submit(self, job: Job) -> None:
        """Start a job; returns at once."""
        ...

    def events(self, timeout: float) -> Sequence[Event]:
        """What happened since the last call; waits up to ``timeout`` seconds for something.

        Of every submitted job exactly one of finished, failed, fatal and died comes, last.
        """
        ...

    def close(self) -> None:
        """Stop all jobs and free everything; may be called twice."""
        ...
