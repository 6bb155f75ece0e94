import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stockpot.errors import StockpotError
from stockpot.evaluation import sandbox as module
from stockpot.evaluation._seccomp import OWN_PID, system_call_filter
from stockpot.evaluation.sandbox import Limits, Sandbox

pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs are run on Unix only")

QUICK = Limits(seconds=0.25, memory_bytes=96 << 20, file_bytes=1 << 20, processes=24)
UNFINISHED = "ended without finishing the tests"


@pytest.fixture(scope="module")
def strongest():
    try:
        return Sandbox.strongest(QUICK)
    except StockpotError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["strongest", "namespaces", "landlock+seccomp"])
def sandbox(request):
    """Each way to isolate by itself, so that one is not hidden behind another."""
    if request.param == "strongest":
        return request.getfixturevalue("strongest")
    found, obstacle = module._working(tuple(request.param.split("+")), QUICK)
    if found is None:
        pytest.skip(f"{request.param} is not allowed here: {obstacle}")
    return found


def patient(sandbox):
    """The same, for programs that should end well, on a busy machine too."""
    return replace(sandbox, limits=Limits(seconds=20))


def children():
    """The processes whose parent this one is, those that ended and were not asked after too."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


class Host:
    """What programs must leave alone, and whether they did."""

    def __init__(self, folder, server, bystander):
        self.folder = folder
        self.server = server
        self.bystander = bystander
        self.outside = folder / "new"
        self.secret = folder / "secret"
        self.secret.write_text("kept")
        for path, mode in ((self.secret, 0o666), (folder, 0o777)):
            path.chmod(mode)
        self.home = Path.home() / f"stockpot-test-{os.getpid()}"
        self.before = self._state()
        self.children = children()

    def _state(self):
        paths = [self.folder, *self.folder.rglob("*")]
        return {path: (path.stat().st_mode, path.is_file() and path.read_bytes()) for path in paths}

    def names(self):
        return {
            "secret": str(self.secret),
            "folder": str(self.folder),
            "outside": str(self.outside),
            "home": str(self.home),
            "port": self.server.getsockname()[1],
            "host": os.getpid(),
            "bystander": self.bystander.pid,
        }

    def assert_untouched(self):
        assert self._state() == self.before
        assert not self.home.exists()
        assert self.bystander.poll() is None
        with pytest.raises(BlockingIOError):
            self.server.accept()
        assert children() <= self.children


@pytest.fixture
def host(tmp_path):
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans become children of this process
    tmp_path.parent.chmod(0o755)
    bystander = subprocess.Popen(["sleep", "60"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield Host(tmp_path, server, bystander)
    bystander.kill()
    bystander.wait()


# Each would pass if it got what it wants. The names of what it wants are set before its first line.
HOSTILE = {
    "forks without end": """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """,
    "threads without end": """
        import _thread, time
        while True:
            try:
                _thread.start_new_thread(time.sleep, (100,))
            except RuntimeError:
                pass
    """,
    "output without end": "while True: print('x' * 10_000)",
    "errors without end": "import sys\nwhile True: sys.stderr.write('x' * 10_000)",
    "loops": "while True: pass",
    "sleeps": "import time\ntime.sleep(1000)",
    "ignores signals": """
        import signal
        for number in signal.valid_signals():
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True:
            try:
                while True: pass
            except BaseException:
                pass
    """,
    "leaves at once": "import os\nos._exit(0)",
    "exits": "import sys\nsys.exit(0)",
    "raises an exit": "raise SystemExit",
    "interrupts itself": "raise KeyboardInterrupt",
    "exits at exit": "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit(0)",
    "aborts": "import os\nos.abort()",
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', port), 1)",
    "sends": """
        import socket
        socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port))
    """,
    "listens to others": """
        import socket
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(chr(0) + "stockpot")
        import os
        os.kill(host, 0)
    """,
    "reads a secret": "open(secret).read()",
    "reads the home": """
        import os
        listed = os.listdir(os.path.dirname(home))
        assert len(listed) > 1, "only the way to Python can be seen"
    """,
    "reads passwords": "open('/etc/shadow').read()",
    "reads another process": "open(f'/proc/{bystander}/environ').read()",
    "writes a secret": "open(secret, 'w').write('x')",
    "truncates a secret": "import os\nos.truncate(secret, 0)",
    "appends to a secret": "open(secret, 'a').write('x')",
    "writes outside": "open(outside, 'w').write('x')",
    "writes at home": "open(home, 'w').write('x')",
    "links": "import os\nos.symlink('/', outside)",
    "makes a folder": "import os\nos.mkdir(outside)",
    "deletes": "import os\nos.remove(secret)",
    "deletes all": "import shutil\nshutil.rmtree(folder)",
    "renames": "import os\nos.rename(secret, outside)",
    "locks away": "import os\nos.chmod(secret, 0)",
    "changes the date": "import os\nos.utime(secret, (0, 0))",
    "changes the library": "import os\nopen(os.__file__, 'a').write('\\n')",
    "takes memory at once": "held = bytearray(1 << 34)",
    "takes memory": "held = []\nwhile True: held.append(bytearray(1 << 20))",
    "fills the disk": """
        while True:
            with open("large", "ab") as file:
                file.write(bytes(1 << 16))
    """,
    "fills the disk with files": """
        number = 0
        while True:
            number += 1
            open(f"small-{number}", "w").close()
    """,
    "leaves a daemon": """
        import os, signal, time
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if os.fork():
            os._exit(0)
        os.setsid()
        if os.fork():
            os._exit(0)
        while True:
            time.sleep(1)
    """,
    "leaves a daemon and waits": """
        import os, time
        if not os.fork():
            os.setsid()
            os.fork()
        while True:
            time.sleep(1)
    """,
    "starts a program": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "closes everything": "import os\nos.closerange(0, 4096)",
    "kills its parent": """
        import os, signal
        os.kill(os.getppid() or host, signal.SIGKILL)
    """,
    "kills its group": """
        import ctypes, os, signal
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(0, number)
        while True: pass
    """,
    "kills everyone": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "kills the test": "import os, signal\nos.kill(host, signal.SIGKILL)",
    "kills by a file": """
        import fcntl, os
        end, _ = os.pipe()
        fcntl.fcntl(end, fcntl.F_SETOWN, bystander)
    """,
    "slows another": "import os\nos.setpriority(os.PRIO_PROCESS, bystander, 10)",
    "limits another": """
        import resource
        resource.prlimit(bystander, resource.RLIMIT_NOFILE, (0, 0))
    """,
    "lifts its limits": """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    """,
    "waits for input": "input()",
    "takes all descriptors": "import os\nheld = [os.pipe() for _ in range(10_000)]",
    "recurses": "def down(): down()\ndown()",
    "recurses without a limit": """
        import sys
        sys.setrecursionlimit(10 ** 9)
        nested = []
        for _ in range(10 ** 7):
            nested = [nested]
        hash(repr(nested))
        def down(): down()
        down()
    """,
    "reads at zero": "import ctypes\nctypes.string_at(0)",
    "is no program": "def (:",
    "is not text for a compiler": "x = '\0'",
    "is nested too deeply": "x = " + "(" * 5000 + ")" * 5000,
    "fails in words that fail": """
        class Silent(Exception):
            def __str__(self):
                raise SystemExit
        raise Silent
    """,
    "prints that it passed": "import os\nprint('started\\npassed', flush=True)\nos._exit(0)",
    "writes that it passed": """
        import os
        for number in range(64):
            for text in (b"passed\\n", b"started\\n", b"True\\n", bytes(32) + b"\\n", b"0" * 64):
                try:
                    os.write(number, text)
                except OSError:
                    pass
        os._exit(0)
    """,
    "echoes what can be read": """
        import os
        seen = []
        for number in range(64):
            try:
                os.set_blocking(number, False)
                seen.append(os.read(number, 1000))
            except OSError:
                pass
        for number in range(64):
            for text in seen:
                for end in (b"", b"\\n"):
                    try:
                        os.write(number, text + end)
                        os.write(number, text.hex().encode() + end)
                    except OSError:
                        pass
        os._exit(0)
    """,
    "calls what is in the frames": """
        import os, sys
        frame = sys._getframe()
        while frame.f_back:
            frame = frame.f_back
            for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
                for arguments in ((), (0,), (3, b"passed")):
                    try:
                        value(*arguments)
                    except BaseException:
                        pass
        raise AssertionError
    """,
    "writes what is in the frames": """
        import gc, os, sys
        found = [value for value in gc.get_objects() if isinstance(value, (dict, list, tuple))]
        frame = sys._getframe()
        while frame:
            found += [frame.f_locals, frame.f_globals]
            frame = frame.f_back
        secrets = set()
        for held in found:
            for value in held.values() if isinstance(held, dict) else held:
                if isinstance(value, bytes) and len(value) in (32, 64):
                    secrets.add(value)
        for number in range(3, 64):
            for secret in secrets:
                try:
                    os.write(number, secret + b"\\n")
                except OSError:
                    break
        os._exit(0)
    """,
    "changes the built-ins": """
        import builtins, hashlib, os, sys
        class Quiet(BaseException):
            pass
        for name in ("AssertionError", "Exception", "BaseException", "SystemExit", "MemoryError"):
            setattr(builtins, name, Quiet)
        builtins.exec = builtins.compile = builtins.type = lambda *rest, **named: None
        hashlib.sha256 = lambda *rest: None
        os.write = os._exit = lambda *rest: None
        sys.excepthook = lambda *rest: None
        assert 1 == 2
    """,
    "changes the modules": """
        import sys, types
        for name in list(sys.modules):
            if name not in ("sys", "builtins"):
                sys.modules[name] = types.ModuleType(name)
        assert False
    """,
    "looks at the main module": """
        import __main__
        assert len(vars(__main__)) > 5
    """,
    "passes in a thread": """
        import _thread, os, time
        def report():
            for number in range(3, 64):
                try:
                    os.write(number, b"passed\\n")
                except OSError:
                    pass
        _thread.start_new_thread(report, ())
        time.sleep(0.05)
        assert False
    """,
}

# These are stopped before any layer comes in: once is enough.
WITHOUT_LAYERS = {
    *("output without end", "errors without end", "loops", "sleeps", "exits", "raises an exit"),
    *("interrupts itself", "exits at exit", "aborts", "takes memory at once", "takes memory"),
    *("takes all descriptors", "recurses", "recurses without a limit", "is no program"),
    *("waits for input", "is not text for a compiler", "is nested too deeply"),
    *("fails in words that fail", "prints that it passed", "changes the modules"),
    *("calls what is in the frames", "writes what is in the frames", "changes the built-ins"),
    *("looks at the main module", "passes in a thread"),
}

REASONS = {
    "loops": {"timed out"},
    "sleeps": {"timed out"},
    "ignores signals": {"timed out"},
    "output without end": {"timed out"},
    "errors without end": {"timed out"},
    "leaves at once": {UNFINISHED},
    "exits": {UNFINISHED},
    "raises an exit": {UNFINISHED},
    "exits at exit": {UNFINISHED},
    "reads at zero": {UNFINISHED},
    "closes everything": {UNFINISHED},
    "prints that it passed": {UNFINISHED},
    "takes memory": {"out of memory"},
    "takes memory at once": {"out of memory"},
    "fails in words that fail": {"failed: an error that cannot be put in words"},
}


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in WITHOUT_LAYERS])
def test_a_hostile_program_is_contained_and_fails(sandbox, host, name):
    contained_and_failed(sandbox, host, name)


@pytest.mark.parametrize("name", sorted(WITHOUT_LAYERS))
def test_a_program_that_does_not_finish_fails(strongest, host, name):
    contained_and_failed(strongest, host, name)


def contained_and_failed(sandbox, host, name):
    given = "".join(f"{key} = {value!r}\n" for key, value in host.names().items())
    begin = time.monotonic()
    outcome = sandbox.run(given + textwrap.dedent(HOSTILE[name]))
    assert time.monotonic() - begin < 10
    assert not outcome.passed
    assert outcome.reason != "passed"
    assert outcome.reason in {*REASONS.get(name, {outcome.reason}), "timed out"}  # a busy machine
    host.assert_untouched()


HARMLESS = {
    "nothing": "",
    "assertions": "assert sum([1, 2]) == 3",
    "the library": """
        import collections, dataclasses, datetime, functools, heapq, itertools, math, random, re
        import hashlib, statistics, string, typing, bisect, operator, copy, json, decimal
        import sqlite3, zlib, zoneinfo
        @dataclasses.dataclass
        class Point:
            x: int
        assert Point(1) == copy.copy(Point(1))
        assert hashlib.md5(b"x").hexdigest().startswith("9dd4")
    """,
    "threads": """
        import threading
        seen = []
        thread = threading.Thread(target=seen.append, args=(1,))
        thread.start()
        thread.join()
        assert seen == [1]
    """,
    "an event loop": """
        import asyncio
        async def wait():
            await asyncio.sleep(0.001)
            return 3
        assert asyncio.run(wait()) == 3
    """,
    "its own signals": """
        import signal
        seen = []
        signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
        signal.raise_signal(signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    """,
    "caught errors": """
        try:
            raise SystemExit
        except BaseException:
            pass
    """,
    "much output": "print('x' * 1_000_000)",
    "no environment": "import os\nassert not os.environ",
    "an unwritten main": "assert __name__ != '__main__'",
    "no shared descriptors": """
        import os
        held = []
        for number in range(64):
            try:
                os.fstat(number)
                held.append(number)
            except OSError:
                pass
        assert len(held) == 5, held
    """,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_program_passes(sandbox, name):
    superuser = os.geteuid() == 0
    if name == "threads" and "namespaces" not in sandbox.layers and not superuser:
        pytest.skip("without namespaces a program has one thread")
    outcome = patient(sandbox).run(textwrap.dedent(HARMLESS[name]))
    assert outcome.passed, outcome
    assert outcome.reason == "passed"


def test_a_program_may_write_into_its_folder_and_nothing_is_left_of_it(sandbox):
    if "namespaces" not in sandbox.layers:
        pytest.skip("without namespaces nothing can be written")
    program = """
        import os, tempfile
        assert os.listdir(".") == []
        with open("left", "w") as file:
            file.write("text")
        with tempfile.TemporaryDirectory() as folder:
            open(os.path.join(folder, "inside"), "w").close()
    """
    for _ in range(2):
        assert (
            Sandbox(sandbox.layers, Limits(20), sandbox.as_nobody)
            .run(textwrap.dedent(program))
            .passed
        )


def test_the_program_ends_with_its_caller(sandbox, host, tmp_path_factory):
    """Even when the caller is killed and cannot clean up."""
    code = f"""
import stockpot.evaluation.sandbox as module
limits = module.Limits(seconds=300)
module.Sandbox({sandbox.layers!r}, limits, {sandbox.as_nobody}).run("while True: pass")
"""
    folder = str(tmp_path_factory.mktemp("left"))
    caller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": folder})
    deadline = time.monotonic() + 30
    while not (inside := _busy(caller.pid)):
        assert time.monotonic() < deadline
        assert caller.poll() is None
        time.sleep(0.02)
    caller.kill()
    caller.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in inside):
        assert time.monotonic() < deadline
        for pid in children() - host.children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def _busy(caller):
    """The caller's descendants, if one of them is running a program."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
            used[int(stat.parent.name)] = int(fields[11])
    found = set()
    for pid in parents:
        above = parents[pid]
        while above in parents and above != caller:
            above = parents[above]
        if above == caller:
            found.add(pid)
    return found if any(used[pid] > 10 for pid in found) else set()


def test_many_programs_keep_their_order_and_report_progress(sandbox):
    programs = [f"assert {number} % 2 == 0, {number}" for number in range(8)]
    seen = []
    outcomes = patient(sandbox).run_many(programs, 3, lambda done, of: seen.append((done, of)))
    assert [outcome.passed for outcome in outcomes] == [number % 2 == 0 for number in range(8)]
    assert outcomes[5].reason == "failed: AssertionError: 5"
    assert seen == [(done, 8) for done in range(1, 9)]
    assert sandbox.run_many([]) == []
    with pytest.raises(StockpotError, match="at least one program"):
        sandbox.run_many(programs, 0)


def test_what_a_program_says_is_made_printable_and_short(sandbox):
    outcome = patient(sandbox).run("raise ValueError('\\x1b[2J\\n\\u202e' + 'x' * 10_000)")
    assert outcome.reason.startswith("failed: ValueError: ?[2J ?xxx")
    assert outcome.reason.isprintable()
    assert len(outcome.reason) < 500
    assert not sandbox.run("raise ValueError('\\udcff')").passed


def test_the_time_is_the_programs_own(sandbox):
    outcome = patient(sandbox).run("import time\ntime.sleep(0.3)")
    assert outcome.passed
    # The clock may start a moment after the program does, on a machine that is busy.
    assert 0.2 <= outcome.seconds < 10


def test_descriptors_and_folders_do_not_pile_up(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for program in ("pass", "import os; os._exit(0)", "while True: pass"):
        sandbox.run(program)
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="levels beyond limits are Linux's")
def test_the_level_is_what_was_reached():
    assert Sandbox(("namespaces", "landlock")).level == "namespaces+landlock"
    assert Sandbox(()).level == "limits"


def test_without_isolation_consent_is_asked_for(monkeypatch):
    monkeypatch.setattr(module, "_STRONGEST_FIRST", ((),))
    with pytest.raises(StockpotError, match=r"no more than limits here.*allow_weak=True"):
        Sandbox.strongest()
    sandbox = Sandbox.strongest(QUICK, allow_weak=True)
    assert sandbox.level == "limits"
    assert sandbox.limits == QUICK
    assert patient(sandbox).run("pass").passed
    for name in ("loops", "leaves at once", "takes memory", "closes everything", "exits at exit"):
        outcome = sandbox.run(textwrap.dedent(HOSTILE[name]))
        assert not outcome.passed
        assert outcome.reason in {*REASONS[name], "timed out"}


def test_what_is_missing_is_said(monkeypatch):
    working = module._working

    def only_limits(layers, limits):
        return (None, "Operation not permitted (unshare)") if layers else working(layers, limits)

    monkeypatch.setattr(module, "_working", only_limits)
    with pytest.raises(StockpotError, match=r"namespaces: Operation not permitted \(unshare\)"):
        Sandbox.strongest()
    monkeypatch.setattr(module, "_working", lambda layers, limits: (None, "no such thing"))
    with pytest.raises(StockpotError, match="no program can be run here"):
        Sandbox.strongest(allow_weak=True)


def test_a_layer_that_fails_later_stops_the_evaluation(sandbox, monkeypatch):
    """No program is run with less than was agreed, and none can pretend that this happened."""
    if "seccomp" not in sandbox.layers:
        pytest.skip("the filter is what is broken here")
    monkeypatch.setattr(module, "system_call_filter", lambda: b"")
    with pytest.raises(StockpotError, match=r"could not be isolated by .* was not run: Invalid"):
        sandbox.run("pass")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seconds": 0}, "above 0 s"),
        ({"seconds": float("nan")}, "above 0 s"),
        ({"memory_bytes": 1000}, "too few for Python"),
        ({"file_bytes": 0}, "at least 4,096 bytes"),
        ({"processes": 0}, "1 process"),
    ],
)
def test_limits_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(StockpotError, match=message):
        Limits(**wrong)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_well_formed(machine):
    """Every jump lands inside, the last statement returns, and the marker is there to replace."""
    code = system_call_filter(machine)
    assert len(code) % 8 == 0
    statements = [code[start : start + 8] for start in range(0, len(code), 8)]
    assert len(statements) < 4096
    for place, statement in enumerate(statements):
        if statement[0] & 7 == 5:  # a jump
            assert place + 1 + max(statement[2], statement[3]) < len(statements)
    assert statements[-1][0] == 6  # a return
    assert code.count(OWN_PID) == 3
    assert system_call_filter("s390x") == b""


def test_an_interrupted_evaluation_stops(sandbox):
    calls = []

    def stop(done, of):
        calls.append(done)
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sandbox.run_many(["pass"] + ["import time; time.sleep(100)"] * 50, 1, stop)
    assert calls == [1]
    assert time.monotonic() - begin < 10


def test_signals_of_the_parent_are_left_as_they_were(sandbox):
    before = signal.getsignal(signal.SIGCHLD)
    sandbox.run("pass")
    assert signal.getsignal(signal.SIGCHLD) == before
