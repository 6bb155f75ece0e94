"""Run folders whose every number is made here, written file by file as a run writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Lines = list[dict[str, Any]]

TEN = (
    ("sequential", {}),
    ("multitask", {"without": None}),
    ("rehearsal", {"fraction": 0.05}),
    ("sfa", {"p": 0.25, "every": None, "beta": 0.5, "earlier_p": None, "protect_base": False}),
    ("l2", {"strength": 0.1}),
    ("ewc", {"strength": 100.0, "labels": "sampled", "samples": 200}),
    ("wise-ft", {"beta": 0.5}),
    ("task-arithmetic", {"scale": 0.3, "weights": None}),
    ("ties", {"density": 0.2, "scale": 1.0, "per_tensor": False}),
    ("fisher-merging", {"labels": "exact", "samples": 2000, "floor": 1e-6}),
)
"""Ten methods at one setting each, as plan.json has them."""
THREE = (TEN[0], TEN[1], TEN[3])
AVERAGING = ("sfa", "wise-ft")


@dataclass
class Spec:
    """What a made-up experiment is."""

    tasks: Sequence[str] = ("even", "odd", "prime")
    methods: Sequence[tuple[str, dict[str, Any]]] = THREE
    seeds: Sequence[int] = (0, 1)
    name: str = "made up"
    steps: int = 100
    every: int | None = 50
    """Optimizer steps between scores during training."""
    merges: bool = True
    line: int = 3
    """Points on the line from the anchor."""
    metric: str = "accuracy"
    extra: Sequence[str] = ()
    """More metrics of each task, which are not the headline."""
    stages: dict[str, int] = field(default_factory=dict)
    """How far a run (by its id) has come; all the way where it is not named."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels by method, where they are not the usual ones."""
    described: dict[str, Any] = field(default_factory=dict)
    """Sections of experiment.json."""
    digits: int = 15

    @property
    def better(self) -> str:
        return "lower" if self.metric == "loss" else "higher"


def label_of(method: str, settings: dict[str, Any]) -> str:
    shown = {k: v for k, v in settings.items() if v is not None and v is not False}
    return " ".join([method, *(f"{key}={value}" for key, value in shown.items())])


def write_made_up(folder: Path, spec: Spec | None = None, **changes: Any) -> Path:
    """Write the whole record; the numbers follow from the spec alone."""
    spec = Spec(**changes) if spec is None else spec
    runs = [_Run(spec, number, seed) for seed in spec.seeds for number in range(len(spec.methods))]
    plan = {
        "stream": "digits/thirds",
        "scenario": "domain-incremental",
        "tasks": list(spec.tasks),
        "runs": [run.planned() for run in runs],
    }
    # Begun with the usual sections, as experiment.json is.
    described = {
        "name": spec.name,
        "planned": len(runs),
        "data": "2add55",
        "left out": [],
        "stream": {"name": "digits", "order": None, "split": "thirds"},
        "model": {"name": "mlp", "hidden": [8]},
        "training": {"epochs": 2, "batch_size": 16, "device": "cpu", "threads": 1},
        "evaluation": {"every": spec.every, "merges": spec.merges, "line": spec.line},
        **spec.described,
    }
    environment = {
        "versions": {"stockpot": "0.1.0", "python": "3.11.7"},
        "hardware": {"machine": "x86_64", "cores": 2, "gpu": None},
        "command": "stockpot run made-up.yaml",
        "notes on the data": [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "experiment.json": described,
        "plan.json": plan,
        "environment.json": environment,
        "summary.json": [run.summary() for run in runs if run.done == run.count],
    }.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    (folder / "experiment.yaml").write_text(f"name: {json.dumps(spec.name)}\nseeds: [0]\n")
    for log in ("scores", "stages", "merges", "curves", "lines"):
        write_lines(folder / f"{log}.jsonl", (line for run in runs for line in run.lines(log)))
    return folder


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


class _Run:
    """One run's numbers, drawn from its method, setting and seed."""

    def __init__(self, spec: Spec, method: int, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self.method, self.settings = spec.methods[method]
        self.label = spec.labels.get(self.method) or label_of(self.method, self.settings)
        self.id = f"{label_of(self.method, self.settings).replace(' ', '-')}-seed{seed}"
        self.joint = self.method == "multitask"
        size = len(spec.tasks)
        self.count = 1 if self.joint else size
        self.done = spec.stages.get(self.id, self.count)
        self.random = np.random.default_rng([seed, method, size])
        # Scores that forget: high where learned, lower the longer ago.
        ages = np.arange(size)[:, None] - np.arange(size)[None, :]
        kept = np.where(ages >= 0, 0.95 * 0.9 ** (np.maximum(ages, 0) / (method + 1)), 0.2)
        R = np.clip(kept + self.random.normal(0, 0.02, (size, size)), 0.01, 1)
        self.R = self._as_scores(R)
        start = np.random.default_rng([seed, size])
        self.b = self._as_scores(np.clip(start.normal(0.2, 0.02, size), 0, 1))
        self.l2 = 1 + self.random.random(size)

    def _as_scores(self, shares: np.ndarray) -> np.ndarray:
        values = 3 * (1 - shares) if self.spec.better == "lower" else shares
        return np.round(values, self.spec.digits)

    def _tasks(self, stage: int) -> list[str]:
        return list(self.spec.tasks) if self.joint else [self.spec.tasks[stage]]

    def _row(self, stage: int) -> int:
        return len(self.spec.tasks) - 1 if self.joint else stage

    def _steps(self) -> int:
        return self.spec.steps * (len(self.spec.tasks) if self.joint else 1)

    def planned(self) -> dict[str, Any]:
        stages = [
            {"tasks": self._tasks(n), "row": self._row(n), "steps": self._steps()}
            for n in range(self.count)
        ]
        keys = ("method", "settings", "label", "seed")
        return {"run": self.id, **{key: getattr(self, key) for key in keys}, "stages": stages}

    def summary(self) -> dict[str, Any]:
        R = [row.tolist() for row in self.R]
        if self.joint:
            R = [None] * (len(R) - 1) + R[-1:]
        sign = -1 if self.spec.better == "lower" else 1
        drops = [sign * (self.R[i][i] - self.R[-1][i]) for i in range(len(R) - 1)]
        lost = None if self.joint or not drops else float(np.mean(drops))
        return {
            "stream": "digits/thirds",
            "scenario": "domain-incremental",
            **{key: getattr(self, key) for key in ("method", "settings", "label", "seed")},
            "run": self.id,
            "tasks": list(self.spec.tasks),
            "metric": self.spec.metric,
            "better": self.spec.better,
            "R": R,
            "b": self.b.tolist(),
            "metrics": {"average": float(np.mean(self.R[-1])), "forgetting": lost},
            "scores": [],
        }

    def lines(self, log: str) -> Iterable[dict[str, Any]]:
        if log == "scores" and self.done:
            yield from self._scores(-1, None, 0, self.b)
        for stage in range(self.done):
            yield from getattr(self, f"_{log}_of")(stage)

    def _scores(self, stage: int, trained: str | None, step: int, row: np.ndarray) -> Lines:
        metrics = [(self.spec.metric, self.spec.better, True)]
        metrics += [(name, "higher", False) for name in self.spec.extra]
        return [
            {
                "run": self.id,
                "stage": stage,
                "trained": trained,
                "step": step,
                "task": task,
                "evaluation": "test",
                "metric": metric,
                "value": float(value) if headline else float(value) / 2,
                "n": 100,
                "stderr": 0.01,
                "better": better,
                "headline": headline,
            }
            for task, value in zip(self.spec.tasks, row, strict=True)
            for metric, better, headline in metrics
        ]

    def _scores_of(self, stage: int) -> Lines:
        row = self._row(stage)
        return self._scores(stage, self.spec.tasks[row], self._steps(), self.R[row])

    def _stages_of(self, stage: int) -> Lines:
        return [
            {
                "run": self.id,
                "stage": stage,
                "tasks": self._tasks(stage),
                "row": self._row(stage),
                "steps": self._steps(),
                "seconds": 1.5 + stage,
                "peak_memory": 500_000_000 + 1_000_000 * stage,
                "trained_here": True,
                "l2_to_anchor": float(self.l2[stage]),
                "kl_from_anchor": float(self.l2[stage]) ** 2,
                "trained_examples": 1000,
                "extra_examples": 100,
                "stored": {"weights": 1000, "data": 10 * stage, "other": 0},
                "losses": [[n, 2.0 / (1 + n)] for n in range(2, self._steps() + 1, 2)],
                "key": "db9e",
                "sha256": "fad1",
            }
        ]

    def _merge_steps(self, stage: int) -> list[int]:
        if self.method not in AVERAGING or not stage:
            return []
        quarter = self.spec.steps // 4
        return [n * quarter for n in (1, 2, 3, 4)] if self.method == "sfa" else [self.spec.steps]

    def _merges_of(self, stage: int) -> Lines:
        return [
            {
                "run": self.id,
                "stage": stage,
                "task": self.spec.tasks[stage],
                "step": step,
                "beta": 0.5,
                "distance_before": 1.0 + step / 100,
                "distance_after": 0.5 + step / 200,
                "seconds": 0.001,
            }
            for step in self._merge_steps(stage)
        ]

    def _curves_of(self, stage: int) -> Lines:
        if self.spec.every is None:
            return []
        moments = [(step, "step") for step in range(0, self._steps() + 1, self.spec.every)]
        if self.spec.merges:
            for step in self._merge_steps(stage):
                moments += [(step, "before merge"), (step, "after merge")]
        order = ("before merge", "after merge", "step")
        moments.sort(key=lambda pair: (pair[0], order.index(pair[1])))
        found = []
        for step, moment in moments:
            row = self._as_scores(self.random.random(len(self.spec.tasks)))
            found += [
                {
                    "run": self.id,
                    "stage": stage,
                    "trained": self.spec.tasks[self._row(stage)],
                    "step": step,
                    "moment": moment,
                    "task": task,
                    "metric": self.spec.metric,
                    "value": float(value),
                    "n": 100,
                    "stderr": 0.01,
                }
                for task, value in zip(self.spec.tasks, row, strict=True)
            ]
        return found

    def _lines_of(self, stage: int) -> Lines:
        # The first task has no anchor but the start; joint training has no task before it.
        if not self.spec.line or not stage:
            return []
        metrics = ("loss",) if self.spec.metric == "loss" else ("loss", "accuracy")
        last = self.spec.line - 1
        found = []
        for n in range(self.spec.line):
            for task in self.spec.tasks:
                value = round(float(self.random.random()), 12)
                for metric in metrics:
                    found.append(
                        {
                            "run": self.id,
                            "stage": stage,
                            "trained": self.spec.tasks[stage],
                            "alpha": n / last,
                            "task": task,
                            "metric": metric,
                            "value": 3 * value if metric == "loss" else value,
                            "n": 100,
                            "stderr": 0.01,
                            "better": "lower" if metric == "loss" else "higher",
                        }
                    )
        return found
