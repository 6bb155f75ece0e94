r"""What averaging costs: a merge event against memory and disk, and SFA in a whole training.

    python benchmarks/averaging.py --write benchmarks/results/averaging.md
    python benchmarks/averaging.py --device cuda --shape 7b --dtype bfloat16   # on a GPU

Each part runs in a fresh process. A merge event is what `SFA.step()` does at a merge step: the
check for NaN, the average, both distances and the check of what was written. It is compared, in
the same process and by turns, with the least that any average must do: read both sets of weights
and write one (`torch.add(a, b, out=c)`), or for `store="disk"`, read the anchor's file. The file is
dropped from the system's cache before either.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {
    "50m": (512, 12, 8192),  # width, layers, vocabulary
    "7b": (4096, 32, 32000),
}


def make_model(shape: str, dtype: str, device: str) -> Any:
    """Linear layers with the sizes of a Llama's."""
    import torch
    from torch import nn

    width, layers, vocabulary = SHAPES[shape]
    hidden = int(width * 2.6875)
    torch.manual_seed(0)
    with torch.device(device):
        blocks: list[nn.Module] = []
        for _ in range(layers):
            attention = [nn.Linear(width, width, bias=False) for _ in range(4)]
            mlp = [nn.Linear(width, hidden, bias=False) for _ in range(2)]
            blocks.append(nn.ModuleList([*attention, *mlp, nn.Linear(hidden, width, bias=False)]))
        tables = [nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)]
        return nn.ModuleList([*blocks, *tables]).to(getattr(torch, dtype))


def clock(device: str, what: Callable[[], Any]) -> float:
    """Seconds that ``what`` takes, the device's work included."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    what()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def merge_event(options: argparse.Namespace, store: str) -> dict[str, float]:
    """Medians over the rounds, in seconds, and the ratio within a round."""
    import torch

    from stockpot.averaging import SFA, Anchor

    model = make_model(options.shape, options.dtype, options.device)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "anchor.safetensors"
        if store == "disk":
            Anchor.capture(model).save(path)
        sfa = SFA(every=1, beta=0.3, store=store, anchor=path if store == "disk" else None)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=1e-3)
        memory = [] if store == "disk" else list(model.parameters())
        others = [(torch.randn_like(p), torch.empty_like(p)) for p in memory]

        def floor() -> None:
            if store == "disk":
                with path.open("rb", buffering=0) as file:
                    buffer = bytearray(16 << 20)
                    while file.readinto(buffer):
                        pass
                return
            for p, (other, out) in zip(model.parameters(), others, strict=True):
                torch.add(p.detach(), other, out=out)

        floor()  # its buffer, and what the first average of a process loads, are not the anchor's
        warm_up(store)
        before = peak_from_here()
        sfa.attach(model, total_steps=1000)
        rounds: list[tuple[float, float]] = []
        peak = highest()
        for _ in range(options.rounds + 1):  # the first one warms up
            forget(path)
            peak_from_here()
            ours = clock(options.device, lambda: sfa.merge(1))
            peak = max(peak, highest())
            forget(path)
            rounds.append((ours, clock(options.device, floor)))
    rounds = rounds[1:]
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    return {
        "seconds": statistics.median(ours for ours, _ in rounds),
        "floor": statistics.median(floor for _, floor in rounds),
        "ratio": statistics.median(ours / floor for ours, floor in rounds),
        "gigabytes": size / 1e9,
        "extra_mb": max(0, peak - before) / 1e6,
        "largest_mb": largest / 1e6,
    }


def forget(path: Path) -> None:
    """Have the system drop a file from its cache, so that it is read from the disk."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_up(store: str) -> None:
    """Average something small, once."""
    import torch

    from stockpot.averaging import SFA

    with SFA(every=1, store=store).attach(torch.nn.Linear(512, 512), total_steps=1) as sfa:
        sfa.step()


def peak_from_here() -> int:
    """Forget the process's highest resident memory so far; what it is now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return highest()


def highest() -> int:
    """The process's highest resident memory since :func:`peak_from_here`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def training(options: argparse.Namespace, method: str) -> dict[str, float]:
    """Seconds for ``steps`` optimizer steps of a 50M-parameter network with this method."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from stockpot.averaging import SFA

    torch.manual_seed(0)
    sizes = [1024, 4096, 4096, 4096, 2048, 1024]
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, y = torch.randn(16, 1024), torch.randint(1024, (16,))
    start = [p.detach().clone() for p in model.parameters()]
    fisher = [torch.rand_like(p) for p in start] if method == "ewc" else []
    begin = time.perf_counter()
    sfa = SFA(p=0.25).attach(model, optimizer, total_steps=options.steps)
    for _ in range(options.steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            grads = [p.grad for p in model.parameters()]
            if method == "l2":
                torch._foreach_add_(grads, torch._foreach_sub(list(model.parameters()), start))
            elif method == "ewc":
                pull = torch._foreach_sub(list(model.parameters()), start)
                torch._foreach_mul_(pull, fisher)
                torch._foreach_add_(grads, pull)
        optimizer.step()
        if method == "sfa":
            sfa.step()
    seconds = time.perf_counter() - begin
    parameters = sum(p.numel() for p in model.parameters())
    return {"seconds": seconds, "merging": sum(e.seconds for e in sfa.events), "n": parameters}


def child(part: str, argument: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one part in a process of its own."""
    command = [sys.executable, __file__, "--part", part, argument]
    for name in ("device", "shape", "dtype", "rounds", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    print(f"{part} {argument} ...", file=sys.stderr, flush=True)
    result: dict[str, float] = json.loads(subprocess.check_output(command))
    return result


def report(options: argparse.Namespace) -> str:
    """All parts, as Markdown."""
    import torch

    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    machine = gpu or f"{os.cpu_count()} cores, {platform.machine()}"
    lines = [
        "# What averaging costs",
        "",
        f"`python benchmarks/averaging.py` on {machine}, torch {torch.__version__}, "
        f"{options.dtype}, the shapes of a {options.shape.upper()} Llama, {options.rounds} rounds.",
        "",
        "| merge event | ms | the floor, ms | ratio | extra memory, MB | largest tensor, MB |",
        "|---|---|---|---|---|---|",
    ]
    for store in ("device", "cpu", "disk"):
        r = child("merge", store, options)
        lines.append(
            f'| `store="{store}"`, {r["gigabytes"]:.2f} GB | {r["seconds"] * 1e3:.1f} | '
            f"{r['floor'] * 1e3:.1f} | {r['ratio']:.2f} | "
            + (f"{r['extra_mb']:.0f}" if store == "disk" else "one copy")
            + f" | {r['largest_mb']:.0f} |"
        )
    lines += ["", "The floor: reading both sets of weights and writing one, or reading the file."]
    lines += ["", *LIMITS.splitlines()]
    if options.device == "cpu":
        lines += ["", f"| {options.steps} steps of training | s | to plain | merging, s |"]
        lines += ["|---|---|---|---|"]
        runs = {m: child("training", m, options) for m in ("plain", "sfa", "l2", "ewc")}
        for method, r in runs.items():
            ratio = r["seconds"] / runs["plain"]["seconds"]
            merging = f"{r['merging']:.3f} ({r['merging'] / r['seconds']:.2%})"
            lines.append(
                f"| {method} | {r['seconds']:.1f} | {ratio:.3f} | "
                f"{merging if method == 'sfa' else '-'} |"
            )
        lines += ["", f"{runs['plain']['n'] / 1e6:.1f}M parameters, AdamW, float32, batches of 16."]
    return "\n".join(lines) + "\n"


LIMITS = """\
What limits it in memory: all weights are read once before any is written, so that a model that has
diverged is left as it was (0.35 of the floor), and the distance to the anchor needs the difference
in the processor's cache (0.9), beside the average itself (0.25). Tried and slower: one thread a
tensor, smaller and larger parts, a fused distance (cdist), `lerp_` after a pass for the distance.
The floor moves between 12 and 18 ms with where the system puts the memory. On disk: reading ahead
in a second thread or by the system (both fight with the arithmetic for two cores) was slower."""


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="50m", choices=list(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--write", type=Path, help="also write the tables to this file")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part = {"merge": merge_event, "training": training}[options.part[0]]
        print(json.dumps(part(options, options.part[1])))
        return
    text = report(options)
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
