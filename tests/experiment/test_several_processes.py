"""One run in several processes, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stockpot.files import exclusive
from support.experiments import SETTINGS, lines, record_of, write_experiment
from support.launch import launch

ALL = "[" + ", ".join(SETTINGS.values()) + "]"
FEW = f"[{SETTINGS['rehearsal']}, {SETTINGS['ewc']}, {SETTINGS['sfa']}]"


def digits(folder: Path, methods: str = ALL, **training: Any) -> Path:
    path = write_experiment(folder, methods)
    # Adam would blow up a gradient that is nothing but rounding to a whole step.
    training = {"optimizer": "sgd", "momentum": 0.9, **training}
    settings = "".join(f", {key}: {value}" for key, value in training.items())
    path.write_text(path.read_text().replace(", device: cpu}", f", device: cpu{settings}}}"))
    return path


def run(
    count: int, *words: object, ok: bool = True, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    module, place = ("stockpot", {}) if ok else ("support.slow_to_say", {"PYTHONPATH": "tests"})
    # What is said of an error depends on how the launcher ends the processes.
    done = launch(count, module, ["run", *words], place, fresh=fresh or not ok)
    assert (done.returncode == 0) == ok, done.stderr[-4000:]
    return done


def assert_same_run(ours: Path, right: Path, atol: float = 3e-5) -> None:
    """The same record but for rounding, and no more files."""
    one, other = record_of(ours), record_of(right)
    assert one["files"] == other["files"]
    for folder in sorted((right / "runs").iterdir()):
        weights, expected = (
            load_file(path / "runs" / folder.name / "model.safetensors") for path in (ours, right)
        )
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=atol, msg=name)
    places = ("run", "stage", "trained", "task", "metric", "n", "step")
    assert [[line[key] for key in places] for line in one["scores"]] == [
        [line[key] for key in places] for line in other["scores"]
    ]
    for line, expected_line in zip(one["scores"], other["scores"], strict=True):
        assert abs(line["value"] - expected_line["value"]) <= 1.01 / line["n"] + 1e-5
    for line, expected_line in zip(one["merges"], other["merges"], strict=True):
        assert line["step"] == expected_line["step"]
        for key in ("distance_before", "distance_after"):
            assert line[key] == pytest.approx(expected_line[key], rel=1e-3)
    for line, expected_line in zip(one["stages"], other["stages"], strict=True):
        assert line["key"] == expected_line["key"]
        assert line["extra_examples"] == expected_line["extra_examples"]
        for (step, loss), (step_there, loss_there) in zip(
            line["losses"], expected_line["losses"], strict=True
        ):
            assert step == step_there
            assert loss == pytest.approx(loss_there, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(1, digits(folder), "-q", "-o", folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def few_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    run(1, digits(folder, FEW), "-q", "-o", folder / "out")
    return folder / "out"


def test_two_processes_give_what_one_gives(tmp_path: Path, alone: Path) -> None:
    """With every method. Under ddp: below; each mode without a command line: tests/training."""
    path = digits(tmp_path, parallel="fsdp2")
    done = run(2, path, "--json", "-o", tmp_path / "out", fresh=True)
    assert_same_run(tmp_path / "out", alone)
    environment = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert environment["processes of a run"] == 2
    # One process says the result, and nothing else is on stdout.
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "summary.json").read_text())


def test_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    methods = f"[{SETTINGS['sfa']}, {SETTINGS['ewc']}]"
    path = digits(tmp_path, methods, parallel="zero3")
    run(1, path, "-q", "-o", tmp_path / "one")
    run(2, path, "-q", "-o", tmp_path / "two")
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("rank", "before", "after", "methods"),
    [(0, 2, 1, ALL), (1, 2, 1, FEW), (0, 1, 2, FEW), (1, 2, 2, FEW)],
    ids=["main-2-1", "other-2-1", "1-2", "other-2-2"],
)
def test_killed_and_resumed_by_another_number(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    rank: int,
    before: int,
    after: int,
    methods: str,
) -> None:
    alone: Path = request.getfixturevalue("alone" if methods == ALL else "few_alone")
    path, out = digits(tmp_path, methods, checkpoint_seconds=0), tmp_path / "out"
    pattern = "scratch/ewc*/stage-0001/checkpoint-[34]"
    words = [rank, pattern, "run", path, "-q", "-o", out]
    killed = launch(before, "support.killed_run", words)
    assert killed.returncode != 0
    assert list(out.glob("scratch/ewc*/stage-0001/checkpoint-*"))
    finished = len(lines(out / "stages.jsonl"))
    assert finished
    run(after, path, "-q", "-o", out)
    assert_same_run(out, alone)
    assert len(lines(out / "stages.jsonl")) > finished


def test_the_others_delete_nothing_that_a_killed_main_process_has_not_done_with(
    tmp_path: Path,
) -> None:
    path, out = digits(tmp_path, "[sequential]"), tmp_path / "out"
    words = [0, "stage 1", "run", path, "evaluation.kl=0", "-q", "-o", out]
    assert launch(2, "support.killed_run", words).returncode != 0
    assert len(lines(out / "stages.jsonl")) == 1
    run(1, path, "evaluation.kl=0", "-q", "-o", out)
    run(1, path, "evaluation.kl=0", "-q", "-o", tmp_path / "alone")
    assert_same_run(out, tmp_path / "alone")


def test_a_folder_that_is_in_use_is_refused_once_and_by_all(tmp_path: Path) -> None:
    path, out = digits(tmp_path, "[sequential]"), tmp_path / "out"
    out.mkdir()
    with exclusive(out):
        done = run(2, path, "-q", "-o", out, ok=False)
    assert done.stderr.count("another stockpot process is working in") == 1
    assert "closed by peer" not in done.stderr


def test_several_runs_at_a_time_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    done = run(2, digits(tmp_path), "-j", "2", "-o", tmp_path / "out", ok=False)
    assert done.stderr.count("do not go together") == 1
    assert not (tmp_path / "out").exists()


def test_accelerate_launch(tmp_path: Path, few_alone: Path) -> None:
    path = digits(tmp_path, FEW)
    words = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "bf16"]
    start = [sys.executable, "-m", "accelerate.commands.launch"]
    done = subprocess.run(
        [*start, *words, "-m", "stockpot", "run", path, "-q", "-o", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # The precision is the experiment's, not the launcher's.
    assert_same_run(tmp_path / "out", few_alone)


def test_a_failing_run_stops_neither_the_others_nor_a_process(tmp_path: Path) -> None:
    methods = "[{name: l2, strength: 1.0e+30}, sequential]"
    done = run(2, digits(tmp_path, methods), "-o", tmp_path / "out", ok=False)
    assert "is not finite" in done.stderr or "the loss is" in done.stderr
    assert done.stderr.count("failed: l2") == 1
    finished = {line["run"] for line in lines(tmp_path / "out" / "stages.jsonl")}
    assert "sequential-seed0" in finished
    assert json.loads((tmp_path / "out" / "failures.json").read_text()).keys() == {
        "l2-strength1e+30-seed0"
    }


def test_errors_are_said_once(tmp_path: Path) -> None:
    path = digits(tmp_path)
    out = tmp_path / "taken"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    done = run(2, path, "-o", out, ok=False)
    assert done.stderr.count("is not empty and holds no stockpot record") == 1
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_statistics_of_batches_are_refused(tmp_path: Path) -> None:
    path = digits(tmp_path)
    text = path.read_text().replace(
        "{name: mlp, hidden: [8]}", "{name: conv, norm: batch, channels: [4]}"
    )
    path.write_text(text)
    done = run(2, path, "-o", tmp_path / "out", ok=False)
    assert "BatchNorm" in done.stderr
    assert not (tmp_path / "out" / "stages.jsonl").exists()
