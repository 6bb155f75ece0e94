"""What trackers hold, read back by their own means, against the run folder's record."""

import atexit
import importlib.util
import json
import logging
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.parse
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook

from stockpot.errors import ConfigError
from stockpot.experiment import load_experiment, tracking
from stockpot.experiment.observer import Observer
from stockpot.tracking import names
from stockpot.tracking.trackers import TRACKERS, TrackedRun, check_trackers
from support.experiments import lines, record_of, run_file, write_experiment
from support.trackers import Series, events, mlflow_series, wandb_records, wandb_series

METHODS = "[sequential, {name: sfa, p: 0.5, beta: 0.3}, {name: wise-ft, beta: 0.4}, multitask]"
TWO = "[sequential, {name: sfa, p: 0.5, beta: 0.3}]"
MERGES = {
    "sequential-seed0": 0,
    "sfa-p0.5-beta0.3-seed0": 4,
    "wise-ft-beta0.4-seed0": 2,
    "multitask-seed0": 0,
}
SFA = "sfa-p0.5-beta0.3-seed0"
SCHEDULE = ["training.schedule=cosine", "training.warmup=0.2", "training.batch_size=8"]
HERE = [name for name, tracker in TRACKERS.items() if importlib.util.find_spec(tracker.package)]
EACH = [
    pytest.param(name, marks=[] if name in HERE else pytest.mark.skip(f"{name} is not installed"))
    for name in TRACKERS
]
# Trackio asks when it is imported.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")
atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)


def quiet(patch: pytest.MonkeyPatch) -> None:
    """Nothing is sent, and none of this machine's settings counts."""
    for key in list(os.environ):
        if key.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")) and key != "TRACKIO_DIR":
            patch.delenv(key)
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("WANDB_ERROR_REPORTING", "false")
    patch.setenv("WANDB_SILENT", "true")
    patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)


# What must be there, from the files of the record alone.


def expected(out: Path, run: str) -> Series:
    points: dict[str, dict[int, float]] = defaultdict(dict)
    own = {name: [line for line in lines(out / f"{name}.jsonl") if line["run"] == run]
           for name in ("stages", "scores", "merges", "curves")}  # fmt: skip
    tasks = [line["task"] for line in own["scores"] if line["stage"] == -1]
    b = [line["value"] for line in own["scores"] if line["stage"] == -1]
    for task, value in zip(tasks, b, strict=True):
        points[f"scores/{task}"][0] = value
    rows: dict[int, list[float]] = {}
    begin, seconds, memory = 0, 0.0, 0
    for stage in own["stages"]:
        number, end = stage["stage"], begin + stage["steps"]
        for step, loss in stage["losses"]:
            points["train/loss"][begin + step] = loss
            points["train/task"][begin + step] = number + 1
            points["train/learning_rate"][begin + step] = rate(step, stage["steps"])
        for line in own["merges"]:
            if line["stage"] == number:
                for key in ("beta", "distance_before", "distance_after", "seconds"):
                    points[f"merge/{key}"][begin + line["step"]] = line[key]
        for line in own["curves"]:
            if line["stage"] == number and (line["step"] > 0 or number == 0):
                before = line["moment"] == "before merge"
                name = f"{'before_merge' if before else 'during'}/{line['task']}"
                points[name][begin + line["step"]] = line["value"]
        row = [line["value"] for line in own["scores"] if line["stage"] == number]
        for task, value in zip(tasks, row, strict=True):
            points[f"scores/{task}"][end] = value
        rows[stage["row"]] = row
        for name, value in metrics(rows, b, stage["row"]).items():
            points[f"summary/{name}"][end] = value
        points["distance/l2_to_anchor"][end] = stage["l2_to_anchor"]
        points["distance/kl_from_anchor"][end] = stage["kl_from_anchor"]
        seconds, memory = seconds + stage["seconds"], max(memory, stage["peak_memory"])
        points["cost/seconds"][end], points["cost/peak_memory"][end] = seconds, memory
        begin = end
    return {name: sorted(series.items()) for name, series in points.items()}


def rate(step: int, steps: int) -> float:
    """Linear from 0 over a fifth of the steps, then half a cosine; step 1 is made with factor 0."""
    warmup, done = round(0.2 * steps), step - 1
    if done < warmup:
        return 0.01 * done / warmup
    return 0.01 * (1 + math.cos(math.pi * (done - warmup) / (steps - warmup))) / 2


def metrics(rows: dict[int, list[float]], b: list[float], t: int) -> dict[str, float]:
    """Over the tasks 0..t, as docs/metrics.md has them."""
    last = rows[t]
    found = {"average": sum(last[: t + 1]) / (t + 1)}
    if set(rows) >= set(range(t + 1)):
        found["learned"] = sum(rows[i][i] for i in range(t + 1)) / (t + 1)
    if t and set(rows) >= set(range(t + 1)):
        found["forgetting"] = sum(rows[i][i] - last[i] for i in range(t)) / t
        found["bwt"] = -found["forgetting"]
        best = [max(rows[j][i] for j in range(i, t)) for i in range(t)]
        found["forgetting_vs_best"] = sum(best[i] - last[i] for i in range(t)) / t
        found["fwt"] = sum(rows[i - 1][i] - b[i] for i in range(1, t + 1)) / t
    return found


# What is there.


def held(tracker: str, out: Path, run: str) -> Series:
    found = {"tensorboard": in_tensorboard, "wandb": in_wandb, "mlflow": in_mlflow,
             "trackio": in_trackio}[tracker](out, run)  # fmt: skip
    return {name: sorted(series) for name, series in found.items()}


def in_tensorboard(out: Path, run: str) -> Series:
    return events(out / "tracking" / "tensorboard" / run)


def wandb_runs(out: Path) -> dict[str, list[Any]]:
    """Records by the run's name, over all files of it in the order of their making."""
    found: dict[str, list[Any]] = {}
    for file in sorted((out / "tracking" / "wandb").glob("offline-run-*/run-*.wandb")):
        records = wandb_records(file)
        about = next(r.run for r in records if r.WhichOneof("record_type") == "run")
        found.setdefault(about.display_name, []).extend(records)
    return found


def in_wandb(out: Path, run: str) -> Series:
    return wandb_series(wandb_runs(out)[run])


def mlflow_runs(out: Path, experiment: str = "experiment") -> tuple[Any, list[Any]]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{out.resolve()}/tracking/mlflow/mlflow.db")
    found = client.get_experiment_by_name(experiment)
    return client, list(client.search_runs([found.experiment_id]))


def in_mlflow(out: Path, run: str) -> Series:
    client, runs = mlflow_runs(out)
    (own,) = [found.info.run_id for found in runs if found.info.run_name == run]
    return mlflow_series(client, own)


def in_trackio(out: Path, run: str) -> Series:
    series: Series = defaultdict(list)
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "experiment.db") as base:
        own = (run, journal(out, run)["trackio"]["id"])
        rows = base.execute(
            "SELECT step, metrics FROM metrics WHERE run_name = ? AND run_id = ?", own
        )
        for step, text in rows:
            for name, value in json.loads(text).items():
                series[name].append((step, value))
    return series


def journal(out: Path, run: str) -> dict[str, Any]:
    trackers: dict[str, Any] = json.loads((out / "tracking" / f"{run}.json").read_text())
    return trackers["trackers"]


def assert_same(found: Series, wanted: Series) -> None:
    """Every point once and no other; TensorBoard keeps float32."""
    assert found.keys() == wanted.keys()
    for name, series in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in series], name
        assert [value for _, value in found[name]] == pytest.approx(
            [value for _, value in series], rel=1e-6, abs=1e-12
        ), name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tracked")
    path = write_experiment(folder, METHODS, evaluation="{every: 3, merges: true}")
    with pytest.MonkeyPatch.context() as patch:
        quiet(patch)
        run_file(path, folder / "out", [*SCHEDULE, f"training.report_to=[{','.join(HERE)}]"])
        yield folder / "out"


@pytest.mark.parametrize("tracker", EACH)
@pytest.mark.parametrize("run", MERGES)
def test_every_tracker_holds_what_the_record_says(made: Path, tracker: str, run: str) -> None:
    wanted = expected(made, run)
    assert_same(held(tracker, made, run), wanted)
    # It is all there: R with b, a merge at every merge step, and the axis over all tasks.
    stages = [line for line in lines(made / "stages.jsonl") if line["run"] == run]
    assert len(wanted["scores/0-1"]) == 1 + len(stages)
    assert len(wanted.get("merge/beta", [])) == MERGES[run]
    assert wanted["train/loss"][-1][0] == 36


def test_what_each_run_is_called_and_made_with(made: Path) -> None:
    runs = wandb_runs(made)
    assert set(runs) == set(MERGES)
    about = next(r.run for r in runs[SFA] if r.WhichOneof("record_type") == "run")
    assert (about.project, about.run_group) == ("experiment", "experiment")
    assert about.job_type == "sfa p=0.5 beta=0.3"
    config = {item.key: json.loads(item.value_json) for item in about.config.update}
    assert config["method"] == "sfa"
    assert config["settings"]["beta"] == 0.3
    assert config["seed"] == 0
    assert config["stream"]["split"] == "pairs"
    assert config["model"]["hidden"] == [8]
    assert config["training"]["batch_size"] == 8
    assert config["tasks"] == ["0-1", "2-3", "4-5"]

    client, found = mlflow_runs(made)
    assert {run.info.run_name for run in found} == set(MERGES)
    (own,) = (run for run in found if run.info.run_name == SFA)
    assert own.info.status == "FINISHED"
    assert own.data.params["settings.beta"] == "0.3"
    assert own.data.params["model.hidden"] == "[8]"
    assert own.data.params["training.schedule"] == "cosine"
    place = client.get_experiment(own.info.experiment_id).artifact_location
    assert place == (made / "tracking" / "mlflow" / "artifacts").as_uri()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    accumulator = EventAccumulator(str(made / "tracking" / "tensorboard" / SFA)).Reload()
    content = accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["settings.beta"].number_value == 0.3
    assert shown["method"].string_value == "sfa"


def test_a_finished_folder_is_caught_up_and_nothing_is_logged_twice(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, "[multitask, {name: wise-ft, beta: 0.4}]")
    runs = ("multitask-seed0", "wise-ft-beta0.4-seed0")
    out = tmp_path / "out"
    run_file(path, out, SCHEDULE)
    assert not (out / "tracking").exists()
    before = record_of(out)
    one, both = ("training.report_to=mlflow", "training.report_to=[tensorboard, mlflow]")
    for report_to in (one, both, both):
        run_file(path, out, [*SCHEDULE, report_to])
        for run in runs:
            assert_same(held("mlflow", out, run), expected(out, run))
    for run in runs:
        assert_same(held("tensorboard", out, run), expected(out, run))
        assert len(list((out / "tracking" / "tensorboard" / run).iterdir())) == 1
    assert len(mlflow_runs(out)[1]) == len(runs)
    after = record_of(out)
    assert {**before, "files": None} == {**after, "files": None}
    # Where it is not known how far a tracker is, it gets a run that is whole.
    (out / "tracking" / f"{runs[0]}.json").write_text('{"trackers": {"ml')
    run_file(path, out, [*SCHEDULE, one])
    client, found = mlflow_runs(out)
    assert sorted(run.info.run_name for run in found) == sorted([*runs, runs[0]])
    again = mlflow_series(client, journal(out, runs[0])["mlflow"]["id"])
    assert_same({name: sorted(series) for name, series in again.items()}, expected(out, runs[0]))


class Interrupting(Observer):
    def __init__(self, stage: int, step: int) -> None:
        self.at, self.now = (stage, step), 0

    def stage_begins(self, run: Any, stage: Any, *more: Any) -> None:
        self.now = stage.number

    def step(self, run, step: int, loss: float | None) -> None:
        if (self.now, step) == self.at:
            raise KeyboardInterrupt


class Asking(Observer):
    """MLflow's word on the run while it trains."""

    def __init__(self, out: Path) -> None:
        self.out, self.said = out, set[str]()

    def stage_begins(self, run: Any, stage: Any, *more: Any) -> None:
        self.said |= {run.info.status for run in mlflow_runs(self.out)[1]}


@pytest.mark.parametrize("tracker", EACH)
def test_an_interrupted_run_goes_on_as_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.setattr(tracking, "LIVE_SECONDS", 0.0)  # every window of the loss
    methods = "[{name: sfa, p: 0.5, beta: 0.3}]"
    path = write_experiment(tmp_path, methods, evaluation="{every: 3, merges: true}")
    out = tmp_path / "out"
    words = [*SCHEDULE, f"training.report_to={tracker}", "training.checkpoint_seconds=0"]
    with pytest.raises(KeyboardInterrupt):
        run_file(path, out, words, observer=Interrupting(1, 9))
    live = held(tracker, out, SFA)
    assert live["train/loss"][-1][0] == 12 + 8  # while the task trained, not when it was finished
    assert [step for step, _ in live["merge/beta"]] == [12 + 6]
    assert [step for step, _ in live["scores/2-3"]] == [0, 12]
    if tracker == "mlflow":
        assert [run.info.status for run in mlflow_runs(out)[1]] == ["KILLED"]
    known = journal(out, SFA)[tracker]["id"]
    asking = Asking(out) if tracker == "mlflow" else Observer()
    run_file(path, out, words, observer=asking)
    assert_same(held(tracker, out, SFA), expected(out, SFA))
    if tracker == "tensorboard":
        assert len(list((out / "tracking" / "tensorboard" / SFA).iterdir())) == 1
    if tracker == "wandb":
        assert len(list((out / "tracking" / "wandb").glob("offline-run-*"))) == 1
    if tracker == "mlflow":
        assert journal(out, SFA)[tracker]["id"] == known
        assert isinstance(asking, Asking)
        assert asking.said == {"RUNNING"}
        assert [run.info.status for run in mlflow_runs(out)[1]] == ["FINISHED"]
    if tracker == "trackio":
        with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "experiment.db") as base:
            count = "SELECT COUNT(*) FROM metrics WHERE run_id = ?"
            assert base.execute(count, (known,)).fetchone() == (0,)


def test_what_is_shown_while_a_task_trains_takes_nothing_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An average at a task's end comes after its last loss; a slow tracker's time is its own."""

    class Slow(TRACKERS["tensorboard"]):  # type: ignore[misc]
        def log(self, points: Any) -> None:
            time.sleep(0.2)
            super().log(points)

    monkeypatch.setattr(tracking, "LIVE_SECONDS", 0.0)
    monkeypatch.setitem(TRACKERS, "tensorboard", Slow)
    path = write_experiment(tmp_path, "[{name: wise-ft, beta: 0.4}]")
    out, run = tmp_path / "out", "wise-ft-beta0.4-seed0"
    run_file(path, out, [*SCHEDULE, "training.report_to=tensorboard"])
    found = held("tensorboard", out, run)
    assert_same(found, expected(out, run))
    assert [step for step, _ in found["merge/beta"]] == [24, 36]
    for stage in lines(out / "stages.jsonl"):
        assert stage["seconds"] < 11 * 0.2  # the times it was logged to while it trained


KILLED = [*SCHEDULE, "training.report_to=[tensorboard, wandb, mlflow]",
          "training.checkpoint_seconds=null"]  # fmt: skip


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run without trackers; then one that is killed in its second task, half of it logged."""
    folder = tmp_path_factory.mktemp("killed")
    path = write_experiment(folder, "[{name: sfa, p: 0.5, beta: 0.3}]", evaluation="{every: 3}")
    code = f"""
        import contextlib, os, signal, sys
        from pathlib import Path
        from stockpot.experiment import tracking
        from stockpot.experiment.observer import Observer
        from support.experiments import run_file

        with contextlib.suppress(ImportError):
            import deepspeed  # Trainer imports it, and it imports mlflow by itself
        before = set(sys.modules)
        path, folder = Path({str(path)!r}), Path({str(folder)!r})
        run_file(path, folder / "off")
        found = {{name.split(".")[0] for name in set(sys.modules) - before}} & {set(TRACKERS)!r}
        print("imported:", found, flush=True)

        class Assassin(Observer):
            def stage_begins(self, run, stage, *more):
                self.stage = stage.number
            def step(self, run, step, loss):
                if (self.stage, step) == (1, 9):
                    os.kill(os.getpid(), signal.SIGKILL)

        tracking.LIVE_SECONDS = 0.0
        run_file(path, folder / "out", {KILLED!r}, observer=Assassin())
    """
    with pytest.MonkeyPatch.context() as patch:
        quiet(patch)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    return folder, ran.stdout


def test_without_trackers_none_is_imported(killed: tuple[Path, str]) -> None:
    folder, said = killed
    assert said.splitlines()[-1] == "imported: set()"
    assert not (folder / "off" / "tracking").exists()


def test_a_killed_run_has_every_point_once(killed: tuple[Path, str]) -> None:
    folder, _ = killed
    out = folder / "out"
    assert events(out / "tracking" / "tensorboard" / SFA)["train/loss"][-1][0] == 12 + 8
    run_file(folder / "experiment.yaml", out, KILLED)
    wanted = expected(out, SFA)
    assert_same(held("tensorboard", out, SFA), wanted)
    assert_same(held("wandb", out, SFA), wanted)
    found = held("mlflow", out, SFA)
    # What was logged before the kill stays, how long an average took then included.
    assert [step for step, _ in found["merge/seconds"]] == [18, 24, 30, 36]
    assert_same({**found, "merge/seconds": wanted["merge/seconds"]}, wanted)


def test_a_tracker_that_fails_is_said_once_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that is not there, a key that is none, a folder that cannot be made."""
    import wandb

    path = write_experiment(tmp_path, TWO)
    run_file(path, tmp_path / "plain", SCHEDULE)
    out = tmp_path / "out"
    (out / "tracking").mkdir(parents=True)
    (out / "tracking" / "tensorboard").write_text("in the way")
    shutil.copy(tmp_path / "plain" / "experiment.json", out)  # else the folder is another's
    words = [*SCHEDULE, "training.report_to=[tensorboard, wandb, mlflow]"]
    wandb.teardown()  # it asks for its mode once
    with monkeypatch.context() as broken:
        broken.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        broken.setenv("WANDB_MODE", "online")
        broken.setenv("WANDB_API_KEY", "wrong")
        with caplog.at_level(logging.WARNING, logger="stockpot"):
            outcome = run_file(path, out, words)
    said = [record.getMessage() for record in caplog.records if record.name == "stockpot"]
    assert len(said) == 3
    for tracker, text in zip(("tensorboard", "wandb", "mlflow"), said, strict=True):
        assert text.startswith(f"tracking: {tracker} failed and is left out")
    assert not outcome.failures
    there, plain = record_of(out), record_of(tmp_path / "plain")
    assert {**there, "files": None} == {**plain, "files": None}
    # Mended, the same command logs what is missing.
    wandb.teardown()
    (out / "tracking" / "tensorboard").unlink()
    run_file(path, out, words)
    for tracker in ("tensorboard", "wandb", "mlflow"):
        assert_same(held(tracker, out, SFA), expected(out, SFA))


def test_a_tracker_that_breaks_half_way_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its database is taken away while the second run trains."""

    class Vandal(Observer):
        def stage_begins(self, run: Any, stage: Any, *more: Any) -> None:
            if run.id == SFA and stage.number == 1:
                with sqlite3.connect(tmp_path / "out/tracking/mlflow/mlflow.db") as base:
                    base.execute("DROP TABLE metrics")

    path = write_experiment(tmp_path, TWO)
    words = [*SCHEDULE, "training.report_to=[mlflow, tensorboard]"]
    with caplog.at_level(logging.WARNING, logger="stockpot"):
        outcome = run_file(path, tmp_path / "out", words, observer=Vandal())
    said = [record.getMessage() for record in caplog.records if record.name == "stockpot"]
    assert [text.split()[1] for text in said] == ["mlflow"]
    assert len(outcome.summary) == 2
    for run in (SFA, "sequential-seed0"):
        assert_same(held("tensorboard", tmp_path / "out", run), expected(tmp_path / "out", run))


def test_a_wrong_name_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, "[sequential]")
    with pytest.raises(ConfigError, match=r"wandbb.*did you mean 'wandb'") as caught:
        load_experiment(path, ["training.report_to=[mlflow, wandbb]"])
    assert "training.report_to.1" in str(caught.value)
    for nonsense in ("3", "{a: b}", "[[wandb]]", "[3]", "all"):
        with pytest.raises(ConfigError, match=r"training\.report_to"):
            load_experiment(path, [f"training.report_to={nonsense}"])
    for none in ("none", "null", "[]"):
        assert load_experiment(path, [f"training.report_to={none}"]).training.report_to == ()
    twice = load_experiment(path, ["training.report_to=[wandb, wandb]"])
    assert twice.training.report_to == ("wandb",)
    assert twice.training.identity() == load_experiment(path).training.identity()


def test_a_missing_package_is_refused_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else there(n))
    check_trackers(["tensorboard", "mlflow"])
    path = write_experiment(tmp_path, "[sequential]")
    with pytest.raises(ConfigError, match=r"pip install 'stockpot\[wandb\]'"):
        run_file(path, tmp_path / "out", ["training.report_to=[tensorboard, wandb]"])
    assert not (tmp_path / "out").exists()


ODD = ["a b", "a.b", "a/b", "a_b", "A b", "..", ".", "ä", "法律", "(x)", "a%b", "é" * 60, "e" * 300]


@settings(deadline=None)  # the first imports MLflow
@given(st.lists(st.text(min_size=1), unique=True, max_size=5))
def test_names_stay_different_and_are_taken_by_all(tasks: list[str]) -> None:
    from mlflow.utils.validation import _validate_metric_name
    from torch.utils.tensorboard.summary import scalar

    tasks += ODD
    found = [names.score(task) for task in tasks]
    assert len(set(found)) == len(set(tasks))
    for task, name in zip(tasks, found, strict=True):
        _validate_metric_name(name)
        assert scalar(name, 0.0).value[0].tag == name
        assert len(names.detail(task, task, task)) <= 250
        if ".." not in name:  # not shortened: it can be read back
            code = name.removeprefix("scores/").replace(".", "%")
            assert urllib.parse.unquote(code, errors="surrogatepass") == task


@pytest.mark.parametrize("tracker", EACH)
def test_odd_names_arrive(tmp_path: Path, tracker: str) -> None:
    run = TrackedRun("run 1", "sfa p=0.5", "experiment", {"x": {"a b": None, "c": [1]}}, tmp_path)
    one = TRACKERS[tracker]()
    (tmp_path / "tracking").mkdir()
    run = TrackedRun(run.id, run.label, run.experiment, run.config, tmp_path / "tracking")
    known = one.open(run, None)
    values = {names.score(task): float(n) for n, task in enumerate(ODD)}
    one.log({0: values, 7: values})
    one.close("finished")
    (tmp_path / "tracking" / "run 1.json").write_text(
        json.dumps({"trackers": {tracker: {"id": known}}})
    )
    wanted = {name: [(0, value), (7, value)] for name, value in values.items()}
    assert held(tracker, tmp_path, "run 1") == wanted


def test_a_slow_writer_of_wandb_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process, held up as it is told to close the file, has nothing of a short run in it."""
    from wandb.sdk.lib.service.service_connection import ServiceConnection

    (tmp_path / "tracking").mkdir()
    run = TrackedRun("run", "sfa", "experiment", {}, tmp_path / "tracking")
    one = TRACKERS["wandb"]()
    one.open(run, None)
    one.log({0: {"a": 1.0}, 7: {"a": 2.0}})
    children = psutil.Process().children(recursive=True)
    writers = [child for child in children if "wandb-core" in child.name()]
    tell = ServiceConnection.inform_finish

    def held_up(self: Any, run_id: str) -> None:
        for writer in writers:
            writer.suspend()
        (file,) = tmp_path.glob("tracking/wandb/offline-run-*/run-*.wandb")
        assert wandb_records(file) == []
        tell(self, run_id)
        for writer in writers:
            threading.Timer(1.0, writer.resume).start()

    monkeypatch.setattr(ServiceConnection, "inform_finish", held_up)
    one.close("finished")
    assert writers
    assert held("wandb", tmp_path, "run") == {"a": [(0, 1.0), (7, 2.0)]}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_the_learning_rate_is_the_one_that_steps_are_made_with(
    tmp_path: Path, schedule: str, warmup: float
) -> None:
    made_with: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *more: Any) -> None:
        made_with.append(optimizer.param_groups[0]["lr"])

    path = write_experiment(tmp_path, "[sequential]")
    words = [f"training.schedule={schedule}", f"training.warmup={warmup}",
             "training.report_to=tensorboard", "stream.order=[0, 1]"]  # fmt: skip
    hook = register_optimizer_step_pre_hook(note)
    try:
        run_file(path, tmp_path / "out", words)
    finally:
        hook.remove()
    found = in_tensorboard(tmp_path / "out", "sequential-seed0")["train/learning_rate"]
    assert [step for step, _ in found] == list(range(1, 13))
    assert [value for _, value in found] == pytest.approx(made_with, rel=1e-6)
