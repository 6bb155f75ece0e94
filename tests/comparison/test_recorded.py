"""Runs as `stockpot run` leaves them: which are meant, what is paired, and what is damaged."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.stats import binomtest

from stockpot.comparison.recorded import pair_sides
from stockpot.comparison.sides import read_side
from stockpot.comparison.verdict import judge
from stockpot.comparison.wording import as_json
from stockpot.errors import ConfigError, DamagedRecordError, StockpotError
from support.experiments import run_and_kill, run_file, write_experiment

METHODS = "[sequential, multitask, {name: sfa, p: [0.5, 1], beta: 0.3}]"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return write_experiment(tmp_path_factory.mktemp("e"), METHODS, seeds="[0, 1]")


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    run_file(experiment, out)
    return out


@pytest.fixture
def folder(finished, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(finished, tmp_path / "digits")


def pairings(before, after, same_items=False):
    sides = read_side(str(before), "BEFORE"), read_side(str(after), "AFTER")
    return pair_sides(*sides, same_items)


def rows(before, after, **options):
    (pairing,), _ = pairings(before, after, **options)
    return {row.task: row for row in pairing.rows}


def items(folder, run, stage, task):
    return load_file(folder / "runs" / run / "items" / f"{stage}.safetensors")[f"{task}/accuracy"]


def edit(folder, run, stage, change):
    path = folder / "runs" / run / "items" / f"{stage}.safetensors"
    save_file(change(load_file(path)), path)


def test_the_numbers_are_those_of_the_items(finished):
    run = f"{finished}/runs/sequential-seed0"
    found = rows(f"{run}@0", run)
    assert list(found) == ["0-1", "2-3", "4-5"]
    for task, row in found.items():
        before = items(finished, "sequential-seed0", "stage-0000", task)
        after = items(finished, "sequential-seed0", "stage-0002", task)
        lost, won = int((before > after).sum()), int((before < after).sum())
        assert (row.before, row.after) == pytest.approx((before.mean(), after.mean()))
        assert (row.n, row.lost, row.won, row.headline) == (30, lost, won, True)
        assert row.p == pytest.approx(binomtest(lost, lost + won).pvalue if lost + won else 1)


def test_the_scores_are_those_of_the_record(finished):
    lines = [json.loads(line) for line in (finished / "scores.jsonl").read_text().splitlines()]
    found = rows(f"{finished}/runs/sequential-seed0@start", f"{finished}/runs/sequential-seed0@2-3")
    for line in lines:
        if line["run"] == "sequential-seed0" and line["stage"] in (-1, 1):
            value = found[line["task"]].before if line["stage"] < 0 else found[line["task"]].after
            assert value == pytest.approx(line["value"], abs=1e-6)


@pytest.mark.parametrize(
    ("side", "names"),
    [
        (":sequential", ["sequential, after 4-5"]),
        (":sequential@start", ["sequential, start"]),
        (":sfa-p0.5-beta0.3@1", ["sfa-p0.5-beta0.3, after 2-3"]),
        (":sfa p=0.5 beta=0.3@2-3", ["sfa-p0.5-beta0.3, after 2-3"]),
        (":multi", None),
        (":multitask", ["multitask, after 0-1 + 2-3 + 4-5"]),
        ("/runs/multitask-seed1@0-1", ["multitask-seed1, after 0-1 + 2-3 + 4-5"]),
        (":sequential-seed1@0", ["sequential-seed1, after 0-1"]),
    ],
)
def test_what_a_side_may_be_called(finished, side, names):
    other = f"{finished}:sequential-seed1@start" if "seed1" in side else f"{finished}:sfa-p1@start"
    if names is None:
        with pytest.raises(ConfigError, match="did you mean 'multitask'"):
            read_side(f"{finished}{side}", "BEFORE")
        return
    found, _ = pairings(f"{finished}{side}", other)
    assert [pairing.before for pairing in found] == names


def test_two_settings_are_paired_seed_by_seed(finished):
    found = rows(f"{finished}:sequential", f"{finished}:sfa-p1")
    for task, row in found.items():
        d = [
            items(finished, f"sequential-seed{seed}", "stage-0002", task)
            - items(finished, f"sfa-p1-beta0.3-seed{seed}", "stage-0002", task)
            for seed in (0, 1)
        ]
        assert row.drop == pytest.approx(np.mean(d))
        assert row.by_seed == pytest.approx({0: d[0].mean(), 1: d[1].mean()})
        assert row.n == 30


def test_a_whole_experiment_is_paired_setting_by_setting(finished):
    found, notes = pairings(f"{finished}@start", finished)
    assert [pairing.setting for pairing in found] == [
        "sequential",
        "multitask",
        "sfa-p0.5-beta0.3",
        "sfa-p1-beta0.3",
    ]
    assert all(pairing.seeds == (0, 1) and len(pairing.rows) == 3 for pairing in found)
    assert notes == []
    result = judge(found, "a", "b")
    assert len(result.judged) == 12
    assert result.judged[0].p_corrected >= min(1, result.judged[0].row.p)
    assert json.loads(json.dumps(as_json(result), allow_nan=False))["tests"] == 12


def test_the_same_experiment_run_again_has_changed_nothing(experiment, finished, tmp_path):
    run_file(experiment, tmp_path / "again", ["methods=[sequential]", "seeds=[0]"])
    found, notes = pairings(finished, tmp_path / "again")
    (pairing,) = found
    assert pairing.seeds == (0,)
    assert notes == ["sequential: seed 1 is on one side only and left out"]
    assert all(not row.d.any() for row in pairing.rows)


def test_other_data_are_refused_unless_the_user_vouches(experiment, finished, tmp_path):
    run_file(
        experiment,
        tmp_path / "other",
        ["methods=[sequential]", "seeds=[0]", "stream.train_limit=32"],
    )
    one, other = f"{finished}:sequential", f"{tmp_path}/other:sequential"
    with pytest.raises(ConfigError, match=r"stream.train_limit: 48 before, 32 after.*--same-items"):
        pairings(one, other)
    found, notes = pairings(one, other, same_items=True)
    assert len(found[0].rows) == 3
    assert "you said that their test items are the same" in notes[0]


def test_tasks_that_only_one_side_has_are_said_and_the_others_compared(
    experiment, finished, tmp_path
):
    run_file(
        experiment, tmp_path / "two", ["methods=[sequential]", "seeds=[0]", "stream.order=[1,0]"]
    )
    (pairing,), _ = pairings(f"{finished}:sequential", f"{tmp_path}/two:sequential", True)
    assert sorted(row.task for row in pairing.rows) == ["0-1", "2-3"]
    (left,) = pairing.left
    assert (left.task, left.reason, left.judged) == ("4-5", "AFTER has no such score", True)
    (pairing,), _ = pairings(f"{tmp_path}/two:sequential", f"{finished}:sequential", True)
    assert (pairing.left[0].reason, pairing.left[0].judged) == ("BEFORE has no such score", False)


# What goes wrong.


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("{f}/nope", "{f}:sequential", "digits is an experiment. Write its runs as FOLDER:RUN"),
        ("{f}/sequential", "{f}", "did you mean 'sequential'"),
        ("/no/such/place", "{f}", "there is no folder '/no/such/place'"),
        ("{f}/runs", "{f}", "neither the folder of an experiment"),
        ("{f}:squential", "{f}", "did you mean 'sequential'"),
        ("{f}:sfa", "{f}", "could be any of 2 settings. Choose: sfa-p0.5-beta0.3, sfa-p1-beta0.3"),
        ("{f}:sequential@3", "{f}", r"it has start, 0 \(0-1\), 1 \(2-3\), 2 \(4-5\)"),
        ("{f}:sequential@9-9", "{f}", "no finished stage '9-9'"),
        ("{f}:multitask@1", "{f}", "'multitask-seed0' has no finished stage '1'"),
        ("{f}", "{f}", "BEFORE and AFTER are the same"),
        ("{f}:sequential", "{f}:sequential@2", "BEFORE and AFTER are the same"),
        ("{f}:sequential@start", "{f}/runs/sequential-seed0@start", "are the same"),
        ("{f}:sequential-seed0", "{f}:sequential@4-5", None),
    ],
)
def test_sides_that_mean_nothing(finished, before, after, message):
    before, after = (side.format(f=finished) for side in (before, after))
    if message is None:
        after = after.replace(":sequential@4-5", ":sfa-p1@4-5")
        (pairing,), notes = pairings(before, after)
        assert (pairing.seeds, len(notes)) == ((0,), 1)
        return
    with pytest.raises(ConfigError, match=message):
        pairings(before, after)


def test_two_experiments_without_a_setting_in_common(experiment, finished, tmp_path):
    run_file(experiment, tmp_path / "l2", ["methods=[l1, l2]", "seeds=[5]"])
    with pytest.raises(ConfigError, match=r"no setting in common. .* has: sequential, multitask"):
        pairings(finished, tmp_path / "l2")
    with pytest.raises(ConfigError, match="no seed is in both"):
        pairings(f"{finished}:sequential", f"{tmp_path}/l2:l2@start")
    # Two single runs are compared whatever their seeds are.
    assert pairings(f"{finished}:sequential-seed0", f"{tmp_path}/l2:l2")


def test_a_run_that_was_killed_early(experiment, tmp_path):
    run_and_kill(experiment, tmp_path / "cut", stage=1, step=2)
    found = rows(f"{tmp_path}/cut:sequential@start", f"{tmp_path}/cut/runs/sequential-seed0")
    assert len(found) == 3
    with pytest.raises(ConfigError, match="no finished stage '1'; it has start, 0"):
        read_side(f"{tmp_path}/cut:sequential@1", "BEFORE")
    (tmp_path / "cut" / "runs" / "multitask-seed0").mkdir()
    with pytest.raises(ConfigError, match=r"'multitask-seed0' .* has no finished stage yet"):
        read_side(f"{tmp_path}/cut/runs/multitask-seed0", "BEFORE")
    (tmp_path / "cut" / "stages.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no finished stage of any run yet"):
        read_side(f"{tmp_path}/cut", "BEFORE")


def test_a_folder_of_an_older_version_has_no_items(folder):
    shutil.rmtree(folder / "runs" / "sequential-seed0" / "items")
    with pytest.raises(ConfigError, match="no items: it was made by an older version"):
        pairings(f"{folder}:sequential-seed0@0", f"{folder}:sequential-seed0")


def test_a_run_without_its_experiment(folder, tmp_path):
    shutil.copytree(folder / "runs" / "sequential-seed0", tmp_path / "x" / "y" / "z")
    with pytest.raises(ConfigError, match="the record of its experiment is not above it"):
        read_side(str(tmp_path / "x" / "y" / "z"), "BEFORE")


def test_a_model_without_items_asks_for_tasks(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="--task FILE or --stream"):
        read_side(str(tmp_path), "BEFORE")


@pytest.mark.parametrize("damage", ["cut", "gone", "noise", "empty", "other"])
def test_damaged_items_are_refused(folder, damage):
    path = folder / "runs" / "sequential-seed0" / "items" / "stage-0002.safetensors"
    if damage == "gone":
        path.unlink()
    elif damage == "other":
        save_file({"something/else": np.ones(3, np.float32)}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[:-50], "noise": b"\xff" * 400, "empty": b""}[damage])
    with pytest.raises(DamagedRecordError, match=r"stage-0002\.safetensors"):
        pairings(f"{folder}:sequential-seed0@0", f"{folder}:sequential-seed0")


@pytest.mark.parametrize("file", ["scores.jsonl", "stages.jsonl"])
def test_a_damaged_log_is_refused(folder, file):
    (folder / file).write_text("{not json}\n" + (folder / file).read_text())
    with pytest.raises(StockpotError, match=rf"{file}:1: damaged line"):
        pairings(f"{folder}:sequential-seed0@0", f"{folder}:sequential-seed0")


@pytest.mark.parametrize(
    ("task", "items", "reason"),
    [
        ("0-1", np.full(30, np.nan), "30 of 30 items of AFTER are not finite numbers"),
        ("2-3", np.zeros(0), "AFTER has no items"),
        ("4-5", np.ones(29), "it has 30 items before and 29 after"),
    ],
)
def test_one_task_that_cannot_be_compared_does_not_stop_the_others(folder, task, items, reason):
    edit(
        folder,
        "sequential-seed0",
        "stage-0002",
        lambda tensors: tensors | {f"{task}/accuracy": items.astype(np.float32)},
    )
    (pairing,), _ = pairings(f"{folder}:sequential-seed0@0", f"{folder}:sequential-seed0")
    assert len(pairing.rows) == 2
    assert [(left.task, left.reason, left.judged) for left in pairing.left] == [
        (task, reason, True)
    ]


def test_generated_texts_illustrate_what_was_lost(folder):
    for stage, word in (("stage-0000", "old"), ("stage-0002", "new")):
        lines = [
            json.dumps({"task": "0-1", "score": "accuracy", "answer": f"{word} {n}", "gold": "7"})
            for n in range(30)
        ]
        path = folder / "runs" / "sequential-seed0" / "items" / f"{stage}.jsonl"
        path.write_text("\n".join(lines) + "\n")
    found = rows(f"{folder}:sequential-seed0@0", f"{folder}:sequential-seed0")["0-1"]
    before = items(folder, "sequential-seed0", "stage-0000", "0-1")
    after = items(folder, "sequential-seed0", "stage-0002", "0-1")
    assert found.examples
    for example in found.examples:
        n = example["item"]
        assert (example["before"], example["after"]) == (before[n], after[n])
        assert (example["what"] == "lost") == (before[n] > after[n])
        assert example["text_before"] == f"old {n}\n(right: 7)"
        assert example["text_after"].startswith(f"new {n}")
