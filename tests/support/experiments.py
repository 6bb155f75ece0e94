"""Small experiments, runs of them that end in SIGKILL, and what of a record must be the same."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.launch import call_until_killed

TINY = """
stream: {name: digits, split: pairs, order: [0, 1, 2], train_limit: 48, test_limit: 30}
model: {name: mlp, hidden: [8]}
training: {epochs: 2, batch_size: 16, learning_rate: 0.01, threads: 1, device: cpu}
"""
STEPS_PER_TASK = 6
SETTINGS = {
    "sequential": "{name: sequential}",
    "multitask": "{name: multitask}",
    "rehearsal": "{name: rehearsal, fraction: 0.1}",
    "l1": "{name: l1, strength: 0.01}",
    "l2": "{name: l2, strength: 0.5}",
    "ewc": "{name: ewc, strength: 100, samples: 20}",
    "sfa": "{name: sfa, p: 0.5, beta: 0.3}",
    "wise-ft": "{name: wise-ft, beta: 0.4}",
    "task-arithmetic": "{name: task-arithmetic, scale: 0.5}",
    "ties": "{name: ties, density: 0.3}",
    "fisher-merging": "{name: fisher-merging, samples: 20}",
}
"""Each method with settings that fit such an experiment."""


def write_experiment(folder: Path, methods: str, **sections: str) -> Path:
    """A tiny experiment's file."""
    text = TINY + f"methods: {methods}\n"
    for key, value in sections.items():
        text += f"{key}: {value}\n"
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


def run_file(path: Path, output: Path, overrides: Sequence[str] = (), **options: Any) -> Any:
    """Run an experiment file in this process."""
    from stockpot.experiment import load_experiment, run_experiment

    return run_experiment(load_experiment(path, overrides, output), **options)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _child(path: Path, output: Path, overrides: Sequence[str], die_at: dict[str, int]) -> None:
    from stockpot.experiment.observer import Observer

    class Assassin(Observer):
        stage = 0

        def stage_begins(self, run: Any, stage: Any, merges: Any) -> None:
            self.stage = stage.number

        def step(self, run, step: int, loss: float | None) -> None:
            if (self.stage, step) == (die_at.get("stage"), die_at.get("step")):
                _die()

    if "fsync" in die_at:  # in the middle of writing the record
        real, left = os.fsync, [die_at["fsync"]]

        def fsync(file: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                _die()
            real(file)

        os.fsync = fsync
    if "deleted" in die_at:
        die_before_deleting(output / "runs", die_at["deleted"])
    run_file(path, output, overrides, observer=Assassin(), jobs=die_at.get("jobs", 1))


def die_before_deleting(folder: Path, after: int) -> None:
    """Be killed instead of deleting a file in the folder, after so many."""
    so_far = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal so_far
        if event == "os.remove" and Path(arguments[0]).is_relative_to(folder):
            so_far += os.path.exists(arguments[0])
            if so_far > after:
                _die()

    sys.addaudithook(hook)


def run_and_kill(path: Path, output: Path, overrides: Sequence[str] = (), **die_at: int) -> None:
    """Run in a process of its own that is killed by SIGKILL where ``die_at`` says."""
    call_until_killed(_child, path, output, overrides, die_at)


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def record_of(folder: Path) -> dict[str, Any]:
    """All of a record that a kill must not change: everything but times, memory and who trained."""
    volatile = {"seconds", "wall_seconds", "peak_memory", "resident_memory", "trained_here"}

    def steady(value: dict[str, Any]) -> dict[str, Any]:
        return {key: item for key, item in value.items() if key not in volatile}

    manifests = {
        str(path.relative_to(folder)): json.loads(path.read_text())
        for path in sorted(folder.glob("runs/*/manifest.json"))
    }
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "scores": lines(folder / "scores.jsonl"),
        "merges": [steady(line) for line in lines(folder / "merges.jsonl")],
        "stages": [steady(line) for line in lines(folder / "stages.jsonl")],
        "manifests": manifests,
        "summary": [{**steady(run), "metrics": steady(run["metrics"])} for run in summary],
        "files": sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
        ),
    }
