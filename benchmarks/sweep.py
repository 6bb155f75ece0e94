r"""Wall time of a sweep: runs at a time and one after another, with and without shared prefixes.

20 settings of seven methods by three seeds, 60 runs, over scikit-learn's digits (even, then odd),
with a 64-128-5 ReLU network and one CPU thread a run. Each way of running them is a fresh process,
timed from its start to the end of the last run: loading PyTorch and the data counts, and so does
starting the processes; drawing the report does not. "Runs" is the time from the first run to the
last. The ways take turns within each round, in an order that moves on from round to round; the
table gives medians over the rounds, and medians of the ratios within a round.

    python benchmarks/sweep.py --rounds 5 --write benchmarks/results/sweep.md

All ways must give the same scores, which is checked.
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
from pathlib import Path
from typing import Any

EXPERIMENT = """
stream: {name: digits, split: even-odd, scenario: domain-incremental}
model: {name: mlp, hidden: [128]}
training: {epochs: EPOCHS, batch_size: 32, learning_rate: 1.0e-3, threads: 1}
methods:
  - sequential
  - {name: rehearsal, fraction: [0.05, 0.1]}
  - {name: sfa, p: [0.1, 0.25, 0.5], beta: [0.2, 0.5]}
  - {name: l2, strength: [0.03, 0.1, 0.3]}
  - {name: ewc, strength: [100, 300, 1000]}
  - {name: wise-ft, beta: [0.35, 0.5]}
  - {name: task-arithmetic, scale: [0.3, 0.5, 0.8]}
seeds: SEEDS
"""
# Runs at a time, and whether prefixes are shared; the first is what the others are compared with.
WAYS = {
    "2 at a time": (2, True),
    "one after another": (1, True),
    "2 at a time, nothing shared": (2, False),
    "one after another, nothing shared": (1, False),
}


def measure(way: str, epochs: int, seeds: int, began: float) -> None:
    """Run the sweep in this process; print its times and a digest of its scores."""
    from stockpot.experiment.local import LocalJobs, Nursery
    from stockpot.experiment.resources import ResourceSettings

    jobs, share = WAYS[way]
    # As `stockpot run --jobs` does it: the workers' process loads while this one does.
    executor = None
    if jobs > 1:
        executor = LocalJobs.of(jobs, ResourceSettings(), "cpu", Nursery())
    from stockpot.experiment import load_experiment, run_experiment
    from stockpot.experiment.observer import Observer

    class Begun(Observer):
        at = 0.0

        def run_begins(self, run: Any, finished: int) -> None:
            self.at = self.at or time.time()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sweep.yaml"
        text = EXPERIMENT.replace("EPOCHS", str(epochs)).replace("SEEDS", str([*range(seeds)]))
        file.write_text(text)
        experiment = load_experiment(file, output=Path(folder) / "out")
        begun = Begun()
        outcome = run_experiment(experiment, begun, share_prefixes=share, executor=executor)
        end = time.time()
        stages = (Path(folder) / "out" / "stages.jsonl").read_text().splitlines()
        result = {
            "seconds": end - began,
            "runs_seconds": end - begun.at,
            "runs": len(outcome.summary),
            "trained": sum(json.loads(line)["trained_here"] for line in stages),
            "stages": len(stages),
            "scores": [[run["run"], run["R"]] for run in outcome.summary],
        }
    print(json.dumps(result))


def run_way(way: str, epochs: int, seeds: int) -> dict[str, Any]:
    """One way in a fresh process."""
    command = [sys.executable, __file__, "--measure", way, "--began", str(time.time())]
    command += ["--epochs", str(epochs), "--seeds", str(seeds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """Medians over the rounds, as Markdown."""
    first = next(iter(WAYS))
    lines = [
        f'| {rounds[0][first]["runs"]} runs | trainings | seconds in all | to "{first}" | '
        "seconds of runs | to the same |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for way in WAYS:
        cells = [f"{rounds[0][way]['trained']} of {rounds[0][way]['stages']}"]
        for key in ("seconds", "runs_seconds"):
            cells.append(f"{statistics.median(r[way][key] for r in rounds):.1f}")
            ratios = [r[way][key] / r[first][key] for r in rounds]
            cells.append(f"{statistics.median(ratios):.2f}x")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each way runs")
    parser.add_argument("--epochs", type=int, default=20, help="passes over each task")
    parser.add_argument("--seeds", type=int, default=3, help="20 runs each")
    parser.add_argument("--write", type=Path, help="file to write the table to")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.epochs, options.seeds, options.began)
        return
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        ways = [*WAYS][number % len(WAYS) :] + [*WAYS][: number % len(WAYS)]
        rounds.append({way: run_way(way, options.epochs, options.seeds) for way in ways})
        for way, result in rounds[-1].items():
            if result["scores"] != rounds[0][ways[0]]["scores"]:
                raise SystemExit(f"{way} gives other scores")
    import torch

    given = f"--rounds {options.rounds} --epochs {options.epochs} --seeds {options.seeds}"
    text = (
        "# A sweep in several processes\n\n"
        f"`python benchmarks/sweep.py {given}`, medians. {processor()}, {os.cpu_count()} cores; "
        f"torch {torch.__version__}, Python {platform.python_version()}.\n\n" + table(rounds)
    )
    print(text)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)


if __name__ == "__main__":
    main()
