"""Jobs in processes of this machine.

One process, the *nursery*, imports the libraries and reads the data once, and forks a worker for
every job that runs at a time: a worker costs no time to start, and what was read is in memory once.
It does nothing else, so there are no threads and no GPU that a fork would break.

Nothing is left behind: a worker ends when its nursery does, the nursery when the pipe to the
process that started it closes, whatever ended that one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import IO, Any, NoReturn

from stockpot.errors import ConfigError, StockpotError
from stockpot.experiment.jobs import Event, Job, WorkerSettings
from stockpot.experiment.resources import ResourceSettings

__all__ = ["LocalExecutor", "LocalJobs", "Nursery", "cores", "how_it_ended"]

_GRACE_SECONDS = 10.0
"""For workers to end when asked to: trackers say goodbye to their servers."""
_REAP_SECONDS = 0.1
_REMEMBERED = 1000
_START = "from stockpot.experiment.local import _nursery; _nursery()"
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_FORK_SAFE = {
    "TOKENIZERS_PARALLELISM": "false",  # no threads
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # to look for GPUs does not begin to use them
}
_LOADED = "loaded"
_CLOSED = ("StockpotError", "the workers are closed")


class Nursery:
    """The process that workers are forked from; it loads its libraries from the first moment on.

    Raises:
        ConfigError: where there is no fork.
    """

    def __init__(self) -> None:
        if not hasattr(os, "fork"):
            raise ConfigError("--jobs needs a system with fork (Linux, macOS); use --jobs 1")
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the coordinator, which then ends them
                env={**os.environ, **_FORK_SAFE},
            )
        self.connection = Connection(ours.detach())
        assert self._process.stdout is not None
        said = threading.Thread(target=_pass_on, args=(self._process.stdout,), daemon=True)
        said.start()
        self._said = said
        self._closed = False

    def load(self, settings: WorkerSettings) -> None:
        """Have it read the experiment and its data."""
        self.connection.send(settings)

    def fork(self, number: int, environment: Mapping[str, str]) -> Connection:
        """Start a worker; the returned end of the connection is for its jobs and events."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.connection.send((number, dict(environment)))
            send_handle(self.connection, theirs.fileno(), self._process.pid)
        return Connection(ours.detach())

    def exit_code(self) -> int | None:
        """How it ended; None while it lives."""
        return self._process.poll()

    def close(self) -> None:
        """End it and all workers: they are asked first, and killed after a while."""
        if self._closed:
            return
        self._closed = True
        self.connection.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS + 5)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._said.join(1)


def _pass_on(stream: IO[bytes]) -> None:
    """Say on stderr what workers say; what another has said before, once is enough."""
    told: set[bytes] = set()
    for line in stream:
        if len(told) > _REMEMBERED:
            told.clear()
        if line not in told:
            told.add(line)
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(line.decode(errors="replace"))


# In the nursery's process.


def _nursery() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    coordinator = Connection(int(sys.argv[1]))
    workers: dict[int, int] = {}
    try:
        _end_with_parent(signal.SIGTERM, int(sys.argv[2]))
        worker = _load(coordinator)
        while worker is not None:
            if coordinator.poll(_REAP_SECONDS):
                number, environment = coordinator.recv()
                handle = recv_handle(coordinator)
                nursery, pid = os.getpid(), os.fork()
                if not pid:
                    _worker(worker, coordinator, handle, environment, nursery)
                os.close(handle)
                workers[pid] = number
            for pid, code in _ended():
                coordinator.send((workers.pop(pid), code))
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # the coordinator has closed the connection, or is gone
    except BaseException:
        traceback.print_exc()
    finally:
        _end(workers)
        sys.stderr.flush()
        os._exit(0)


def _end_with_parent(how: signal.Signals, parent: int) -> None:
    """Be sent a signal when the parent process is gone, however it ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, int(how), 0, 0, 0)
    if os.getppid() != parent:  # it was gone before that was said
        os.kill(os.getpid(), how)


def _load(coordinator: Connection) -> Any:
    """A worker that has not begun, in this process; None if there can be none."""
    from stockpot.experiment import stages, worker

    import accelerate.utils  # isort: skip
    import torch  # isort: skip

    torch.set_num_threads(1)  # threads would not survive the fork
    del stages
    if not torch.cuda.device_count():
        # Each worker's first training would import DeepSpeed, where it is installed, to ask
        # whether the model is one of its.
        accelerate.utils.extract_model_from_parallel(torch.nn.Identity())
    settings: WorkerSettings = coordinator.recv()
    try:
        made = worker.Worker(settings)
    except StockpotError as error:
        coordinator.send((type(error).__name__, str(error)))
    except Exception as error:
        traceback.print_exc()
        coordinator.send(("StockpotError", f"workers cannot start: {error!r}"))
    else:
        coordinator.send(_LOADED)
        gc.collect()
        gc.freeze()  # what is shared with the workers stays so
        return made
    return None


def _ended() -> list[tuple[int, int]]:
    """The children that have ended since the last call, and how."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    return ended


def _end(workers: dict[int, int]) -> None:
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    while workers and time.monotonic() < deadline:
        for pid, _ in _ended():
            del workers[pid]
        time.sleep(0.02)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)


# In a worker's process.


def _worker(
    worker: Any, nursery: Connection, handle: int, environment: Mapping[str, str], parent: int
) -> NoReturn:
    code = 1
    try:
        nursery.close()
        coordinator = Connection(handle)

        def tell(event: Event) -> None:
            try:
                coordinator.send(event)
            except OSError:
                raise KeyboardInterrupt from None  # nobody is there to hear it

        _end_with_parent(signal.SIGKILL, parent)
        os.environ.update(environment)
        while True:
            worker.work(coordinator.recv(), tell)
    except (EOFError, OSError, KeyboardInterrupt):
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _stop(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


# In the coordinator's process.


@dataclass
class _Hand:
    """A worker as the coordinator sees it."""

    number: int
    slot: int
    connection: Connection
    job: Job | None = None


class LocalExecutor:
    """Runs jobs in processes of this machine.

    Args:
        settings: of the workers.
        jobs: how many run at a time.
        nursery: what workers are forked from, if it was started before.
        places: environment variables of each worker by its number: which GPU is its.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        jobs: int,
        nursery: Nursery | None = None,
        places: Sequence[Mapping[str, str]] = (),
    ) -> None:
        threads = settings.threads or max(1, cores() // jobs)
        self._settings = replace(settings, threads=threads)
        self._jobs, self._places = jobs, places
        self._hands: list[_Hand] = []
        self._codes: dict[int, int] = {}
        self._hired = 0
        self._waiting: list[Event] = []
        self._loaded = False
        self._unusable: tuple[str, str] | None = None
        self._nursery: Nursery | None = nursery or Nursery()
        self._nursery.load(self._settings)

    @property
    def slots(self) -> int:
        """How many jobs may be submitted at a time."""
        return self._jobs

    def submit(self, job: Job) -> None:
        """Give a job to an idle worker, or to a new one."""
        if self._unusable is not None:
            self._waiting.append(_fatal(job, self._unusable))
            return
        hand = next((hand for hand in self._hands if hand.job is None), None) or self._hire()
        hand.job = job
        with contextlib.suppress(OSError):  # it has just died, and will be seen to have
            hand.connection.send(job)

    def events(self, timeout: float) -> Sequence[Event]:
        """What workers have told, and which have died."""
        told, self._waiting = self._waiting, []
        nursery = [] if self._nursery is None else [self._nursery.connection]
        hands = {hand.connection: hand for hand in self._hands}
        for connection in wait([*hands, *nursery], 0 if told else timeout):
            if connection in hands:
                told += self._hear(hands[connection])
            elif self._nursery is not None and self._nursery.connection.poll():
                # Unless a worker's death, which came with it, has taken what it said.
                told += self._hear_nursery()
        return told

    def close(self) -> None:
        """End all workers."""
        nursery, self._nursery, self._unusable = self._nursery, None, _CLOSED
        try:
            if nursery is not None:
                nursery.close()
        finally:
            for hand in self._hands:
                hand.connection.close()
            self._hands = []

    def _hire(self) -> _Hand:
        if self._nursery is None:
            self._nursery = Nursery()
            self._nursery.load(self._settings)
        taken = {hand.slot for hand in self._hands}
        slot = next(slot for slot in range(self._jobs) if slot not in taken)
        self._hired += 1
        place = self._places[slot] if self._places else {}
        hand = _Hand(self._hired, slot, self._nursery.fork(self._hired, place))
        self._hands.append(hand)
        return hand

    def _hear(self, hand: _Hand) -> list[Event]:
        """All that a worker has told; its death, if its connection is broken."""
        told: list[Event] = []
        try:
            while hand.connection.poll():
                event: Event = hand.connection.recv()
                told.append(event)
                if event.kind in ("finished", "failed", "fatal"):
                    hand.job = None
        except (EOFError, OSError):
            hand.connection.close()
            self._hands.remove(hand)
            if hand.job is not None:
                told.append(Event("died", hand.job.run, {}, how_it_ended(self._code(hand.number))))
        return told

    def _code(self, number: int) -> int | None:
        """How a worker ended, as the nursery says it soon; None if that has ended as well."""
        deadline = time.monotonic() + 20 * _REAP_SECONDS
        while number not in self._codes and self._nursery is not None:
            if not self._nursery.connection.poll(max(0.0, deadline - time.monotonic())):
                break
            self._waiting += self._hear_nursery()
        return self._codes.get(number)

    def _hear_nursery(self) -> list[Event]:
        """How workers ended; or that there can be none."""
        assert self._nursery is not None
        try:
            said = self._nursery.connection.recv()
        except (EOFError, OSError):
            nursery, self._nursery = self._nursery, None
            nursery.close()
            if self._loaded:
                return []  # its workers are gone as well, and their jobs can be tried again
            how = how_it_ended(nursery.exit_code())
            said = ("StockpotError", f"the process that workers are made from {how}")
        if said == _LOADED:
            self._loaded = True
        elif isinstance(said[0], int):
            self._codes[said[0]] = said[1]
        else:
            self._unusable = said
            jobs = [hand.job for hand in self._hands if hand.job is not None]
            for hand in self._hands:
                hand.job = None
            return [_fatal(job, said) for job in jobs]
        return []


def _fatal(job: Job, why: tuple[str, str]) -> Event:
    return Event("fatal", job.run, {"type": why[0]}, why[1])


def how_it_ended(code: int | None) -> str:
    """A process's end in words, by its exit code; negative: the signal that killed it."""
    if code is None:
        return "was killed with the process that it was made from"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    memory = ": out of memory?" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code} ({name}){memory}"


def cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class LocalJobs:
    """How many runs at a time on this machine, and on which GPU each."""

    jobs: int
    gpus: tuple[str, ...] = ()
    """``CUDA_VISIBLE_DEVICES`` of each of them; empty: none is set."""
    nursery: Nursery | None = None

    @classmethod
    def of(
        cls,
        jobs: int | None,
        resources: ResourceSettings,
        device: str,
        nursery: Nursery | None = None,
    ) -> LocalJobs:
        """Check a number of jobs, or choose it.

        Args:
            jobs: how many; None: as many as have their CPUs, memory and GPUs here.
            resources: what each is given.
            device: where runs train: cpu, cuda or auto.
            nursery: what workers are forked from, if it was started before.

        Raises:
            ConfigError: if not even one has what it needs.
        """
        if jobs is not None and jobs < 1:
            raise ConfigError(f"--jobs {jobs}: at least one run at a time")
        gpus = [] if device == "cpu" else _visible_gpus()
        if device != "cpu" and not gpus and resources.gpus:
            raise ConfigError(f"resources.gpus = {resources.gpus:g}, and no GPU is found here")
        places = _gpu_places(gpus, resources.gpus) if gpus else ()
        if resources.gpus and jobs is not None:
            jobs = min(jobs, len(places)) if places else jobs
        if jobs is None:
            jobs = len(places) if places else max(1, cores() // resources.cpus)
            if resources.memory_bytes is not None:
                import psutil

                fit = psutil.virtual_memory().available // resources.memory_bytes
                jobs = max(1, min(jobs, int(fit)))
        dealt = tuple(places[number % len(places)] for number in range(jobs)) if places else ()
        return cls(jobs, dealt, nursery)

    def __call__(self, settings: WorkerSettings, resources: ResourceSettings) -> LocalExecutor:
        """The executor."""
        places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in self.gpus]
        return LocalExecutor(settings, self.jobs, self.nursery, places)


def _visible_gpus() -> list[str]:
    """As ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _gpu_places(gpus: Sequence[str], each: float) -> tuple[str, ...]:
    """Which GPUs each run may get; several runs may share one.

    Raises:
        ConfigError: if there are not as many as one run needs.
    """
    if each <= 1:  # dealt in turn: the first runs get a GPU of their own
        return tuple(gpus) * (int(1 / each + 1e-9) if each else 1)
    size = int(each)
    if len(gpus) < size:
        raise ConfigError(f"resources.gpus = {size}, and there are {len(gpus)} here")
    return tuple(
        ",".join(gpus[begin : begin + size]) for begin in range(0, len(gpus) - size + 1, size)
    )
