"""Runs whose evaluation is thinned: what is scored is what a full evaluation would say of it."""

import gc
import json

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from stockpot.errors import ConfigError, DamagedRecordError
from stockpot.experiment import load_experiment, run_experiment
from stockpot.experiment.observer import Observer
from stockpot.experiment.record import Record
from stockpot.report.reading import read_record
from stockpot.report.write import write_report
from stockpot.streams.digits import load_digits
from stockpot.streams.images import permuted_stream
from support.experiments import lines, record_of, run_and_kill, run_file

METHODS = [{"name": "sfa", "p": 0.5, "beta": 0.3}, "sequential", "multitask"]
RUNS = ("sfa-p0.5-beta0.3-seed4", "sequential-seed4", "multitask-seed4")
BASE = {
    "stream": {"name": "digits", "split": "pairs", "train_limit": 48, "test_limit": 30},
    "model": {"name": "mlp", "hidden": [8]},
    "training": {
        "epochs": 1,
        "batch_size": 16,
        "learning_rate": 0.01,
        "threads": 1,
        "device": "cpu",
    },
    "methods": METHODS,
    "seeds": [4],
}
MEASURED = {"every": 2, "merges": True, "line": 3, "kl": 8}
THINNED = {
    "recent": {"tasks": "recent", "tasks_limit": 2},
    "sample": {"tasks": "sample", "tasks_limit": 3},
    "every": {"every_tasks": 2},
    "both": {"tasks": "sample", "tasks_limit": 2, "every_tasks": 3},
}


def written(folder, **evaluation):
    folder.mkdir(exist_ok=True)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({**BASE, "evaluation": {**MEASURED, **evaluation}}))
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    run_file(written(folder), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def thinned(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            path = written(folder, **THINNED[name])
            run_file(path, folder / "out")
            made[name] = path, folder / "out"
        return made[name]

    return get


def summaries(folder):
    return {run["run"]: run for run in json.loads((folder / "summary.json").read_text())}


@pytest.mark.parametrize("name", THINNED)
def test_what_is_scored_is_what_a_full_evaluation_says(full, thinned, name):
    path, out = thinned(name)
    settings = load_experiment(path).evaluation
    whole, found = summaries(full), summaries(out)
    assert set(found) == set(RUNS)
    for run in RUNS:
        R, all_of_R = found[run]["R"], whole[run]["R"]
        for t, row in enumerate(R):
            if run.startswith("multitask"):
                assert row == all_of_R[t]
                continue
            wanted = settings.tasks_after(t, 5, seed=4)
            assert row == [x if i in wanted else None for i, x in enumerate(all_of_R[t])]
        b = settings.tasks_at_start(5)
        assert found[run]["b"] == [x if i in b else None for i, x in enumerate(whole[run]["b"])]
        metrics, all_metrics = found[run]["metrics"], whole[run]["metrics"]
        for exact in ("average", "learned", "forgetting", "bwt", "l2_to_anchor", "kl_from_anchor"):
            assert metrics[exact] == all_metrics[exact]
        assert metrics["fwt"] is metrics["forgetting_vs_best"] is None
    matrix = np.array([r or [np.nan] * 5 for r in found["sequential-seed4"]["R"]], float)
    assert not np.isnan(np.diag(matrix)).any()
    assert not np.isnan(matrix[-1]).any()
    assert np.isnan(matrix).any()


@pytest.mark.parametrize("name", ["sample", "every"])
def test_items_curves_and_lines_go_by_the_tasks_too(full, thinned, name):
    path, out = thinned(name)
    settings = load_experiment(path).evaluation
    tasks = summaries(out)[RUNS[0]]["tasks"]
    stage_of = {RUNS[0]: range(5), RUNS[2]: range(1)}
    for run, stages in stage_of.items():
        for stage in stages:
            row = 4 if run == RUNS[2] else stage
            after = {tasks[i] for i in settings.tasks_after(row, 5, 4)}
            during = {tasks[i] for i in settings.tasks_during(row, 5, 4)}
            during = set(tasks) if run == RUNS[2] else during
            items = out / "runs" / run / "items" / f"stage-{stage:04d}.safetensors"
            with safe_open(items, "np") as file:
                assert set(file.keys()) == {f"{task}/accuracy" for task in after}
            for log in ("curves.jsonl", "lines.jsonl"):
                mine, theirs = (
                    [x for x in lines(folder / log) if (x["run"], x["stage"]) == (run, stage)]
                    for folder in (out, full)
                )
                assert mine == [x for x in theirs if x["task"] in during]
                assert mine or (log == "lines.jsonl" and stage == 0)


def test_a_run_that_was_killed_scores_the_same_sample(thinned, tmp_path):
    path, out = thinned("sample")
    again = tmp_path / "again"
    run_and_kill(path, again, stage=3, step=2)
    run_file(path, again)
    assert record_of(again) == record_of(out)


def test_another_thinning_is_another_experiment(thinned):
    path, out = thinned("recent")
    with pytest.raises(ConfigError, match=r"evaluation\.tasks: 'recent' there, 'sample' now"):
        run_file(path, out, ["evaluation.tasks=sample"])
    with pytest.raises(ConfigError, match=r"evaluation\.every_tasks: 1 there, 2 now"):
        run_file(path, out, ["evaluation.every_tasks=2"])


def test_a_record_from_before_there_was_a_choice_is_taken_up(full, tmp_path):
    import shutil

    old = tmp_path / "old"
    shutil.copytree(full, old)
    described = json.loads((old / "experiment.json").read_text())
    for key in ("tasks", "tasks_limit", "every_tasks"):
        del described["evaluation"][key]
    (old / "experiment.json").write_text(json.dumps(described))
    path = written(tmp_path / "new")
    before = lines(old / "stages.jsonl")
    run_file(path, old)
    assert lines(old / "stages.jsonl") == before
    (old / "experiment.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"evaluation\.tasks: 'all' there, 'recent' now"):
        run_file(path, old, ["evaluation.tasks=recent"])


def test_a_score_that_should_be_there_is_missed(thinned, tmp_path):
    """A gap that the settings do not ask for is damage."""
    import shutil

    path, out = thinned("recent")
    hurt = tmp_path / "hurt"
    shutil.copytree(out, hurt)
    kept = [
        line
        for line in lines(hurt / "scores.jsonl")
        if (line["run"], line["stage"], line["task"]) != (RUNS[0], 2, "2-3")
    ]
    (hurt / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (hurt / "summary.json").unlink()
    with pytest.raises(DamagedRecordError, match=r"lacks the score of .* 2, on task '2-3'"):
        run_file(path, hurt)
    assert any("no score after 4-5 on 2-3" in gap for gap in read_record(hurt).gaps)


@pytest.mark.parametrize("name", THINNED)
def test_the_report_lives_with_gaps_and_calls_none_of_them_damage(thinned, name):
    _, out = thinned(name)
    recorded = read_record(out)
    assert recorded.gaps == []
    found = summaries(out)
    assert len(recorded.finished) == len(RUNS)
    for run in recorded.runs:
        assert run["R"] == found[run["run"]]["R"]
        for metric, value in found[run["run"]]["metrics"].items():
            assert run["metrics"][metric] == pytest.approx(value)
    page = write_report(out)
    assert page.stat().st_size > 100_000
    assert (out / "figures" / "accuracy_matrix.svg").exists()


def test_a_report_without_its_scores_takes_a_thinned_r_from_the_summary(thinned, tmp_path):
    import shutil

    _, out = thinned("both")
    bare = tmp_path / "bare"
    shutil.copytree(out, bare)
    (bare / "scores.jsonl").unlink()
    found = summaries(out)
    assert {run["run"]: run["R"] for run in read_record(bare).runs} == {
        name: run["R"] for name, run in found.items()
    }


# What is held while a long stream goes on.


class _Tensors(Observer):
    """Bytes of all tensors that are alive after each task."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def stage_ends(self, run, stage, trained, row):
        gc.collect()
        alive = (x for x in gc.get_objects() if isinstance(x, torch.Tensor))
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
        self.held.append(sum(storages.values()))


@pytest.mark.parametrize("evaluation", [{}, {"tasks": "sample"}])
@pytest.mark.parametrize("method", ["sequential", "{name: sfa, p: 0.5}"])
def test_no_tensor_is_kept_for_a_past_task(tmp_path, method, evaluation):
    """The scores of 30 tasks have a number for each of 300 items: 36 kB a task, were they kept."""
    digits = load_digits()
    described = {**BASE, "methods": [yaml.safe_load(method)], "evaluation": {**evaluation, "kl": 0}}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({**described, "stream": {"name": "digits"}, "model": "mlp"}))
    stream = permuted_stream("p", digits.limited(48, 300, (("all", range(10)),)), 30, 10, seed=0)
    watch = _Tensors()
    outcome = run_experiment(load_experiment(path, output=tmp_path / "out"), watch, stream=stream)
    assert not outcome.failures
    assert len(watch.held) == 30
    assert watch.held[28] <= watch.held[12] + 4096  # from the tenth on a sample is whole
    for stage in Record(tmp_path / "out").load().stages().values():
        assert stage["resident_memory"] > 0
        assert stage["wall_seconds"] >= stage["seconds"] > 0


def test_trackers_get_what_is_known_and_nothing_else(thinned):
    """The mean over the tasks so far wherever all of them were scored, and nowhere else."""
    from stockpot.experiment.tracking import StageLines, stage_points

    _, out = thinned("every")
    scores = lines(out / "scores.jsonl")
    stages = [
        StageLines(
            stage,
            [x for x in scores if (x["run"], max(x["stage"], 0)) == (RUNS[1], stage["stage"])],
            (),
            (),
        )
        for stage in lines(out / "stages.jsonl")
        if stage["run"] == RUNS[1]
    ]
    run = summaries(out)[RUNS[1]]
    R, tasks = run["R"], run["tasks"]
    for t in range(5):
        points = stage_points(stages[: t + 1], tasks)
        found = points[max(points)]
        row = R[t][: t + 1]
        assert {
            name: found.get(f"scores/{task}") for name, task in zip(tasks, tasks, strict=True)
        } == dict(zip(tasks, R[t], strict=True))
        whole = None not in row
        assert found.get("summary/average") == (pytest.approx(np.mean(row)) if whole else None)
        learned = np.mean([R[i][i] for i in range(t + 1)])
        assert found["summary/learned"] == pytest.approx(learned)
        drops = [R[i][i] - R[t][i] for i in range(t)] if whole else []
        wanted = pytest.approx(np.mean(drops)) if drops else None
        assert found.get("summary/forgetting") == wanted
        assert ("summary/fwt" in found) == (t == 1 and R[0][1] is not None)
