"""Running programs that a model has written, as isolated as this machine allows.

Each program runs in a process of its own: a bare interpreter (``python -I -S -B``) with an empty
environment, nothing to read on its input, its output thrown away, an empty folder to work in, and
hard limits on time, memory and files. Around it are up to three layers, each tried out before it is
relied on:

``namespaces``
    A root folder that holds Python and the shared libraries, read-only, and one small folder in
    memory to write to; no network; no other process to be seen. All of it ends with the program.
``landlock``
    The kernel lets the process open the same files and no others, and no TCP port.
``seccomp``
    The kernel refuses new processes, sockets, signals to others, changes of modes and owners, and
    the system calls through which kernels are attacked.

A machine counts as able to isolate if a prying program could not read or change a file of the user,
reach a port or signal a process. Otherwise only the limits hold and the programs can do what the
user can; then the caller has to say that this will do.

A program has passed if it ran to its last line. It is the program's own process that says so, with
a digest of a key that the caller made up. The exit status counts for nothing, nor does output, and
the key is read from a pipe only at the end, so that ``os._exit(0)``, ``sys.exit(0)``, raised exits,
changed built-ins, writing to every descriptor, and what can be read in frames, modules and files do
not pass. Two things still do. A program written against this module, which reads the key, computes
the digest and writes it: nothing that is judged inside the process it runs in can be proof against
that. And one that makes the tests themselves say yes, by returning what is equal to everything.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from stockpot.errors import StockpotError
from stockpot.evaluation._seccomp import OWN_PID, system_call_filter

__all__ = ["Limits", "Outcome", "Sandbox"]

_CHILD = Path(__file__).with_name("_sandbox_child.py")
_START_SECONDS = 30.0  # for an interpreter on a busy machine; the program's own clock comes after
_LINE_BYTES = 4096
_UNFINISHED = "ended without finishing the tests"

_STRONGEST_FIRST: tuple[tuple[str, ...], ...] = (
    ("namespaces", "landlock", "seccomp"),
    ("namespaces", "seccomp"),
    ("landlock", "seccomp"),
    ("namespaces", "landlock"),
    ("namespaces",),
    ("landlock",),
    ("seccomp",),
    (),
)


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 3.0
    """Wall-clock time, from the program's first line."""
    memory_bytes: int = 1 << 30
    """Address space of each of its processes, at least 64 MiB."""
    file_bytes: int = 16 << 20
    """Size of all files it writes; without namespaces it cannot write any."""
    processes: int = 32
    """Processes and threads together; without namespaces it may have no more than one."""

    def __post_init__(self) -> None:
        """Refuse limits under which no program could run, or that are none."""
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise StockpotError(f"a program needs a time limit above 0 s, not {self.seconds}")
        if self.memory_bytes < 64 << 20:
            raise StockpotError(
                f"{self.memory_bytes:,} bytes of memory are too few for Python: allow at least "
                f"{64 << 20:,}"
            )
        if self.file_bytes < 4096 or self.processes < 1:
            raise StockpotError("allow at least 4,096 bytes of files and 1 process")


@dataclass(frozen=True)
class Outcome:
    """What became of one program."""

    passed: bool
    """Whether it ran to its last line, every test in it included."""
    reason: str
    """``passed``, ``timed out``, ``out of memory``, ``ended without finishing the tests``, or
    ``failed:`` and the error. What the program wrote into it is made printable."""
    seconds: float
    """How long it ran."""


@dataclass(frozen=True)
class Sandbox:
    """A way to run programs with certain layers of isolation; :meth:`strongest` chooses them."""

    layers: tuple[str, ...]
    """Of ``namespaces``, ``landlock`` and ``seccomp``."""
    limits: Limits = field(default_factory=Limits)
    """What each program may use."""
    as_nobody: bool = False
    """Whether the program runs as a user that owns nothing: only the superuser can choose so."""

    @property
    def level(self) -> str:
        """The layers by name, for the record; ``limits`` if there are none."""
        return "+".join(self.layers) or "limits"

    @classmethod
    def strongest(cls, limits: Limits | None = None, allow_weak: bool = False) -> Sandbox:
        """The strongest sandbox that works here: each is tried out, with a program that pries.

        Args:
            limits: what each program may use.
            allow_weak: take one that does not isolate, if no other works.

        Raises:
            StockpotError: if only such a one works and it is not allowed.
        """
        limits = limits or Limits()
        if os.name != "posix":
            raise StockpotError(
                "generated programs can be run on Linux, and on other Unix systems if you trust "
                f"them, but not on {sys.platform}: score this benchmark on such a machine"
            )
        weak: Sandbox | None = None
        obstacles = []
        for layers in _STRONGEST_FIRST if sys.platform == "linux" else ((),):
            sandbox, obstacle = _working(layers, limits)
            if sandbox is not None and not _lets_pry(sandbox):
                return sandbox
            weak = weak or sandbox
            if obstacle and len(layers) == 1:
                obstacles.append(f"{layers[0]}: {obstacle}")
        if weak is not None and allow_weak:
            return weak
        raise StockpotError(_refusal(weak, obstacles))

    def run(self, program: str) -> Outcome:
        """Run one program and say whether it came to its end.

        Raises:
            StockpotError: if it could not be isolated as agreed; it was then not run.
        """
        key = os.urandom(32)
        with _started(self, program, key) as result:
            first, _ = _line(result, time.monotonic() + _START_SECONDS)
            if first != "started":
                raise StockpotError(
                    f"a program could not be isolated by {self.level} and was not run: "
                    f"{first or 'its process ended or did not start in time'}"
                )
            begin = time.monotonic()
            said, late = _line(result, begin + self.limits.seconds)
            seconds = time.monotonic() - begin
        if said == hashlib.sha256(key).hexdigest():
            return Outcome(True, "passed", seconds)
        if late:
            return Outcome(False, "timed out", seconds)
        known = said == "out of memory" or said.startswith("failed: ")
        return Outcome(False, said if known else _UNFINISHED, seconds)

    def run_many(
        self,
        programs: Sequence[str],
        workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Outcome]:
        """Run programs side by side; the outcomes are in the order of the programs.

        Args:
            programs: what to run.
            workers: how many at once; as many as there are usable cores by default. More make
                programs wait for each other, which counts as their time.
            progress: called with the number finished and the number of all, after each.
        """
        if workers is None:
            usable = getattr(os, "sched_getaffinity", None)
            workers = len(usable(0)) if usable else os.cpu_count() or 1
        if workers < 1:
            raise StockpotError(f"at least one program must run at a time, not {workers}")
        with ThreadPoolExecutor(workers, thread_name_prefix="sandbox") as pool:
            futures = [pool.submit(self.run, program) for program in programs]
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    future.result()
                    if progress is not None:
                        progress(done, len(futures))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]


@contextmanager
def _started(sandbox: Sandbox, program: str, key: bytes) -> Iterator[int]:
    """The program's process: where to read what it says. Whatever it started ends with it."""
    key_end, result_end, lifeline_end = os.pipe(), os.pipe(), os.pipe()
    pipes = {*key_end, *result_end, *lifeline_end}

    def close(*ends: int) -> None:
        for end in ends:
            pipes.discard(end)
            os.close(end)

    try:
        with (
            tempfile.TemporaryDirectory(prefix="stockpot-") as folder,
            tempfile.TemporaryFile() as setting,
        ):
            setting.write(json.dumps(_asked(sandbox, program, folder)).encode())
            setting.seek(0)
            os.write(key_end[1], key)
            inherited = [setting.fileno(), key_end[0], result_end[1], lifeline_end[0]]
            process = subprocess.Popen(
                [_interpreter(), "-I", "-S", "-B", _CHILD, *map(str, inherited)],
                env={name: os.environ[name] for name in _LOADER & os.environ.keys()},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=inherited,
                start_new_session=True,
            )
            try:
                close(key_end[0], key_end[1], result_end[1], lifeline_end[0])
                yield result_end[0]
            finally:
                close(lifeline_end[1])
                _end(process, guarded="namespaces" in sandbox.layers)
    finally:
        close(*pipes)


_LOADER = {"LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}
"""What an interpreter may need to start; the program no longer sees it."""


def _interpreter() -> str:
    """Python itself and not a virtual environment's: what lies beside it is what may be read."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _asked(sandbox: Sandbox, program: str, folder: str) -> dict[str, object]:
    limits = sandbox.limits
    return {
        "program": program,
        "layers": sandbox.layers,
        "folder": folder,
        "parent": os.getpid(),
        # one of 500 numbers that no distribution gives to anyone: few share one at a time
        "uid": 60_600 + hash(folder) % 500 if sandbox.as_nobody else None,
        "filter": system_call_filter().hex(),
        "own_pid": OWN_PID.hex(),
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "processes": limits.processes,
    }


def _end(process: subprocess.Popen[bytes], guarded: bool) -> None:
    """End all of the program's processes: with a guard, it does so when its lifeline ends."""
    if guarded:
        try:
            process.wait(timeout=_START_SECONDS)
            return
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.kill()
    process.wait()


def _line(source: int, deadline: float) -> tuple[str, bool]:
    """The next line, made printable, and whether it is late; empty if it does not end."""
    line = b""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    while len(line) < _LINE_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(math.ceil(left * 1000)):
            return "", True
        byte = os.read(source, 1)
        if byte == b"\n":
            text = line.decode("utf-8", "replace")
            return "".join(c if c.isprintable() else "?" for c in text), False
        if not byte:
            break
        line += byte
    return "", False


_HONEST = """
import ctypes, decimal, fractions, threading
assert fractions.Fraction(1, 2) + fractions.Fraction(1, 2) == 1
"""

_PRYING = """
import os, socket
def must_fail(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return
    raise AssertionError(action)
def add(path):
    with open(path, "a") as file:
        file.write("x")
secret, folder, port, process = {places!r}
must_fail(open, secret)
must_fail(os.listdir, folder)
must_fail(add, secret)
must_fail(add, folder + "/new")
must_fail(os.chmod, secret, 0o600)
must_fail(os.remove, secret)
must_fail(socket.create_connection, ("127.0.0.1", port), 1)
must_fail(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port)))
if process != os.getpid():
    must_fail(os.kill, process, 0)
"""


def _working(layers: tuple[str, ...], limits: Limits) -> tuple[Sandbox | None, str]:
    """A sandbox with these layers in which a harmless program runs, or why there is none."""
    if "seccomp" in layers and not system_call_filter():
        return None, f"no filter for {os.uname().machine}"
    patient = replace(limits, seconds=max(limits.seconds, 10.0))
    obstacle = ""
    for as_nobody in (True, False) if os.geteuid() == 0 else (False,):
        sandbox = Sandbox(layers, patient, as_nobody)
        try:
            outcome = sandbox.run(_HONEST)
        except StockpotError as error:
            obstacle = str(error).rpartition("not run: ")[2]
            continue
        if outcome.passed:
            return replace(sandbox, limits=limits), ""
        obstacle = outcome.reason
    return None, obstacle


def _lets_pry(sandbox: Sandbox) -> bool:
    """Whether a program can get at a file, a port or a process of the user's.

    The file is open to all: that the program may run as a user of no rights must not be enough.
    """
    patient = replace(sandbox, limits=replace(sandbox.limits, seconds=10.0))
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        secret = Path(folder, "secret")
        secret.write_text("kept", encoding="utf-8")
        secret.chmod(0o666)
        os.chmod(folder, 0o777)
        places = (str(secret), folder, server.getsockname()[1], os.getpid())
        kept_out = patient.run(_PRYING.format(places=places)).passed
        return not (kept_out and secret.read_text(encoding="utf-8") == "kept")


def _refusal(weak: Sandbox | None, obstacles: list[str]) -> str:
    if weak is None:
        return f"no program can be run here ({'; '.join(obstacles) or 'Python does not start'})"
    found = f" ({'; '.join(obstacles)})" if obstacles else ""
    return (
        f"generated programs would be held by no more than {weak.level} here, and could read and "
        "change your files and use the network. Isolation needs Linux with user namespaces, or "
        f"with Landlock (5.13 or newer) and seccomp{found}. Run where they are allowed, or, if you "
        "trust the programs or the machine holds nothing of worth, allow weak isolation "
        "(allow_weak=True)"
    )
