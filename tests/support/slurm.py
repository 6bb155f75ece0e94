"""A small Slurm: ``sbatch`` on the PATH, and what its controller then does with real processes.

Of the real thing it has job arrays, dependencies, ``#SBATCH`` lines, output files, and that options
it does not know are refused. Nothing runs before :meth:`Slurm.run_all`. The ``python -m stockpot``
of a job is forked from a process that has imported the libraries (:mod:`support.launch`) and ends
when the job is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path

_PYTHON = f"""#!{sys.executable}
import os, sys
from multiprocessing.connection import Client

if sys.argv[1:3] != ["-m", "stockpot"]:
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
with Client(os.environ["SLURM_EMULATION_PYTHON"]) as server:
    server.send((sys.argv[2:], dict(os.environ), os.getcwd()))
    code = server.recv()
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
_OPTIONS = (
    "job-name", "nodes", "ntasks", "cpus-per-task", "gres", "mem", "partition", "time", "account",
    "qos", "array", "dependency", "kill-on-invalid-dep", "output",
)  # fmt: skip


def _sbatch() -> None:
    """Be ``sbatch``: check, keep and number a job."""
    parser = argparse.ArgumentParser("sbatch", allow_abbrev=False)
    parser.add_argument("--parsable", action="store_true")
    for name in _OPTIONS:
        parser.add_argument(f"--{name}")
    parser.add_argument("script", nargs="?")
    given = parser.parse_args()
    script = sys.stdin.read() if given.script is None else Path(given.script).read_text()
    if not script.startswith("#!"):
        sys.exit("sbatch: error: This does not look like a batch script.")
    lines = re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)
    within = parser.parse_args([word for line in lines for word in shlex.split(line)])
    options = {key: value for key, value in vars(within).items() if value is not None}
    options |= {key: value for key, value in vars(given).items() if value is not None}
    queue = Path(os.environ["SLURM_EMULATION"])
    number = 1000 + len(list(queue.glob("*.json")))
    for _, ids in _dependencies(options):
        for one in ids:
            if not (queue / f"{one}.json").exists():
                sys.exit("sbatch: error: Batch job submission failed: Job dependency problem")
    job = {"id": number, "script": script, "options": options, "directory": os.getcwd()}
    (queue / f"{number}.json").write_text(json.dumps(job))
    print(f"{number};emulated" if given.parsable else f"Submitted batch job {number}")


def _dependencies(options: dict) -> list[tuple[str, list[int]]]:
    found = []
    for part in filter(None, options.get("dependency", "").split(",")):
        kind, *ids = part.split(":")
        if kind not in ("afterok", "afterany") or not ids:
            sys.exit(f"sbatch: error: Invalid dependency {part}")
        found.append((kind, [int(one) for one in ids]))
    return found


class Slurm:
    """A cluster of this machine.

    Args:
        folder: for its queue and its commands.
        at_a_time: how many tasks of an array run at a time.
    """

    def __init__(self, folder: Path, at_a_time: int = 2) -> None:
        self.queue, self.at_a_time = folder / "queue", at_a_time
        self.queue.mkdir(parents=True)
        bin_ = folder / "bin"
        bin_.mkdir()
        command = bin_ / "sbatch"
        support = Path(__file__).parents[1]
        command.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(support)!r})\n"
            "from support.slurm import _sbatch\n_sbatch()\n"
        )
        command.chmod(0o755)
        self.python = bin_ / "python"
        self.python.write_text(_PYTHON)
        self.python.chmod(0o755)
        self.listener = Listener()
        threading.Thread(target=self._listen, daemon=True).start()
        self.environment = {
            **os.environ,
            "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
            "SLURM_EMULATION": str(self.queue),
            "SLURM_EMULATION_PYTHON": str(self.listener.address),
        }
        self.done: dict[int, dict[int, int | None]] = {}
        """Exit codes by job and task; None: cancelled."""

    def submit(self, script: str) -> str:
        """Run a script that calls ``sbatch``, as on a login node; returns what it says."""
        result = subprocess.run(
            ["bash"], input=script, text=True, capture_output=True, env=self.environment
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def jobs(self) -> list[dict]:
        """What was submitted, in that order."""
        return [json.loads(path.read_text()) for path in sorted(self.queue.glob("*.json"))]

    def run_all(
        self, watch: Callable[[subprocess.Popen, dict, int], None] = lambda *_: None
    ) -> None:
        """Run what is queued, each job when its dependencies allow it.

        Args:
            watch: is called in a thread with the process, the job and the task's number.
        """
        for job in self.jobs():  # a job can only depend on earlier ones
            if job["id"] in self.done:
                continue
            options = job["options"]
            tasks, limit = [0], 1
            if "array" in options:
                first, last, most = re.fullmatch(
                    r"(\d+)-(\d+)(?:%(\d+))?", options["array"]
                ).groups()
                tasks = list(range(int(first), int(last) + 1))
                limit = min(self.at_a_time, int(most or self.at_a_time))
            allowed = all(
                kind == "afterany"
                or all(code == 0 for one in ids for code in self.done[one].values())
                for kind, ids in _dependencies(options)
            )
            if not allowed:
                assert options.get("kill_on_invalid_dep") == "yes", "it would wait for ever"
                self.done[job["id"]] = dict.fromkeys(tasks)
                continue
            with ThreadPoolExecutor(limit) as pool:
                codes = pool.map(lambda task, job=job: self._run(job, task, watch), tasks)
                self.done[job["id"]] = dict(zip(tasks, codes, strict=True))

    def _run(self, job: dict, task: int, watch: Callable) -> int:
        number = str(job["id"])
        environment = {**self.environment, "SLURM_JOB_ID": number}
        log = job["options"].get("output", "slurm-%A_%a.out")
        if "array" in job["options"]:
            environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": str(task)}
        meant = {"%A": number, "%a": str(task), "%j": number, "%%": "%"}
        log = re.sub("%.", lambda found: meant[found[0]], log)
        path = self.queue / f"{number}-{task}.sh"
        path.write_text(job["script"].replace(sys.executable, str(self.python)))
        path.chmod(0o755)
        environment["SLURM_EMULATION_LOG"] = os.path.abspath(log)
        Path(log).unlink(missing_ok=True)
        with Path(log).open("a") as said:  # a folder that is not there fails the job, as there
            process = subprocess.Popen(
                [path], stdout=said, stderr=said, env=environment, cwd=job["directory"]
            )
            threading.Thread(target=watch, args=(process, job, task), daemon=True).start()
            return process.wait()

    def _listen(self) -> None:
        while True:
            caller = self.listener.accept()
            threading.Thread(target=self._be_python, args=(caller,), daemon=True).start()

    @staticmethod
    def _be_python(caller: Connection) -> None:
        """Do what a job's Python is asked for; end when the job does."""
        from support.launch import start_module  # which sbatch need not import

        arguments, environment, folder = caller.recv()
        log = Path(environment["SLURM_EMULATION_LOG"])
        process = start_module(arguments, environment, folder, log, log)
        if process.sentinel not in wait([caller, process.sentinel]):
            process.kill()
        process.join()
        with contextlib.suppress(OSError):
            caller.send(process.exitcode)
        caller.close()
