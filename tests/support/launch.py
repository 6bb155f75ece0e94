"""Programs started in several processes, as users start them.

Most of what a test of several processes took was once their importing of torch, transformers and
DeepSpeed. They are forked from a process that has imported them; with ``fresh=True`` they are
started as by a user, for what Python's start or a launcher has a say in.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed

__all__ = ["call_in_processes", "call_until_killed", "forking", "launch", "start_module"]

forking = multiprocessing.get_context("forkserver")
"""Where processes come from that need not import what is slow to import."""
forking.set_forkserver_preload(
    [
        "stockpot.cli.app",
        "stockpot.experiment.runner",
        "sklearn.datasets",
        "transformers.trainer",
        # The Trainer asks it, where it is installed, whether the model is one of its.
        "deepspeed",
    ]
)
_GRACE_SECONDS = 30.0
"""For the others to end once one has failed, as torchrun gives them."""


def launch(
    count: int,
    module: str,
    words: Sequence[object] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
    *,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a module in so many processes, to the end.

    Args:
        count: how many; several are a group.
        module: as after ``python -m``.
        words: its arguments.
        environment: what is added to this process's.
        timeout: in seconds.
        fresh: whether they are started from nothing, several of them by torchrun.
    """
    arguments = [module, *map(str, words)]
    within = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    if not fresh:
        return _forked(count, arguments, within, timeout)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [sys.executable, *(torchrun if count > 1 else ()), "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=within,
        check=False,
    )


def call_in_processes(function: Callable[..., None], *arguments: object, count: int = 2) -> None:
    """Call ``function(rank, *arguments)`` in so many processes, which may form a group.

    Raises:
        ProcessRaisedException: what one of them raises.
    """
    with _ranks(count) as ranks:
        torch.multiprocessing.start_processes(
            _call, (function, ranks, arguments), nprocs=count, start_method="forkserver"
        )


def _call(
    rank: int,
    function: Callable[..., None],
    ranks: list[dict[str, str]],
    arguments: tuple[object, ...],
) -> None:
    os.environ.update(ranks[rank])
    _prepare()
    function(rank, *arguments)


def call_until_killed(function: Callable[..., None], *arguments: object) -> None:
    """Call ``function(*arguments)`` in a process of its own, which must end by SIGKILL."""
    process = forking.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, f"it was not killed but ended: {process.exitcode}"


def _forked(
    count: int, arguments: list[str], environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder, _ranks(count) as ranks:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        group = [
            start_module(arguments, {**environment, **rank}, os.getcwd(), *files) for rank in ranks
        ]
        code = _wait_for(group, time.monotonic() + timeout)
        said = [file.read_text(errors="replace") for file in files]
    return subprocess.CompletedProcess(arguments, code, *said)


@contextlib.contextmanager
def _ranks(count: int) -> Iterator[list[dict[str, str]]]:
    """What each process has in its environment; where they meet is kept here, as by torchrun."""
    if count == 1:
        yield [{}]
        return
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    yield [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    del store


def _wait_for(group: list[BaseProcess], deadline: float) -> int:
    """How the processes ended: 0, or that of the first to fail, which ends the others."""
    try:
        while time.monotonic() < deadline:
            multiprocessing.connection.wait([p.sentinel for p in group if p.is_alive()], 1)
            failed = [code for p in group if (code := p.exitcode)]
            if failed:
                return failed[0]
            if not any(p.is_alive() for p in group):
                return 0
        raise TimeoutError("the processes have not ended")
    finally:
        for process in group:
            process.terminate()
        for process in group:
            process.join(_GRACE_SECONDS)
            process.kill()
            process.join()


def start_module(
    arguments: Sequence[str], environment: Mapping[str, str], folder: str, out: Path, err: Path
) -> BaseProcess:
    """Start ``python -m`` with these arguments, all of this environment, and output to files."""
    process = forking.Process(target=_run, args=(arguments, environment, folder, out, err))
    process.start()
    return process


def _run(
    arguments: Sequence[str], environment: Mapping[str, str], folder: str, *said: Path
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(said, start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = list(arguments)
    _prepare()
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


def _prepare() -> None:
    torch.set_num_threads(1)
    if "deepspeed" in sys.modules:
        # On CPUs, and only there, it would compile a reduction of its own for a minute. gloo does.
        sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
