r"""What a large model, many runs and many tasks need: every number with its calculation.

    python benchmarks/scale.py                                     # a Llama of 70B on 64 GPUs
    python benchmarks/scale.py --model 8b --gpus 8 --per-node 8

What can be counted is counted from the model's shape; what depends on a machine is a rate that is
measured first, on this one, so the times are what *this* machine would take per process. Give your
own with --memory-rate, --read-rate and so on, in GB/s. `--write FILE` keeps the output as Markdown.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

GB = 1e9
FLOAT = 4
"""Bytes of a weight: `stockpot run` keeps weights, gradients and Adam's moments in float32."""


@dataclass(frozen=True)
class Shape:
    """A Llama's, as its config.json has it."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    key_heads: int

    @property
    def block(self) -> int:
        """Parameters of one layer."""
        keys = self.width * self.key_heads // self.heads
        attention = 2 * self.width * self.width + 2 * self.width * keys
        return attention + 3 * self.width * self.hidden + 2 * self.width

    @property
    def parameters(self) -> int:
        """All of them, the head not tied."""
        return self.layers * self.block + 2 * self.vocabulary * self.width + self.width

    @property
    def largest(self) -> int:
        """The largest tensor's."""
        return self.vocabulary * self.width


SHAPES = {
    "1b": Shape(128256, 2048, 8192, 16, 32, 8),
    "8b": Shape(128256, 4096, 14336, 32, 32, 8),
    "70b": Shape(128256, 8192, 28672, 80, 64, 8),
}


@dataclass(frozen=True)
class Rates:
    """GB/s of one process on this machine."""

    memory: float
    """Bytes that a merge event moves in memory (16 a weight), by its time."""
    write: float
    """To disk, until it is durable."""
    read: float
    """From disk, not from the system's cache."""
    digest: float
    """SHA-256."""


def median_rate(size: int, what: Callable[[], object], rounds: int = 5) -> float:
    """GB/s of the median of some rounds."""
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        what()
        seconds.append(time.perf_counter() - begin)
    return size / GB / statistics.median(seconds)


def measure(megabytes: int) -> Rates:
    """The rates of this machine."""
    import torch
    from safetensors.torch import load_file
    from torch import nn

    from stockpot.averaging import SFA
    from stockpot.files import sha256, write_tensors

    count = megabytes * 1_000_000 // FLOAT // 16
    model = nn.ParameterList([nn.Parameter(torch.randn(count)) for _ in range(16)])
    sfa = SFA(every=1, beta=0.3, store="device").attach(model, total_steps=1000)
    sfa.merge(1)
    memory = median_rate(16 * count * 16, lambda: sfa.merge(1))
    tensors = {str(n): p.detach() for n, p in enumerate(model)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        size = 16 * count * FLOAT
        write = median_rate(size, lambda: write_tensors(path, tensors))

        def read() -> None:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for tensor in load_file(str(path)).values():
                tensor.sum()

        return Rates(
            memory, write, median_rate(size, read), median_rate(size, lambda: sha256(path))
        )


def gigabytes(count: float) -> str:
    """``17.6``; small numbers with more places."""
    value = count / GB
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def training_memory(shape: Shape, gpus: int) -> Iterator[str]:
    """What one GPU holds while any method trains, activations apart."""
    n, two_blocks = shape.parameters * FLOAT, 2 * shape.block * FLOAT
    rows = {
        "`ddp`": ("4N + 4N + 8N", 4 * n),
        "`zero2`": (
            "4N + 4N (gradients until they are reduced) + (4N + 8N)/G",
            2 * n + 3 * n / gpus,
        ),
        "`fsdp2`": ("(4N + 4N + 8N)/G + 2 blocks", 4 * n / gpus + two_blocks),
        "`zero3`": ("(4N + 4N + 8N)/G + 2 blocks", 4 * n / gpus + two_blocks),
    }
    yield "| `training.parallel` | bytes: weights + gradients + Adam's moments | GB on each GPU |"
    yield "|---|---|---|"
    for mode, (formula, value) in rows.items():
        yield f"| {mode} | {formula} | {gigabytes(value)} |"


def method_memory(shape: Shape, gpus: int) -> Iterator[str]:
    """What a method adds to it, with a share of the weights on each GPU."""
    n, part = shape.parameters * FLOAT, shape.parameters * FLOAT / gpus
    room = 2 * shape.largest * FLOAT / gpus
    rows = [
        ("sequential, rehearsal", "0", 0.0, "0", 0.0),
        ("SFA, `store=device`", "4N/G", part, "0", 0.0),
        ("SFA, `store=cpu`", "one tensor's share", room / 2, "4N/G a process", part),
        ("SFA, `store=disk`", "one tensor's share", room / 2, "0 (a file of 4N)", 0.0),
        ("L1, L2", "4N/G + 2 of the largest tensor's share", part + room, "0", 0.0),
        (
            "EWC",
            "8N/G + 2 of the largest tensor's share",
            2 * part + room,
            "8N at a task's end",
            2 * n,
        ),
        ("WiSE-FT, task arithmetic, TIES", "0", 0.0, "two sets of weights at a task's end", 2 * n),
    ]
    yield "| method | on each GPU | GB | in host memory | GB |"
    yield "|---|---|---|---|---|"
    for name, formula, value, host, host_value in rows:
        yield f"| {name} | {formula} | {gigabytes(value)} | {host} | {gigabytes(host_value)} |"


def merge_event(shape: Shape, gpus: int, rates: Rates) -> Iterator[str]:
    """What one average moves, and how long that takes at the measured rates."""
    part = shape.parameters * FLOAT / gpus
    rows = [
        ("`device`", "8N/G + 4N/G", "4N/G", "0", 4 * part / GB / rates.memory),
        ("`cpu`", "8N/G + 4N/G", "4N/G", "4N/G from host to GPU", 4 * part / GB / rates.memory),
        (
            "`disk`",
            "8N/G + 4N/G",
            "4N/G",
            "4N/G from disk",
            4 * part / GB / rates.memory + part / GB / rates.read,
        ),
    ]
    yield "| anchor | read in memory | written in memory | moved besides | seconds, as measured |"
    yield "|---|---|---|---|---|"
    for store, read, written, moved, seconds in rows:
        yield f"| {store} | {read} | {written} | {moved} | {seconds:.1f} |"


def between_tasks(shape: Shape, options: argparse.Namespace, rates: Rates) -> Iterator[str]:
    """What happens once a task, in one process or in all."""
    n = shape.parameters * FLOAT
    rows = [
        (
            "the trained weights gathered and written by the main process",
            "4N",
            n / GB / rates.write,
        ),
        ("their SHA-256", "4N", n / GB / rates.digest),
        ("read by every process of a machine, once (a mapped file)", "4N", n / GB / rates.read),
    ]
    yield "| once a task | bytes | seconds, as measured |"
    yield "|---|---|---|"
    for what, formula, seconds in rows:
        yield f"| {what} | {formula} = {gigabytes(n)} GB | {seconds:,.0f} |"
    yield ""
    yield (
        f"Host memory of a machine with {options.per_node} processes: two mapped files that all of "
        f"them share and the system may drop (the anchor and the starting model), 8N = "
        f"{gigabytes(2 * n)} GB, and 4N = {gigabytes(n)} GB in the main process while it writes; "
        f"for a moment, when the model is read or ZeRO cuts it up, 4N in each process: "
        f"{gigabytes(options.per_node * n)} GB. Scoring wants the whole model on each GPU: 4N = "
        f"{gigabytes(n)} GB, when training ends beside the shares: 4N + 4N/G = "
        f"{gigabytes(n + n / options.gpus)} GB."
    )


def report(options: argparse.Namespace, rates: Rates) -> Iterator[str]:
    """All of it, as Markdown."""
    import torch

    shape = SHAPES[options.model]
    yield f"# A {options.model.upper()} model on {options.gpus} GPUs"
    yield ""
    yield (
        f"`python benchmarks/scale.py --model {options.model} --gpus {options.gpus}` on "
        f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}."
    )
    yield ""
    yield (
        f"N = {shape.layers} layers x {shape.block:,} + 2 x {shape.vocabulary:,} x {shape.width:,} "
        f"+ {shape.width:,} = {shape.parameters:,} parameters; G = {options.gpus}; float32."
    )
    yield (
        f"Measured here, one process: a merge event moves {rates.memory:.1f} GB/s in memory (16 "
        f"bytes a weight), a file is written at {rates.write:.2f} GB/s, read at {rates.read:.2f} "
        f"GB/s, hashed at {rates.digest:.2f} GB/s."
    )
    for title, table in (
        ("Training, whatever the method", training_memory(shape, options.gpus)),
        ("What a method adds", method_memory(shape, options.gpus)),
        ("A merge event, in each process", merge_event(shape, options.gpus, rates)),
        ("Between two tasks", between_tasks(shape, options, rates)),
    ):
        yield ""
        yield f"## {title}"
        yield ""
        yield from table


def main() -> None:
    """Print the tables, and write them where that is asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="70b")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=400, help="size of what is measured")
    for rate in ("memory", "write", "read", "digest"):
        parser.add_argument(f"--{rate}-rate", type=float, help="GB/s, instead of measuring")
    parser.add_argument("--write", type=Path, help="a Markdown file to write")
    options = parser.parse_args()
    given = {
        rate: getattr(options, f"{rate}_rate") for rate in ("memory", "write", "read", "digest")
    }
    if all(given.values()):
        rates = Rates(**given)
    else:
        measured = measure(options.megabytes)
        rates = Rates(**{rate: value or getattr(measured, rate) for rate, value in given.items()})
    text = "\n".join(report(options, rates)) + "\n"
    print(text, end="")
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
