r"""Permuted MNIST with 200 tasks: what a task costs late in a long stream, and what is kept.

    python benchmarks/long_stream.py cost                       # ten minutes on a quiet machine
    python benchmarks/long_stream.py again --repeat 3           # the ratios of cost, several times
    python benchmarks/long_stream.py accuracy --runs runs/long  # an hour; goes on where it stopped
    python benchmarks/long_stream.py pages                      # tables, figure, docs once more

`cost` runs each method in a process of its own, one after another unless `--jobs` says otherwise,
with three tasks scored after each (`evaluation.tasks: sample`). It notes for each task the seconds
by the clock and of the processor, and the resident memory of the process when it is finished. Quote
it from an idle machine. `accuracy` scores all tasks after every tenth (`every_tasks: 10`);
it does not depend on who else uses the machine.

All keep their numbers in `results/long_stream.json`, from which `results/long_stream.md`, the
figure `docs/images/long-stream.png` and the marked tables of `docs/long-streams.md` are made.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "long_stream.json"
DOCS = HERE.parent / "docs"

COST_METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"name": "sequential"},
    "sfa": {"name": "sfa", "p": 0.25, "beta": 0.5},
    "ewc": {"name": "ewc", "strength": 100.0},
    "rehearsal": {"name": "rehearsal", "fraction": 0.05},
}
ACCURACY_METHODS: list[Any] = [
    "sequential",
    {"name": "sfa", "p": 0.25, "beta": [0.05, 0.2, 0.5, 0.8, 0.9]},
    {"name": "sfa", "p": 1.0, "beta": [0.5, 0.8, 0.95]},
    {"name": "rehearsal", "fraction": [0.05, 0.5]},
    {"name": "ewc", "strength": [10, 100], "samples": 200},
]
DRAWN = (
    "sequential",
    "sfa p=0.25 beta=0.2",
    "sfa p=0.25 beta=0.5",
    "sfa p=0.25 beta=0.8",
    "sfa p=1 beta=0.95",
    "rehearsal fraction=0.05",
    "ewc strength=100 samples=200",
)
"""What the figure shows of the accuracies; the table has all."""
AFTER = (10, 50, 100, 200)
TEN = 10
SCORED = 3
"""Tasks scored after each while costs are measured."""


def experiment(tasks: int, examples: int, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The stream, the model and its training, which both parts share."""
    stream = {"name": "mnist", "split": "permuted", "tasks": tasks}
    return {
        "stream": {**stream, "train_limit": examples, "test_limit": 1000},
        "model": {"name": "mlp", "hidden": [100, 100]},
        "training": {
            "epochs": 2,
            "batch_size": 32,
            "learning_rate": 1.0e-3,
            "checkpoint_seconds": None,
        },
        "evaluation": {**evaluation, "kl": 0},
        "record": {"weights": "none"},
    }


def load(folder: Path, described: dict[str, Any], output: Path) -> Any:
    """The experiment as ``stockpot run`` reads it."""
    import yaml

    from stockpot.experiment.config import load_experiment

    path = folder / "long_stream.yaml"
    path.write_text(yaml.safe_dump(described), encoding="utf-8")
    return load_experiment(path, output=output)


# What a task costs.


def measure_one(method: str, tasks: int, examples: int) -> dict[str, Any]:
    """Run one method in this process; one number a task of each kind."""
    import psutil

    from stockpot.experiment.observer import Observer
    from stockpot.experiment.runner import run_experiment

    class Meter(Observer):
        """Looks at the process when a task is finished."""

        def __init__(self) -> None:
            self.cpu: list[float] = []
            self.memory: list[int] = []
            self._before = time.process_time()

        def stage_begins(self, run: Any, stage: Any, merges: Any) -> None:
            self._before = time.process_time()

        def stage_ends(self, run: Any, stage: Any, trained: bool, row: Any) -> None:
            self.cpu.append(time.process_time() - self._before)
            self.memory.append(psutil.Process().memory_info().rss)

    # Few, so that the very first tasks do not lack earlier ones to score.
    evaluation = {"tasks": "sample", "tasks_limit": SCORED}
    described = experiment(tasks, examples, evaluation)
    described |= {"methods": [COST_METHODS[method]], "seeds": [0]}
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        loaded = load(Path(folder), described, output)
        outcome = run_experiment(loaded, meter)
        if outcome.failures:
            raise SystemExit(f"{method} failed: {outcome.failures}")
        lines = [json.loads(line) for line in (output / "stages.jsonl").open(encoding="utf-8")]
    return {
        "label": outcome.summary[0]["label"],
        "wall_seconds": [line["wall_seconds"] for line in lines],
        "training_seconds": [line["seconds"] for line in lines],
        "cpu_seconds": meter.cpu,
        "resident_memory": meter.memory,
        "stored": [sum(line["stored"].values()) for line in lines],
    }


def measured(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """One method in a fresh process with one thread."""
    command = [sys.executable, __file__, "one", "--method", method]
    command += ["--tasks", str(options.tasks), "--examples", str(options.examples)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    print(f"{method}: {sum(result['wall_seconds']):.0f} s", file=sys.stderr)
    return result


def measure_cost(options: argparse.Namespace) -> dict[str, Any]:
    """Every method once."""
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(partial(measured, options), options.methods))
    about = {"tasks": options.tasks, "examples": options.examples, "jobs": options.jobs}
    return {**about, **machine(), "methods": dict(zip(options.methods, results, strict=True))}


def measure_again(options: argparse.Namespace) -> dict[str, Any]:
    """Every method several times, in turn: how far a ratio is the machine's own drift."""
    ratios: dict[str, list[float]] = {}
    for _ in range(options.repeat):
        for method in options.methods:
            result = measured(options, method)
            first, last = ends(result["cpu_seconds"])
            ratios.setdefault(result["label"], []).append(last / first)
    about = {"tasks": options.tasks, "examples": options.examples}
    return {**about, **machine(), "ratios": ratios}


def again_table(again: dict[str, Any]) -> str:
    """Last ten tasks over first ten, each time."""
    lines = ["| CPU s a task, last ten / first ten | each time | median |", "|---|---|---:|"]
    for label, ratios in again["ratios"].items():
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"| {label} | {each} | {statistics.median(ratios):.2f} |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """On what it ran."""
    import torch

    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def ends(values: list[float]) -> tuple[float, float]:
    """The medians of the first ten and of the last ten."""
    return statistics.median(values[:TEN]), statistics.median(values[-TEN:])


def cost_table(cost: dict[str, Any]) -> str:
    """The first ten tasks against the last ten, medians."""
    lines = [
        "| | CPU s a task: first ten | last ten | ratio | clock s: first ten | last ten | ratio "
        "| resident MB after task 10 | after the last | growth, kB a task | kept for another task, "
        "MB |",
        "|---|" + "---:|" * 10,
    ]
    for result in cost["methods"].values():
        cpu, wall = ends(result["cpu_seconds"]), ends(result["wall_seconds"])
        memory = result["resident_memory"]
        # The last task is left out: all tasks are scored after it.
        growth = (memory[-2] - memory[TEN - 1]) / (len(memory) - 1 - TEN) / 1e3
        lines.append(
            f"| {result['label']} | {cpu[0]:.3f} | {cpu[1]:.3f} | {cpu[1] / cpu[0]:.2f} "
            f"| {wall[0]:.3f} | {wall[1]:.3f} | {wall[1] / wall[0]:.2f} "
            f"| {memory[TEN - 1] / 1e6:.0f} | {memory[-2] / 1e6:.0f} | {growth:.1f} "
            f"| {max(result['stored']) / 1e6:.2f} |"
        )
    return "\n".join(lines) + "\n"


# What is kept.


def measure_accuracy(options: argparse.Namespace, earlier: dict[str, Any]) -> dict[str, Any]:
    """Train what is not trained yet, and read the rows of R in which all tasks are scored.

    Seeds that were measured ``earlier``, and are not asked for now, are kept.
    """
    from stockpot.experiment.runner import run_experiment

    described = experiment(options.tasks, options.examples, {"every_tasks": TEN})
    described |= {"name": "long stream", "methods": ACCURACY_METHODS, "seeds": options.seeds}
    if not options.read_only:
        with tempfile.TemporaryDirectory() as folder:
            loaded = load(Path(folder), described, options.runs)
            outcome = run_experiment(loaded, jobs=options.jobs)
        for run, why in outcome.failures.items():
            print(f"{run} failed: {why}", file=sys.stderr)
    summary = json.loads((options.runs / "summary.json").read_text(encoding="utf-8"))
    runs = kept(summary)
    about = {"tasks": options.tasks, "examples": options.examples}
    if all(earlier.get(key) == value for key, value in about.items()):  # of other seeds
        runs += [run for run in earlier["runs"] if run["seed"] not in options.seeds]
        runs.sort(key=lambda run: run["seed"])
    return {**about, "runs": runs}


def kept(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each run, after every tenth task: the mean over all tasks seen, and over the first ten."""

    def mean(values: list[float]) -> float:
        return round(statistics.fmean(values), 4)

    runs = []
    for run in summary:
        R, count = run["R"], len(run["tasks"])
        whole = list(range(TEN - 1, count, TEN))
        runs.append(
            {
                "method": run["method"],
                "label": run["label"],
                "seed": run["seed"],
                "after": [t + 1 for t in whole],
                "seen": [mean(R[t][: t + 1]) for t in whole],
                "first ten": [mean(R[t][:TEN]) for t in whole],
                "latest ten": [mean(R[t][t + 1 - TEN : t + 1]) for t in whole],
                "learned": [mean([R[i][i] for i in range(t + 1 - TEN, t + 1)]) for t in whole],
            }
        )
    return runs


def by_label(accuracy: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each setting, one a seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in accuracy["runs"]:
        found.setdefault(run["label"], []).append(run)
    return found


def percent(runs: list[dict[str, Any]], what: str, task: int) -> str:
    """``81.2 ± 2.0``, over the seeds."""
    from stockpot.report.table import Interval

    interval = Interval.of([run[what][run["after"].index(task)] for run in runs])
    assert interval is not None
    mean = f"{100 * interval.mean:.1f}"
    return mean if interval.half_width is None else f"{mean} ± {100 * interval.half_width:.1f}"


def accuracy_table(accuracy: dict[str, Any]) -> str:
    """All settings: what is known of the tasks seen, of the first ten, and of new ones."""
    after = [task for task in AFTER if task <= accuracy["tasks"]]
    columns = [("seen", "all tasks seen", after), ("first ten", "first ten tasks", after)]
    columns += [("learned", "ten newest, when new", [after[0], after[-1]])]
    head = [f"{title} after {task}" for _, title, tasks in columns for task in tasks]
    lines = [f"| % | seeds | {' | '.join(head)} |", "|---|" + "---:|" * (len(head) + 1)]
    for label, runs in by_label(accuracy).items():
        cells = [percent(runs, what, task) for what, _, tasks in columns for task in tasks]
        lines.append(f"| {label} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# The pages.


def draw(results: dict[str, Any]) -> None:
    """The figure of the docs: two panels of cost, two of accuracy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from stockpot.report.figures import save_figure
    from stockpot.report.style import colour, title

    figure = Figure(figsize=(11, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    (seconds, memory), (seen, first) = figure.subplots(2, 2)
    for method, result in results.get("cost", {}).get("methods", {}).items():
        shade, name = colour(method), title(method)
        values = result["cpu_seconds"]
        smooth = [statistics.median(values[max(0, n - 4) : n + 5]) for n in range(len(values))]
        seconds.plot(range(1, len(values)), smooth[:-1], color=shade, label=name)
        held = [value / 1e6 for value in result["resident_memory"][:-1]]
        memory.plot(range(1, len(values)), held, color=shade, label=name)
    dashes = iter(("-", "--", ":", "-."))
    for label, runs in by_label(results.get("accuracy", {"runs": []})).items():
        if label not in DRAWN:
            continue
        method = runs[0]["method"]
        line = next(dashes, "-.") if method == "sfa" else "-"
        for axes, what in ((seen, "seen"), (first, "first ten")):
            values = [
                100 * statistics.fmean(column)
                for column in zip(*(r[what] for r in runs), strict=True)
            ]
            name = title(method) + label.removeprefix(method)
            axes.plot(runs[0]["after"], values, line, color=colour(method), label=name)
    for axes, what, unit in (
        (seconds, "One task: training, scoring, writing", "CPU seconds"),
        (memory, "Memory of the process after a task", "MB"),
        (seen, "Mean accuracy on all tasks seen", "%"),
        (first, "Mean accuracy on the first ten tasks", "%"),
    ):
        axes.set_title(what, loc="left", fontsize=11)
        axes.set_xlabel("tasks trained")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25, linewidth=0.6)
    seen.set_ylim(top=100)
    first.set_ylim(top=100)
    for axes in (seconds, seen):  # each row has the same lines in both panels
        if axes.lines:
            axes.legend(frameon=False, fontsize=8, ncols=2)
    seconds.set_ylim(top=1.5 * max([0.01, *(max(line.get_ydata()) for line in seconds.lines)]))
    memory.set_ylim(top=1.2 * max([1.0, *(max(line.get_ydata()) for line in memory.lines)]))
    save_figure(figure, DOCS / "images", "long-stream")


def write_pages(results: dict[str, Any]) -> None:
    """The tables as a page of results and in the docs, and the figure."""
    parts = ["# A stream of 200 tasks\n", "`python benchmarks/long_stream.py`, permuted MNIST.\n"]
    tables = {}
    if cost := results.get("cost"):
        tables["cost"] = cost_table(cost)
        parts.append(
            f"What a task costs: {cost['tasks']} tasks of {cost['examples']} examples, MLP of "
            f"100 + 100 units, two epochs, one thread, {cost['machine']}, Python {cost['python']}, "
            f"torch {cost['torch']}, {cost['jobs']} at a time; medians over ten tasks.\n"
        )
        parts.append(tables["cost"])
    if again := results.get("again"):
        tables["again"] = again_table(again)
        parts.append(
            f"The same several times, in turn: {again['machine']}, Python {again['python']}, "
            f"torch {again['torch']}.\n"
        )
        parts.append(tables["again"])
    if accuracy := results.get("accuracy"):
        tables["accuracy"] = accuracy_table(accuracy)
        parts.append("What is kept: accuracy in %, ± half of a 95 % interval over seeds.\n")
        parts.append(tables["accuracy"])
    RESULTS.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")
    page = DOCS / "long-streams.md"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if begin in text and end in text:
            text = text[: text.index(begin)] + begin + table + text[text.index(end) :]
    if text:
        page.write_text(text, encoding="utf-8")
    draw(results)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=["cost", "again", "accuracy", "pages", "one"])
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--examples", type=int, default=2000, help="training images a task")
    parser.add_argument("--methods", nargs="+", choices=COST_METHODS, default=list(COST_METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("--repeat", type=int, default=3, help="of `again`: how often")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/long-stream"))
    parser.add_argument("--read-only", action="store_true", help="of --runs, train nothing")
    parser.add_argument("--method", choices=COST_METHODS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, and write what was measured."""
    options = parse()
    if options.part == "one":
        print(json.dumps(measure_one(options.method, options.tasks, options.examples)))
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if options.part == "cost":
        results["cost"] = measure_cost(options)
        print(cost_table(results["cost"]))
    if options.part == "again":
        results["again"] = measure_again(options)
        print(again_table(results["again"]))
    if options.part == "accuracy":
        results["accuracy"] = measure_accuracy(options, results.get("accuracy", {}))
        print(accuracy_table(results["accuracy"]))
    RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
    write_pages(results)


if __name__ == "__main__":
    main()
