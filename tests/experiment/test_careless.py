"""What careless use and unusual models must not do: lie, lock, crash."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from stockpot.errors import ConfigError, DamagedRecordError
from stockpot.experiment import load_experiment
from support.experiments import lines, run_and_kill, run_file, write_experiment


@pytest.fixture
def path(tmp_path):
    return write_experiment(tmp_path, "[sequential]")


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "fisher-merging"])
def test_merging_averages_batchnorm_statistics(tmp_path, path, method):
    """Variances stay positive whatever the scale, and are the mean of the experts' variances."""
    overrides = [
        "model={name: conv, channels: [4], norm: batch}",
        "record.weights=all",
        "training.learning_rate=0.001",
    ]
    scale = "" if method == "fisher-merging" else ", scale: 1.0"
    merged = run_file(path, tmp_path / "m", [*overrides, f"methods=[{{name: {method}{scale}}}]"])
    assert not merged.failures
    # Experts: the same training from the same start, one task each.
    experts = []
    for task in range(3):
        run_file(path, tmp_path / f"e{task}", [*overrides, f"stream.order=[{task}]"])
        experts.append(load_file(next((tmp_path / f"e{task}").glob("runs/*/model.safetensors"))))
    final = load_file(next((tmp_path / "m").glob("runs/*/model.safetensors")))
    assert (final["1.running_var"] > 0).all()
    # Batches are drawn by seed and stage, so only the first expert is trained alike here.
    first = load_file(next((tmp_path / "m").glob("runs/*/stage-0000.safetensors")))
    torch.testing.assert_close(first["1.running_mean"], experts[0]["1.running_mean"])
    assert first["1.num_batches_tracked"] == experts[0]["1.num_batches_tracked"]


def test_settings_that_differ_have_runs_of_their_own(tmp_path, path):
    grid = "methods=[{name: ewc, strength: [1000001, 1000002], samples: [5, null]}]"
    outcome = run_file(path, tmp_path / "out", [grid])
    assert len({run["run"] for run in outcome.summary}) == 4
    assert len({run["label"] for run in outcome.summary}) == 4
    scored = {tuple(map(tuple, run["R"])) for run in outcome.summary}
    one_by_one = set()
    for number, (strength, samples) in enumerate(
        [(1000001, 5), (1000001, "null"), (1000002, 5), (1000002, "null")]
    ):
        alone = f"methods=[{{name: ewc, strength: {strength}, samples: {samples}}}]"
        (run,) = run_file(path, tmp_path / f"alone{number}", [alone]).summary
        one_by_one.add(tuple(map(tuple, run["R"])))
    assert scored == one_by_one


def test_resolved_experiment_keeps_null(tmp_path, path):
    methods = "methods=[{name: ewc, samples: [5, null]}, {name: sfa, every: 3}]"
    experiment = load_experiment(path, [methods])
    (tmp_path / "again.yaml").write_text(experiment.to_yaml())
    again = load_experiment(tmp_path / "again.yaml")
    assert [m.settings() for m in again.methods] == [m.settings() for m in experiment.methods]


def test_stage_of_other_settings_is_not_taken(tmp_path, path):
    run_file(path, tmp_path / "out")
    stages = lines(tmp_path / "out" / "stages.jsonl")
    stages[1]["key"] = "0" * 32
    text = "".join(json.dumps(line) + "\n" for line in stages)
    (tmp_path / "out" / "stages.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="made with other settings"):
        run_file(path, tmp_path / "out")


def test_a_typo_does_not_lock_the_folder(tmp_path, path):
    with pytest.raises(ConfigError, match="cannot be imported"):
        run_file(path, tmp_path / "out", ["model=no_module:make"])
    assert len(run_file(path, tmp_path / "out").summary) == 1


@pytest.mark.parametrize("damage", ["junk", "missing"])
def test_finished_models_are_checked(tmp_path, path, damage):
    run_file(path, tmp_path / "out")
    model = next((tmp_path / "out").glob("runs/*/model.safetensors"))
    if damage == "junk":
        model.write_bytes(b"junk" * 600)
    else:
        model.unlink()
    with pytest.raises(DamagedRecordError, match=r"model\.safetensors"):
        run_file(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "text"),
    [("experiment.json", "[]"), ("scores.jsonl", '{"run": "r", "stage": 0, "value": "x"}\n')],
)
def test_records_of_another_shape_are_damage(tmp_path, path, file, text):
    run_file(path, tmp_path / "out")
    (tmp_path / "out" / file).write_text(text)
    with pytest.raises(DamagedRecordError):
        run_file(path, tmp_path / "out")


def test_a_library_error_in_one_run_leaves_the_others(tmp_path, monkeypatch):
    from stockpot.methods.l2 import L2

    def broken(self, run):
        raise ZeroDivisionError("as a user's method might")

    monkeypatch.setattr(L2, "end_task", broken)
    path = write_experiment(tmp_path, "[l2, sequential]")
    outcome = run_file(path, tmp_path / "out")
    assert "ZeroDivisionError" in outcome.failures["l2-strength1-seed0"]
    assert "broken" in next((tmp_path / "out").rglob("error.txt")).read_text()
    assert [run["method"] for run in outcome.summary] == ["sequential"]


MODELS = {
    "channels_last": "nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), "
    "nn.Linear(256, labels)).to(memory_format=torch.channels_last)",
    "gru": "GRU(labels)",
    "looks_at_data": "Looks(labels)",
}
CODE = """
import torch
from torch import nn
class GRU(nn.Module):
    def __init__(self, labels):
        super().__init__()
        self.gru, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, labels)
    def forward(self, x):
        return self.head(self.gru(x.squeeze(1))[0][:, -1])
class Looks(nn.Module):
    def __init__(self, labels):
        super().__init__()
        self.head = nn.Linear(64, labels)
    def forward(self, x):
        return self.head(x.flatten(1)) * (2.0 if x.sum().item() > 0 else 1.0)
"""


@pytest.mark.parametrize("kind", MODELS)
def test_unusual_models_train_with_penalties_and_fisher_values(tmp_path, path, kind, monkeypatch):
    code = CODE + f"def make(image_shape, labels):\n    return {MODELS[kind]}\n"
    (tmp_path / f"unusual_{kind}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    outcome = run_file(
        path,
        tmp_path / "out",
        [f"model=unusual_{kind}:make", "methods=[l1, {name: ewc, samples: 6}, sfa]",
         "training.checkpoint_seconds=0"],
    )  # fmt: skip
    assert not outcome.failures
    sys.modules.pop(f"unusual_{kind}")


def test_labels_true_is_a_word(path):
    (method,) = load_experiment(path, ["methods=[{name: ewc, labels: true}]"]).methods
    assert method.settings()["labels"] == "true"


@pytest.mark.parametrize(
    "override",
    [
        "training.max_grad_norm=.inf",
        "seeds=[4294967296]",
        "training.batch_size=99999999999999999999",
        "methods.0={name: [a]}",
        "methods=[{name: fisher-merging, floor: .inf}]",
        "methods=[{name: l2, strength: 1.0e+300}]",
    ],
)
def test_absurd_values_are_refused_by_name(path, override):
    with pytest.raises(ConfigError):
        load_experiment(path, [override])


@pytest.mark.parametrize("text", ["a: &x [*x]\n", "when: 2020-13-45\n"])
def test_yaml_that_cannot_be(tmp_path, text):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"odd\.yaml"):
        load_experiment(tmp_path / "odd.yaml")


def test_model_that_is_too_large_is_an_error_of_the_model(tmp_path, path):
    with pytest.raises(ConfigError, match="cannot be built"):
        run_file(path, tmp_path / "out", ["model.hidden=[1000000000000000]"])


def test_output_that_is_a_file(tmp_path, path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot make the run folder"):
        run_file(path, tmp_path / "file")


def test_overrides_of_short_forms(path):
    experiment = load_experiment(path, ["model=pkg:make", "model.arguments.h=4"])
    assert experiment.model.model_dump()["arguments"] == {"h": 4}


def test_a_kill_leaves_a_summary_of_what_is_finished(tmp_path):
    path = write_experiment(tmp_path, "[sequential, sfa]")
    run_and_kill(path, tmp_path / "out", stage=2, step=6)  # of the first run
    assert not (tmp_path / "out" / "summary.json").exists()
    long = write_experiment(tmp_path, "[sequential, l1, l2]")
    run_file(long, tmp_path / "all")
    assert len(json.loads((tmp_path / "all" / "summary.json").read_text())) == 3


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_task_goes_on_from_its_checkpoint(tmp_path, path, stage):
    """The same weights prove no resume, training again gives them as well: count the steps."""
    from stockpot.experiment.observer import Observer

    class Counter(Observer):
        def __init__(self):
            self.steps = []

        def step(self, run, step, loss):
            self.steps.append(step)

    every_step = ["training.checkpoint_seconds=0"]
    run_and_kill(path, tmp_path / "out", every_step, stage=stage, step=4)
    counter = Counter()
    run_file(path, tmp_path / "out", every_step, observer=counter)
    # Step 4 was killed before its checkpoint: 4 to 6 of this task, and the tasks after it.
    assert counter.steps == [4, 5, 6, *([1, 2, 3, 4, 5, 6] * (2 - stage))]


def test_checkpoints_of_another_experiment_are_not_taken_up(tmp_path, path):
    every_step = ["training.checkpoint_seconds=0"]
    changed = [*every_step, "training.learning_rate=0.002"]
    run_and_kill(path, tmp_path / "out", every_step, stage=0, step=4)
    run_file(path, tmp_path / "out", changed)
    run_file(path, tmp_path / "fresh", changed)
    ours, fresh = (
        next((tmp_path / name).glob("runs/*/model.safetensors")).read_bytes()
        for name in ("out", "fresh")
    )
    assert ours == fresh
