"""A damaged line or value costs what it held, is named, and harms nothing else."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stockpot.report.pooling import Pool
from stockpot.report.write import read_pools
from support.reading import LOGS, MAPPINGS, SFA, numbers, report
from support.records import read_lines, write_lines, write_made_up


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_made_up(tmp_path_factory.mktemp("good") / "run")


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "run"))


# Lines.


def damage(folder: Path, log: str, number: int, change: dict[str, Any] | str) -> str:
    """Change values of a line (1-based), or the whole line; returns its run."""
    path = folder / f"{log}.jsonl"
    rows = path.read_text().split("\n")
    line = json.loads(rows[number - 1])
    rows[number - 1] = change if isinstance(change, str) else json.dumps({**line, **change})
    path.write_text("\n".join(rows))
    return str(line["run"])


def unharmed(before: dict[str, Any], pool: Pool, run: str) -> None:
    """All other runs have the numbers they had."""
    after = numbers(pool)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} <= {run}


@pytest.mark.parametrize("log", LOGS)
@pytest.mark.parametrize("at", [1, 7, -1])
@pytest.mark.parametrize(
    "text", ['{"run": "seq', "\x00\x00\x00", "[1]", "{}", '{"run": null, "stage": 0}', "é" * 9]
)
def test_a_damaged_line_is_named_and_harms_no_other_run(log, at, text, good, folder):
    number = at if at > 0 else len(read_lines(folder / f"{log}.jsonl"))
    run = damage(folder, log, number, text)
    pool, _ = report(folder)
    assert f"{log}.jsonl: line {number} cannot be read and is left out" in pool.gaps
    unharmed(numbers(report(good)[0]), pool, run)


NEEDED = {
    "scores": ("run", "stage", "task", "value"),
    "stages": ("run", "stage"),
    "merges": ("run", "stage", "step", "beta", "distance_before", "distance_after"),
    "curves": ("run", "stage", "step", "task", "value"),
    "lines": ("run", "stage", "alpha", "task", "metric", "value"),
}
WRONG = (True, "x", [], {}, 1e400, float("nan"), -(10**400), 10**400, ["x"], "__proto__")


MORE = {
    "scores": ("trained", "metric", "headline"),
    "stages": ("row", "steps", "seconds", "peak_memory", "l2_to_anchor", "stored", "losses"),
    "curves": ("moment",),
}


@pytest.mark.parametrize("log", LOGS)
def test_a_value_of_another_type_costs_its_line(log, good, folder):
    before = numbers(report(good)[0])
    path = folder / f"{log}.jsonl"
    whole = path.read_text()
    for key in (*NEEDED[log], *MORE.get(log, ())):
        text = isinstance(read_lines(path)[8].get(key), str)
        for value in WRONG:
            if isinstance(value, str) and text and key != "moment":
                continue  # another name: see what the plan does not have
            if (key, value) in (("headline", True), ("losses", [])):
                continue
            if key not in NEEDED[log] and value == {} and key == "stored":
                continue
            path.write_text(whole)
            run = damage(folder, log, 9, {key: value})
            pool, _ = report(folder)
            assert f"{log}.jsonl: line 9 cannot be read and is left out" in pool.gaps, (key, value)
            unharmed(before, pool, run)


ELSEWHERE = (("run", "other-seed0"), ("task", "eveN"), ("stage", 3), ("stage", 10**9))


@pytest.mark.parametrize(
    ("log", "key", "value"),
    # The task that a stage or a merge names is not used.
    [(log, *x) for log in LOGS for x in ELSEWHERE if x[0] != "task" or log[0] not in "sm"]
    + [("scores", "task", "eveN")],
)
def test_what_the_plan_does_not_have_is_left_out(log, key, value, good, folder):
    run = damage(folder, log, 9, {key: value})
    pool, _ = report(folder)
    (gap,) = [gap for gap in pool.gaps if gap.startswith(f"{log}.jsonl: line 9 ")]
    assert "is left out" in gap
    unharmed(numbers(report(good)[0]), pool, run)


def test_a_score_under_another_tasks_name_is_not_averaged_with_that_tasks(good, folder):
    lines = read_lines(folder / "scores.jsonl")
    number = next(n for n, line in enumerate(lines, 1) if line["run"] == SFA and line["stage"] == 1)
    damage(folder, "scores", number, {"trained": "even"})
    pool, _ = report(folder)
    assert any(gap.startswith(f"scores.jsonl: line {number} ") for gap in pool.gaps)
    assert numbers(pool)[SFA]["R"] == numbers(report(good)[0])[SFA]["R"]


@pytest.mark.parametrize("log", LOGS)
def test_lines_that_are_there_twice_count_once(log, good, folder):
    path = folder / f"{log}.jsonl"
    data = path.read_text()
    path.write_text(data + data)
    pool, _ = report(folder)
    assert any(gap.startswith(f"{log}.jsonl: lines ") and "repeat" in gap for gap in pool.gaps)
    assert numbers(pool) == numbers(report(good)[0])


def test_the_last_of_two_lines_counts(folder):
    lines = read_lines(folder / "scores.jsonl")
    changed = {**lines[3], "value": 0.125}
    write_lines(folder / "scores.jsonl", [*lines, changed])
    (folder / "summary.json").unlink()
    pool, _ = report(folder)
    run = next(run for run in pool.runs if run["run"] == changed["run"])
    assert 0.125 in run["R"][0] + run["b"]


# What a lost line costs.


@pytest.mark.parametrize("held", [True, False])
def test_a_lost_score_is_taken_from_the_summary_or_makes_a_run_unfinished(held, good, folder):
    lines = read_lines(folder / "scores.jsonl")
    lost = next(
        n
        for n, line in enumerate(lines)
        if (line["run"], line["stage"], line["task"]) == (SFA, 2, "odd")
    )
    write_lines(folder / "scores.jsonl", lines[:lost] + lines[lost + 1 :])
    if not held:
        (folder / "summary.json").unlink()
    pool, document = report(folder)
    unharmed(numbers(report(good)[0]), pool, SFA)
    now, before = numbers(pool)[SFA], numbers(report(good)[0])[SFA]
    assert any(SFA in gap for gap in document["gaps"])
    if held:
        assert (now["R"], now["metrics"]) == (before["R"], before["metrics"])
    else:
        assert any("no score after prime on odd" in gap for gap in document["gaps"])
        assert now["R"][2] == [before["R"][2][0], None, before["R"][2][2]]
        assert now["R"][:2] == before["R"][:2]
        assert not now["finished"]
        assert now["metrics"] == {}


def test_a_lost_row_in_the_middle_is_said_and_costs_only_what_needs_it(good, folder):
    lines = read_lines(folder / "scores.jsonl")
    write_lines(folder / "scores.jsonl", [x for x in lines if (x["run"], x["stage"]) != (SFA, 1)])
    (folder / "summary.json").unlink()
    pool, _ = report(folder)
    assert f"run {SFA}: no score after odd on even and 2 more" in pool.gaps
    now, before = numbers(pool)[SFA], numbers(report(good)[0])[SFA]
    assert now["finished"]
    assert now["metrics"]["average"] == before["metrics"]["average"]
    assert now["metrics"]["forgetting"] is None


def test_lost_scores_of_the_starting_model_are_said(good, folder):
    lines = read_lines(folder / "scores.jsonl")
    write_lines(folder / "scores.jsonl", [x for x in lines if x["stage"] >= 0])
    (folder / "summary.json").unlink()
    pool, _ = report(folder)
    (said,) = [gap for gap in pool.gaps if "no score before training" in gap]
    assert said.startswith("6 runs (")  # what many lack is said once
    for run, held in numbers(report(good)[0]).items():
        now = numbers(pool)[run]
        assert now["metrics"] == {**held["metrics"], "fwt": None}
        assert now["b"] is None


def test_part_of_the_costs_is_not_passed_off_as_all(good, folder):
    """One of three stages without its line: the sum of the other two would look cheap."""
    lines = read_lines(folder / "stages.jsonl")
    write_lines(folder / "stages.jsonl", [x for x in lines if (x["run"], x["stage"]) != (SFA, 2)])
    pool, _ = report(folder)
    assert any(SFA in gap and "stages.jsonl has no line for prime" in gap for gap in pool.gaps)
    now, before = numbers(pool)[SFA]["metrics"], numbers(report(good)[0])[SFA]["metrics"]
    unknown = {key for key, value in now.items() if value is None}
    assert {"seconds", "peak_memory", "l2_to_anchor", "stored_bytes", "steps"} <= unknown
    assert {k: v for k, v in now.items() if k not in unknown} == {
        k: v for k, v in before.items() if k not in unknown
    }


@pytest.mark.parametrize("log", ["curves", "lines", "merges"])
def test_a_stage_without_the_lines_it_was_to_have_is_said(log, folder):
    lines = read_lines(folder / f"{log}.jsonl")
    write_lines(folder / f"{log}.jsonl", [x for x in lines if (x["run"], x["stage"]) != (SFA, 1)])
    pool, _ = report(folder)
    assert pool.gaps == [f"{log}.jsonl has no line of run {SFA} after odd"]


def test_a_loss_that_was_not_finite_is_no_damage(folder):
    """``null`` on the line from the anchor: the weights between two models may be no model."""
    damage(folder, "lines", 4, {"value": None})
    pool, _ = report(folder)
    assert pool.gaps == []


# Mappings.


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is a value: of lists the first, of runs the first and one with settings."""
    yield at
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths(item, (*at, key))
    elif isinstance(value, list):
        for key in (0, 2) if at == ("runs",) else range(min(1, len(value))):
            yield from paths(value[key], (*at, key))


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    copy = json.loads(json.dumps(value))
    inside = copy
    for key in at[:-1]:
        inside = inside[key]
    inside[at[-1]] = new
    return copy


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_value_of_another_type_anywhere_in_a_mapping(name, good, folder):
    """Whatever it is, there is a report, and the runs that the plan still knows are as before."""
    path = folder / f"{name}.json"
    value = json.loads(path.read_text())
    before = numbers(report(good)[0])
    for at in paths(value):
        for wrong in (*WRONG, None, -1, 0.5, "\ud800"):
            path.write_text(json.dumps(put(value, at, wrong)))
            pool, _ = report(folder)
            after = numbers(pool)
            if name != "plan":
                assert {run: now["R"] for run, now in after.items()} == {
                    run: held["R"] for run, held in before.items()
                }
            elif at[:1] == ("runs",) and len(at) > 1:
                whole = [run for n, run in enumerate(before) if n != at[1]]
                assert {run: after[run] for run in whole} == {run: before[run] for run in whole}
            if at == ():
                assert any(gap.startswith(f"{name}.json") for gap in pool.gaps) or wrong in ({}, [])


@given(st.data())
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_bytes_anywhere(good, folder, data):
    """Parts of any files overwritten, cut out or doubled: a report, or a clear error."""
    names = [f"{log}.jsonl" for log in LOGS] + [f"{name}.json" for name in MAPPINGS]
    before = numbers(read_pools([good])[0])
    damaged = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    for name in names:
        shutil.copyfile(good / name, folder / name)
    for name in damaged:
        content = (good / name).read_bytes()
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 300)))
        new = data.draw(st.one_of(st.binary(max_size=20), st.just(content[start:end] * 2)))
        (folder / name).write_bytes(content[:start] + new + content[end:])
    pool, document = report(folder)
    for run, now in numbers(pool).items():
        if "scores.jsonl" not in damaged and "plan.json" not in damaged:
            assert now["R"] == before[run]["R"]
    assert len(document["runs"]) == len(pool.runs)


def test_a_damaged_entry_of_the_plan_is_looked_up_in_the_summary(good, folder):
    plan = json.loads((folder / "plan.json").read_text())
    plan["runs"][2]["settings"] = "p"
    (folder / "plan.json").write_text(json.dumps(plan))
    pool, _ = report(folder)
    assert "plan.json: run 3 is damaged and is left out" in pool.gaps
    (run,) = [run for run in pool.runs if run["run"] == SFA]
    before = next(run for run in report(good)[0].runs if run["run"] == SFA)
    for key in ("settings", "label", "seed", "R", "metrics"):
        assert run[key] == before[key]
