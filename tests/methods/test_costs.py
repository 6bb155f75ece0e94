"""What a method keeps and does beside training, against bytes and passes counted by hand."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from stockpot.experiment.observer import Observer
from stockpot.methods import METHODS, Memory, Method, TaskRun
from stockpot.methods.base import Stored
from stockpot.models.learner import ImageLearner, mlp
from stockpot.streams.data import ImageData, Mixture
from stockpot.streams.tokens import Ragged, TextData
from stockpot.training.settings import TrainingSettings
from support.experiments import SETTINGS, STEPS_PER_TASK, lines, run_file, write_experiment
from support.text import write_model, write_tasks, write_text_experiment

# The model of these experiments: 64 pixels, 8 hidden units, 2 labels, in float32. A task has 48
# images of 64 pixels in float32, each with a label in int64.
NUMBERS = 64 * 8 + 8 + 8 * 2 + 2
MODEL = 4 * NUMBERS
TASK = 48 * (64 * 4 + 8)

Bytes = tuple[int, int, int]
"""Weights, data, other."""
KEPT: dict[str, Callable[[int], Bytes]] = {
    # By the number of tasks so far.
    "sequential": lambda tasks: (0, 0, 0),
    "multitask": lambda tasks: (0, 3 * TASK, 0),
    "rehearsal": lambda tasks: (0, tasks * TASK, 0),
    "l1": lambda tasks: (MODEL, 0, 0),
    "l2": lambda tasks: (MODEL, 0, 0),
    "ewc": lambda tasks: (MODEL, 0, MODEL + 8),
    "sfa": lambda tasks: (MODEL, 0, 0),
    "wise-ft": lambda tasks: (MODEL, 0, 0),
    "task-arithmetic": lambda tasks: ((1 + tasks) * MODEL, 0, 0),
    "ties": lambda tasks: ((1 + tasks) * MODEL, 0, 0),
    "fisher-merging": lambda tasks: ((1 + tasks) * MODEL, 0, tasks * MODEL),
}
EXTRA = {"ewc": [20, 20, 0], "fisher-merging": [2 * 20] * 3}  # exact: a pass for each label
methods = pytest.mark.parametrize("name", sorted(METHODS))


def test_every_method_has_an_answer_here():
    assert KEPT.keys() == SETTINGS.keys() == METHODS.keys()


def test_a_method_without_an_answer_is_no_method_that_keeps_nothing():
    class Forgetful(Method):
        name = "forgetful"

    with pytest.raises(NotImplementedError, match=r"Forgetful\.stored"):
        Forgetful().stored(None)  # type: ignore[arg-type]


class Memories(Observer):
    """Reads what methods have written to keep it, at the end of every stage."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.found: dict[int, dict[str, np.ndarray]] = {}

    def stage_ends(self, run: Any, stage: Any, *rest: Any) -> None:
        files = sorted((self.out / "runs" / run.id / "memory").glob("*.safetensors"))
        self.found[stage.number] = {
            f"{path.stem}/{name}": values
            for path in files
            for name, values in load_file(path).items()
        }

    def bytes(self, stage: int, *words: str) -> int:
        """Of the tensors whose file and name have all these words."""
        return sum(
            values.nbytes
            for name, values in self.found[stage].items()
            if all(word in name for word in words)
        )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished record of each method, and what its memory held on the way."""
    made: dict[str, tuple[Path, Memories]] = {}

    def get(name: str) -> tuple[Path, Memories]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            path = write_experiment(folder, f"[{SETTINGS[name]}]")
            watch = Memories(folder / "out")
            assert not run_file(path, folder / "out", observer=watch).failures
            made[name] = folder / "out", watch
        return made[name]

    return get


def stages(out: Path) -> list[dict[str, Any]]:
    return lines(out / "stages.jsonl")


@methods
def test_bytes_are_those_counted_by_hand(finished, name):
    out, _ = finished(name)
    found = [tuple(line["stored"][k] for k in ("weights", "data", "other")) for line in stages(out)]
    # After the last task it is what a fourth task would need.
    count = 1 if METHODS[name].joint else 3
    assert found == [KEPT[name](tasks) for tasks in range(1, count + 1)]


@methods
def test_bytes_are_those_that_the_method_really_wrote(finished, name):
    """The memory's own files; the last stage writes none, for no task will ask for them."""
    out, watch = finished(name)
    for line in stages(out)[:-1]:
        stage, stored = line["stage"], line["stored"]
        written = watch.bytes(stage, "")
        if name == "ewc":  # the sum before this one stays until its stage cannot be done again
            last = f"ewc-{stage:04d}"
            assert watch.bytes(stage, last, "centre.") == stored["weights"]
            assert watch.bytes(stage, last) == stored["weights"] + stored["other"]
            assert written <= 2 * (stored["weights"] + stored["other"])
        elif name in ("task-arithmetic", "ties", "fisher-merging"):
            assert watch.bytes(stage, "expert-") + MODEL == stored["weights"]  # and theta_0
            assert watch.bytes(stage, "fisher-") == stored["other"]
            assert written == stored["weights"] - MODEL + stored["other"]
        else:  # the anchor is the model before, the data are the stream's
            assert written == 0


@methods
def test_extra_passes(finished, name):
    out, _ = finished(name)
    assert [line["extra_examples"] for line in stages(out)] == EXTRA.get(
        name, [0] * len(stages(out))
    )


@methods
def test_the_summary_has_the_largest_and_the_sums(finished, name):
    out, _ = finished(name)
    (run,) = json.loads((out / "summary.json").read_text())
    metrics = run["metrics"]
    assert metrics["stored_bytes"] == max(sum(KEPT[name](tasks)) for tasks in (1, 2, 3))
    assert metrics["extra_examples"] == sum(EXTRA.get(name, [0]))
    # 2 epochs of 48 images a task; jointly 18 steps of 16 of the 144 images are 2 epochs too.
    assert metrics["trained_examples"] == 3 * 2 * 48


@methods
def test_a_record_from_before_they_were_counted_is_read(finished, name, tmp_path):
    import shutil

    out, _ = finished(name)
    shutil.copytree(out, tmp_path / "old")
    path = tmp_path / "experiment.yaml"
    path.write_text((out / "experiment.yaml").read_text())
    new = ("stored", "extra_examples", "trained_examples")
    old = [{k: v for k, v in line.items() if k not in new} for line in stages(out)]
    text = "".join(json.dumps(line) + "\n" for line in old)
    (tmp_path / "old" / "stages.jsonl").write_text(text)
    (run,) = run_file(path, tmp_path / "old").summary
    for key in ("stored_bytes", "extra_examples", "trained_examples"):
        assert run["metrics"][key] is None
    assert run["metrics"]["steps"] == 3 * STEPS_PER_TASK


# Passes.


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ("{name: ewc, samples: null}", 48 + 48),
        ("{name: ewc, samples: 7, labels: 'true'}", 7 + 7),
        ("{name: ewc, samples: 100000}", 48 + 48),
        ("{name: ewc, samples: 5, labels: exact}", 5 * 2 + 5 * 2),
        ("{name: fisher-merging, samples: 5, labels: sampled}", 3 * 5),
    ],
)
def test_passes_follow_samples_and_labels(tmp_path, method, passes):
    path = write_experiment(tmp_path, f"[{method}]")
    (run,) = run_file(path, tmp_path / "out").summary
    assert run["metrics"]["extra_examples"] == passes


COUNTER = """
from torch import nn
seen = []
class Counting(nn.Module):
    def __init__(self, labels):
        super().__init__()
        self.linear = nn.Linear(64, labels)
    def forward(self, images):
        if self.training:
            seen.append(len(images))
        return self.linear(images.flatten(1))
def make(image_shape, labels):
    return Counting(labels)
"""


@pytest.fixture
def counter(tmp_path, monkeypatch):
    """A model that counts the images that it is trained on."""
    (tmp_path / "counting_model.py").write_text(COUNTER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "counting_model", raising=False)

    def seen() -> list[int]:
        return list(sys.modules["counting_model"].seen)

    return seen


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"epochs": 3, "batch_size": 20},  # the third batch of an epoch has 8
        {"steps": 4, "batch_size": 20},
        {"steps": 2, "batch_size": 20},
        {"steps": 7, "batch_size": 10, "gradient_accumulation": 2},
        {"steps": 8, "batch_size": 10, "gradient_accumulation": 3},
        {"epochs": 2, "batch_size": 7, "gradient_accumulation": 4},
        {"steps": 3, "batch_size": 100},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["sequential", "multitask", "rehearsal"])
def test_trained_examples_are_those_that_the_model_saw(tmp_path, counter, training, method):
    path = write_experiment(tmp_path, f"[{method}]")
    overrides = [f"training.{key}={value}" for key, value in training.items()]
    (run,) = run_file(path, tmp_path / "out", ["model=counting_model:make", *overrides]).summary
    assert run["metrics"]["trained_examples"] == sum(counter())


@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 5), st.integers(1, 60))
def test_examples_in_steps_by_walking_through_them(examples, batch, accumulation, steps):
    settings = TrainingSettings(batch_size=batch, gradient_accumulation=accumulation)
    seen = done = 0
    while done < steps:
        batches = [min(batch, examples - begin) for begin in range(0, examples, batch)]
        while batches and done < steps:
            seen += sum(batches[:accumulation])
            batches, done = batches[accumulation:], done + 1
    assert settings.examples_in(steps, examples) == seen


# What is not like the small network: buffers, frozen weights, other types, adapters.


def asked(name: str, module: torch.nn.Module) -> Stored:
    """What a method says after the second of its tasks."""
    from stockpot.streams.data import Task

    learner = ImageLearner(module)
    data = ImageData(torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64))
    weights = learner.weights()
    run = TaskRun(
        stage=1,
        last=False,
        tasks=(Task("b", data, data),),
        past=(Task("a", data, data),),
        learner=learner,
        start=weights,
        previous=weights,
        memory=Memory(Path("unused"), 1),
        seed=0,
        total_steps=1,
        device=torch.device("cpu"),
    )
    return METHODS[name]().stored(run)


def normalised() -> torch.nn.Module:
    """20 numbers that train, 6 that do not, 2 x 5 running statistics and a counter."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 5, bias=False), torch.nn.BatchNorm1d(5))
    module.append(torch.nn.Linear(6, 1, bias=False)).requires_grad_(True)
    module[2].weight.requires_grad_(False)
    return module


@pytest.mark.parametrize("name", ["l1", "l2", "sfa", "wise-ft"])
def test_the_anchor_is_of_the_weights_that_train(name):
    assert asked(name, normalised()) == Stored(weights=4 * 20)
    assert asked(name, normalised().to(torch.bfloat16)) == Stored(weights=2 * 20)


@pytest.mark.parametrize("name", ["task-arithmetic", "ties"])
def test_an_expert_is_a_whole_model(name):
    whole = 4 * (20 + 6 + 10) + 8  # the counter is int64
    assert asked(name, normalised()) == Stored(weights=3 * whole)


def test_fisher_values_are_in_float32_whatever_the_model_is_in():
    assert asked("ewc", normalised().to(torch.bfloat16)) == Stored(weights=80, other=80 + 8)


def text_run(folder: Path, method: str, model: str = "", **more: str) -> dict[str, Any]:
    gpt2 = write_model(folder / "gpt2", "gpt2")
    tasks = write_tasks(folder, columns=("prompt", "response"))
    path = write_text_experiment(
        folder, tasks, f"{{id: {gpt2}, max_length: 48{model}}}", f"[{method}]", **more
    )
    (run,) = run_file(path, folder / "out").summary
    return {**run["metrics"], "stages": stages(folder / "out")}


def gpt2_bytes() -> int:
    """Bytes of the small GPT-2 of these tests, its output layer tied to its input."""
    from support.text import SIZES, byte_tokenizer

    size, layers = SIZES["gpt2"]["n_embd"], SIZES["gpt2"]["n_layer"]
    a_layer = 2 * 2 * size + (size + 1) * 3 * size + (size + 1) * size + 8 * size**2 + 5 * size
    embedded = (len(byte_tokenizer()) + SIZES["gpt2"]["n_positions"]) * size
    return 4 * (embedded + layers * a_layer + 2 * size)


@pytest.mark.parametrize(
    ("method", "models"),
    [("{name: sfa, p: 0.5}", 0), ("wise-ft", 1), ("task-arithmetic", 3), ("sequential", 0)],
)
def test_of_adapters(tmp_path, method, models):
    """Exact averaging needs no second model; whoever averages whole models keeps whole ones."""
    pytest.importorskip("peft")
    found = text_run(tmp_path, method, ", lora: {r: 2, alpha: 8}")
    assert found["stored_bytes"] == models * gpt2_bytes()


def test_of_texts(tmp_path):
    found = text_run(tmp_path, "{name: ewc, samples: 3}", record="{weights: all}")
    assert found["stored_bytes"] == 2 * gpt2_bytes() + 8
    assert [line["extra_examples"] for line in found["stages"]] == [3, 0]
    assert found["trained_examples"] == 4 * 4 + 4 * 4 - 2 * 2  # of 10 rows the third batch has 2


# Data.


def test_images_count_by_their_rows_and_their_type():
    images = torch.zeros(10, 3, 4, 4, dtype=torch.uint8)
    whole = ImageData(images, torch.zeros(10, dtype=torch.int64))
    part = whole.subset(torch.tensor([2, 3, 5]))
    assert whole.nbytes() == 10 * (48 + 8)
    assert part.nbytes() == 3 * (48 + 8)
    assert Mixture([part, whole]).nbytes() == 13 * (48 + 8)
    turned = ImageData(images.float(), whole.labels, permutation=torch.arange(48))
    assert turned.nbytes() == 10 * (4 * 48 + 8)


def test_images_that_lie_on_disk_count_as_they_lie(tmp_path):
    file = np.memmap(tmp_path / "pixels", np.uint8, mode="w+", shape=(6, 1, 5, 5))
    data = ImageData(torch.from_numpy(file), torch.zeros(6, dtype=torch.int64))
    assert data.nbytes() == (tmp_path / "pixels").stat().st_size + 6 * 8


def test_texts_count_by_their_tokens():
    inputs = Ragged.of([[1, 2, 3], [4], [5, 6]])  # int32
    causal = TextData(inputs, torch.ones(6, dtype=torch.bool), None, pad=0)
    assert causal.nbytes() == 6 * (4 + 1)
    assert causal.subset(torch.tensor([0, 2])).nbytes() == 5 * (4 + 1)
    both = TextData(inputs, None, Ragged.of([[7], [8, 9], [1, 1, 1, 1]]), pad=0)
    assert both.nbytes() == 6 * 4 + 7 * 4
    assert both.subset(torch.tensor([1])).nbytes() == 4 + 2 * 4


def test_the_numbers_of_the_small_network():
    module = mlp((1, 8, 8), (8,), 2)
    assert sum(parameter.numel() for parameter in module.parameters()) == NUMBERS
