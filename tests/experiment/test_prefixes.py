"""What runs share is trained once, and the weights are the same as without sharing."""

import json
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from stockpot.experiment import load_experiment
from stockpot.experiment.plan import make_plan
from stockpot.experiment.prefixes import PrefixStore
from stockpot.methods import METHODS
from support.experiments import STEPS_PER_TASK, lines, record_of, run_file, write_experiment

ALL = (
    "[sequential, multitask, {name: rehearsal, fraction: [0.05, 0.2]}, l1, ties, "
    "{name: l2, strength: [1, 2]}, {name: ewc, samples: 10}, {name: sfa, p: [0.5, 1], beta: 0.5}, "
    "{name: wise-ft, beta: [0.2, 0.5]}, {name: task-arithmetic, scale: [0.3, 1]}, "
    "{name: fisher-merging, samples: 9}]"
)


def deployed(folder):
    return {
        path.parent.name: json.loads(path.read_text())["model.safetensors"]["sha256"]
        for path in folder.glob("runs/*/manifest.json")
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefixes")
    path = write_experiment(folder, ALL)
    run_file(path, folder / "shared")
    run_file(path, folder / "alone", share_prefixes=False)
    return path, folder


def test_weights_scores_and_merges_are_the_same_without_sharing(both):
    _, folder = both
    shared, alone = record_of(folder / "shared"), record_of(folder / "alone")
    for line in (*shared["stages"], *alone["stages"]):
        del line["key"]  # says with whom it may be shared
    assert len(shared["manifests"]) == 16
    assert shared == alone


def test_first_task_is_trained_once(both):
    _, folder = both
    stages = lines(folder / "shared" / "stages.jsonl")
    first = [line for line in stages if line["stage"] == 0 and "multitask" not in line["run"]]
    assert len(first) == 15
    assert sum(line["trained_here"] for line in first) == 1
    assert all(line["trained_here"] for line in lines(folder / "alone" / "stages.jsonl"))


def test_what_the_plan_promises_is_what_is_trained(both):
    path, folder = both
    experiment = load_experiment(path)
    plan = make_plan(experiment, experiment.stream.load())
    stages = lines(folder / "shared" / "stages.jsonl")
    assert plan.steps == sum(line["steps"] for line in stages) == 16 * 3 * STEPS_PER_TASK
    assert plan.steps_to_train == sum(line["steps"] for line in stages if line["trained_here"])


def test_merging_methods_share_their_experts(both):
    _, folder = both
    stages = lines(folder / "shared" / "stages.jsonl")
    experts = [
        line
        for line in stages
        if line["run"].split("-")[0] in ("task", "ties", "fisher") and line["stage"]
    ]
    assert len(experts) == 8
    assert sum(line["trained_here"] for line in experts) == 2


def test_nothing_is_shared_that_differs(tmp_path):
    """Settings that change the weights change the key; runs share a key only if they agree."""
    path = write_experiment(tmp_path, ALL, seeds="[0, 1]")
    experiment = load_experiment(path)
    stream = experiment.stream.load()
    plan = make_plan(experiment, stream)
    by_id = {run.id: run for run in plan.runs}
    assert (
        by_id["sequential-seed0"].stages[0].trained != by_id["sequential-seed1"].stages[0].trained
    )
    for one, other in (
        ("l2-strength1-seed0", "l2-strength2-seed0"),
        ("sfa-p0.5-beta0.5-seed0", "sfa-p1-beta0.5-seed0"),
        ("rehearsal-fraction0.05-seed0", "rehearsal-fraction0.2-seed0"),
    ):
        a, b = by_id[one].stages, by_id[other].stages
        assert a[0].trained == b[0].trained
        assert a[1].trained != b[1].trained
        assert a[2].trained != b[2].trained
    for change in ("training.batch_size=8", "model.hidden=[9]", "stream.order=[1,0,2]"):
        changed = load_experiment(path, [change])
        other = make_plan(changed, changed.stream.load())
        assert not other.uses().keys() & plan.uses().keys()


def test_wise_ft_is_sfa_with_p_1(tmp_path):
    path = write_experiment(tmp_path, "[{name: wise-ft, beta: 0.5}, {name: sfa, p: 1, beta: 0.5}]")
    run_file(path, tmp_path / "out")
    one, other = (load_file(f) for f in sorted(tmp_path.glob("out/runs/*/model.safetensors")))
    assert all(one[name].equal(other[name]) for name in one)


def test_store_is_gone_at_the_end(both):
    _, folder = both
    assert not (folder / "shared" / "prefixes").exists()
    assert not (folder / "shared" / "scratch").exists()


def test_two_jobs_that_train_the_same_at_once_both_go_on(tmp_path):
    """Threads here: each then reads the whole of what one wrote, and nothing stays behind."""
    barrier, met = threading.Barrier(4, timeout=20), Counter()

    def job(number):
        store = PrefixStore(tmp_path, Counter({"key": 9}))
        for _ in range(50):
            barrier.wait()
            store.save("key", {"w": torch.full((1000,), float(number))}, {"by": number})
            weights, about = store.load("key")
            assert set(weights["w"].tolist()) == {float(about["by"])}
            met[about["by"]] += 1
            if barrier.wait() == 0:
                shutil.rmtree(tmp_path / "key")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(job, range(4)))
    assert sum(met.values()) == 200
    assert len(met) > 1
    assert not list(tmp_path.iterdir())


def test_every_method_states_its_identity():
    for method in METHODS.values():
        assert method().training_identity(0) == {}
