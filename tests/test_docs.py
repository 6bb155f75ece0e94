"""What the documents promise: examples that work, links that lead somewhere, numbers that agree."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from tests.support.merging import tensors_of, write_model
from torch import nn

from stockpot.experiment import load_experiment
from stockpot.experiment.plan import make_plan
from stockpot.merging.recipe import load_recipe
from stockpot.merging.settings import METHODS as MERGE_METHODS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))


def blocks(language):
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.M | re.S)
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, text in enumerate(pattern.findall(page.read_text()))
    ]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_examples_are_experiments(text, tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(text)
    if text.startswith("method:"):
        recipe, _ = load_recipe(path)
        assert recipe.points()
    else:
        assert load_experiment(path).methods


def test_the_python_of_merging_runs(tmp_path):
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/merging.md").read_text(), re.M | re.S
    )
    shapes = {"w": (8, 8)}
    base = tensors_of(0, shapes, "BF16")
    scope = {"base": str(write_model(tmp_path / "base", base)), "out": str(tmp_path / "out")}
    for number, name in enumerate(("math", "law")):
        model = tensors_of(number + 1, shapes, "BF16", base)
        scope[name] = str(write_model(tmp_path / name, model))
    exec(code, scope)  # the document's own words
    assert scope["result"].tensors == 1


def test_every_merge_method_and_option_is_in_the_docs():
    page = (ROOT / "docs/merging.md").read_text()
    for name, method in MERGE_METHODS.items():
        assert f"`{name}`" in page
        for option in method.model_fields:
            assert f"-{option.replace('_', '-')}`" in page or f"`--{option}" in page, (name, option)


def test_the_loop_of_the_readme_runs():
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    code = code.replace("        ...\n", "        model(batch).square().sum().backward()\n")
    scope = {"model": model, "optimizer": optimizer, "data": [torch.ones(1, 4)] * 8, "T": 8}
    exec(code, scope)  # the document's own words
    assert [event.step for event in scope["sfa"].events] == [2, 4, 6, 8]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_what_they_are_and_load(path):
    head = path.read_text().split("\nname:")[0]
    # The paper's own size is estimated, and its numbers are the paper's; the rest was measured.
    told = ("# Hardware ", "# Paper ") if "# Paper " in head else ("# Time ", "# Expected ")
    for word in ("# What ", "# Command ", *told):
        assert word in head
    assert f"stockpot run recipes/{path.name}" in head
    assert "@" not in head
    load_experiment(path)


def test_the_demo_has_the_methods_and_seeds_that_were_promised():
    experiment = load_experiment(ROOT / "recipes" / "digits.yaml")
    assert {method.name for method in experiment.methods} == {
        "sequential", "multitask", "rehearsal", "sfa", "l2", "ewc", "wise-ft", "task-arithmetic",
        "ties",
    }  # fmt: skip
    assert len(experiment.seeds) == 3
    plan = make_plan(experiment, experiment.stream.load())
    readme = (ROOT / "README.md").read_text()
    assert f"{len(plan.runs)} runs" in readme
    # All methods but multitask share the first task: it is trained once per seed.
    first = {run.stages[0].trained for run in plan.runs if run.method.name != "multitask"}
    assert len(first) == 3


def test_constraints_pin_what_the_project_needs():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert pins["torch"] == "2.13.0"
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    needed = [need for group in groups for need in group]
    names = {re.split(r"[<>=~!\[]", need)[0].lower().replace("_", "-") for need in needed}
    assert names - {"stockpot"} <= {pin.lower().replace("_", "-") for pin in pins}
    assert not any("==" in need for need in needed)


def test_the_document_of_the_metrics_names_them_all():
    from stockpot.metrics import all_metrics

    text = (ROOT / "docs" / "metrics.md").read_text()
    assert all(f"`{name}`" in text for name in all_metrics([[0.5]], [0.1]))


def test_citation_is_valid_yaml():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    import stockpot

    assert citation["version"] == stockpot.__version__
    assert citation["preferred-citation"]["journal"].endswith("2501.05559")
