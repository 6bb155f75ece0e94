"""Steps per second of bare PyTorch on the second of two tasks: the loop everyone writes by hand.

What it measures: the ceiling for a library that adds something to training. The data, the model
and the measurement live here because `avalanche_loop.py` imports them: both peers then train the
same network on the same tensors, and a difference between them is the library's.

    python bare_loop.py --data mnist.npz --json

The data: an .npz with `x_train` (uint8, N x 28 x 28), `y_train` (int64, 0 to 4), `task_train`
(int64, 0 = task A, 1 = task B), and the same three for `test`. Both tasks have the same five
labels and one head: domain-incremental.

The model and its training: a 784-128-5 ReLU MLP; one epoch of A, then one of B; batches of 32, the
last one smaller; Adam at 1e-3, made anew for each task.

What is timed: the training of task B only, from making its DataLoader and optimizer to the last
step, by `time.perf_counter`. Task A is the warm-up (allocator, kernels, imports). Reading the file,
converting pixels to floats and scoring are outside: they are not optimizer steps.

Needs torch and numpy, nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

TASK_NAMES = ("A", "B")
PIXELS = 28 * 28
HIDDEN = 128
CLASSES = 5
BATCH_SIZE = 32
LEARNING_RATE = 1e-3
EPOCHS = 1


@dataclass(frozen=True)
class Split:
    """One task's images, (N, 784) float32 in 0 to 1, and labels, (N,) int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """One task to learn, and what it is scored on."""

    name: str
    train: Split
    test: Split


@dataclass(frozen=True)
class Measurement:
    """The training of task B by one strategy, and the scores after it.

    `train_seconds` and `steps_per_second` leave out what a strategy does once, after the task's
    last step, to prepare for the next one (EWC's Fisher pass). That is `fisher_seconds`, 0 where
    there is none; `steps_per_second_with_fisher` is steps / (train_seconds + fisher_seconds).
    `accuracy` is the share of correct answers on each task's test set after both tasks, 0 to 1.
    """

    steps: int
    train_seconds: float
    fisher_seconds: float
    steps_per_second: float
    steps_per_second_with_fisher: float
    accuracy: dict[str, float]


def measurement(
    steps: int, total_seconds: float, fisher_seconds: float, accuracy: dict[str, float]
) -> Measurement:
    """Split task B's `total_seconds` into its steps and its Fisher pass."""
    train_seconds = total_seconds - fisher_seconds
    return Measurement(
        steps=steps,
        train_seconds=train_seconds,
        fisher_seconds=fisher_seconds,
        steps_per_second=steps / train_seconds,
        steps_per_second_with_fisher=steps / total_seconds,
        accuracy=accuracy,
    )


def load_tasks(path: Path) -> tuple[Task, Task]:
    """Read tasks A and B from the .npz that the head of this file describes.

    Raises ValueError, naming the key, if an array is missing or is not what was described.
    """
    with np.load(path, allow_pickle=False) as arrays:
        by_part = {part: _read_part(arrays, part, path) for part in ("train", "test")}
    first, second = (
        Task(name, by_part["train"][number], by_part["test"][number])
        for number, name in enumerate(TASK_NAMES)
    )
    return first, second


def _read_part(arrays: Mapping[str, np.ndarray], part: str, path: Path) -> tuple[Split, ...]:
    """Read `part` ("train" or "test"), one Split per task."""
    names = [f"{name}_{part}" for name in ("x", "y", "task")]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(f"{path}: no array named {', '.join(missing)}")
    images, labels, tasks = (arrays[name] for name in names)
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28):
        raise ValueError(
            f"{path}: {names[0]} is {images.dtype} {images.shape}, not uint8 (N, 28, 28)"
        )
    if not len(images) == len(labels) == len(tasks):
        raise ValueError(f"{path}: {', '.join(names)} differ in length")
    for name, values, allowed in (
        (names[1], labels, range(CLASSES)),
        (names[2], tasks, range(len(TASK_NAMES))),
    ):
        unknown = sorted(set(values.tolist()) - set(allowed))
        if unknown:
            raise ValueError(f"{path}: {name} holds {unknown[0]}, outside 0 to {allowed.stop - 1}")
    return tuple(
        _to_split(images[tasks == number], labels[tasks == number])
        for number in range(len(TASK_NAMES))
    )


def _to_split(images: np.ndarray, labels: np.ndarray) -> Split:
    pixels = torch.from_numpy(images).float().flatten(start_dim=1) / 255
    return Split(images=pixels, labels=torch.from_numpy(labels).long())


def make_model(seed: int) -> nn.Sequential:
    """Make the 784-128-5 MLP; `seed` fixes its weights and, after them, the order of batches."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


@torch.no_grad()
def accuracies(model: nn.Module, tasks: tuple[Task, Task]) -> dict[str, float]:
    """Score `model` on each task's test set: the share of correct answers, 0 to 1."""
    was_training = model.training
    model.eval()
    scores = {
        task.name: (model(task.test.images).argmax(dim=1) == task.test.labels).float().mean().item()
        for task in tasks
    }
    model.train(was_training)
    return scores


def train(model: nn.Module, data: Split) -> int:
    """Train `model` on `data` in place for one epoch; return the number of optimizer steps."""
    dataset = TensorDataset(data.images, data.labels)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    model.train()
    steps = 0
    for _ in range(EPOCHS):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            steps += 1
    return steps


def measure(tasks: tuple[Task, Task], seed: int) -> Measurement:
    """Train on A, then on B, and time B."""
    first, second = tasks
    model = make_model(seed)
    train(model, first.train)

    start = time.perf_counter()
    steps = train(model, second.train)
    seconds = time.perf_counter() - start

    return measurement(steps, seconds, 0.0, accuracies(model, tasks))


def make_report(
    peer: str,
    strategies: Mapping[str, Measurement],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Make the object that both scripts print: settings, versions, one measurement a strategy."""
    return {
        "peer": peer,
        "settings": {
            "model": f"mlp {PIXELS}-{HIDDEN}-{CLASSES} relu",
            "optimizer": "adam",
            "learning_rate": LEARNING_RATE,
            "batch_size": BATCH_SIZE,
            "epochs_per_task": EPOCHS,
            **settings,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            **versions,
        },
        "strategies": {name: asdict(result) for name, result in strategies.items()},
    }


def print_report(report: Mapping[str, Any], as_json: bool) -> None:
    """Print `report` as one line of JSON, or as a line to read for each strategy."""
    if as_json:
        print(json.dumps(report))
        return
    for name, result in report["strategies"].items():
        scores = ", ".join(f"{task} {score:.4f}" for task, score in result["accuracy"].items())
        line = f"{name:8} {result['steps_per_second']:7.1f} steps/s; accuracy {scores}"
        if result["fisher_seconds"]:
            line += (
                f"; Fisher pass {result['fisher_seconds']:.2f} s, "
                f"with it {result['steps_per_second_with_fisher']:.1f} steps/s"
            )
        print(line)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make the options that both scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help=".npz with both tasks")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every strategy (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main() -> None:
    """Measure, and print."""
    options = make_parser("Steps per second of a bare PyTorch loop.").parse_args()
    torch.set_num_threads(options.threads)
    result = measure(load_tasks(options.data), options.seed)
    settings = {"threads": options.threads, "seed": options.seed}
    print_report(make_report("pytorch", {"bare": result}, settings, {}), options.json)


if __name__ == "__main__":
    main()
