"""Experiments on Ray: real clusters on this machine, whose processes are killed."""

import contextlib
import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from stockpot.errors import ConfigError, StockpotError
from stockpot.experiment import on_ray
from stockpot.experiment.config import load_experiment
from stockpot.experiment.jobs import Job, WorkerSettings
from stockpot.experiment.observer import Observer
from stockpot.experiment.plan import make_plan
from stockpot.experiment.resources import ResourceSettings
from support.experiments import SETTINGS, lines, record_of, run_file, write_experiment

if not os.environ.get("CI"):
    pytest.importorskip("ray")

WORKER = "ray::RayWorker"
LONG = ("training.epochs=200",)  # 600 steps a task: long enough to be killed in the middle


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A cluster of two CPUs, as `ray start` leaves one on a machine; its process."""
    folder = Path(tempfile.mkdtemp(prefix="ray-test-", dir="/tmp"))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--port=0", "--num-cpus=2", f"--temp-dir={folder}", "--include-dashboard=false"]
    command += ["--disable-usage-stats", f"--object-store-memory={80 * 2**20}"]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )
    address = folder / "ray_current_cluster"
    deadline = time.monotonic() + 60
    while not address.exists():
        assert process.poll() is None, (folder / "said").read_text()
        assert time.monotonic() < deadline, (folder / "said").read_text()
        time.sleep(0.1)
    os.environ["RAY_ADDRESS"] = address.read_text().strip()
    os.environ["OMP_NUM_THREADS"] = "1"
    yield psutil.Process(process.pid)
    del os.environ["RAY_ADDRESS"]
    processes = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.wait(30)
    for one in psutil.wait_procs(processes, 10)[1]:
        one.kill()
    subprocess.run(["rm", "-r", folder], check=True)


def workers(cluster):
    """The processes of a cluster that do or did jobs."""
    found = []
    for process in cluster.children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(WORKER):
                found.append(process)
        except psutil.Error:
            pass
    return found


def run_on_ray(path, output, overrides=(), address=None, **options):
    executor = partial(on_ray.make_executor, address)
    return run_file(path, output, overrides, executor=executor, **options)


def the_same(folder):
    """A record without the order in which runs were finished, and without Ray's or our traces."""
    record = record_of(folder)
    for log in ("scores", "merges", "stages"):
        record[log] = sorted(record[log], key=lambda line: json.dumps(line, sort_keys=True))
    # What failed runs would share stays for the next try; which of it, depends on the order.
    record["files"] = [name for name in record["files"] if not name.startswith("prefixes/")]
    return record


def test_the_record_is_that_of_a_local_run_prefixes_trained_once_a_failed_run_reported(
    tmp_path, cluster
):
    diverges = "{name: l2, strength: 1e30}"  # on the second task
    path = write_experiment(tmp_path, f"[{diverges}, {', '.join(SETTINGS.values())}]")
    local = run_file(path, tmp_path / "local", ["training.optimizer=sgd"])
    outcome = run_on_ray(path, tmp_path / "ray", ["training.optimizer=sgd"])
    assert outcome.failures == local.failures
    assert set(outcome.failures) == {"l2-strength1e+30-seed0"}
    assert len(outcome.summary) == len(SETTINGS)
    assert the_same(tmp_path / "ray") == the_same(tmp_path / "local")

    stages = lines(tmp_path / "ray" / "stages.jsonl")
    experiment = load_experiment(path)
    plan = make_plan(experiment, experiment.load_stream())
    trained_as = {(r.id, s.number): s.trained for r in plan.runs for s in r.stages}
    trained = [trained_as[one["run"], one["stage"]] for one in stages if one["trained_here"]]
    done = {trained_as[one["run"], one["stage"]] for one in stages}
    assert sorted(trained) == sorted(done), "each once"
    assert len(done) < len(stages), "some are shared"
    deadline = time.monotonic() + 20
    while workers(cluster):  # Ray ends them in a moment
        assert time.monotonic() < deadline, "actors are left in a cluster that is another's"
        time.sleep(0.1)


def test_a_killed_worker_loses_nothing(tmp_path, cluster):
    path = write_experiment(
        tmp_path, "[sequential, {name: sfa, p: 0.5, beta: 0.3}]", seeds="[0, 1]"
    )
    run_file(path, tmp_path / "local", LONG)

    class Assassin(Observer):
        victims = 0
        began = 0

        def __init__(self):
            self.at_work = set()

        def stage_begins(self, run, stage, merges):
            self.began += 1

        def run_ends(self, run):
            self.at_work.discard(run.id)

        def step(self, run, step, loss):
            self.at_work.add(run.id)
            # Both workers train: under load one of them may be there long before the other.
            if not self.victims and self.began >= 3 and step > 10 and len(self.at_work) == 2:
                workers(cluster)[0].send_signal(signal.SIGKILL)
                self.victims += 1

    assassin = Assassin()
    outcome = run_on_ray(path, tmp_path / "ray", LONG, observer=assassin)
    assert assassin.victims == 1
    assert assassin.began > len(lines(tmp_path / "ray" / "stages.jsonl")), "a task began again"
    assert not outcome.failures
    assert the_same(tmp_path / "ray") == the_same(tmp_path / "local")


def test_a_worker_without_work_makes_room_for_one_that_waits(tmp_path, cluster, monkeypatch):
    import ray

    monkeypatch.setattr(on_ray, "_PLACE_SECONDS", 1.0)
    path = write_experiment(tmp_path, "[sequential]", seeds="[0, 1]")  # nothing in common

    class Other:
        def there(self):
            return True

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="error")
    try:
        # Half of the cluster is somebody else's, for as long as this takes.
        other = ray.remote(num_cpus=1)(Other).remote()
        assert ray.get(other.there.remote(), timeout=60)
        outcome = run_on_ray(path, tmp_path / "ray")
    finally:
        ray.shutdown()
    assert not outcome.failures
    assert len(outcome.summary) == 2


DRIVER = """
import sys
from functools import partial
from support.experiments import run_file
from stockpot.experiment.on_ray import make_executor

executor = partial(make_executor, "ray://local")
run_file(sys.argv[1], sys.argv[2], sys.argv[3:], executor=executor)
"""


def test_a_killed_driver_takes_its_cluster_along_and_the_next_call_goes_on(tmp_path, cluster):
    path = write_experiment(
        tmp_path, "[sequential, {name: sfa, p: 0.5, beta: 0.3}]", seeds="[0, 1]"
    )
    run_file(path, tmp_path / "local", LONG)
    out = tmp_path / "ray"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    driver = psutil.Popen(
        [sys.executable, "-c", DRIVER, path, out, *LONG], env=environment, start_new_session=True
    )
    finished = out / "stages.jsonl"
    deadline = time.monotonic() + 300
    while len(lines(finished)) < 2 or len(workers(driver)) < 2:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    own = workers(driver)
    raylet = [p for p in driver.children(recursive=True) if p.name() in ("raylet", "gcs_server")]
    assert len(own) == 2
    assert len(raylet) == 2
    driver.kill()
    driver.wait()
    assert not psutil.wait_procs(own + raylet, 20)[1], "what it had started is gone"
    before = lines(finished)

    outcome = run_on_ray(path, out, LONG)
    assert not outcome.failures
    assert lines(finished)[: len(before)] == before, "what was finished is not done again"
    assert the_same(out) == the_same(tmp_path / "local")


def rays_environment():
    return {k: v for k, v in os.environ.items() if k.startswith("RAY_") or k == "PYTHONBREAKPOINT"}


def rays_processes(cluster):
    """The names of Ray's processes below this one, but for those of the tests' own cluster."""
    others = {cluster.pid, *(process.pid for process in cluster.children(recursive=True))}
    names = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid not in others and process.status() != psutil.STATUS_ZOMBIE:
                names.append(process.name())
    return [name for name in names if "ray" in name or "gcs_server" in name]


def test_a_cluster_of_our_own_leaves_nothing(tmp_path, cluster):
    path = write_experiment(tmp_path, "[sequential]")
    environment = rays_environment()
    with pytest.raises(ConfigError, match=r"4096 CPUs, and this machine has \d+ CPUs"):
        run_on_ray(path, tmp_path / "large", ["resources.cpus=4096"], address="ray://local")
    outcome = run_on_ray(path, tmp_path / "out", address="ray://local")
    assert len(outcome.summary) == 1
    assert rays_environment() == environment
    deadline = time.monotonic() + 60
    while left := rays_processes(cluster):  # some need a moment to end
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert not glob.glob(f"{tempfile.gettempdir()}/stockpot-{os.getpid()}-*")
    assert not list((tmp_path / "out").glob(".seen-*"))


def settings_of(folder, tmp_path):
    path = write_experiment(tmp_path, "[sequential]")
    folder.mkdir()
    (folder / "experiment.yaml").write_text(load_experiment(path).to_yaml())
    return WorkerSettings(folder / "experiment.yaml", folder)


def last_event(executor, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for event in executor.events(1.0):
            if event.kind in ("finished", "failed", "fatal", "died"):
                return event
    raise AssertionError("the job has not ended")


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray, "NETWORK_SECONDS", 0.2)
    folder = tmp_path / "not on the other machines"
    executor = on_ray.make_executor(None, settings_of(folder, tmp_path), ResourceSettings())
    try:
        (token,) = folder.glob(".seen-*")
        token.unlink()
        executor.submit(Job("sequential-seed0", 3))
        event = last_event(executor)
    finally:
        executor.close()
    assert event.kind == "fatal"
    assert f"does not see the record's folder {folder}" in event.error
    assert "--output" in event.error


def test_slots_are_what_fits(tmp_path):
    settings = settings_of(tmp_path / "record", tmp_path)
    # The cluster has two CPUs; memory is of this machine.
    for asked, slots in ((1, 2), (2, 1)):
        executor = on_ray.make_executor(None, settings, ResourceSettings(cpus=asked))
        assert executor.slots == slots
        executor.close()
        executor.close()


def test_what_cannot_be_reached_or_would_be_another_run_is_refused(tmp_path):
    settings = settings_of(tmp_path / "record", tmp_path)
    with pytest.raises(ConfigError, match=r"resources.gpus = 2: on Ray each run is one process"):
        on_ray.make_executor(None, settings, ResourceSettings(gpus=2))
    with pytest.raises(StockpotError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        on_ray.make_executor("127.0.0.1:9", settings, ResourceSettings())
