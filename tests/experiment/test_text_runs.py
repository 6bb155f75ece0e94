"""Whole experiments on tasks of text: every method, kills, curves, items, benchmarks."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stockpot.errors import ConfigError
from stockpot.evaluation.language import choices, held_out_loss
from stockpot.evaluation.sandbox import Sandbox
from stockpot.evaluation.settings import Programs
from stockpot.experiment import load_experiment, run_experiment
from stockpot.methods import METHODS, Memory, TaskRun
from stockpot.models.language import TextLearner
from stockpot.models.learner import load_weights_
from stockpot.streams.data import Stream, Task
from stockpot.streams.text import ProgramProblem, ProgramProblems
from stockpot.training import TrainingSettings
from stockpot.training.trainer import train_task
from support.experiments import lines, record_of, run_and_kill, run_file
from support.text import write_tasks, write_text_experiment

STEPS = 4
METHOD = {
    "ewc": "{name: ewc, strength: 10, samples: 4}",
    "fisher-merging": "{name: fisher-merging, labels: sampled, samples: 4}",
    "rehearsal": "{name: rehearsal, fraction: 0.3}",
    "sfa": "{name: sfa, p: 0.5, beta: 0.3}",
}
EVERY_STEP = ["training.checkpoint_seconds=0"]


def write(folder: Path, stories: Path, methods: str, losses: bool = False, **more: str) -> Path:
    """An experiment on two tasks, scored by the choice of a label, or by the loss."""
    columns = ("prompt", "response") if losses else ("text", "label")
    model = f"{{id: {stories}, max_length: 48}}"
    return write_text_experiment(
        folder, write_tasks(folder, columns=columns), model, methods, **more
    )


def finish(path: Path, output: Path, *overrides: str, **options: Any) -> list[dict[str, Any]]:
    outcome = run_file(path, output, overrides, **options)
    assert not outcome.failures
    return list(outcome.summary)


def loaded(path: Path) -> tuple[TextLearner, Stream]:
    settings = load_experiment(path)
    stream = settings.load_stream()
    learner = settings.model.build(stream)
    assert isinstance(learner, TextLearner)
    return learner, stream


def loss_of(learner: TextLearner, weights: Path, data: Any) -> float:
    load_weights_(learner.module, load_file(weights))
    return held_out_loss(learner, data, 32).value


def all_of(folder: Path) -> dict[str, Any]:
    """What a kill must not change: the record, the curves, and every item."""
    items = sorted(folder.glob("runs/*/items/*"))
    return {
        **record_of(folder),
        "curves": lines(folder / "curves.jsonl"),
        "items": {
            str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in items
        },
    }


# Every method.


@pytest.fixture(scope="module")
def every(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("every")
    methods = ", ".join(METHOD.get(name, name) for name in METHODS)
    path = write(folder, stories, f"[{methods}]", record="{weights: all}")
    finish(path, folder / "out")
    return path, folder / "out"


def summary_of(out: Path, method: str) -> dict[str, Any]:
    found = json.loads((out / "summary.json").read_text())
    (run,) = [run for run in found if run["method"] == method]
    return dict(run)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_and_is_scored(every, method):
    _, out = every
    run = summary_of(out, method)
    assert run["metrics"]["steps"] == 2 * STEPS
    assert (run["metric"], run["better"]) == ("accuracy", "higher")
    assert [row is None for row in run["R"]] == [METHODS[method].joint, False]
    named = {(s["task"], s["evaluation"], s["metric"]) for s in run["scores"]}
    assert named == {
        (task, *score)
        for task in ("tea", "sky")
        for score in (("test", "loss"), ("labels", "accuracy"), ("labels", "accuracy_norm"))
    }
    stages = [line for line in lines(out / "stages.jsonl") if line["run"] == run["run"]]
    losses = [loss for line in stages for _, loss in line["losses"]]
    assert len(losses) == 2 * STEPS
    assert losses[STEPS - 1] < losses[0]
    assert all(line["kl_from_anchor"] > 0 for line in stages)


@pytest.mark.parametrize("method", ["sequential", "sfa", "ewc", "multitask"])
def test_recorded_scores_and_items_are_those_of_the_weights(every, method):
    path, out = every
    learner, stream = loaded(path)
    run = summary_of(out, method)
    folder = out / "runs" / run["run"]
    load_weights_(learner.module, load_file(folder / "model.safetensors"))
    last = 0 if METHODS[method].joint else 1
    items = load_file(folder / "items" / f"stage-{last:04d}.safetensors")
    recorded = {(s["task"], s["evaluation"], s["metric"]): s for s in run["scores"]}
    for task in stream.tasks:
        loss = held_out_loss(learner, task.test, 7)
        found = recorded[task.name, "test", "loss"]
        assert found["value"] == pytest.approx(loss.value, rel=1e-5)
        assert found["stderr"] == pytest.approx(loss.stderr, rel=1e-4)
        torch.testing.assert_close(items[f"{task.name}/loss"], loss.items, rtol=1e-4, atol=1e-5)
        right, normalised = choices(learner, "labels", task.benchmarks["labels"], 5)
        for score in (right, normalised):
            found = recorded[task.name, "labels", score.metric]
            own = items[f"{task.name}/labels {score.metric}"]
            assert own.equal(score.items)
            assert found["value"] == pytest.approx(float(own.double().mean()))
            assert found["n"] == len(own) == len(task.test)
    assert run["R"][-1] == [recorded[t.name, "labels", "accuracy"]["value"] for t in stream.tasks]
    start = load_file(folder / "items" / "start.safetensors")
    assert run["b"] == [float(start[f"{t.name}/labels accuracy"].mean()) for t in stream.tasks]


def test_a_record_holds_its_own_notes(every):
    _, out = every
    environment = json.loads((out / "environment.json").read_text())
    assert environment["notes on the data"] == []


# Kills.

WATCHING = "{every: 2, merges: true, during_limit: 3}"


@pytest.mark.parametrize("die", [{"stage": 0, "step": 3}, {"stage": 1, "step": 3}, {"fsync": 9}])
def test_killed_runs_go_on_to_the_same_record(stories, tmp_path, die):
    path = write(tmp_path, stories, f"[{METHOD['sfa']}]", evaluation=WATCHING)
    finish(path, tmp_path / "whole", *EVERY_STEP)
    run_and_kill(path, tmp_path / "killed", EVERY_STEP, **die)
    finish(path, tmp_path / "killed", *EVERY_STEP)
    assert all_of(tmp_path / "killed") == all_of(tmp_path / "whole")
    assert len(lines(tmp_path / "killed" / "curves.jsonl")) == 2 * (3 + 3 + 2 * 2)


# Curves.


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_curves_say_how_the_loss_goes(stories, tmp_path, precision):
    path = write(
        tmp_path,
        stories,
        "[{name: sfa, p: 1.0, beta: 0.3}, sequential]",
        losses=True,
        evaluation="{every: 0.5, merges: true, during_limit: null}",
        record="{weights: all}",
        training=f"{{steps: 4, precision: {precision}}}",
    )
    finish(path, tmp_path / "out")
    learner, stream = loaded(path)
    points = lines(tmp_path / "out" / "curves.jsonl")
    averaged = [p for p in points if p["run"].startswith("sfa")]
    moments = [(p["stage"], p["step"], p["moment"]) for p in averaged if p["task"] == "tea"]
    assert moments == [
        *((0, step, "step") for step in (0, 2, 4)),
        *((1, step, "step") for step in (0, 2)),
        (1, 4, "before merge"),
        (1, 4, "after merge"),
        (1, 4, "step"),
    ]
    sfa, plain = (next((tmp_path / "out" / "runs").glob(f"{m}*")) for m in ("sfa", "sequential"))
    weights = {  # with p = 1 nothing is averaged before the last step
        (0, 4, "step"): sfa / "stage-0000.safetensors",
        (1, 0, "step"): sfa / "stage-0000.safetensors",
        (1, 4, "before merge"): plain / "stage-0001.safetensors",
        (1, 4, "after merge"): sfa / "stage-0001.safetensors",
        (1, 4, "step"): sfa / "stage-0001.safetensors",
    }
    for moment, file in weights.items():
        for task in stream.tasks:
            (point,) = [
                p
                for p in averaged
                if p["task"] == task.name and (p["stage"], p["step"], p["moment"]) == moment
            ]
            assert point["value"] == pytest.approx(loss_of(learner, file, task.test), rel=1e-5)
            assert (point["metric"], point["n"]) == ("loss", len(task.test))
    start = [p["value"] for p in averaged if (p["stage"], p["step"]) == (0, 0)]
    assert start == pytest.approx(summary_of(tmp_path / "out", "sfa")["b"], rel=1e-6)


# Losses as scores.


def train_alone(learner: TextLearner, task: Task, using: TrainingSettings, folder: Path) -> Any:
    start = learner.weights()
    run = TaskRun(
        stage=1,
        last=True,
        tasks=(task,),
        past=(),
        learner=learner,
        start=start,
        previous=start,
        memory=Memory(folder, 1),
        seed=1,  # the run's seed, 0, times 1,000,003, and the stage
        total_steps=STEPS,
        device=torch.device("cpu"),
    )
    train_task(METHODS["sequential"](), run, task.train, using, folder / "scratch")
    return learner.weights()


@pytest.fixture(scope="module")
def by_loss(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("losses")
    methods = (
        "[sequential, {name: task-arithmetic, weights: [[0.0, 1.0], [1.0, 0.0]]}, multitask,"
        " {name: multitask, without: sky}, {name: sfa, p: 0.25, earlier_p: 0.5, "
        "protect_base: true}]"
    )
    path = write(folder, stories, methods, losses=True, record="{weights: all}")
    finish(path, folder / "out")
    return path, folder / "out"


def test_losses_are_better_lower(by_loss):
    _, out = by_loss
    run = summary_of(out, "sequential")
    assert (run["metric"], run["better"]) == ("loss", "lower")
    (first, second), b = run["R"], run["b"]
    metrics = run["metrics"]
    assert metrics["average"] == pytest.approx((second[0] + second[1]) / 2)
    assert metrics["forgetting"] == pytest.approx(second[0] - first[0])  # how far it has risen
    assert metrics["bwt"] == pytest.approx(first[0] - second[0])
    assert metrics["fwt"] == pytest.approx(b[1] - first[1])  # how far it has fallen


def test_task_arithmetic_with_one_weight_is_that_expert(by_loss):
    path, out = by_loss
    first, second = (
        load_file(out / "runs" / f"task-arithmetic-weights{w}-seed0" / "model.safetensors")
        for w in ("1_0", "0_1")
    )
    # The first task's expert is what every method trains first.
    alone = load_file(next((out / "runs").glob("sequential*")) / "stage-0000.safetensors")
    for name in alone:
        torch.testing.assert_close(first[name], alone[name], rtol=0, atol=1e-6)
    # The second's is trained from theta_0 with the seed of a second stage.
    settings = load_experiment(path)
    learner, stream = loaded(path)
    expert = train_alone(learner, stream.tasks[1], settings.training, out.parent / "alone")
    for name in expert:
        torch.testing.assert_close(second[name], expert[name], rtol=0, atol=1e-6)
    assert max(float((second[name] - first[name]).abs().max()) for name in first) > 1e-3


def test_multitask_without_a_task_is_training_on_the_others(by_loss):
    path, out = by_loss
    found = json.loads((out / "summary.json").read_text())
    both, without = [run for run in found if run["method"] == "multitask"]
    assert both["metrics"]["steps"] == 2 * STEPS
    assert without["metrics"]["steps"] == STEPS
    assert without["settings"]["without"] == "sky"
    # One task is left, the first, trained as any method trains it.
    alone = load_file(next((out / "runs").glob("sequential*")) / "stage-0000.safetensors")
    model = load_file(out / "runs" / without["run"] / "model.safetensors")
    assert all(model[name].equal(alone[name]) for name in alone)
    assert without["R"][-1] == pytest.approx(summary_of(out, "sequential")["R"][0])
    with pytest.raises(ConfigError, match="no task 'sea'"):
        finish(path, out.parent / "x", "methods=[{name: multitask, without: sea}]")


def test_earlier_tasks_may_be_averaged_less_often(by_loss):
    _, out = by_loss
    events = [(m["stage"], m["step"]) for m in lines(out / "merges.jsonl")]
    assert events == [(0, 2), (0, 4), (1, 1), (1, 2), (1, 3), (1, 4)]


def test_divergence_is_from_the_model_before_on_the_new_task(by_loss):
    path, out = by_loss
    learner, stream = loaded(path)
    folder = next((out / "runs").glob("sequential*"))
    learner.module.eval()
    logs = []
    for stage in (0, 1):
        load_weights_(learner.module, load_file(folder / f"stage-{stage:04d}.safetensors"))
        batch: Any = stream.tasks[1].test.__getitems__(range(len(stream.tasks[1].test)))
        with torch.no_grad():
            logs.append(learner.predictions(batch).logits.double().log_softmax(-1))
    expected = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert summary_of(out, "sequential")["metrics"]["kl_from_anchor"] == pytest.approx(
        expected, rel=1e-4
    )


# Benchmarks.


def test_tasks_of_lm_evaluation_harness(stories, tmp_path):
    pytest.importorskip("lm_eval")
    documents = tmp_path / "docs.jsonl"
    documents.write_text(
        "".join(
            json.dumps({"text": text, "label": label}) + "\n"
            for text, label in (("Once upon a", 0), ("Lily and", 1), ("The sun is", 0))
        )
    )
    definition = {
        "task": "little",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(documents)}, "cache_dir": str(tmp_path / "cache")
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "label",
        "doc_to_choice": ["time", "Tom"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "little.yaml").write_text(yaml.safe_dump(definition))
    evaluation = f"{{lm_eval: [little], lm_eval_include: {tmp_path / 'include'}}}"
    path = write(tmp_path, stories, "[sequential]", losses=True, evaluation=evaluation)
    (run,) = finish(path, tmp_path / "out")
    scores = [s for s in lines(tmp_path / "out" / "scores.jsonl") if s["task"] == "lm-eval"]
    assert [(s["stage"], s["evaluation"], s["metric"], s["n"]) for s in scores] == [
        (stage, "little", "acc", 3) for stage in (-1, 0, 1)
    ]
    assert not any(s["headline"] for s in scores)
    assert (run["metric"], run["tasks"]) == ("loss", ["tea", "sky"])
    for name, score in zip(("start", "stage-0000", "stage-0001"), scores, strict=True):
        items = load_file(next((tmp_path / "out").glob(f"runs/*/items/{name}.safetensors")))
        own = items["lm-eval/little acc"]
        assert len(own) == 3
        assert score["value"] == pytest.approx(float(own.mean()))


PROBLEM = ProgramProblem(
    "little/0", "def two():\n", "two", "    return 2\n", "def check(f):\n    assert f() == 2\n"
)


@pytest.fixture
def programs(stories: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs an experiment whose second task is scored by a program."""
    path = write(tmp_path, stories, "[sequential]", evaluation="{max_new_tokens: 4, shots: 0}")

    def run(**consent: bool) -> Any:
        experiment = load_experiment(path, output=tmp_path / "out")
        stream = experiment.load_stream()
        benchmarks = {"humaneval": ProgramProblems((PROBLEM,))}
        code = dataclasses.replace(stream.tasks[1], benchmarks=benchmarks)
        stream = dataclasses.replace(stream, tasks=(stream.tasks[0], code))
        return run_experiment(experiment, stream=stream, programs=Programs(**consent))

    return run


def test_programs_are_not_run_without_consent(programs, tmp_path):
    with pytest.raises(ConfigError, match=r"sky: humaneval runs programs .* --run-programs"):
        programs()
    assert not (tmp_path / "out").exists()


def test_programs_may_be_left_out(programs):
    (run,) = programs(skip=True).summary
    # One of the tasks has nothing left but its loss: then the loss is the score of all.
    assert (run["metric"], run["better"]) == ("loss", "lower")
    assert not any(score["evaluation"] == "humaneval" for score in run["scores"])


def test_programs_are_run_with_consent(programs, tmp_path):
    try:
        Sandbox.strongest(allow_weak=True)
    except Exception as error:
        pytest.skip(str(error))
    (run,) = programs(run=True, allow_weak=True).summary
    assert run["metric"] == "score"  # accuracy here, pass@1 there
    (score,) = [s for s in run["scores"] if s["evaluation"] == "humaneval"]
    assert (score["metric"], score["value"], score["n"]) == ("pass@1", 0.0, 1)
    (text,) = [
        line
        for line in lines(next((tmp_path / "out").glob("runs/*/items/stage-0001.jsonl")))
        if line["task"] == "sky"
    ]
    assert (text["task_id"], text["passed"]) == ("little/0", False)
    assert math.isfinite(score["stderr"])


# What is refused before anything is loaded.


@pytest.mark.parametrize("method", ["{name: ewc, labels: exact}", "fisher-merging"])
def test_the_exact_expectation_over_texts_is_refused(stories, tmp_path, method):
    path = write(tmp_path, stories, f"[sequential, {method}]")
    with pytest.raises(ConfigError, match=r"1 problem in .*\n.*methods: .*labels = exact"):
        load_experiment(path)
