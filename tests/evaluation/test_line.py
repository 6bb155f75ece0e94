"""The loss along the line, against numpy and plain loops; what it must leave as it was."""

import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from torch import nn

from stockpot.errors import ConfigError, DamagedRecordError
from stockpot.evaluation.line import interpolate, scores_along_line, spread
from stockpot.experiment import load_experiment
from stockpot.experiment.observer import Observer
from stockpot.models.learner import ImageLearner, conv, copy_weights
from stockpot.streams.data import ImageData
from support.experiments import lines, record_of, run_and_kill, run_file, write_experiment
from support.text import write_model, write_tasks, write_text_experiment

METHODS = (
    "[sequential, {name: sfa, p: 0.5, beta: 0.3}, {name: wise-ft, beta: 0.4}, task-arithmetic]"
)
LINE = "{line: 5, line_limit: null}"
ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]


def finish(path: Path, output: Path, *overrides: str, **options: Any) -> Path:
    outcome = run_file(path, output, overrides, **options)
    assert not outcome.failures
    return output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("line")
    path = write_experiment(folder, METHODS, evaluation=LINE, record="{weights: all}")
    return path, finish(path, folder / "out")


# The numbers.


def between(run: Path, stage: int, alpha: float) -> dict[str, np.ndarray]:
    """Interpolated from the files of a run, in float64."""
    before, after = (load_arrays(run / f"stage-{n:04d}.safetensors") for n in (stage - 1, stage))
    return {
        name: (1 - alpha) * before[name].astype(np.float64) + alpha * after[name].astype(np.float64)
        if after[name].dtype.kind == "f"
        else after[name]
        for name in after
    }


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def judged(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The loss of every image, and whether it is right."""
    losses = -log_probabilities(logits)[np.arange(len(labels)), labels]
    return {"loss": losses, "accuracy": (logits.argmax(axis=1) == labels).astype(float)}


def numpy_mlp(weights: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    hidden = images.reshape(len(images), -1) @ weights["1.weight"].T + weights["1.bias"]
    return np.maximum(hidden, 0) @ weights["3.weight"].T + weights["3.bias"]


def check_against(out: Path, path: Path, logits_of: Any) -> int:
    """Every line of ``lines.jsonl`` against an independent model; returns how many there were."""
    stream = load_experiment(path).load_stream()
    found = lines(out / "lines.jsonl")
    for line in found:
        (task,) = [task for task in stream.tasks if task.name == line["task"]]
        data = task.test
        assert isinstance(data, ImageData)
        images = data.images[data.rows].double().numpy()
        labels = data.labels[data.rows].numpy()
        weights = between(out / "runs" / line["run"], line["stage"], line["alpha"])
        logits = logits_of(weights, images)
        if data.allowed is not None:
            logits = np.where(data.allowed.numpy(), logits, -np.inf)
        items = judged(logits, labels)[line["metric"]]
        assert line["value"] == pytest.approx(items.mean(), abs=1e-5)
        assert line["stderr"] == pytest.approx(items.std() / math.sqrt(len(items)), abs=1e-5)
        assert line["n"] == len(items) == 30
        assert line["better"] == {"loss": "lower", "accuracy": "higher"}[line["metric"]]
        assert line["trained"] == stream.tasks[line["stage"]].name
    return len(found)


def test_every_point_is_that_of_the_interpolated_weights(made):
    path, out = made
    runs = [run["run"] for run in json.loads((out / "summary.json").read_text())]
    tasks = ["0-1", "2-3", "4-5"]
    expected = Counter(
        (run, stage, alpha, task, metric)
        for run in runs
        for stage in (1, 2)  # before the first task the weights are drawn by chance
        for alpha in ALPHAS
        for task in tasks
        for metric in ("loss", "accuracy")
    )
    keys = ("run", "stage", "alpha", "task", "metric")
    found = Counter(tuple(line[key] for key in keys) for line in lines(out / "lines.jsonl"))
    assert found == expected
    assert check_against(out, path, numpy_mlp) == 4 * 2 * 5 * 3 * 2


def test_the_points_differ_as_lines_do(made):
    """So that the comparison above compares something: ends, middles, methods and tasks differ."""
    _, out = made
    losses = [line["value"] for line in lines(out / "lines.jsonl") if line["metric"] == "loss"]
    assert len(set(losses)) > 0.8 * len(losses)
    assert max(losses) - min(losses) > 0.1


def test_only_the_labels_that_a_task_allows_compete(tmp_path):
    path = write_experiment(
        tmp_path, "[sequential]", evaluation="{line: 3}", record="{weights: all}"
    )
    out = finish(path, tmp_path / "out", "stream.scenario=task-incremental")
    text = (out / "experiment.yaml").read_text()
    (tmp_path / "resolved.yaml").write_text(text)
    assert check_against(out, tmp_path / "resolved.yaml", numpy_mlp) == 2 * 3 * 3 * 2


def test_statistics_of_batch_norm_are_interpolated_and_its_counter_is_not(tmp_path):
    path = write_experiment(
        tmp_path, "[sequential]", evaluation="{line: 3}", record="{weights: all}"
    )
    network = ["model={name: conv, channels: [4], norm: batch}"]
    out = finish(path, tmp_path / "out", *network)
    (tmp_path / "resolved.yaml").write_text((out / "experiment.yaml").read_text())

    def network_of(weights: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
        module = conv((1, 8, 8), (4,), 2, "batch").double().eval()
        state = {name: torch.from_numpy(np.asarray(weight)) for name, weight in weights.items()}
        module.load_state_dict(state)
        with torch.no_grad():
            logits: np.ndarray = module(torch.from_numpy(images)).numpy()
        return logits

    assert check_against(out, tmp_path / "resolved.yaml", network_of) == 2 * 3 * 3 * 2
    before, after = (load_file(next(out.glob(f"runs/*/stage-{n:04d}.safetensors"))) for n in (0, 1))
    (counter,) = [name for name, weight in after.items() if not weight.is_floating_point()]
    assert before[counter] != after[counter]
    assert interpolate(before, after, 0.25)[counter] == after[counter]


def test_the_ends_are_the_scores_that_are_taken_anyway(made):
    _, out = made
    scores = {(s["run"], s["stage"], s["task"]): s["value"] for s in lines(out / "scores.jsonl")}
    ends = [
        line
        for line in lines(out / "lines.jsonl")
        if line["metric"] == "accuracy" and line["alpha"] in (0, 1)
    ]
    assert len(ends) == 4 * 2 * 3 * 2
    for line in ends:
        stage = line["stage"] - 1 + int(line["alpha"])
        assert line["value"] == scores[line["run"], stage, line["task"]]


# Text.


@pytest.fixture(scope="module")
def of_text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("text")
    path = text_experiment(folder, "[sequential, {name: sfa, p: 0.5, beta: 0.3}]")
    return path, finish(path, folder / "out")


def text_experiment(folder: Path, methods: str, model: str = "", **more: str) -> Path:
    gpt2 = write_model(folder / "gpt2", "gpt2")
    tasks = write_tasks(folder, columns=("prompt", "response"))
    more = {"evaluation": "{line: 3}", "record": "{weights: all}", **more}
    return write_text_experiment(
        folder, tasks, f"{{id: {gpt2}, max_length: 48{model}}}", methods, **more
    )


def test_a_pre_trained_start_is_an_anchor_too(of_text):
    _, out = of_text
    stages = Counter((line["run"], line["stage"]) for line in lines(out / "lines.jsonl"))
    assert set(stages.values()) == {3 * 2}  # points x tasks: of text the loss alone
    assert {stage for _, stage in stages} == {0, 1}
    check_ends(out)


def check_ends(out: Path) -> None:
    """The loss at both ends is the held-out loss of the record, to the last bit."""
    scores = {
        (s["run"], s["stage"], s["task"]): s
        for s in lines(out / "scores.jsonl")
        if s["metric"] == "loss"
    }
    ends = [line for line in lines(out / "lines.jsonl") if line["alpha"] in (0, 1)]
    assert ends
    for line in ends:
        score = scores[line["run"], line["stage"] - 1 + int(line["alpha"]), line["task"]]
        assert {k: line[k] for k in ("value", "n", "stderr")} == {
            k: score[k] for k in ("value", "n", "stderr")
        }


def test_fresh_weights_are_no_anchor(tmp_path):
    path = text_experiment(tmp_path, "[sequential]", ", pretrained: false")
    found = lines(finish(path, tmp_path / "out") / "lines.jsonl")
    assert {line["stage"] for line in found} == {1}


def test_loss_of_texts_is_that_of_a_plain_loop(of_text, tmp_path):
    """One example at a time, unpadded, in float64."""
    from transformers import AutoModelForCausalLM

    path, out = of_text
    stream = load_experiment(path).load_stream()
    run = out / "runs" / "sfa-p0.5-beta0.3-seed0"
    weights = {n: torch.from_numpy(w) for n, w in between(run, 1, 0.5).items()}
    module = AutoModelForCausalLM.from_pretrained(path.parent / "gpt2").double().eval()
    assert not module.load_state_dict(weights, strict=False).unexpected_keys
    for task in stream.tasks:
        total, count = 0.0, 0
        for row in range(len(task.test)):
            batch = task.test.__getitems__([row])
            tokens, labels = batch["input_ids"][0], batch["labels"][0]
            with torch.no_grad():
                logits = module(tokens[None]).logits[0]
            for place in range(1, len(tokens)):
                if labels[place] >= 0:
                    total -= float(logits[place - 1].log_softmax(0)[tokens[place]])
                    count += 1
        (line,) = [
            line
            for line in lines(out / "lines.jsonl")
            if (line["run"], line["stage"], line["alpha"], line["task"])
            == (run.name, 1, 0.5, task.name)
        ]
        assert line["value"] == pytest.approx(total / count, abs=1e-5)
        assert (line["metric"], line["better"], line["n"]) == ("loss", "lower", len(task.test))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_ends_are_scored_in_the_precision_of_the_scores(tmp_path, precision):
    path = text_experiment(
        tmp_path, "[sequential]", evaluation=f"{{line: 3, precision: {precision}}}"
    )
    check_ends(finish(path, tmp_path / "out"))


def test_of_adapters_the_line_is_between_merged_models(tmp_path):
    pytest.importorskip("peft")
    path = text_experiment(tmp_path, "[{name: sfa, p: 0.5, beta: 0.3}]", ", lora: {r: 2, alpha: 8}")
    out = finish(path, tmp_path / "out")
    check_ends(out)
    without = finish(path, tmp_path / "without", "evaluation.line=0")
    same_but_for_the_line(out, without)


# What it leaves as it was.


def same_but_for_the_line(out: Path, without: Path) -> None:
    one, other = record_of(out), record_of(without)
    assert "lines.jsonl" in one.pop("files")
    assert "lines.jsonl" not in other.pop("files")
    assert one == other  # scores, and the hashes of all weights


def test_a_run_is_the_same_without_it(made, tmp_path):
    path, out = made
    same_but_for_the_line(out, finish(path, tmp_path / "without", "evaluation.line=0"))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = conv((1, 8, 8), (3,), 4, "batch")
    module(torch.rand(8, 1, 8, 8))  # moves the statistics
    return module


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_model_has_its_weights_again_and_its_modes(kind):
    module = network(0).to(kind)
    module[1].eval()
    anchor, deployed = copy_weights(network(1).to(kind)), copy_weights(module)
    data = ImageData(torch.rand(9, 1, 8, 8), torch.arange(9) % 4)
    learner = ImageLearner(module, lambda images: images.to(kind))
    kept = {name: weight.clone() for name, weight in anchor.items()}
    points = scores_along_line(anchor, deployed, learner, {"a": data}, 4, 2, "cpu")
    assert len(points) == 4 * 2
    for name, weight in copy_weights(module).items():
        assert weight.equal(deployed[name])
        assert anchor[name].equal(kept[name])
    assert [part.training for part in module] == [True, False, True, True, True, True]


def test_progress_counts_tasks_at_points():
    module = network(0)
    data = ImageData(torch.rand(9, 1, 8, 8), torch.arange(9) % 4)
    seen: list[tuple[int, int]] = []
    scores_along_line(
        copy_weights(network(1)),
        copy_weights(module),
        ImageLearner(module),
        {"a": data, "b": data},
        3,
        4,
        "cpu",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(n, 6) for n in range(1, 7)]


class Division(nn.Module):
    """Divides by its weight: nothing is finite where that is 0."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) / self.weight


def test_an_overflow_on_the_way_is_said_and_stops_nothing():
    ends = [copy_weights(Division(weight)) for weight in (-1.0, 1.0)]
    images = torch.tensor([[1.0, 2.0], [3.0, 1.0]]).view(2, 2, 1, 1)
    data = ImageData(images, torch.tensor([1, 1]))
    points = scores_along_line(*ends, ImageLearner(Division(1.0)), {"a": data}, 3, 2, "cpu")
    found = {(p.alpha, p.metric): p.value for p in points}
    assert found[0.5, "loss"] is None
    assert found[0.5, "accuracy"] == 0
    assert found[0, "accuracy"] == found[1, "accuracy"] == 0.5
    loss = np.log1p(np.exp([-1.0, 2.0])).mean()  # by hand: logits 1, 2 and 3, 1; label 1
    assert found[1, "loss"] == pytest.approx(loss)


class Scoring(Observer):
    """Counts what is scored along lines."""

    def __init__(self) -> None:
        self.points = 0

    def scoring(self, run, what: str, done: int, total: int) -> None:
        self.points += what.startswith("line")


def test_what_runs_share_is_measured_once(tmp_path):
    path = text_experiment(tmp_path, "[sequential, {name: sfa, p: 0.5, beta: 0.3}]")
    watch = Scoring()
    out = finish(path, tmp_path / "out", observer=watch)
    # The first task is the same model in both runs; the second is not.
    assert watch.points == 3 * 2 * (1 + 2)
    first = [line for line in lines(out / "lines.jsonl") if line["stage"] == 0]
    one, other = (
        [{k: v for k, v in line.items() if k != "run"} for line in first if line["run"] == run]
        for run in dict.fromkeys(line["run"] for line in first)
    )
    assert one == other
    assert len(one) == 3 * 2
    alone = finish(path, tmp_path / "alone", share_prefixes=False)
    assert lines(alone / "lines.jsonl") == lines(out / "lines.jsonl")


# Kills and damage.


def writes_of(path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that an undisturbed run makes durable, in order."""
    names: list[str] = []
    real = os.fsync

    def fsync(file: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        finish(path, out)
    return names


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_kill_between_the_line_and_its_stage_leaves_nothing(tmp_path, monkeypatch):
    path = write_experiment(tmp_path, "[{name: sfa, p: 0.5}]", evaluation="{line: 3}")
    whole = tmp_path / "whole"
    names = writes_of(path, whole, monkeypatch)
    points = [n for n, name in enumerate(names) if name == "lines.jsonl"]
    assert len(points) == 2
    assert names[points[0] + 1] == "scores.jsonl"
    for number, moment in enumerate((points[0], points[0] + 1, points[1], points[1] + 1)):
        out = tmp_path / f"killed-{number}"
        run_and_kill(path, out, fsync=moment)
        finished = {line["stage"] for line in lines(out / "stages.jsonl")}
        left = {line["stage"] for line in lines(out / "lines.jsonl")}
        assert left - finished == {1 + number // 2}, "the kill came at another moment"
        finish(path, out)
        assert (out / "lines.jsonl").read_bytes() == (whole / "lines.jsonl").read_bytes()
        assert record_of(out) == record_of(whole)


def test_half_a_line_and_a_damaged_one(made, tmp_path):
    path, out = made
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    with (copy / "lines.jsonl").open("a") as file:
        file.write('{"run": "seq')
    finish(path, copy)
    assert (copy / "lines.jsonl").read_bytes() == (out / "lines.jsonl").read_bytes()
    text = (copy / "lines.jsonl").read_text().splitlines(keepends=True)
    text[2] = text[2][:30] + "\n"
    (copy / "lines.jsonl").write_text("".join(text))
    with pytest.raises(DamagedRecordError, match=r"lines\.jsonl:3: damaged line"):
        run_file(path, copy)


# Settings.


@pytest.mark.parametrize("points", [1, 2, -1])
def test_a_line_needs_three_points(tmp_path, points):
    path = write_experiment(tmp_path, "[sequential]", evaluation=f"{{line: {points}}}")
    with pytest.raises(ConfigError, match=r"evaluation\.line"):
        load_experiment(path)


def test_it_is_not_measured_unless_asked_for(tmp_path):
    path = write_experiment(tmp_path, "[sequential]")
    assert load_experiment(path).evaluation.line == 0
    assert not (finish(path, tmp_path / "out") / "lines.jsonl").exists()


def test_a_folder_from_before_there_were_lines_goes_on(tmp_path):
    path = write_experiment(tmp_path, "[sequential]")
    out = finish(path, tmp_path / "out")
    described = json.loads((out / "experiment.json").read_text())
    for key in ("line", "line_limit"):
        del described["evaluation"][key]
    (out / "experiment.json").write_text(json.dumps(described))
    finish(path, out, "methods=[sequential, l2]")
    with pytest.raises(ConfigError, match=r"evaluation\.line: 0 there, 3 now"):
        run_file(path, out, ["evaluation.line=3"])


@given(st.integers(1, 60), st.integers(1, 70))
def test_examples_are_spread_over_sorted_data(examples, limit):
    labels = torch.arange(examples)
    data = ImageData(torch.zeros(examples, 1, 1, 1), labels)
    chosen = spread(data, limit)
    kept = chosen.__getitems__(range(len(chosen)))["labels"].tolist()
    assert len(kept) == min(limit, examples)
    assert kept == sorted(set(kept))
    gaps = np.diff([*kept, examples + kept[0]])  # around the circle
    assert gaps.max() - gaps.min() <= 1
    assert len(spread(data, None)) == examples
