"""Runs in several processes: the same record, whatever is killed, and nothing left behind."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from stockpot.errors import ConfigError, DiskFullError, NonFiniteError, StockpotError
from stockpot.experiment import load_experiment
from stockpot.experiment.jobs import Event, Job, WorkerSettings
from stockpot.experiment.journal import Journal
from stockpot.experiment.local import LocalExecutor, LocalJobs, Nursery, how_it_ended
from stockpot.experiment.observer import Observer
from stockpot.experiment.plan import make_plan
from stockpot.experiment.record import Record
from stockpot.experiment.resources import ResourceSettings
from stockpot.experiment.worker import stops_all
from support.experiments import TINY, lines, record_of, run_and_kill, run_file, write_experiment

METHODS = (
    "[sequential, multitask, {name: rehearsal, fraction: 0.1}, {name: ewc, strength: [10, 100], "
    "samples: 20}, {name: sfa, p: [0.5, 1], beta: 0.3}, {name: wise-ft, beta: [0.3, 0.4]}, "
    "{name: task-arithmetic, scale: [0.5, 1]}, {name: fisher-merging, samples: 20}]"
)


def unordered(folder):
    """A record whose runs may have finished in any order."""
    record = record_of(folder)
    for log in ("scores", "merges", "stages"):
        record[log] = sorted(json.dumps(line, sort_keys=True) for line in record[log])
    return record


def processes_of(mark):
    """The processes that hold STOCKPOT_TEST=mark in their environment, but this one.

    The tests' own server of forks may have been started with it as well.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            marked = process.environ().get("STOCKPOT_TEST") == mark
            ours = "multiprocessing" in " ".join(process.cmdline()) or process.pid == os.getpid()
            if marked and not ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture(autouse=True)
def no_process_is_left(request, monkeypatch):
    mark = f"{os.getpid()}-{request.node.name}"
    monkeypatch.setenv("STOCKPOT_TEST", mark)
    yield mark
    deadline = time.monotonic() + 10
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The experiment as one process does it."""
    folder = tmp_path_factory.mktemp("jobs")
    path = write_experiment(folder, METHODS, seeds="[0, 1]", record="{weights: all}")
    run_file(path, folder / "out")
    return path, folder / "out"


class Events(Observer):
    """What is told, run by run."""

    def __init__(self):
        self.told = {}

    def run_begins(self, run, finished):
        self.told.setdefault(run.id, []).append(("begins", finished))

    def stage_begins(self, run, stage, merges):
        self.told[run.id].append(("stage", stage.number))
        self.merges = merges

    def stage_ends(self, run, stage, trained, row):
        self.told[run.id].append(("ends", stage.number, tuple(row.values)))

    def run_ends(self, run):
        self.told[run.id].append("ends")

    def run_failed(self, run, error):
        self.told[run.id].append(f"failed: {error}")


def test_the_record_is_that_of_one_process(alone, tmp_path):
    path, out = alone
    events = Events()
    outcome = run_file(path, tmp_path / "out", jobs=2, observer=events)
    assert unordered(tmp_path / "out") == unordered(out)
    assert [run["run"] for run in outcome.summary] == [
        run["run"] for run in json.loads((out / "summary.json").read_text())
    ]
    # What is shared is trained once, by whichever process.
    experiment = load_experiment(path)
    plan = make_plan(experiment, experiment.load_stream())
    trained = [s["key"] for s in lines(tmp_path / "out" / "stages.jsonl") if s["trained_here"]]
    assert len(trained) == len(plan.uses())
    # Who watches is told of each run in order.
    tasks = ("0-1", "2-3", "4-5")
    for run in plan.runs:
        whole = [("begins", 0)]
        for stage in run.stages:
            whole += [("stage", stage.number), ("ends", stage.number, tasks)]
        assert events.told[run.id] == [*whole, "ends"]
    # A finished record is left as it is.
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}
    assert run_file(path, tmp_path / "out", jobs=2).summary == outcome.summary
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_from_one_to_the_other_killed_each_time(alone, tmp_path):
    """One process, then the coordinator of two, again and again; then the rest in one."""
    path, out = alone
    here = tmp_path / "out"
    run_and_kill(path, here, stage=1, step=3)
    begun = len(lines(here / "stages.jsonl"))
    for number in (25, 70):
        run_and_kill(path, here, jobs=2, fsync=number)
        Record(here).load()  # what is there can be read at any moment
    run_and_kill(path, here, fsync=55)
    assert begun < len(lines(here / "stages.jsonl")) < 70
    run_file(path, here)
    assert unordered(here) == unordered(out)


# A model that kills its process, or fails, at chosen moments: each moment once.

OWN_MODEL = """
import errno, json, os, signal
from pathlib import Path
from torch import nn

HERE = Path(__file__).parent
counts = {}

def moment(what):
    counts[what] = counts.get(what, 0) + 1
    for number, (kind, count, way) in enumerate(json.loads((HERE / "moments.json").read_text())):
        if (kind, count) != (what, counts[what]):
            continue
        try:
            (HERE / f"moment-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        if way == "fail":
            raise ZeroDivisionError("as was asked for")
        if way == "read":
            Path("/nowhere/words.txt").read_text()
        if way == "write":
            raise OSError(errno.EIO, "Input/output error", str(HERE / "out" / "runs" / "a file"))
        os.kill(os.getpid(), getattr(signal, way))

class Net(nn.Sequential):
    def forward(self, x):
        moment("train" if self.training else "score")
        return super().forward(x)

def make(image_shape, labels):
    real = os.fsync
    if "fsync" not in counts:
        counts["fsync"] = 0
        def fsync(file):
            moment("fsync")
            if "/runs/" in os.path.realpath(f"/proc/self/fd/{file}"):
                moment("fsync a result")
            real(file)
        os.fsync = fsync
    return Net(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, labels))
"""


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """An experiment with that model; call it with the moments."""
    (tmp_path / "moments.json").write_text("[]")
    (tmp_path / "jobs_own_model.py").write_text(OWN_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("jobs_own_model", None)
    text = TINY.replace("{name: mlp, hidden: [8]}", "jobs_own_model:make").replace(
        "{epochs", "{checkpoint_seconds: 0, epochs"
    )
    path = tmp_path / "own.yaml"
    path.write_text(f"{text}methods: {METHODS}\nseeds: [0]\nresources: {{retries: 3}}\n")

    def plan(moments):
        for old in tmp_path.glob("moment-*"):
            old.unlink()
        (tmp_path / "moments.json").write_text(json.dumps(moments))
        return path

    real = os.fsync
    yield plan
    os.fsync = real
    sys.modules.pop("jobs_own_model", None)


def test_killed_workers_lose_nothing(own_model, tmp_path):
    run_file(own_model([]), tmp_path / "undisturbed")
    # In training, in scoring, in writing: weights, items, the journal, checkpoints.
    moments = [("train", n, "SIGKILL") for n in (2, 7, 9, 16)]
    moments += [("score", n, "SIGKILL") for n in (1, 6, 9)]
    moments += [("fsync", n, "SIGKILL") for n in (1, 4, 30, 57, 58, 59, 60, 61, 62)]
    moments += [("fsync a result", n, "SIGKILL") for n in (1, 2, 3, 4)]
    moments += [("train", 4, "SIGTERM")]
    path = own_model(moments)
    # So many deaths close together may meet one run.
    outcome = run_file(path, tmp_path / "killed", ["resources.retries=20"], jobs=2)
    assert len(list(tmp_path.glob("moment-*"))) == len(moments)
    assert not outcome.failures
    assert unordered(tmp_path / "killed") == unordered(tmp_path / "undisturbed")


def test_failed_runs_are_reported_and_stop_nobody(own_model, tmp_path):
    """The run that trains what all share fails; the process of another is killed."""
    path = own_model([("train", 4, "fail"), ("train", 30, "SIGKILL")])
    events = Events()
    methods = "methods=[sequential, {name: l2, strength: [1, 2]}, {name: sfa, p: [0.5, 1]}]"
    overrides = ["resources.retries=0", methods]
    outcome = run_file(path, tmp_path / "out", overrides, jobs=2, observer=events)
    assert len(outcome.failures) == 2
    reasons = sorted(outcome.failures.values())
    assert reasons[0].startswith("ZeroDivisionError: as was asked for (where: ")
    assert reasons[1] == (
        "the process that trained it was killed by signal 9 (SIGKILL): out of memory?"
    )
    assert reasons[0] == outcome.failures["sequential-seed0"]
    assert "moment" in (tmp_path / "out/runs/sequential-seed0/error.txt").read_text()
    assert json.loads((tmp_path / "out" / "failures.json").read_text()) == outcome.failures
    assert len(outcome.summary) == 5 - 2
    assert {run for run, told in events.told.items() if "failed" in told[-1]} == set(
        outcome.failures
    )
    # The same command tries them again, here in one process, and nothing differs.
    assert not run_file(path, tmp_path / "out", overrides).failures
    run_file(path, tmp_path / "undisturbed", overrides)
    assert unordered(tmp_path / "out") == unordered(tmp_path / "undisturbed")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_file_of_the_users_stops_its_run_and_one_of_the_record_stops_all(
    own_model, tmp_path, jobs
):
    path, out = own_model([("train", 4, "read")]), tmp_path / "out"
    overrides = ["methods=[sequential, {name: l2, strength: 1}]", "resources.retries=0"]
    (reason,) = run_file(path, out, overrides, jobs=jobs).failures.values()
    assert reason.startswith("FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/wo")
    own_model([("train", 4, "write")])
    if jobs == 1:
        sys.modules["jobs_own_model"].counts.pop("train")
    with pytest.raises((OSError, StockpotError), match="Input/output error"):
        run_file(path, out, overrides, jobs=jobs)
    assert not run_file(path, out, overrides, jobs=jobs).failures


@pytest.mark.parametrize(
    ("error", "stops"),
    [
        (OSError(errno.EIO, "of the record", "/here/runs/x/stage-0000.json"), True),
        (OSError(errno.EIO, "of the record", b"/here/runs/x/stage-0000.json"), True),
        (OSError(errno.ENOSPC, "full", "/tmp/a file of a library's"), True),
        (OSError(errno.EIO, "which file is not said"), True),
        (OSError(errno.EIO, "a file that has only a number", 7), True),
        (PermissionError(errno.EACCES, "of a method", "/words.txt"), False),
        (FileNotFoundError(errno.ENOENT, "beside the record", "/here-2/words.txt"), False),
        (OSError("x is not a local folder and is not a valid model identifier"), False),
        (ConnectionResetError(errno.ECONNRESET, "reset by peer"), False),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), False),
        (DiskFullError("said"), True),
        (NonFiniteError("said"), False),
        (ValueError("of a method"), False),
    ],
)
def test_which_errors_stop_all_runs(error, stops):
    assert stops_all(error, Path("/here")) == stops


def test_an_error_that_concerns_all_stops_all(alone, tmp_path):
    """A stream that the experiment does not describe: workers would read another."""
    path, _ = alone
    experiment = load_experiment(path, ["methods=[sequential, l2]"], tmp_path / "out")
    stream = load_experiment(path, ["stream.train_limit=40"]).load_stream()
    from stockpot.experiment import run_experiment

    with pytest.raises(ConfigError, match="a worker reads are not those"):
        run_experiment(experiment, stream=stream, jobs=2)
    assert not lines(tmp_path / "out" / "stages.jsonl")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_from_outside(tmp_path, how, no_process_is_left):
    """Ctrl-C, a polite and an impolite end of the command; the fixture looks for what is left."""
    path = write_experiment(tmp_path, METHODS, seeds="[0, 1]")
    command = [sys.executable, "-m", "stockpot", "run", str(path), "training.epochs=4000"]
    command += ["-j", "2", "--json", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out" / "prefixes").glob("start*")) and time.monotonic() < deadline:
        if list((tmp_path / "out" / "runs").glob("*/items")):
            break
        if len(processes_of(no_process_is_left)) >= 4:  # it, the nursery and two workers
            break
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == (130 if how == signal.SIGINT else -how), stderr
    assert stdout == ""
    if how == signal.SIGINT:
        assert "the same command goes on" in stderr
        assert "Traceback" not in stderr


# Journals.


def stage_lines(run, number, start="aa"):
    at = {"run": run, "stage": number}
    scores = [{**at, "task": "A", "value": 0.5}]
    if number == 0:
        scores.insert(0, {"run": run, "stage": -1, "task": "A", "value": 0.25})
    return {**at, "key": "k", "sha256": "s"}, scores, [{**at, "step": 1}], [], []


@pytest.fixture
def open_record(alone, tmp_path):
    """An empty record, with what opens it again."""
    path, _ = alone
    experiment = load_experiment(path, output=tmp_path / "out")

    def open_it():
        record = Record(tmp_path / "out")
        with record.held():
            record.open(experiment, "data", {}, 1)
        return record

    return open_it


def journal_of(record, *stages):
    journal = Journal(record.folder)
    journal.check_start(0, "aa")
    for stage in stages:
        journal.finish_stage(*stage)
    return journal


def test_opening_takes_up_what_workers_left(open_record):
    record = open_record()
    journal_of(record, stage_lines("one", 0), stage_lines("two", 0), stage_lines("one", 1))
    assert not lines(record.folder / "stages.jsonl")
    again = open_record()
    assert sorted(again.stages()) == [("one", 0), ("one", 1), ("two", 0)]
    assert len(again.scores()) == 3 + 2
    assert json.loads((record.folder / "start.json").read_text()) == {"0": "aa"}
    assert not (record.folder / "jobs").exists()


@pytest.mark.parametrize("killed_after", ["merges", "scores", "stages"])
def test_folding_that_was_killed_doubles_nothing(open_record, killed_after):
    """Each log is written in one go; the journal's file is deleted after the last."""
    record = open_record()
    journal_of(record, stage_lines("one", 0), stage_lines("one", 1))
    shutil.copytree(record.folder / "jobs", record.folder.parent / "kept")
    record.fold("one")
    whole = {log: lines(record.folder / f"{log}.jsonl") for log in ("merges", "scores", "stages")}
    # As if the kill had come in the second stage, after this log.
    logs = list(whole)
    for log in logs[logs.index(killed_after) + 1 :]:
        kept = [json.dumps(line) + "\n" for line in whole[log] if line["stage"] < 1]
        (record.folder / f"{log}.jsonl").write_text("".join(kept))
    shutil.copytree(record.folder.parent / "kept", record.folder / "jobs", dirs_exist_ok=True)
    open_record()
    assert {log: lines(record.folder / f"{log}.jsonl") for log in logs} == whole


def test_a_worker_that_started_from_other_weights_is_not_taken_up(open_record):
    record = open_record()
    record.check_start(0, "bb")
    with pytest.raises(ConfigError, match="starts from other weights"):
        Journal(record.folder).check_start(0, "aa")
    journal = Journal(record.folder)
    journal._start = (0, "aa")  # it read start.json before the other wrote it
    journal.finish_stage(*stage_lines("one", 0))
    with pytest.raises(ConfigError, match="differs between the machines"):
        record.fold("one")
    assert not open_record().stages()


def test_journals_alone_make_it_another_experiment(alone, open_record, tmp_path):
    path, _ = alone
    record = open_record()
    journal_of(record, stage_lines("one", 0))
    changed = load_experiment(path, ["training.epochs=3"], tmp_path / "out")
    with pytest.raises(ConfigError, match="holds another experiment"):
        Record(tmp_path / "out").open(changed, "data", {}, 1)
    assert open_record().stages()


# Settings and places.


@pytest.mark.parametrize(
    ("text", "size"),
    [("8 GB", 8 * 10**9), ("500MiB", 500 * 2**20), ("1.5 g", 15 * 10**8), ("1000", 1000)],
)
def test_sizes_of_memory(text, size):
    assert ResourceSettings(memory=text).memory_bytes == size


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("resources.memory=lots", "is no size"),
        ("resources.gpus=1.5", "only whole GPUs"),
        ("resources.cpus=0", "greater than or equal to 1"),
        ("resources.cpu=2", "did you mean 'cpus'"),
    ],
)
def test_wrong_resources_are_refused(alone, override, reason):
    with pytest.raises(ConfigError, match=reason):
        load_experiment(alone[0], [override])


def test_resources_are_resolved_and_do_not_make_another_experiment(alone, tmp_path):
    path, out = alone
    shutil.copytree(out, tmp_path / "out")
    run_file(path, tmp_path / "out", ["resources.cpus=2", "resources.memory=1 GB"])
    again = load_experiment(tmp_path / "out" / "experiment.yaml")
    assert again.resources == ResourceSettings(cpus=2, memory="1 GB")


def test_gpus_are_dealt_out(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")

    def gpus(jobs, each):
        return LocalJobs.of(jobs, ResourceSettings(gpus=each), "cuda").gpus

    assert gpus(6, 0) == ("2", "3", "5", "7", "2", "3")
    assert gpus(None, 0) == ("2", "3", "5", "7")
    assert gpus(None, 0.5) == ("2", "3", "5", "7") * 2
    assert gpus(9, 0.5) == ("2", "3", "5", "7") * 2
    assert gpus(None, 2) == ("2,3", "5,7")
    with pytest.raises(ConfigError, match="there are 4 here"):
        gpus(None, 8)
    assert LocalJobs.of(3, ResourceSettings(), "cpu").gpus == ()


def test_how_many_fit(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert LocalJobs.of(None, ResourceSettings(), "cpu").jobs == 16
    assert LocalJobs.of(None, ResourceSettings(cpus=5), "cpu").jobs == 3
    assert LocalJobs.of(None, ResourceSettings(cpus=64), "cpu").jobs == 1
    available = psutil.virtual_memory().available
    half = ResourceSettings(memory=str(int(available * 0.4)))
    assert LocalJobs.of(None, half, "cpu").jobs == 2
    with pytest.raises(ConfigError, match="at least one"):
        LocalJobs.of(0, ResourceSettings(), "cpu")


def test_how_processes_end():
    assert how_it_ended(3) == "ended with exit code 3"
    assert how_it_ended(-11) == "was killed by signal 11 (SIGSEGV)"
    assert "out of memory?" in how_it_ended(-9)


@pytest.fixture
def one_worker(alone, tmp_path):
    """A nursery that has loaded a finished record's experiment, and its executor of one worker."""
    _, out = alone
    shutil.copytree(out, tmp_path / "out")
    settings = WorkerSettings(
        (tmp_path / "out" / "experiment.yaml").resolve(), (tmp_path / "out").resolve()
    )
    nursery = Nursery()
    executor = LocalExecutor(settings, 1, nursery)
    try:
        while not executor._loaded:
            executor.events(0.1)
        yield nursery, executor
    finally:
        executor.close()
        executor.close()  # may be called twice


def test_a_nursery_that_is_killed_is_replaced(one_worker):
    """All workers go with it; their jobs are tried again in new ones."""
    nursery, executor = one_worker
    job = Job("multitask-seed0", 1)
    executor.submit(job)
    os.kill(nursery._process.pid, signal.SIGKILL)
    told = []
    while not told or told[-1].kind not in ("died", "finished"):
        told += executor.events(1.0)
    assert told[-1].kind == "died"
    executor.submit(job)
    while told[-1].kind != "finished":
        told += executor.events(1.0)


def test_a_death_of_which_both_tell_at_once(one_worker):
    """The worker's broken connection and what the nursery says of it are found in one look."""
    nursery, executor = one_worker
    told: list[Event] = []

    def look():
        while not told or told[-1].kind != "died":
            told.extend(executor.events(1.0))

    executor.submit(Job("multitask-seed0", 1))
    while not (workers := psutil.Process(nursery._process.pid).children()):
        time.sleep(0.01)
    workers[0].kill()
    time.sleep(1)  # the nursery looks for the dead ten times a second
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(20)
    assert not looking.is_alive()
    assert "SIGKILL" in told[-1].error


def test_options(tmp_path, alone):
    from typer.testing import CliRunner

    from stockpot.cli.app import app

    for options, reason in (
        (["-j", "two"], "a number from 1 on, or auto"),
        (["-j", "0"], "a number from 1 on, or auto"),
        (["--on", "dask"], "give ray, or ray://"),
    ):
        done = CliRunner().invoke(app, ["run", str(alone[0]), *options])
        assert isinstance(done.exception, ConfigError)
        assert reason in str(done.exception)


def test_no_torch_in_the_coordinators_imports():
    """`--jobs` starts its processes before PyTorch is loaded here."""
    code = (
        "import sys, stockpot.cli.workers, stockpot.experiment.local\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
