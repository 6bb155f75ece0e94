"""Every recipe runs, cut down to seconds, and the numbers in its head are the paper's."""

import csv
import json
import os
import re
from pathlib import Path

import pytest

from stockpot.evaluation.settings import Programs
from stockpot.experiment import load_experiment, run_experiment
from stockpot.experiment.smoke import with_tiny_model
from stockpot.report.write import write_report

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
REPRODUCED = {1, 2, 3, 4, 5, 6, 7}
"""The paper's tables of results; Table 8 lists metrics."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_smoke(path, mirror, tmp_path):
    """The whole way on real data: load, tokenise, train every method, score, record, report."""
    experiment = load_experiment(path, output=tmp_path / "out", smoke=True)
    full = load_experiment(path)
    assert experiment.methods == full.methods
    experiment, stream = with_tiny_model(experiment)
    outcome = run_experiment(experiment, stream=stream, programs=Programs(skip=True))
    assert not outcome.failures
    assert len(outcome.summary) == len(experiment.methods)
    for run in outcome.summary:
        assert len(run["R"]) == len(run["tasks"]) == len(stream.tasks)
    write_report(outcome.folder)
    with (outcome.folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows] == [method.label for method in experiment.methods]
    if experiment.evaluation.every is not None:
        curves = [json.loads(x) for x in (outcome.folder / "curves.jsonl").read_text().splitlines()]
        assert {line["task"] for line in curves} == set(outcome.summary[0]["tasks"])


def test_smoke_runs_the_programs_that_it_was_allowed_to(mirror, tmp_path):
    path = ROOT / "recipes" / "fig5-pythia-math-code.yaml"
    experiment = load_experiment(path, ["methods=[sequential]"], tmp_path / "out", smoke=True)
    experiment, stream = with_tiny_model(experiment)
    outcome = run_experiment(
        experiment, stream=stream, programs=Programs(run=True, allow_weak=True)
    )
    (run,) = outcome.summary
    scores = {(s["task"], s["evaluation"], s["metric"]): s for s in run["scores"]}
    assert scores["code", "humaneval", "pass@1"]["n"] == 3
    assert scores["math", "gsm8k", "flexible"]["n"] == 3
    about = json.loads((outcome.folder / "environment.json").read_text())
    assert about["isolation of generated programs"]
    texts = (outcome.folder / "runs/sequential-seed0/items/stage-0001.jsonl").read_text()
    written = [json.loads(line) for line in texts.splitlines()]
    assert {text["task"] for text in written} == {"math", "code"}
    assert sum("reason" in text for text in written) == 3


# The tables in the heads.


def tables_of_the_paper() -> dict[int, list[dict[str, dict[str, float]]]]:
    """Number -> blocks of row -> column -> number, read from the paper's text."""
    folder = os.environ.get("STOCKPOT_PAPER")
    if not folder:
        pytest.skip("set STOCKPOT_PAPER to a folder with the paper's text, soup-to-go.md")
    text = (Path(folder) / "soup-to-go.md").read_text(encoding="utf-8")
    found: dict[int, list[dict[str, dict[str, float]]]] = {}
    number, columns = 0, None
    for line in text.splitlines():
        if caption := re.match(r"Table (\d+): ", line):
            number, columns = int(caption[1]), None
        elif "\t" not in line:
            columns = None
        elif columns is None:
            columns = line.split("\t")[1:]
            found.setdefault(number, []).append({})
        elif number in REPRODUCED:
            row, *values = line.split("\t")
            numbers = [float(value.rstrip(",")) for value in values]
            found[number][-1][row] = dict(zip(columns, numbers, strict=True))
    return found


def tables_of_a_recipe(path: Path) -> dict[int, list[dict[str, dict[str, str]]]]:
    """The same from a recipe's head, with the column ``run here``."""
    found: dict[int, list[dict[str, dict[str, str]]]] = {}
    number, columns = 0, None
    for line in path.read_text().split("\nname:")[0].splitlines():
        if caption := re.match(r"# Paper +Table (\d+)", line):
            number = int(caption[1])
        if not line.startswith("#   | "):
            continue
        first, *cells = [cell.strip() for cell in line[5:].strip(" |").split(" | ")]
        if first == "the paper's row":
            columns = cells
            found.setdefault(number, []).append({})
        else:
            assert columns is not None
            found[number][-1][first] = dict(zip(columns, cells, strict=True))
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_head_has_the_papers_numbers(path):
    ours = tables_of_a_recipe(path)
    if not ours:
        pytest.skip("its head has no table")
    theirs = tables_of_the_paper()
    for number, blocks in ours.items():
        assert len(blocks) == len(theirs[number])
        for block, original in zip(blocks, theirs[number], strict=True):
            for row, cells in block.items():
                numbers = {key: float(v) for key, v in cells.items() if key != "run here"}
                assert numbers == original[row], row


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_head_names_runs_that_there_are(path):
    experiment = load_experiment(path)
    labels = {method.label for method in experiment.methods}
    tasks = (
        {f"after task {name}" for name in getattr(experiment.stream, "tasks", None) or ()}
        if (experiment.stream.name == "domains")
        else set()
    )
    for blocks in tables_of_a_recipe(path).values():
        for block in blocks:
            for row, cells in block.items():
                assert cells["run here"] in {*labels, *tasks, "before training"}, row


def test_every_row_of_every_table_is_in_some_recipe():
    theirs = tables_of_the_paper()
    covered: dict[int, set[str]] = {}
    for path in RECIPES:
        for number, blocks in tables_of_a_recipe(path).items():
            covered.setdefault(number, set()).update(row for block in blocks for row in block)
    for number in REPRODUCED:
        assert covered[number] == {row for block in theirs[number] for row in block}, number
