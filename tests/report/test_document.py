"""What the page is made from, against the record's files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stockpot.report import document as module
from stockpot.report.document import describe_pool, single_task_scores
from stockpot.report.pooling import Pool, pool_records
from stockpot.report.reading import read_record
from stockpot.report.table import benchmark_columns, group_runs, t_quantile
from support.records import TEN, THREE, read_lines, write_made_up

TASKS = ("even", "odd", "prime")


def pool_of(*folders: Path) -> Pool:
    (pool,) = pool_records([read_record(folder) for folder in folders])
    return pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_made_up(tmp_path_factory.mktemp("document") / "run", methods=TEN, seeds=(0, 1, 2))


@pytest.fixture(scope="module")
def document(folder) -> dict[str, Any]:
    return describe_pool(pool_of(folder))


def values(folder: Path, log: str, run: str, **wanted: Any) -> list[dict[str, Any]]:
    lines = [line for line in read_lines(folder / f"{log}.jsonl") if line["run"] == run]
    return [line for line in lines if all(line[k] == v for k, v in wanted.items())]


# Numbers.


@given(st.integers(2, 200))
def test_quantiles_are_scipys(n):
    assert t_quantile(n) == pytest.approx(stats.t.isf(0.025, n - 1), rel=1e-12)


def test_the_page_has_a_quantile_for_every_number_of_runs(document):
    assert set(document["t"]) == set(range(2, len(document["runs"]) + 1))
    assert document["t"][3] == pytest.approx(4.302652730, rel=1e-9)


def test_scores_are_those_of_the_file_to_six_digits(folder, document):
    for run in document["runs"]:
        for t, row in enumerate(run["R"]):
            lines = values(folder, "scores", run["id"], trained=TASKS[t])
            expected = [line["value"] for line in lines]
            assert (row or []) == pytest.approx(expected, rel=5.1e-6)
        starts = values(folder, "scores", run["id"], stage=-1)
        assert run["b"] == pytest.approx([line["value"] for line in starts], rel=5.1e-6)


def test_each_run_belongs_to_its_methods_group(document):
    for run in document["runs"]:
        group = document["groups"][run["group"]]
        assert run["id"].startswith(group["label"].replace(" ", "-"))
    assert [group["method"] for group in document["groups"]] == [name for name, _ in TEN]
    assert {group["n"] for group in document["groups"]} == {3}


def test_what_was_taken_during_training_is_there_in_order(folder, document):
    moments = {"step": "s", "before merge": "b", "after merge": "a"}
    for run in document["runs"]:
        lines = values(folder, "curves", run["id"])
        expected: dict[Any, list[float]] = {}
        for line in lines:
            key = (line["stage"], line["step"], moments[line["moment"]])
            expected.setdefault(key, []).append(line["value"])
        assert [tuple(point[:3]) for point in run["during"]] == list(expected)
        for point in run["during"]:
            assert point[3] == pytest.approx(expected[tuple(point[:3])], rel=5.1e-5)


def test_merge_events_losses_and_lines(folder, document):
    for run in document["runs"]:
        merges = values(folder, "merges", run["id"])
        assert [point[:2] for point in run["merges"]] == [[m["stage"], m["step"]] for m in merges]
        for n, stage in enumerate(run["stages"]):
            (line,) = values(folder, "stages", run["id"], stage=n)
            assert [step for step, _ in stage["losses"]] == [step for step, _ in line["losses"]]
            assert stage["l2"] == pytest.approx(line["l2_to_anchor"], rel=1e-5)
        for stage_number, task, metric, points in run["line"]:
            lines = values(
                folder, "lines", run["id"], stage=stage_number, task=TASKS[task], metric=metric
            )
            assert [alpha for alpha, _ in points] == [0, 0.5, 1]
            assert [v for _, v in points] == pytest.approx([x["value"] for x in lines], rel=1e-4)
        size = 3 * 2 * 2 if run["id"].split("-seed")[0] != "multitask" else 0
        assert len(run["line"]) == size


def test_it_is_plain_json_without_what_json_does_not_have(document):
    text = json.dumps(document, allow_nan=False)
    assert json.loads(text)["tasks"] == list(TASKS)


@given(st.floats(allow_nan=True, allow_infinity=True), st.integers(2, 8))
def test_short_numbers(value, digits):
    short = module._short(value, digits)
    if not math.isfinite(value):
        assert short is None
    elif short is not None and math.isfinite(short):
        assert short == pytest.approx(value, rel=0.5 * 10.0 ** (1 - digits) * 1.0001)


# Thinning.


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return write_made_up(tmp_path_factory.mktemp("dense") / "run", every=5, seeds=[0])


@pytest.mark.parametrize("most", [100, 500, 10**6])
def test_many_scores_are_thinned_evenly_and_the_page_says_so(most, dense, monkeypatch):
    count = len(read_lines(dense / "curves.jsonl"))
    whole = {run["id"]: run["during"] for run in describe_pool(pool_of(dense))["runs"]}
    assert sum(len(point[3]) for points in whole.values() for point in points) == count
    monkeypatch.setattr(module, "_MOST_CURVE_VALUES", most)
    thin = describe_pool(pool_of(dense))
    every = math.ceil(count / most)
    if every == 1:
        assert thin["gaps"] == []
        assert {run["id"]: run["during"] for run in thin["runs"]} == whole
        return
    (note,) = thin["gaps"]
    assert f"{count:,} scores" in note
    assert f"one in {every}" in note
    for run in thin["runs"]:
        kept, full = run["during"], whole[run["id"]]
        assert [point for point in full if point in kept] == kept
        steps = 300 if "multitask" in run["id"] else 100
        free = [p for p in full if p[2] == "s" and 0 < p[1] < steps]
        assert all(point in kept for point in full if point not in free)
        shown = sum(point in kept for point in free)
        assert abs(shown - len(free) / every) < 0.1 * len(free) + 2


# Tasks trained alone.


def alone(folder: Path) -> dict[str, Any]:
    return single_task_scores(pool_of(folder))


def test_the_first_task_alone_is_what_sequential_begins_with(folder):
    starts = [
        values(folder, "scores", f"sequential-seed{seed}", stage=0, task="even")[0]["value"]
        for seed in (0, 1, 2)
    ]
    assert alone(folder) == {"even": {"value": pytest.approx(np.mean(starts), rel=5.1e-6), "n": 3}}


def final(folder: Path, run: str, task: str) -> float:
    return float(values(folder, "scores", run, trained="prime", task=task)[0]["value"])


def test_multitask_without_all_others_is_a_task_alone(tmp_path):
    methods = [
        ("multitask", {"without": "even, odd"}),
        ("multitask", {"without": "odd"}),
        ("multitask", {"without": None}),
    ]
    folder = write_made_up(tmp_path / "run", methods=methods, seeds=[0, 1])
    runs = [f"multitask-without=even,-odd-seed{seed}" for seed in (0, 1)]
    mean = np.mean([final(folder, run, "prime") for run in runs])
    assert alone(folder) == {"prime": {"value": pytest.approx(mean, rel=5.1e-6), "n": 2}}


@pytest.mark.parametrize(
    ("weights", "task"),
    [
        ([0.0, 1.0, 0.0], "odd"),
        ([0, 0, 1], "prime"),
        ([0.5, 0.5, 0.0], None),
        ([0.0, 0.0, 0.5], None),
        ([1.0, 0.0], None),
        ([1.0, -1.0, 1.0], None),
        (None, None),
    ],
)
def test_task_arithmetic_with_one_task_vector(weights, task, tmp_path):
    settings = {"scale": 0.3, "weights": weights}
    folder = write_made_up(tmp_path / "run", methods=[("task-arithmetic", settings)], seeds=[0])
    if task is None:
        assert alone(folder) == {}
    else:
        (run,) = pool_of(folder).runs
        expected = pytest.approx(final(folder, run["run"], task), rel=5.1e-6)
        assert alone(folder) == {task: {"value": expected, "n": 1}}


def test_runs_that_are_not_finished_are_no_single_task(tmp_path):
    stages = {"multitask-without=even,-odd-seed0": 0, "sequential-seed0": 1}
    methods = [("multitask", {"without": "even, odd"}), THREE[0]]
    folder = write_made_up(tmp_path / "run", methods=methods, seeds=[0], stages=stages)
    assert list(alone(folder)) == ["even"]


def test_of_other_orders_the_first_task_is_another(tmp_path):
    one = write_made_up(tmp_path / "one", methods=THREE[:1], seeds=[0])
    two = write_made_up(
        tmp_path / "two", methods=THREE[:1], seeds=[0], tasks=("prime", "even", "odd")
    )
    found = single_task_scores(pool_of(one, two))
    assert set(found) == {"even", "prime"}
    (line,) = values(two, "scores", "sequential-seed0", stage=0, task="prime")
    assert found["prime"] == {"value": pytest.approx(line["value"], rel=5.1e-6), "n": 1}


# Benchmarks.


def test_benchmarks_have_a_column_each_where_a_task_has_several(tmp_path):
    folder = write_made_up(tmp_path / "run", extra=["f1", "recall"], seeds=(0, 1, 2))
    groups = pool_of(folder).groups
    columns = benchmark_columns(groups)
    assert [column.key for column in columns] == [
        f"{task}.test.{metric}" for task in TASKS for metric in ("accuracy", "f1", "recall")
    ]
    (sfa,) = [group for group in groups if group.method == "sfa"]
    for column in columns:
        task, _, metric = column.key.split(".")
        found = [
            values(folder, "scores", run["run"], trained="prime", task=task, metric=metric)
            for run in sfa.runs
        ]
        scores = [line["value"] for (line,) in found]
        interval = column.value(sfa)
        assert interval is not None
        assert interval.mean == pytest.approx(np.mean(scores))
        half = stats.t.isf(0.025, 2) * np.std(scores, ddof=1) / math.sqrt(3)
        assert interval.half_width == pytest.approx(half)
    assert [table["name"] for table in describe_pool(pool_of(folder))["tables"]] == [
        "results",
        "benchmarks",
    ]


def test_one_score_a_task_needs_no_second_table(folder, document):
    assert benchmark_columns(pool_of(folder).groups) == ()
    assert [table["name"] for table in document["tables"]] == ["results"]


def test_benchmarks_of_losses_are_nats_and_lower_is_better(tmp_path):
    folder = write_made_up(tmp_path / "run", metric="loss", extra=["accuracy"])
    by_key = {column.key: column for column in benchmark_columns(pool_of(folder).groups)}
    loss, accuracy = by_key["odd.test.loss"], by_key["odd.test.accuracy"]
    assert (loss.unit, loss.scale, loss.better) == ("nats", 1.0, "lower")
    assert (accuracy.unit, accuracy.scale, accuracy.better) == ("%", 100.0, "higher")
    document = describe_pool(pool_of(folder))
    assert (document["measure"]["unit"], document["measure"]["better"]) == ("nats", "lower")


def test_the_best_of_a_benchmark_column_knows_which_way_is_better(tmp_path):
    """What is neither a share nor a loss is shown as it is, without a best."""
    folder = write_made_up(tmp_path / "run", extra=["perplexity", "exact_match"])
    by_key = {column.key: column for column in benchmark_columns(pool_of(folder).groups)}
    assert by_key["even.test.exact_match"].unit == "%"
    assert by_key["even.test.perplexity"].unit != "%"


# Groups and curves.


def test_groups_of_unfinished_runs_are_there_without_cells(tmp_path):
    stages = {"sequential-seed0": 1, "sequential-seed1": 2, "multitask-seed0": 0}
    folder = write_made_up(tmp_path / "run", stages=stages)
    document = describe_pool(pool_of(folder))
    by_method = {group["method"]: group for group in document["groups"]}
    assert (by_method["sequential"]["n"], by_method["sequential"]["cells"]) == (0, [])
    assert by_method["multitask"]["n"] == 1
    assert len(by_method["sfa"]["cells"]) == len(document["columns"])
    assert (document["finished"], document["planned"]) == (3, 6)


def test_curves_name_their_groups(tmp_path):
    methods = [
        ("sfa", {**THREE[2][1], "p": p, "beta": beta}) for p in (0.5, 0.25) for beta in (0.2, 0.4)
    ]
    folder = write_made_up(tmp_path / "run", methods=[THREE[0], *methods])
    document = describe_pool(pool_of(folder))
    found = [
        (
            curve["along"],
            curve["values"],
            [document["groups"][g]["settings"] for g in curve["groups"]],
        )
        for curve in document["curves"]
        if curve["method"] == "sfa"
    ]
    assert [(along, held) for along, held, _ in found] == [("p", [0.25, 0.5])] * 2
    for _, held, settings in found:
        assert [s["p"] for s in settings] == held
        assert len({s["beta"] for s in settings}) == 1
    covered = {g for curve in document["curves"] for g in curve["groups"]}
    assert covered == set(range(len(document["groups"])))


def test_columns_of_the_table_are_means_with_students_intervals(folder, document):
    groups = group_runs(pool_of(folder).runs)
    for group, shown in zip(groups, document["groups"], strict=True):
        for column, cell in zip(document["columns"], shown["cells"], strict=True):
            if not column["key"].startswith("final."):
                continue
            task = column["key"].removeprefix("final.")
            scores = [run["R"][-1][TASKS.index(task)] for run in group.runs]
            half = stats.t.isf(0.025, 2) * np.std(scores, ddof=1) / math.sqrt(3)
            assert cell == [
                pytest.approx(np.mean(scores), rel=1e-5),
                pytest.approx(half, rel=1e-4),
                3,
            ]
