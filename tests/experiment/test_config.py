"""A wrong experiment is refused before anything is loaded, with its place and the remedy."""

import subprocess
import sys

import pytest
import yaml

from stockpot.errors import ConfigError
from stockpot.experiment import load_experiment
from stockpot.experiment.plan import make_plan

GOOD = """\
stream: {name: digits, split: even-odd}
model: mlp
training:
  epochs: 2
methods:
  - sequential
  - {name: sfa, p: [0.25, 0.5], beta: [0.2, 0.5]}
seeds: [0, 1]
"""


def load(tmp_path, text, overrides=()):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return load_experiment(path, overrides)


def refusal(tmp_path, text, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, overrides)
    return str(caught.value)


def test_grid_is_the_product_of_its_lists(tmp_path):
    experiment = load(tmp_path, GOOD)
    points = [(m.name, m.settings().get("p"), m.settings().get("beta")) for m in experiment.methods]
    assert points == [
        ("sequential", None, None),
        ("sfa", 0.25, 0.2),
        ("sfa", 0.25, 0.5),
        ("sfa", 0.5, 0.2),
        ("sfa", 0.5, 0.5),
    ]
    assert experiment.seeds == (0, 1)
    assert str(experiment.output) == "runs/x"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("epochs: 2", "epoch: 2", ["x.yaml:4", "training.epoch", "did you mean 'epochs'?"]),
        ("epochs: 2", "epochs: 0", ["x.yaml:4", "training.epochs", "greater than or equal to 1"]),
        ("epochs: 2", "epochs: two", ["training.epochs", "'two'", "integer"]),
        ("epochs: 2", "epochs: true", ["training.epochs", "True is not a number"]),
        ("seeds: [0, 1]", "seed: [0, 1]", ["x.yaml:8", "did you mean 'seeds'?"]),
        ("seeds: [0, 1]", "seeds: [0, 0]", ["seeds", "different"]),
        ("seeds: [0, 1]", "seeds: [-1]", ["seeds", "[-1]"]),
        ("name: sfa", "name: sfq", ["x.yaml:7", "methods.1.name", "did you mean 'sfa'?"]),
        ("p: [0.25, 0.5]", "p: [0.25, 0]", ["x.yaml:7", "methods.1.p", "greater than 0"]),
        ("p: [0.25, 0.5]", "p: 1.5", ["methods.1.p", "less than or equal to 1"]),
        ("p: [0.25, 0.5]", "p: []", ["methods.1.p", "empty list"]),
        ("p: [0.25, 0.5]", "p: .nan", ["methods.1.p"]),
        ("p: [0.25, 0.5]", "p: 0.5, every: 3", ["give one of the two"]),
        ("beta: [0.2, 0.5]", "beta: -0.1", ["methods.1.beta", "greater than or equal to 0"]),
        ("beta: [0.2, 0.5]", "beta: 1.01", ["methods.1.beta", "less than or equal to 1"]),
        ("beta: [0.2, 0.5]", "btea: 0.5", ["methods.1.btea", "did you mean 'beta'?"]),
        ("split: even-odd", "split: evenodd", ["x.yaml:1", "did you mean 'even-odd'?"]),
        ("split: even-odd", "order: [0, 2]", ["numbered 0 to 1"]),
        ("split: even-odd", "order: [0, 0]", ["twice"]),
        ("name: digits", "name: digit", ["unknown stream 'digit'", "did you mean 'digits'?"]),
        ("model: mlp", "model: mpl", ["x.yaml:2", "unknown model 'mpl'", "did you mean 'mlp'?"]),
        ("model: mlp", "model: {name: mlp, hidden: [0]}", ["model.hidden", "at least one unit"]),
        ("model: mlp", "model: {factory: nowhere}", ["package.module:function"]),
        ("model: mlp", "modle: mlp", ["'model' is missing", "did you mean 'model'?"]),
        ("  - sequential\n", "  - 3\n", ["methods.0", "has no name"]),
        ("epochs: 2", "epochs: 2\n  epochs: 3", ["x.yaml:5", "given twice"]),
        ("epochs: 2", "optimizer: adam\n  weight_decay: 0.1", ["use adamw"]),
        ("epochs: 2", "optimizer: adam\n  momentum: 0.9", ["sgd"]),
    ],
)
def test_refusals_name_place_reason_and_remedy(tmp_path, old, new, expected):
    assert old in GOOD
    message = refusal(tmp_path, GOOD.replace(old, new, 1))
    for part in expected:
        assert part in message


def test_all_problems_are_told_at_once(tmp_path):
    text = GOOD.replace("epochs: 2", "epoch: 2").replace("beta: [0.2, 0.5]", "beta: [2, 3]")
    message = refusal(tmp_path, text)
    assert message.startswith("3 problems in")
    assert message.count("methods.1.beta") == 2


def test_problem_of_a_grid_is_told_once(tmp_path):
    message = refusal(tmp_path, GOOD.replace("beta: [0.2, 0.5]", "btea: [0.2, 0.5]"))
    assert message.count("btea") == 2  # the key, and the text that names it
    assert message.startswith("1 problem in")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n", "a: [1\n", "\t: x\n"])
def test_what_is_no_experiment_is_refused(tmp_path, text):
    assert "x.yaml" in refusal(tmp_path, text)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_experiment(tmp_path / "none.yaml")


def test_overrides(tmp_path):
    experiment = load(
        tmp_path,
        GOOD,
        ["training.epochs=5", "methods.sfa.p=0.1", "methods.0=multitask", "stream.split=pairs",
         "model.hidden=[3, 4]", "training.learning_rate=1e-2", "seeds=[5]", "record.weights=all"],
    )  # fmt: skip
    assert experiment.training.epochs == 5
    assert experiment.training.learning_rate == 0.01
    assert [m.name for m in experiment.methods] == ["multitask", "sfa", "sfa"]
    assert experiment.stream.model_dump()["split"] == "pairs"
    assert experiment.model.model_dump()["hidden"] == (3, 4)
    assert experiment.seeds == (5,)
    assert experiment.record.weights == "all"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.epoch=1", ["command line", "training.epoch", "did you mean 'epochs'?"]),
        ("training.epochs", ["key=value"]),
        ("=3", ["key=value"]),
        ("methods.ewc.strength=1", ["'ewc' is not there", "0: sequential", "1: sfa"]),
        ("methods.7=l2", ["'7' is not there"]),
        ("seeds.0.x=1", ["has no parts"]),
        ("methods.sfa.beta=7", ["command line", "less than or equal to 1"]),
        ("training.epochs=[", ["no valid YAML"]),
    ],
)
def test_wrong_overrides(tmp_path, override, expected):
    message = refusal(tmp_path, GOOD, [override])
    for part in expected:
        assert part in message


def test_resolved_experiment_is_the_same_experiment(tmp_path):
    experiment = load(tmp_path, GOOD)
    again = load(tmp_path, experiment.to_yaml())
    assert again.common() == experiment.common()
    assert again.methods == experiment.methods
    stream = experiment.stream.load()
    ids = [run.id for run in make_plan(experiment, stream).runs]
    assert [run.id for run in make_plan(again, stream).runs] == ids
    assert len(set(ids)) == len(ids) == 10
    assert yaml.safe_load(experiment.to_yaml())["training"]["batch_size"] == 32


def test_checking_loads_neither_torch_nor_transformers(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(GOOD)
    code = (
        "import sys\n"
        "from stockpot import load_experiment\n"
        f"load_experiment({str(path)!r})\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
