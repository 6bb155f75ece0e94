r"""Optimizer steps per second: stockpot against a bare PyTorch loop and against Avalanche 0.6.0.

All train a 784-128-5 ReLU network on MNIST, even digits and then odd ones, one shared head, Adam
at 1e-3, batches of 32, one epoch per task, one CPU thread. Timed is the training of the second
task, without scoring and without EWC's Fisher pass. The programs take turns within each round, each
in a fresh process; the table gives medians over the rounds, and medians of the ratios within a
round.

    python benchmarks/step_overhead.py --rounds 5 --avalanche .venv-avalanche/bin/python \
        --write benchmarks/results/step_overhead.md

MNIST is read as in every experiment: from the hub, or from STOCKPOT_DATA.
`peers/setup_avalanche.sh` makes Avalanche's environment; without --avalanche that peer is left out.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
# Who is compared with whom: our name for it, and the peer's.
PAIRS = {"sequential": "naive", "ewc": "ewc", "rehearsal": "replay", "l2": None, "sfa": None}

EXPERIMENT = """
stream: mnist
model: {name: mlp, hidden: [128]}
training: {threads: 1, checkpoint_seconds: 120}
methods:
  - sequential
  - {name: ewc, strength: 100}
  - {name: rehearsal, fraction: 0.1}
  - {name: l2, strength: 0.1}
  - {name: sfa, p: 0.25, beta: 0.5}
seeds: [0]
"""


def write_data(path: Path) -> None:
    """MNIST as the peers' .npz: images, labels digit // 2, and the task of each example."""
    import numpy as np

    from stockpot.streams.settings import Mnist

    stream = Mnist().load()
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        sets = [getattr(task, part) for task in stream.tasks]
        arrays[f"x_{part}"] = np.concatenate([d.images[d.rows].numpy()[:, 0] for d in sets])
        arrays[f"y_{part}"] = np.concatenate([d.labels[d.rows].numpy() for d in sets])
        arrays[f"task_{part}"] = np.concatenate([np.full(len(d), t) for t, d in enumerate(sets)])
    np.savez(path, **arrays)


def measure_stockpot() -> None:
    """Run the experiment in this process and print steps per second on the second task."""
    from stockpot.experiment import load_experiment, run_experiment
    from stockpot.experiment.record import Record

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step_overhead.yaml"
        file.write_text(EXPERIMENT)
        experiment = load_experiment(file, output=Path(folder) / "out")
        outcome = run_experiment(experiment)
        stages = Record(outcome.folder).load().stages()
        rates = {
            run["method"]: {
                "steps_per_second": stages[run["run"], 1]["steps"]
                / stages[run["run"], 1]["seconds"],
                "accuracy": dict(zip("AB", run["R"][-1], strict=True)),
            }
            for run in outcome.summary
        }
    print(json.dumps(rates))


def run_json(command: list[str]) -> dict[str, Any]:
    """A program's JSON output, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def one_round(data: Path, avalanche: str | None) -> dict[str, dict[str, Any]]:
    """Every program once, in turn: name to steps per second and accuracies."""
    bare = run_json([sys.executable, str(PEERS / "bare_loop.py"), "--data", str(data), "--json"])
    result = {f"bare/{k}": v for k, v in bare["strategies"].items()}
    ours = run_json([sys.executable, __file__, "--measure"])
    result |= {f"stockpot/{name}": value for name, value in ours.items()}
    if avalanche:
        command = [avalanche, str(PEERS / "avalanche_loop.py"), "--data", str(data), "--json"]
        result |= {f"avalanche/{k}": v for k, v in run_json(command)["strategies"].items()}
    return result


def table(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """Medians over the rounds, as Markdown."""
    bare = next(name for name in rounds[0] if name.startswith("bare/"))

    def median(values: list[float]) -> float:
        return statistics.median(values)

    lines = [
        "| program | steps/s | to the bare loop | to Avalanche's | accuracy on A, B (one seed) |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, first in rounds[0].items():
        rate = median([r[name]["steps_per_second"] for r in rounds])
        ratio = median([r[name]["steps_per_second"] / r[bare]["steps_per_second"] for r in rounds])
        peer = f"avalanche/{PAIRS.get(name.removeprefix('stockpot/'))}"
        against = "-"
        if peer in rounds[0] and name.startswith("stockpot/"):
            against = "{:.2f}x".format(
                median([r[name]["steps_per_second"] / r[peer]["steps_per_second"] for r in rounds])
            )
        scores = ", ".join(f"{value:.2f}" for value in first["accuracy"].values())
        lines.append(f"| {name} | {rate:,.0f} | {ratio:.2f}x | {against} | {scores} |")
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
    parser.add_argument("--rounds", type=int, default=5, help="how often each program runs")
    parser.add_argument("--avalanche", help="Python of the environment that holds Avalanche")
    parser.add_argument("--write", type=Path, help="file to write the table to")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure_stockpot()
        return
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "mnist.npz"
        write_data(data)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            rounds.append(one_round(data, options.avalanche))
    import torch
    import transformers

    text = (
        "# Optimizer steps per second\n\n"
        f"`python benchmarks/step_overhead.py --rounds {options.rounds}`, medians. {processor()}, "
        f"one thread; torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}.\n\n" + table(rounds)
    )
    print(text)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)


if __name__ == "__main__":
    main()
