"""Runs as jobs on Ray: a cluster that is there, or one of this machine for as long as it takes.

Each slot is an actor, a worker process that does one job after another, so that PyTorch and the
data are loaded once. What workers tell goes through a mailbox, an actor of its own: a worker that
dies takes nothing of it along. Ray tries nothing again by itself, the scheduler does.
"""

from __future__ import annotations

import importlib.util
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from stockpot import __version__
from stockpot.errors import ConfigError
from stockpot.experiment.jobs import Event, Executor, Job, WorkerSettings
from stockpot.experiment.ray_cluster import Cluster
from stockpot.experiment.ray_worker import Mailbox, RayWorker
from stockpot.files import NETWORK_SECONDS

if TYPE_CHECKING:
    from stockpot.experiment.resources import ResourceSettings

__all__ = ["make_executor"]

_TOKEN_NAME = ".seen-"
"""Of a file in the record's folder by which workers know that they see that folder."""
_NODES_SECONDS = 5.0
"""How long the size of a cluster is taken to be what it was."""
_PLACE_SECONDS = 30.0
"""How long a worker waits for its place until others that have nothing to do are let go."""
_STOP_SECONDS = 10.0


def make_executor(
    address: str | None, settings: WorkerSettings, resources: ResourceSettings
) -> Executor:
    """Connect to a Ray cluster, or start one on this machine.

    Args:
        address: None or ``auto``: the cluster that ``RAY_ADDRESS`` names, or the one that runs on
            this machine, else a new one, which is stopped by :meth:`Executor.close`. ``local``: a
            new one. ``ray://host:10001``: through Ray's client; ``host:6379``: directly, from a
            machine of the cluster.
        settings: what workers need to know.
        resources: what each job asks for.

    Raises:
        ConfigError: if Ray is not installed, no cluster answers, or no job would ever fit.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--on ray needs Ray, which is not installed: pip install 'stockpot[ray]'")
    asked = _asked(resources)
    return _RayExecutor(Cluster(address), settings, asked)


@dataclass(frozen=True)
class _Running:
    """A job that was submitted."""

    job: Job
    number: int
    """Of the submission: what an earlier try of the same job still tells is not heard."""
    worker: Any


class _RayExecutor:
    """Jobs on actors; see :class:`~stockpot.experiment.jobs.Executor`."""

    def __init__(
        self, cluster: Cluster, settings: WorkerSettings, asked: Mapping[str, float]
    ) -> None:
        import ray

        self._ray, self._cluster = ray, cluster
        self._settings, self._asked = settings, asked
        self._size, self._looked = 0, float("-inf")
        self._idle: list[Any] = []
        self._running: dict[Any, _Running] = {}
        self._starting: dict[Any, float] = {}
        """When each worker was asked for of which nothing has been heard."""
        self._submitted = 0
        self._mailbox: Any = None
        self._taking: Any = None
        for token in settings.folder.glob(f"{_TOKEN_NAME}*"):  # of a process that was killed
            token.unlink(missing_ok=True)
        self._token = settings.folder / f"{_TOKEN_NAME}{uuid.uuid4().hex}"
        self._closed = False
        try:
            self._check_size()
            self._check_device()
            self._token.touch()
            mailbox = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Mailbox)
            self._mailbox = mailbox.remote()
            self._taking = self._mailbox.take.remote()
        except BaseException:
            self.close()
            raise

    def _check_size(self) -> None:
        """Refuse what would wait for ever; another's cluster may still grow."""
        if not self._cluster.own or self.slots:
            return
        (machine,) = self._cluster.nodes()
        lacking = [
            f"{_amount(key, amount)}, and this machine has {_amount(key, machine.get(key, 0.0))}"
            for key, amount in self._asked.items()
            if amount > machine.get(key, 0.0)
        ]
        raise ConfigError(f"no run fits: the resources section asks for {'; '.join(lacking)}")

    def _check_device(self) -> None:
        """Ray hides GPUs from what asks for none: the runs would not be those of a local call."""
        if self._asked["GPU"]:
            return
        have = sum(node.get("GPU", 0.0) for node in self._cluster.nodes())
        training = yaml.safe_load(self._settings.experiment.read_text(encoding="utf-8"))["training"]
        if have and training["device"] != "cpu":
            raise ConfigError(
                f"this Ray cluster has {have:g} GPUs and the runs ask for none: say how many each "
                "is given (resources.gpus=1, or 0.25 to share one), or training.device=cpu"
            )

    @property
    def slots(self) -> int:
        """How many jobs fit into the cluster as it is; others may be using it as well."""
        if time.monotonic() - self._looked > _NODES_SECONDS:
            self._size = sum(self._fit(node) for node in self._cluster.nodes())
            self._looked = time.monotonic()
        # A cluster that has nothing yet may be one that grows when it is asked to.
        return self._size if self._cluster.own else max(1, self._size)

    def _fit(self, node: Mapping[str, float]) -> int:
        return min(
            int(node.get(key, 0.0) / amount + 1e-6) for key, amount in self._asked.items() if amount
        )

    def submit(self, job: Job) -> None:
        """Give a job to a worker that has none, or to a new one, which waits for its place."""
        worker = self._idle.pop() if self._idle else self._hire()
        self._submitted += 1
        ref = worker.work.remote(job, self._submitted)
        self._running[ref] = _Running(job, self._submitted, worker)

    def _hire(self) -> Any:
        actor = self._ray.remote(
            num_cpus=self._asked["CPU"],
            num_gpus=self._asked["GPU"],
            memory=self._asked["memory"],
            max_restarts=0,
            max_task_retries=0,
        )(RayWorker)
        seen = (self._token, NETWORK_SECONDS)
        worker = actor.remote(self._settings, seen, self._mailbox, __version__)
        self._starting[worker.__ray_ready__.remote()] = time.monotonic()
        return worker

    def _make_room(self) -> None:
        """Let idle workers go where others have waited long for a place.

        A cluster that is not ours alone may have less room than its size says.
        """
        if not self._idle or not self._starting or self._cluster.own:
            return
        begun, _ = self._ray.wait(list(self._starting), num_returns=len(self._starting), timeout=0)
        for ref in begun:
            del self._starting[ref]
        late = time.monotonic() - _PLACE_SECONDS
        for since in self._starting.values():
            if self._idle and since < late:
                self._ray.kill(self._idle.pop())

    def events(self, timeout: float) -> Sequence[Event]:
        """What happened since the last call."""
        self._make_room()
        refs = [self._taking, *self._running]
        ready, _ = self._ray.wait(refs, num_returns=1, timeout=timeout)
        if not ready:
            return []
        done = self._finished()
        told = self._take(bool(done)) if done or self._taking in ready else []
        running = {running.number for running in self._running.values()}
        events = [event for number, event in told if number in running]
        return [*events, *(self._end(ref) for ref in done)]

    def _finished(self) -> list[Any]:
        if not self._running:
            return []
        refs = list(self._running)
        done, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        return list(done)

    def _take(self, now: bool) -> list[tuple[int, Event]]:
        """Empty the mailbox; ``now``: whether something is in it or not."""
        if now:
            self._mailbox.put.remote([])
        told: list[tuple[int, Event]] = self._ray.get(self._taking)
        self._taking = self._mailbox.take.remote()
        return told

    def _end(self, ref: Any) -> Event:
        """The last event of a job."""
        running = self._running.pop(ref)
        run = running.job.run
        try:
            last: Event = self._ray.get(ref)
        except self._ray.exceptions.RayError as gone:
            if getattr(gone, "_actor_init_failed", False):
                return Event("fatal", run, {}, _last_line(gone))
            return Event("died", run, {}, _why_gone(gone))
        self._idle.append(running.worker)
        return last

    def close(self) -> None:
        """End all workers; they write nothing more when this returns."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._ray.is_initialized():
                for worker in [*self._idle, *(r.worker for r in self._running.values())]:
                    self._ray.kill(worker)
                if self._running:
                    busy = list(self._running)
                    self._ray.wait(busy, num_returns=len(busy), timeout=_STOP_SECONDS)
                    busy.clear()
                worker = None
                if self._mailbox is not None:
                    if self._taking is not None:  # Ray complains of calls that are cut off
                        self._mailbox.put.remote([])
                        self._ray.wait([self._taking], timeout=_STOP_SECONDS)
                    self._ray.kill(self._mailbox)
        finally:
            # Handles that outlive their session would take away those of the next: it may give the
            # same ids again.
            self._idle, self._running, self._mailbox, self._taking = [], {}, None, None
            self._token.unlink(missing_ok=True)
            self._cluster.close()


def _asked(resources: ResourceSettings) -> dict[str, float]:
    """What each job asks for, as Ray calls it."""
    if resources.gpus > 1:
        raise ConfigError(
            f"resources.gpus = {resources.gpus:g}: on Ray each run is one process, which uses one "
            "GPU. For runs over several GPUs see `stockpot plan --slurm`, or torchrun"
        )
    return {
        "CPU": float(resources.cpus),
        "GPU": float(resources.gpus),
        "memory": float(resources.memory_bytes or 0),
    }


def _amount(key: str, amount: float) -> str:
    return f"{amount / 1e9:.3g} GB of memory" if key == "memory" else f"{amount:g} {key}s"


def _last_line(error: BaseException) -> str:
    """What was said when a worker could not begin, without the way it took through Ray."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1].partition(": ")[2] or lines[-1]


def _why_gone(error: BaseException) -> str:
    """Why a worker is gone, on one line, as the end of a sentence about it."""
    text = " ".join(str(error).split())
    _, found, reason = text.partition("Worker exit detail: ")
    short = (reason if found else text).partition(". ")[0]
    return f"died on Ray (was killed, or out of memory?): {short}"
