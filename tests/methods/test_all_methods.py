"""One suite over all methods: trains, is deterministic, resumes after a kill, saves and loads."""

import json

import pytest
import torch
from safetensors.torch import load_file

from stockpot.evaluation.accuracy import accuracy
from stockpot.experiment import load_experiment
from stockpot.methods import METHODS
from stockpot.models.learner import load_weights_
from support.experiments import (
    SETTINGS,
    STEPS_PER_TASK,
    lines,
    record_of,
    run_and_kill,
    run_file,
    write_experiment,
)

EVERY_STEP = ["training.checkpoint_seconds=0"]


def test_every_method_is_in_this_suite():
    assert SETTINGS.keys() == METHODS.keys()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The record of an undisturbed run, once per method."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            path = write_experiment(folder, f"[{SETTINGS[name]}]")
            outcome = run_file(path, folder / "out")
            assert not outcome.failures
            made[name] = (path, folder / "out")
        return made[name]

    return get


methods = pytest.mark.parametrize("name", sorted(SETTINGS))


@methods
def test_trains_and_scores_every_task(finished, name):
    _, out = finished(name)
    (run,) = json.loads((out / "summary.json").read_text())
    joint = METHODS[name].joint
    assert [row is None for row in run["R"]] == [joint, joint, False]
    assert all(0 <= value <= 1 for row in run["R"] if row for value in row)
    assert run["metrics"]["steps"] == 3 * STEPS_PER_TASK
    losses = [loss for line in lines(out / "stages.jsonl") for _, loss in line["losses"]]
    assert len(losses) == 3 * STEPS_PER_TASK
    assert all(0 < loss < 100 for loss in losses)
    if not joint:  # the first task is learned (chance: 1/2) and its loss came down
        assert run["R"][0][0] > 0.6
        assert sum(losses[STEPS_PER_TASK - 2 : STEPS_PER_TASK]) < sum(losses[:2])


@methods
def test_same_seed_same_record(finished, name, tmp_path):
    path, out = finished(name)
    run_file(path, tmp_path / "again")
    assert record_of(tmp_path / "again") == record_of(out)


@methods
def test_another_seed_another_result(finished, name, tmp_path):
    path, out = finished(name)
    run_file(path, tmp_path / "other", ["seeds=[7]"])
    a, b = (
        load_file(next(folder.glob("runs/*/model.safetensors")))
        for folder in (out, tmp_path / "other")
    )
    assert any(not torch.equal(a[key], b[key]) for key in a)


@methods
def test_saved_model_loads_and_scores_as_recorded(finished, name):
    path, out = finished(name)
    experiment = load_experiment(path, output=out)
    stream = experiment.stream.load()
    learner = experiment.model.build(stream)
    load_weights_(learner.module, load_file(next(out.glob("runs/*/model.safetensors"))))
    (run,) = json.loads((out / "summary.json").read_text())
    assert [accuracy(learner, task.test, 7).value for task in stream.tasks] == run["R"][-1]


def kill_points(name):
    """A step in the first task, some in the middle of later ones, and the very last step."""
    if METHODS[name].joint:
        return [(0, 1), (0, 2 * STEPS_PER_TASK), (0, 3 * STEPS_PER_TASK)]
    return [(0, 4), (1, 1), (1, 5), (2, STEPS_PER_TASK)]


@pytest.mark.parametrize(
    ("name", "stage", "step"), [(n, *point) for n in sorted(SETTINGS) for point in kill_points(n)]
)
def test_resumes_after_a_kill_at_any_step(finished, name, stage, step, tmp_path):
    path, out = finished(name)
    # Checkpoints after every step, so that the resumed run really starts in the middle.
    run_and_kill(path, tmp_path / "killed", EVERY_STEP, stage=stage, step=step)
    done = lines(tmp_path / "killed" / "stages.jsonl")
    assert len(done) == stage, "the kill came at another moment than the test wanted"
    if step > 1:
        assert list((tmp_path / "killed").rglob("checkpoint-*/stockpot.json"))
    run_file(path, tmp_path / "killed", EVERY_STEP)
    assert record_of(tmp_path / "killed") == record_of(out)


@pytest.mark.parametrize(
    ("name", "fsync"),
    [*(("sfa", n) for n in range(15)), *((m, n) for m in ("ewc", "ties") for n in (4, 8, 11, 14))],
)
def test_resumes_after_a_kill_while_writing(finished, name, fsync, tmp_path):
    path, out = finished(name)
    no_checkpoints = ["training.checkpoint_seconds=null"]
    run_and_kill(path, tmp_path / "killed", no_checkpoints, fsync=fsync)
    run_file(path, tmp_path / "killed", no_checkpoints)
    assert record_of(tmp_path / "killed") == record_of(out)


def test_three_kills_in_one_run(finished, tmp_path):
    path, out = finished("sfa")
    for stage, step in ((0, 2), (0, 5), (2, 3)):
        run_and_kill(path, tmp_path / "killed", EVERY_STEP, stage=stage, step=step)
    run_file(path, tmp_path / "killed", EVERY_STEP)
    assert record_of(tmp_path / "killed") == record_of(out)
