"""A record as it is read: whole, missing files, unfinished, or of an older version."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from stockpot.errors import StockpotError
from stockpot.report.reading import experiment_folders
from stockpot.report.write import read_pools, write_report
from support.experiments import run_file, write_experiment
from support.reading import LOGS, MAPPINGS, SFA, numbers, report
from support.records import Spec, read_lines, write_lines, write_made_up

FILES = [*(f"{name}.jsonl" for name in LOGS), *(f"{name}.json" for name in MAPPINGS)]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_made_up(tmp_path_factory.mktemp("good") / "run")


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "run"))


def test_a_whole_record_has_no_gaps_and_the_numbers_of_its_files(good):
    pool, document = report(good)
    assert pool.gaps == document["gaps"] == []
    assert pool.planned == len(pool.runs) == len(pool.finished) == 6
    plan = json.loads((good / "plan.json").read_text())
    cells: dict[tuple[str, str | None, str], float] = {}
    for line in read_lines(good / "scores.jsonl"):
        cells[line["run"], line["trained"], line["task"]] = line["value"]
    for run, planned in zip(pool.runs, plan["runs"], strict=True):
        own = run["run"]
        assert own == planned["run"]
        assert run["b"] == [cells[own, None, task] for task in plan["tasks"]]
        for t, trained in enumerate(plan["tasks"]):
            if (own, trained, "odd") in cells:
                assert run["R"][t] == [cells[own, trained, task] for task in plan["tasks"]]
            else:
                assert "multitask" in own
                assert run["R"][t] is None
        for log in ("merges", "curves", "lines"):
            lines = [line for line in read_lines(good / f"{log}.jsonl") if line["run"] == own]
            assert len(run[log]) == len(lines)
        stages = [line for line in read_lines(good / "stages.jsonl") if line["run"] == own]
        assert run["metrics"]["seconds"] == pytest.approx(sum(s["seconds"] for s in stages))
        assert run["metrics"]["peak_memory"] == max(s["peak_memory"] for s in stages)
        assert run["metrics"]["stored_bytes"] == 1000 + 10 * (len(stages) - 1)
        assert run["metrics"]["l2_to_anchor"] == stages[-1]["l2_to_anchor"]


def test_metrics_are_those_of_the_definitions(good):
    pool, _ = report(good)
    for run in pool.runs:
        R = np.array([row or [np.nan] * 3 for row in run["R"]])
        b, metrics = np.array(run["b"]), run["metrics"]
        assert metrics["average"] == pytest.approx(R[-1].mean())
        if run["method"] == "multitask":
            assert metrics["forgetting"] is None
            assert metrics["fwt"] is None
            continue
        assert metrics["forgetting"] == pytest.approx(np.mean([R[i, i] - R[2, i] for i in (0, 1)]))
        assert metrics["fwt"] == pytest.approx(np.mean([R[0, 1] - b[1], R[1, 2] - b[2]]))


# Whole files.


@pytest.mark.parametrize("name", [*FILES, "experiment.yaml"])
def test_each_file_may_be_missing(name, good, folder):
    (folder / name).unlink()
    pool, document = report(folder)
    before = numbers(report(good)[0])
    after = numbers(pool)
    # Older records have no plan, unfinished ones no summary.
    assert any(name in gap for gap in document["gaps"]) != (name in ("plan.json", "summary.json"))
    lost = {"stages.jsonl": {"trained", "metrics"}}.get(name, {name.removesuffix(".jsonl")})
    for run, held in before.items():
        for key in held.keys() - lost:
            assert after[run][key] == held[key], key
    assert all(run["finished"] for run in pool.runs)


def test_scores_alone_are_a_report(folder):
    for path in folder.iterdir():
        if path.name != "scores.jsonl":
            path.unlink()
    pool, document = report(folder)
    assert len(pool.finished) == 6
    methods = {run["run"]: (run["method"], run["seed"]) for run in pool.runs}
    assert methods[SFA] == ("sfa", 0)
    assert methods["multitask-seed1"] == ("multitask", 1)
    for name in ("experiment.json", "environment.json", "stages.jsonl", "experiment.yaml"):
        assert f"{name} is missing" in document["gaps"]
    assert pool.tasks == ["even", "odd", "prime"]
    assert write_report(folder).exists()


def test_a_summary_alone_is_a_report(good, folder):
    for path in folder.iterdir():
        if path.name != "summary.json":
            path.unlink()
    pool, document = report(folder)
    before = numbers(report(good)[0])
    for run, now in numbers(pool).items():
        assert (now["R"], now["b"]) == (before[run]["R"], before[run]["b"])
    assert any("taken from summary.json" in gap for gap in document["gaps"])
    assert write_report(folder).exists()


def test_nothing_left_is_a_clear_error(folder):
    for name in ("scores.jsonl", "summary.json"):
        (folder / name).unlink()
    before = sorted(folder.iterdir())
    with pytest.raises(StockpotError, match=r"no task .* is trained and scored.*scores\.jsonl"):
        write_report(folder)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", ["absent", "empty", "file"])
def test_what_is_no_record_is_refused_by_name(name, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StockpotError, match=name):
        write_report(tmp_path / name)


FILLINGS = {
    "nothing": lambda data: b"",
    "a line break": lambda data: b"\n",
    "zeros": lambda data: bytes(len(data)),
    "all bytes": lambda data: bytes(range(256)) * 8,
    "brackets": lambda data: b"[" * 100_000,
    "null": lambda data: b"null\n",
    "a number": lambda data: b"3\n",
    "a list": lambda data: b"[[]]\n",
    "infinity": lambda data: b'{"a": 1e999}\n',
    "other bytes": lambda data: b"\xff\xfe" + data[2:],
    "its beginning": lambda data: data[: len(data) // 2],
    "its end": lambda data: data[len(data) // 2 :],
    "itself backwards": lambda data: data[::-1],
}


@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("name", [*FILES, "experiment.yaml"])
def test_each_file_may_be_filled_with_anything(name, filling, good, folder):
    path = folder / name
    path.write_bytes(FILLINGS[filling](path.read_bytes()))
    pool, document = report(folder)
    # A text is a text: what else does the yaml need? Nor is a cut one told from a short one.
    if name != "experiment.yaml" or filling in ("nothing", "zeros", "all bytes", "other bytes"):
        assert any(gap.startswith(name) or name in gap for gap in document["gaps"])
    before, after = numbers(report(good)[0]), numbers(pool)
    if name not in ("scores.jsonl", "plan.json"):
        for run, held in before.items():
            assert (after[run]["R"], after[run]["b"]) == (held["R"], held["b"])
    # summary.json still has R where the scores are gone, and the other way round.
    assert len(pool.finished) == 6


def test_a_folder_where_a_file_should_be(folder):
    (folder / "merges.jsonl").unlink()
    (folder / "merges.jsonl").mkdir()
    _, document = report(folder)
    assert any(gap.startswith("merges.jsonl cannot be read") for gap in document["gaps"])


# Unfinished and older records.


def test_unfinished_runs_are_there_as_far_as_they_went(tmp_path):
    stages = {SFA: 2, "sequential-seed1": 0, "multitask-seed1": 0, "sequential-seed0": 1}
    folder = write_made_up(tmp_path / "run", stages=stages)
    pool, document = report(folder)
    assert pool.gaps == []
    assert pool.planned == 6
    assert {run["run"] for run in pool.finished} == {
        "multitask-seed0",
        SFA.replace("0", "0")[:-1] + "1",
    }
    by_id = {run["run"]: run for run in pool.runs}
    assert [row is not None for row in by_id[SFA]["R"]] == [True, True, False]
    assert by_id["sequential-seed1"]["R"] == [None] * 3
    assert by_id[SFA]["metrics"] == {}
    assert "4 of 6 runs are not finished" in document["answer"]


def test_a_record_without_any_finished_run(tmp_path):
    folder = write_made_up(
        tmp_path / "run", stages={SFA: 1}, methods=(Spec().methods[2],), seeds=[0]
    )
    pool, document = report(folder)
    assert (pool.gaps, pool.finished, document["tables"]) == ([], [], [])
    assert "No run is finished" in document["answer"]
    page = write_report(folder)
    assert page.exists()
    assert not (folder / "results.csv").exists()


def test_a_score_that_is_all_there_is(folder):
    for path in folder.iterdir():
        if path.name != "scores.jsonl":
            path.unlink()
    lines = read_lines(folder / "scores.jsonl")
    write_lines(folder / "scores.jsonl", [line for line in lines if line["stage"] == 0][:1])
    pool, _ = report(folder)
    (run,) = pool.runs
    assert run["R"] == [[lines[3]["value"]]]
    assert write_report(folder).exists()


def test_records_of_the_version_before_have_no_plan(good, folder):
    (folder / "plan.json").unlink()
    pool, _ = report(folder)
    assert pool.gaps == []
    before, after = numbers(report(good)[0]), numbers(pool)
    assert after == before
    for run, old in zip(pool.runs, report(good)[0].runs, strict=True):
        assert (run["settings"], run["label"], run["seed"]) == (
            old["settings"],
            old["label"],
            old["seed"],
        )


def test_unfinished_runs_of_a_record_without_a_plan(tmp_path):
    folder = write_made_up(tmp_path / "run", stages={SFA: 2, "sequential-seed1": 0})
    (folder / "plan.json").unlink()
    pool, document = report(folder)
    assert pool.planned == 6  # as experiment.json says
    by_id = {run["run"]: run for run in pool.runs}
    assert len(by_id) == 5
    assert (by_id[SFA]["method"], by_id[SFA]["seed"]) == ("sfa", 0)
    assert by_id[SFA]["R"][1] is not None
    assert by_id[SFA]["R"][2] is None
    assert "2 of 6 runs are not finished" in document["answer"]


def test_a_run_that_failed_is_said_and_is_not_waited_for(tmp_path):
    folder = write_made_up(tmp_path / "run", stages={SFA: 1, "sequential-seed1": 0})
    failures = {SFA: "task 'odd': the loss is nan at step 3 of 6"}
    (folder / "failures.json").write_text(json.dumps(failures))
    pool, document = report(folder)
    assert pool.gaps == [f"run {SFA} failed: {failures[SFA]}"]
    assert [run["run"] for run in pool.failed] == [SFA]
    assert (len(pool.finished), pool.planned, pool.left) == (4, 6, 1)
    assert "1 of 6 runs are not finished" in document["answer"]
    assert "1 of 6 runs failed" in document["answer"]


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"a": NaN}', "null", '{"x": {"y": 1}}'])
def test_a_damaged_list_of_failures_is_said(text, good, folder):
    (folder / "failures.json").write_text(text)
    pool, _ = report(folder)
    said = any(gap.startswith("failures.json is ") for gap in pool.gaps)
    assert said == ("x" not in text or "\x00" in text)  # of a run that is not there
    assert numbers(pool) == numbers(report(good)[0])


def test_a_real_record_cut_at_every_tenth_byte(tmp_path):
    """scores.jsonl of a real run, cut as a kill would: never an error, never a wrong number."""
    path = write_experiment(tmp_path, "[sequential, {name: sfa, p: 0.5, beta: 0.5}]")
    assert not run_file(path, tmp_path / "out").failures
    out = tmp_path / "out"
    whole = numbers(read_pools([out])[0])
    (out / "summary.json").unlink()
    data = (out / "scores.jsonl").read_bytes()
    made = 0
    for end in range(0, len(data), max(1, len(data) // 40)):
        (out / "scores.jsonl").write_bytes(data[:end])
        try:
            (pool,) = read_pools([out])
        except StockpotError:
            assert b'"stage": 0' not in data[:end].rpartition(b"\n")[0]
            continue
        made += 1
        for run, now in numbers(pool).items():
            for row, held in zip(now["R"], whole[run]["R"], strict=True):
                pairs = zip(row or [], held, strict=False)
                assert all(value in (None, kept) for value, kept in pairs)
    assert made > 30


def test_folders_are_found_in_their_parent_and_once(good, tmp_path):
    for name in ("b", "a"):
        shutil.copytree(good, tmp_path / "runs" / name)
    (tmp_path / "runs/notes").mkdir()
    (tmp_path / "runs/readme.txt").write_text("x")
    parent = tmp_path / "runs"
    assert experiment_folders([parent, parent / "a"]) == [parent / "a", parent / "b"]
    assert experiment_folders([parent / "a" / "..", parent / "b"])[0].resolve() == parent / "a"
