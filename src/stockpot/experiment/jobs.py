"""Runs as jobs: what is asked of a worker, what it tells, and what any place to run them offers.

A job is one run of an experiment, or its first stages. The scheduler decides what runs when; an
:class:`Executor` only knows how to start a job and how to hear of it. Workers write into the
record's folder (each run has a part of its own), so they must see it under the same path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stockpot.evaluation.settings import Programs
from stockpot.experiment.resources import ResourceSettings

__all__ = ["Event", "Executor", "Job", "MakeExecutor", "Told", "WorkerSettings"]


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
    directory: Path = field(default_factory=Path.cwd)
    """Where relative paths of the experiment begin; a worker goes there if it can."""
    modules: tuple[str, ...] = field(default_factory=lambda: tuple(sys.path))
    """Where a model of the user's own may be imported from."""
    share_prefixes: bool = True
    """Whether runs that agree up to a task train it once."""


@dataclass(frozen=True)
class Job:
    """One run, from its first unfinished stage up to (not including) stage ``until``."""

    run: str
    """Its id in the plan."""
    until: int
    finished: tuple[Mapping[str, Any], ...] = ()
    """The lines of ``stages.jsonl`` of its finished stages: a worker need not read the log."""


@dataclass(frozen=True)
class Event:
    """Something a worker tells while it works; plain values only, so that it can be sent.

    Kinds, with their ``values``:

    - ``stage_begins``: ``stage``, its number.
    - ``step``: ``step``, ``loss`` (or None), ``merges`` (merge events since the last that was
      told). A few a second are told.
    - ``scoring``: ``what``, ``done``, ``total``. A few a second are told.
    - ``stage_ends``: ``stage``, ``trained``, ``merges`` as above, ``row`` (the fields of a
      :class:`~stockpot.experiment.observer.Row`). The stage is in the run's journal by then.
    - ``finished``: the job is done.
    - ``failed`` with ``error``: the run stopped on an error of its own.
    - ``fatal`` with ``error``: the error concerns all runs; ``type`` is the name of its class.
    - ``died`` with ``error``: the worker is gone; the job may be tried again.
    """

    kind: str
    run: str
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


Told = Callable[[Event], None]
"""How a worker tells."""


MakeExecutor = Callable[[WorkerSettings, ResourceSettings], "Executor"]
"""Where jobs run, before it is known which."""


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
