"""Folders that are one experiment: more seeds, task orders or methods, and which are not."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from stockpot.report.document import describe_pool
from stockpot.report.pooling import Pool, pool_records
from stockpot.report.reading import read_record
from stockpot.report.table import task_columns
from stockpot.report.write import read_pools, write_report
from support.experiments import run_file, write_experiment
from support.records import TEN, THREE, read_lines, write_made_up

TASKS = ("even", "odd", "prime")
SFA = THREE[2]


def pools(*folders: Path) -> list[Pool]:
    return pool_records([read_record(folder) for folder in folders])


def final_scores(folder: Path, task: str) -> list[float]:
    """The last score of each SFA run on a task, from the file."""
    lines = read_lines(folder / "scores.jsonl")
    return [
        line["value"]
        for line in lines
        if line["run"].startswith("sfa") and line["stage"] == 2 and line["task"] == task
    ]


def interval(values: list[float]) -> tuple[float, float]:
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * error)


def test_seeds_of_two_folders_are_one_experiment(tmp_path):
    one = write_made_up(tmp_path / "one", seeds=[0, 1])
    two = write_made_up(tmp_path / "two", seeds=[2, 3, 4])
    (pool,) = pools(one, two)
    assert len(pool.runs) == pool.planned == 15
    (group,) = [group for group in pool.groups if group.method == "sfa"]
    values = final_scores(one, "odd") + final_scores(two, "odd")
    mean, half = interval(values)
    found = group.final("odd")
    assert found is not None
    assert (found.mean, found.half_width) == (pytest.approx(mean), pytest.approx(half))
    assert found.n == len(values) == 5


def test_task_orders_are_pooled_by_the_tasks_names(tmp_path):
    """The second folder trains the tasks in another order: columns of its R are other tasks."""
    turned = ("prime", "even", "odd")
    one = write_made_up(tmp_path / "one", seeds=[0, 1])
    two = write_made_up(
        tmp_path / "two",
        tasks=turned,
        seeds=[0, 1],
        described={
            "data": "of that order",
            "stream": {"name": "digits", "order": [2, 0, 1], "split": "thirds"},
        },
    )
    (pool,) = pools(one, two)
    assert pool.orders == [list(TASKS), list(turned)]
    assert [run["order"] for run in pool.runs] == [0] * 6 + [1] * 6
    (group,) = [group for group in pool.groups if group.method == "sfa"]
    for task, column in zip(TASKS, task_columns(pool.groups, TASKS), strict=True):
        mean, half = interval(final_scores(one, task) + final_scores(two, task))
        found = column.value(group)
        assert found is not None
        assert (found.mean, found.half_width) == (pytest.approx(mean), pytest.approx(half))
    document = describe_pool(pool)
    assert document["orders"] == [[0, 1, 2], [2, 0, 1]]
    assert set(map(int, document["t"])) >= {2, 3, 4}


def test_an_average_over_seeds_and_orders(tmp_path):
    turned = ("odd", "even", "prime")
    one = write_made_up(tmp_path / "one", seeds=[0, 1, 2])
    two = write_made_up(tmp_path / "two", tasks=turned, seeds=[0, 1, 2])
    (pool,) = pools(one, two)
    (group,) = [group for group in pool.groups if group.method == "sfa"]
    by_run = [
        np.mean([final_scores(folder, task)[seed] for task in TASKS])
        for folder in (one, two)
        for seed in range(3)
    ]
    found = group.metric("average")
    assert found is not None
    assert found.n == 6
    assert (found.mean, found.half_width) == pytest.approx(interval(by_run))


def test_methods_of_two_folders_are_compared(tmp_path):
    one = write_made_up(tmp_path / "one", methods=TEN[:2])
    two = write_made_up(tmp_path / "two", methods=TEN[3:5])
    (pool,) = pools(one, two)
    assert [group.method for group in pool.groups] == ["sequential", "multitask", "sfa", "l2"]


def sections(**changed: Any) -> dict[str, Any]:
    return {
        "stream": {"name": "digits", "order": None, "split": "thirds"},
        "model": {"name": "mlp", "hidden": [8]},
        "training": {"epochs": 2, "batch_size": 16, "device": "cpu", "threads": 1},
        "evaluation": {"every": 50, "max_new_tokens": 512},
        "data": "2add55",
        "left out": [],
        **changed,
    }


OTHERS = {
    "data": {"data": "3bee66"},
    "stream": {"stream": {"name": "digits", "order": None, "split": "halves"}},
    "model": {"model": {"name": "mlp", "hidden": [16]}},
    "training": {"training": {"epochs": 3, "batch_size": 16, "device": "cpu", "threads": 1}},
    "scoring": {"evaluation": {"every": 50, "max_new_tokens": 64}},
    "documents": {"evaluation": {"max_new_tokens": 512, "lm_eval_limit": 10}},
    "benchmarks": {"left out": ["code: humaneval"]},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_measured_otherwise_is_another_experiment(what, tmp_path):
    one = write_made_up(tmp_path / "one", seeds=[0], described=sections())
    two = write_made_up(tmp_path / "two", seeds=[1], described=sections(**OTHERS[what]))
    assert [len(pool.runs) for pool in pools(one, two)] == [3, 3]


@pytest.mark.parametrize(
    "same",
    [
        {"name": "another name", "planned": 99},
        {"training": {"epochs": 2, "batch_size": 16, "device": "cuda", "threads": 8}},
        {"evaluation": {"every": None, "max_new_tokens": 512}},
        {"stream": {"name": "digits", "order": [0, 1, 2], "split": "thirds"}},
    ],
    ids=str,
)
def test_what_does_not_change_the_scores_does_not_matter(same, tmp_path):
    one = write_made_up(tmp_path / "one", seeds=[0], described=sections())
    two = write_made_up(tmp_path / "two", seeds=[1], described=sections(**same))
    assert len(pools(one, two)) == 1


def test_other_tasks_are_another_experiment(tmp_path):
    one = write_made_up(tmp_path / "one", seeds=[0])
    two = write_made_up(tmp_path / "two", seeds=[1], tasks=("even", "odd", "square"))
    assert len(pools(one, two)) == 2


def test_a_record_that_does_not_say_what_it_is_stands_alone(tmp_path):
    folders = [write_made_up(tmp_path / name, seeds=[n]) for n, name in enumerate("ab")]
    for folder in folders:
        (folder / "experiment.json").unlink()
    assert len(pools(*folders)) == 2


def test_three_folders_of_two_experiments(tmp_path):
    one = write_made_up(tmp_path / "one", seeds=[0])
    other = write_made_up(tmp_path / "other", seeds=[1], described={"model": {"name": "conv"}})
    more = write_made_up(tmp_path / "more", seeds=[2])
    found = pools(one, other, more)
    assert [[record.folder for record in pool.records] for pool in found] == [[one, more], [other]]


# The same run twice.


def test_a_run_in_two_folders_counts_once_and_nothing_is_unfinished(tmp_path):
    one = write_made_up(tmp_path / "one", seeds=[0, 1])
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    more = write_made_up(tmp_path / "more", seeds=[1, 2])
    (pool,) = pools(one, copy, more)
    assert len(pool.runs) == len(pool.finished) == pool.planned == 9
    assert {len(group.runs) for group in pool.groups} == {3}
    assert sorted(gap.split(": ", 1)[1] for gap in pool.gaps) == [
        "3 runs are in an earlier folder too; each counts once",
        "6 runs are in an earlier folder too; each counts once",
    ]
    assert "not finished" not in describe_pool(pool)["answer"]
    (alone,) = pools(one)
    assert pool.groups[0].metric("average") != alone.groups[0].metric("average")
    (doubled,) = pools(one, copy)
    assert doubled.groups[0].metric("average") == alone.groups[0].metric("average")


@pytest.mark.parametrize("first", ["begun", "whole"])
def test_of_a_run_in_two_folders_the_finished_one_counts(first, tmp_path):
    stages = {"sfa-p=0.25-beta=0.5-seed0": 1}
    begun = write_made_up(tmp_path / "begun", seeds=[0], stages=stages)
    whole = write_made_up(tmp_path / "whole", seeds=[0])
    (pool,) = pools(*((begun, whole) if first == "begun" else (whole, begun)))
    assert len(pool.finished) == pool.planned == 3


def test_the_same_folder_by_two_names_is_one(tmp_path):
    one = write_made_up(tmp_path / "runs/one")
    (tmp_path / "link").symlink_to(one)
    found = read_pools([one, tmp_path / "runs", tmp_path / "link"])
    assert [len(pool.records) for pool in found] == [1]
    assert found[0].gaps == []


def test_a_double_of_another_order_is_no_double(tmp_path):
    one = write_made_up(tmp_path / "one", seeds=[0])
    two = write_made_up(tmp_path / "two", seeds=[0], tasks=("odd", "prime", "even"))
    (pool,) = pools(one, two)
    assert len(pool.runs) == 6
    assert pool.gaps == []


def test_gaps_say_in_which_folder(tmp_path):
    one = write_made_up(tmp_path / "one", seeds=[0])
    two = write_made_up(tmp_path / "two", seeds=[1])
    (two / "environment.json").unlink()
    (pool,) = pools(one, two)
    assert pool.gaps == [f"{two}: environment.json is missing"]


# The files.


def test_a_report_of_a_parent_folder(tmp_path):
    write_made_up(tmp_path / "runs/a", seeds=[0])
    write_made_up(tmp_path / "runs/b", seeds=[1])
    write_made_up(tmp_path / "runs/c", seeds=[0], described={"model": {"name": "conv"}})
    page = write_report(tmp_path / "runs", tmp_path / "out")
    assert page == tmp_path / "out/report.html"
    for name in ("experiment-1", "experiment-2"):
        assert (tmp_path / "out" / name / "results.csv").exists()
    assert not list((tmp_path / "runs/a").glob("re*.*"))


def test_real_runs_of_two_orders(tmp_path):
    """What `stockpot run` writes for two values of stream.order is one experiment."""
    path = write_experiment(tmp_path, "[sequential]")
    text = path.read_text()
    assert not run_file(path, tmp_path / "a").failures
    path.write_text(text.replace("order: [0, 1, 2]", "order: [2, 0, 1]"))
    assert not run_file(path, tmp_path / "b").failures
    assert path.read_text() != text
    (pool,) = pools(tmp_path / "a", tmp_path / "b")
    assert pool.gaps == []
    assert sorted(pool.orders[0]) == sorted(pool.orders[1])
    assert pool.orders[0] != pool.orders[1]
    scores = [
        line["value"]
        for name in "ab"
        for line in read_lines(tmp_path / name / "scores.jsonl")
        if line["stage"] == 2 and line["task"] == pool.tasks[0]
    ]
    found = pool.groups[0].final(pool.tasks[0])
    assert found is not None
    assert (found.mean, found.half_width) == pytest.approx(interval(scores))
