"""Runs as jobs on Ray: a cluster that is there, or one of this machine for as long as it takes.

Each slot is an actor, a worker process that does one job after another, so that PyTorch and the
data are loaded once. What workers tell goes through a mailbox, an actor of its own: a worker that
dies takes nothing of it along. Ray tries nothing again by itself, the scheduler does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stockpot import __version__
from stockpot.errors import ConfigError, StockpotError, first_line
from stockpot.experiment.jobs import Event, Executor, Job, WorkerSettings
from stockpot.files import NETWORK_SECONDS, await_file

if TYPE_CHECKING:
    from stockpot.experiment.resources import ResourceSettings

__all__ = ["make_executor"]

_LAST = ("finished", "failed", "fatal", "died")
_CLIENT = "ray://"
_OBJECT_STORE = 80 * 2**20
"""Bytes; Ray's least is 75 MiB, and nothing of ours goes through it."""
_TOKEN_NAME = ".seen-"
"""Of a file in the record's folder by which workers know that they see that folder."""
_TOKEN = secrets.token_hex(32)
"""Keeps other users of this machine out of a cluster of ours; Ray reads it once per process."""
_NODES_SECONDS = 5.0
"""How long the size of a cluster is taken to be what it was."""
_PLACE_SECONDS = 30.0
"""How long a worker waits for its place until others that have nothing to do are let go."""
_STOP_SECONDS = 10.0
_CONNECT_SECONDS = 10.0
_LONGEST_TEMPORARY = 30
"""Of a folder's path, for Ray's sockets lie below and a socket's path has at most 107 bytes."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # all that Ray itself would print of a worker that died
}


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
    return _RayExecutor(_Cluster(address), settings, asked)


class _Cluster:
    """The connection to Ray, and Ray itself if we started it."""

    def __init__(self, address: str | None) -> None:
        self._undo = contextlib.ExitStack()
        self._undo.enter_context(_environment(_QUIET))
        try:
            self.own = self._connect(_plain(address))
        except BaseException:
            self._undo.close()
            raise

    def _connect(self, address: str | None) -> bool:
        """Whether a cluster was started."""
        import ray

        if ray.is_initialized():  # by the program that called us; it stays as it is
            return False
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        try:
            if address != "local" and (address or _one_runs()):
                _check_answers(address or os.environ.get("RAY_ADDRESS"))
                ray.init(address=address or "auto", **quiet)
                self._undo.callback(ray.shutdown)
                return False
        except (ConnectionError, RuntimeError, ValueError, OSError, ImportError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {address or os.environ.get('RAY_ADDRESS') or 'auto'}: "
                f"{first_line(error)}. Ray's client listens on port 10001 of the head node "
                "(--on ray://HOST:10001); a cluster with a token wants RAY_AUTH_MODE=token; "
                "--on ray://local starts a cluster on this machine"
            ) from error
        self._start(quiet)
        return True

    def _start(self, quiet: Mapping[str, Any]) -> None:
        import ray

        _remove_abandoned()
        folder = _temporary_folder()
        self._undo.callback(shutil.rmtree, folder, ignore_errors=True)
        # Ray asks for a token, and would leave one in the user's home folder.
        ours = {"RAY_AUTH_TOKEN": _TOKEN}
        # As without Ray: a machine that is nearly full is the kernel's business. In containers Ray
        # may take the machine's memory for its own.
        ours |= {"RAY_memory_monitor_refresh_ms": "0"}
        self._undo.callback(_read_environment_anew)
        self._undo.enter_context(_environment(ours))
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
                **quiet,
            )
        except Exception as error:
            raise StockpotError(
                f"Ray does not start on this machine: {first_line(error)}. --jobs N runs N "
                "processes without it"
            ) from error
        self._undo.callback(ray.shutdown)

    def nodes(self) -> list[Mapping[str, float]]:
        """What each machine of the cluster has."""
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def close(self) -> None:
        """Leave the cluster; stop it if it is ours."""
        self._undo.close()


def _plain(address: str | None) -> str | None:
    """``ray://auto`` and ``ray://local`` are no hosts."""
    word = (address or "").removeprefix(_CLIENT)
    if word in ("", "auto"):
        return None
    return word if word == "local" else address


def _check_answers(address: str | None) -> None:
    """Raise OSError if nobody listens; Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix(_CLIENT).rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()


def _one_runs() -> bool:
    """Whether there is a cluster to be used unasked.

    One that another program started for itself alone is none: it ends with that program.
    """
    if os.environ.get("RAY_ADDRESS"):
        return True
    from ray._private.services import find_bootstrap_address

    return find_bootstrap_address(None) is not None


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that are not set, as long as this lasts; Ray's own changes go with them."""
    before = set(os.environ)
    os.environ.update({key: value for key, value in values.items() if key not in before})
    try:
        yield
    finally:
        for key in set(os.environ) - before:
            if key.startswith("RAY_") or key == "PYTHONBREAKPOINT":
                del os.environ[key]


def _read_environment_anew() -> None:
    """Have Ray forget the token of a cluster of ours: nothing of another one would reach us."""
    with contextlib.suppress(AttributeError):  # older versions have no tokens
        from ray import _raylet

        library: Any = _raylet
        library.Config.initialize("")
        library.AuthenticationTokenLoader.instance().reset_cache()


def _temporary_folder() -> Path:
    """A folder for Ray's logs and sockets, named after this process."""
    base = tempfile.gettempdir()
    base = base if len(base) <= _LONGEST_TEMPORARY else "/tmp"
    return Path(tempfile.mkdtemp(prefix=f"stockpot-{os.getpid()}-", dir=base))


def _remove_abandoned() -> None:
    """Delete the folders of processes that were killed."""
    for base in {tempfile.gettempdir(), "/tmp"}:
        for folder in Path(base).glob("stockpot-*-*"):
            with contextlib.suppress(ValueError, PermissionError):
                pid = int(folder.name.split("-")[1])
                try:
                    os.kill(pid, 0)
                except ProcessLookupError:
                    shutil.rmtree(folder, ignore_errors=True)


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
        self, cluster: _Cluster, settings: WorkerSettings, asked: Mapping[str, float]
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
            mailbox = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Mailbox)
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
        )(_Worker)
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


# What runs elsewhere. Classes are sent by name: workers need stockpot as we do.


class _Mailbox:
    """Keeps what workers tell until it is taken."""

    def __init__(self) -> None:
        import asyncio

        self._told: list[Any] = []
        self._some = asyncio.Event()

    async def put(self, told: list[Any]) -> None:
        self._told += told
        self._some.set()

    async def take(self) -> list[Any]:
        """All there is; waits for something, or for an empty letter."""
        await self._some.wait()
        self._some.clear()
        told, self._told = self._told, []
        return told


class _Worker:
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
