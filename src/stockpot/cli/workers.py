"""``--jobs`` and ``--on``: where the runs of an experiment are done."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Self

from stockpot.errors import ConfigError
from stockpot.processes import check_one_process

if TYPE_CHECKING:
    from stockpot.experiment import Experiment
    from stockpot.experiment.jobs import MakeExecutor

__all__ = ["Workers"]

_RAY = "ray"


class Workers:
    """What the options ask for, checked before anything is loaded; frees it on leaving.

    Args:
        jobs: a number, or ``auto``.
        on: ``ray``, ``ray://host:port``, or None for this machine.
        begin: whether to begin at once, beside what else is loaded.

    Raises:
        ConfigError: if one cannot be used.
    """

    def __init__(self, jobs: str, on: str | None, begin: bool) -> None:
        if jobs != "auto" and (not jobs.isascii() or not jobs.isdecimal() or not int(jobs)):
            raise ConfigError(f"--jobs {jobs}: give a number from 1 on, or auto")
        self._jobs = None if jobs == "auto" else int(jobs)
        self._ray = None if on is None else _on_ray(on)
        if self._ray is not None or self._jobs != 1:
            check_one_process()
        if self._ray is not None and self._jobs != 1:
            raise ConfigError("--jobs is for this machine; on Ray, resources: says what fits")
        self._nursery = None
        if begin and self._ray is None and self._jobs != 1:
            from stockpot.experiment.local import Nursery

            self._nursery = Nursery()

    def executor(self, experiment: Experiment) -> MakeExecutor | None:
        """Where the runs are done; None: in this process, one after another."""
        if self._ray is not None or self._jobs == 1:
            return self._ray
        from stockpot.experiment.local import LocalJobs

        device = experiment.training.device
        local = LocalJobs.of(self._jobs, experiment.resources, device, self._nursery)
        return local if local.jobs > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._nursery is not None:
            self._nursery.close()


def _on_ray(on: str) -> MakeExecutor:
    if on != _RAY and not on.startswith("ray://"):
        raise ConfigError(f"--on {on}: give ray, or ray://host:port for a cluster that runs")
    if find_spec("ray") is None:
        raise ConfigError("--on ray needs Ray, which is not installed: pip install 'stockpot[ray]'")
    from stockpot.experiment.on_ray import make_executor

    return partial(make_executor, None if on == _RAY else on)
