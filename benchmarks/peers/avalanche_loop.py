"""Steps per second of Avalanche 0.6.0 on the second of two tasks: Naive, EWC and Replay.

Runs in an environment of its own, which `setup_avalanche.sh` makes:

    .venv-avalanche/bin/python avalanche_loop.py --data mnist.npz --json

The data, the model, the optimizer and the scoring are those of `bare_loop.py`, imported from it.
Adam's moments are reset between the tasks there and here (`reset_optimizer_state=True`; Avalanche
by itself carries them over), so that accuracies compare.

What is timed: `strategy.train` of task B only, by `time.perf_counter`. It holds everything
Avalanche does to train an experience: adapting the data set, model and optimizer, making the
loader, the steps with their plugins, and the plugins' work after the last step. Task A is the
warm-up. Avalanche is given its best case:

- no evaluation (`eval_streams=[]`, `evaluator=None`), no metric and no logger;
- float tensors, as in `bare_loop.py`, with no transform to run for each image;
- `benchmark_from_datasets` over plain `AvalancheDataset`s. Experiences with task labels
  (`tensors_benchmark`, the classic benchmarks) take a task-balanced loader, slower by a fifth to a
  third here, and these tasks need no task labels.

EWC's Fisher pass over task B runs inside `strategy.train`, after the last step. It is timed apart,
and rates are given without and with it: the first is the price of the penalty in each step, the
second that of the method for each task.

Replay's step takes 32 new samples and up to 32 remembered ones (Avalanche's default), so it does
about twice the arithmetic of the others' step; its number of steps is the same.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from bare_loop import (
    BATCH_SIZE,
    EPOCHS,
    LEARNING_RATE,
    Measurement,
    Task,
    accuracies,
    load_tasks,
    make_model,
    make_parser,
    make_report,
    measurement,
    print_report,
)
from torch.utils.data import TensorDataset


def import_torchvision() -> torch.library.Library | None:
    """Import torchvision even where its wheel was built for another kind of torch.

    The registries' torchvision is built for CUDA. Beside a CPU build of torch its operators do not
    load, and its import dies on describing two of them to torch. Declaring their schemas is enough
    for Avalanche, which imports torchvision but needs none of its operators here.

    Returns the declarations, which last as long as the object does, or None if the plain import
    works.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    else:
        return None
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
    return library


_TORCHVISION_OPERATORS = import_torchvision()

with warnings.catch_warnings():
    # qpsolvers warns that no QP solver is installed; only GEM would need one.
    warnings.filterwarnings("ignore", message="no QP solver found")
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import AvalancheDataset
    from avalanche.training.plugins import EWCPlugin
    from avalanche.training.supervised import Naive, Replay
    from avalanche.training.templates import SupervisedTemplate

MakeStrategy = Callable[..., SupervisedTemplate]


class TimedEWCPlugin(EWCPlugin):
    """Avalanche's EWC plugin, which also says how long its last Fisher pass took.

    `fisher_seconds` covers all it does at the end of a task: the pass over the data with its
    gradients, and the copies of the importances and the weights.
    """

    fisher_seconds = 0.0

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs: Any) -> None:
        """Do the plugin's own work of this event, and time it."""
        start = time.perf_counter()
        super().after_training_exp(strategy, **kwargs)
        self.fisher_seconds = time.perf_counter() - start


def make_experiences(tasks: tuple[Task, Task]) -> list[Any]:
    """Make one Avalanche experience, without task labels, from each task's training data."""
    datasets = [
        AvalancheDataset(TensorDataset(task.train.images, task.train.labels)) for task in tasks
    ]
    return list(benchmark_from_datasets(train=datasets).train_stream)


def measure(
    make_strategy: MakeStrategy,
    tasks: tuple[Task, Task],
    seed: int,
    ewc: TimedEWCPlugin | None = None,
    **arguments: Any,
) -> Measurement:
    """Train a fresh strategy on A, then on B, and time B.

    `make_strategy` is given a model, an optimizer, the run's settings without evaluation, and
    `arguments`. `ewc` is the plugin, if any, whose Fisher pass is timed apart.
    """
    model = make_model(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")
        strategy = make_strategy(
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=LEARNING_RATE),
            criterion=torch.nn.CrossEntropyLoss(),
            train_mb_size=BATCH_SIZE,
            train_epochs=EPOCHS,
            evaluator=None,
            **arguments,
        )
    first, second = make_experiences(tasks)
    strategy.train(first, eval_streams=[], reset_optimizer_state=True)

    start = time.perf_counter()
    strategy.train(second, eval_streams=[], reset_optimizer_state=True)
    seconds = time.perf_counter() - start

    steps = strategy.clock.train_exp_iterations
    fisher_seconds = 0.0 if ewc is None else ewc.fisher_seconds
    return measurement(steps, seconds, fisher_seconds, accuracies(model, tasks))


def measure_all(
    tasks: tuple[Task, Task], seed: int, ewc_lambda: float, replay_memory: int
) -> dict[str, Measurement]:
    """Measure Naive, EWC and Replay, each from the same first weights."""
    # Avalanche's `EWC` strategy is its `Naive` with this plugin.
    ewc = TimedEWCPlugin(ewc_lambda)
    return {
        "naive": measure(Naive, tasks, seed),
        "ewc": measure(Naive, tasks, seed, ewc, plugins=[ewc]),
        "replay": measure(Replay, tasks, seed, mem_size=replay_memory),
    }


def main() -> None:
    """Measure, and print."""
    parser = make_parser("Steps per second of Avalanche's Naive, EWC and Replay.")
    parser.add_argument(
        "--ewc-lambda", type=float, default=100.0, help="weight of EWC's penalty (default: 100)"
    )
    parser.add_argument(
        "--replay-memory", type=int, default=200, help="samples Replay keeps (default: 200)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {
        "threads": options.threads,
        "seed": options.seed,
        "ewc_lambda": options.ewc_lambda,
        "replay_memory": options.replay_memory,
        "replay_memory_batch_size": BATCH_SIZE,
    }
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the report alone
        strategies = measure_all(
            load_tasks(options.data), options.seed, options.ewc_lambda, options.replay_memory
        )
    versions = {"avalanche": version("avalanche-lib"), "torchvision": version("torchvision")}
    print_report(make_report("avalanche", strategies, settings, versions), options.json)


if __name__ == "__main__":
    main()
