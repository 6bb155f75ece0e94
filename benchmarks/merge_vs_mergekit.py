r"""Merging checkpoints: stockpot against mergekit 0.1.5, on the same files, in turn.

Makes Llama-shaped bfloat16 checkpoints (a base and three tuned from it, sharded), runs both
programs as a user would, each in a fresh process with its inputs in the system's cache, and prints
medians over the rounds: wall and CPU time, peak anonymous memory, and how far the outputs are from
a float32 reference that is computed here. The floor is `cat inputs > /dev/null` and writing as many
bytes as the output to the disk (fsync).

    python benchmarks/merge_vs_mergekit.py --rounds 3 --write benchmarks/results/merging.md

mergekit is installed into --environment (default .venv-mergekit) if it is not there yet. The inputs
take 3 GB; with --large (memory at 1.6 billion parameters, and one tensor of 525 million elements)
20 GB. They are made in --folder and stay there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
LIMITS = """\
What limits it. A linear merge of 1.3 s is 0.25 s of start-up (Python, numpy, pydantic), 0.85 s
of reading, arithmetic and hashing on both cores, and 0.1 to 0.2 s until the disk has the rest;
mergekit's 7 to 8 s are some seven times the floor. TIES is bound by numpy's passes over arrays
that two cores share a cache for: two threads do 1.4 times the work of one. Tried, for TIES per
tensor: torch's operations (10 s: masks of booleans are slow, and importing it takes 1.3 s),
masks instead of arithmetic with signs (6.2 s), `np.partition` (slow where few numbers are
distinct, as in differences of bfloat16), a second pass for coordinates whose votes cancel (7.8
s; now both signs are merged for these few at once), smaller parts (13.8 s at 32,768 elements:
threads wait for Python's lock), larger ones (6 s), SHA-256 instead of XXH3 (6.3 s; 2.0 s for
linear), keeping what a survey needs in many small arrays (5.4 s, and twice the memory). Over
the whole model TIES reads all inputs twice: at 1.5 billion parameters that is twice 12 GB from
the disk, since the cache holds less.
"""
AIMS = {"linear": 6.0, "task-arithmetic": 6.0, "slerp": 6.0, "ties": 15.0}


# Checkpoints.


def llama(layers: int, hidden: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes, a group to a shard of about 300 MB."""
    wide = int(hidden * 2.6875)
    group: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, hidden)}
    size = 32000 * hidden
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes = {f"{name}.self_attn.{which}_proj.weight": (hidden, hidden) for which in "qkvo"} | {
            f"{name}.mlp.gate_proj.weight": (wide, hidden),
            f"{name}.mlp.up_proj.weight": (wide, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, wide),
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
        }
        if size > 150e6:
            yield group
            group, size = {}, 0
        group |= shapes
        size += sum(torch.Size(shape).numel() for shape in shapes.values())
    yield group | {"model.norm.weight": (hidden,), "lm_head.weight": (32000, hidden)}


def config(layers: int, hidden: int) -> dict[str, Any]:
    """What transformers needs to know of it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": int(hidden * 2.6875),
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    }


def make_models(folder: Path, layers: int, hidden: int) -> list[Path]:
    """A base and three models tuned from it; changes differ in size from tensor to tensor."""
    models = [folder / name for name in ("base", "tuned0", "tuned1", "tuned2")]
    if (folder / "done").exists():
        return models
    groups = list(llama(layers, hidden))
    for number, model in enumerate(models):
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(config(layers, hidden)))
        weight_map = {}
        for part, shapes in enumerate(groups):
            tensors = {name: weights(name, shape, number) for name, shape in shapes.items()}
            file = f"model-{part + 1:05d}-of-{len(groups):05d}.safetensors"
            save_file(tensors, model / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "done").touch()
    return models


def weights(name: str, shape: tuple[int, ...], number: int) -> torch.Tensor:
    """Drawn from the name; a model with a number is tuned from the base."""
    seed = sum(map(ord, name)) * 7919
    base = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    if number:
        size = 2e-4 if "embed" in name else 2e-3 if "mlp" in name else 1e-3
        generator = torch.Generator().manual_seed(seed + number)
        base = base.bfloat16().float() + size * torch.randn(shape, generator=generator)
    return base.bfloat16()


# Running.


@dataclass
class Run:
    """What one run of a program took, in seconds."""

    wall: float
    cpu: float
    memory: float
    """Peak anonymous memory, MB."""


def run(command: list[str]) -> Run:
    """Run a program to its end."""
    began = time.perf_counter()
    with open(os.devnull, "w") as null:
        process = subprocess.Popen(command, stdout=null, stderr=subprocess.PIPE, text=True)
    peak = [0.0]
    watcher = threading.Thread(target=watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{errors[-2000:]}")
    return Run(wall, usage.ru_utime + usage.ru_stime, peak[0])


def watch(pid: int, peak: list[float]) -> None:
    """Anonymous memory of a process, looked at fifty times a second."""
    path = Path(f"/proc/{pid}/status")
    while True:
        try:
            for line in path.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak[0] = max(peak[0], int(line.split()[1]) / 1024)
        except (OSError, ProcessLookupError):
            return
        time.sleep(0.02)


def warm(models: list[Path]) -> float:
    """Read all inputs; seconds."""
    began = time.perf_counter()
    files = [str(path) for model in models for path in model.glob("*.safetensors")]
    with open(os.devnull, "w") as null:
        subprocess.run(["cat", *files], stdout=null, check=True)
    return time.perf_counter() - began


def write_floor(folder: Path, size: int) -> float:
    """Write so many bytes and bring them to the disk; seconds."""
    began = time.perf_counter()
    subprocess.run(
        [
            "dd",
            "if=/dev/zero",
            f"of={folder / 'floor'}",
            "bs=1M",
            f"count={size >> 20}",
            "conv=fsync",
            "status=none",
        ],
        check=True,
    )
    spent = time.perf_counter() - began
    (folder / "floor").unlink()
    return spent


def ours(method: str, models: list[Path], out: Path, *options: str) -> list[str]:
    """The command of stockpot."""
    base, *tuned = map(str, models)
    settings = {
        "linear": tuned,
        "slerp": [*tuned[:2], "--t", "0.3"],
        "task-arithmetic": [*tuned, "--base", base, "--scale", "0.4"],
        "ties": [*tuned, "--base", base, "--density", "0.2", "--trim", "per-tensor"],
        "ties, global": [*tuned, "--base", base, "--density", "0.2"],
    }[method]
    verb = method.split(",")[0]
    return [sys.executable, "-m", "stockpot", "merge", verb, *settings, "-o", str(out), *options]


def theirs(method: str, models: list[Path], out: Path, program: Path) -> list[str]:
    """The command of mergekit, its recipe beside the output."""
    base, *tuned = map(str, models)
    entries: list[Any] = [{"model": each, "parameters": {"weight": 1.0}} for each in tuned]
    recipe: dict[str, Any] = {"merge_method": method.replace("-", "_"), "dtype": "bfloat16"}
    if method == "slerp":
        recipe |= {"models": [{"model": each} for each in tuned[:2]], "base_model": tuned[0]}
        recipe["parameters"] = {"t": 0.3}
    else:
        recipe["models"] = entries
    if method == "task-arithmetic":
        recipe |= {"base_model": base, "parameters": {"lambda": 0.4}}
    if method == "ties":
        recipe |= {"base_model": base, "parameters": {"density": 0.2}}
    path = out.with_suffix(".json")  # JSON is YAML
    path.write_text(json.dumps(recipe))
    return [str(program), str(path), str(out)]


# The reference.


def tensors_of(folder: Path) -> dict[str, Path]:
    """Where each tensor of a folder is."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def get(places: dict[str, Path], name: str) -> torch.Tensor:
    """One tensor."""
    with safe_open(places[name], "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def reference(method: str, base: torch.Tensor, tuned: list[torch.Tensor]) -> torch.Tensor:
    """One tensor in float32 (angles in float64), rounded once."""
    start, thetas = base.float(), [each.float() for each in tuned]
    if method == "linear":
        return (sum(thetas) / 3).bfloat16()  # type: ignore[union-attr]
    if method == "task-arithmetic":
        return (start + 0.4 * sum(theta - start for theta in thetas)).bfloat16()
    if method == "slerp":
        x, y = (theta.double() for theta in thetas[:2])
        cosine = (x * y).sum() / (x.norm() * y.norm())
        if cosine.abs() > 0.9995:
            return (0.7 * thetas[0] + 0.3 * thetas[1]).bfloat16()
        angle = torch.arccos(cosine)
        left, right = torch.sin(0.7 * angle), torch.sin(0.3 * angle)
        return ((left * x + right * y) / torch.sin(angle)).bfloat16()
    stacked = trimmed(start, thetas)
    sign = stacked.sum(0).sign()
    agrees = (stacked.sign() == sign) & (stacked != 0)
    mean = (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return (start + mean.view(start.shape)).bfloat16()


def trimmed(start: torch.Tensor, thetas: list[torch.Tensor]) -> torch.Tensor:
    """Task vectors without entries below the k-th smallest magnitude, in rows."""
    rows = []
    for theta in thetas:
        delta = (theta - start).flatten()
        k = delta.numel() - int(delta.numel() * 0.2)
        rows.append(torch.where(delta.abs() >= delta.abs().kthvalue(k).values, delta, 0.0))
    return torch.stack(rows)


def even_votes(base: torch.Tensor, tuned: list[torch.Tensor]) -> torch.Tensor:
    """Where task vectors cancel, whose sign one program takes from the model, one as +1."""
    rows = trimmed(base.float(), [each.float() for each in tuned])
    return ((rows.sum(0) == 0) & (rows != 0).any(0)).view(base.shape)


def differing(method: str, models: list[Path], out: Path) -> float:
    """Share of elements that differ from the reference; TIES without those whose vote is even."""
    places, found = [tensors_of(model) for model in models], tensors_of(out)
    wrong = total = 0
    for name in list(places[0])[::7]:
        base, *tuned = (get(each, name) for each in places)
        expected = reference(method, base, tuned)
        differs = get(found, name) != expected
        if method == "ties":
            differs &= ~even_votes(base, tuned)
        wrong += int(differs.sum())
        total += differs.numel()
    return wrong / total


# The tables.


def compare(arguments: argparse.Namespace, models: list[Path], program: Path) -> list[str]:
    """The table of methods, and the floor."""
    size = sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
    lines = [
        "| method | stockpot, s | mergekit, s | wall | CPU | memory, MB | share | aim | "
        "elements off the reference: stockpot, mergekit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    out, kit = arguments.folder / "out", arguments.folder / "kit"
    floors, plain = [], []
    for method, aim in AIMS.items():
        mine: list[Run] = []
        peer: list[Run] = []
        for _ in range(arguments.rounds):
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(kit, ignore_errors=True)
            read = warm(models)
            if method == "linear":
                floors.append(warm(models[1:]) + write_floor(arguments.folder, size))
                plain.append(run(ours(method, models, out, "--hash", "none")).wall)
                shutil.rmtree(out)
            mine.append(run(ours(method, models, out)))
            warm(models)
            peer.append(run(theirs(method, models, kit, program)))
            del read
        lines.append(row(method, aim, mine, peer, models, out, kit))
        print(lines[-1], flush=True)
    shutil.rmtree(kit)
    shutil.rmtree(out)
    warm(models)
    whole = run(ours("ties, global", models, out))
    floor, unhashed = statistics.median(floors), statistics.median(plain)
    lines += [
        "",
        f"TIES over the whole model, which mergekit has not: {whole.wall:.1f} s, "
        f"{whole.memory:.0f} MB.",
        f"The floor of linear, `cat` of its inputs and writing {size / 1e9:.2f} GB with fsync: "
        f"{floor:.2f} s; linear takes {unhashed / floor:.2f} of it without hashes of the inputs "
        f"({unhashed:.2f} s).",
    ]
    print("\n".join(lines[-2:]), flush=True)
    return lines


def row(
    method: str,
    aim: float,
    mine: list[Run],
    peer: list[Run],
    models: list[Path],
    out: Path,
    kit: Path,
) -> str:
    """One line of it."""

    def median(values: Any) -> float:
        return statistics.median(values)

    wall = median(b.wall / a.wall for a, b in zip(mine, peer, strict=True))
    cpu = median(b.cpu / a.cpu for a, b in zip(mine, peer, strict=True))
    memory = median(a.memory for a in mine)
    share = memory / median(b.memory for b in peer)
    return (
        f"| {method} | {median(a.wall for a in mine):.2f} | {median(b.wall for b in peer):.1f} | "
        f"{wall:.1f}x | {cpu:.1f}x | {memory:.0f} | {share:.2f} | {aim:.0f}x, 0.33 | "
        f"{differing(method, models, out):.2%}, {differing(method, models, kit):.2%} |"
    )


def large(arguments: argparse.Namespace) -> list[str]:
    """Memory at four times the size, and of one tensor of 525 million elements."""
    lines = ["", "| | parameters | stockpot, s | memory, MB |", "|---|---|---|---|"]
    out = arguments.folder / "out"
    for label, layers, hidden in (("400M", 24, 1024), ("1.6B", 28, 2048)):
        models = make_models(arguments.folder / label, layers, hidden)
        count = sum(p.stat().st_size for p in models[0].glob("*.safetensors")) / 2
        for method in ("linear", "ties", "ties, global"):
            shutil.rmtree(out, ignore_errors=True)
            warm(models)
            found = run(ours(method, models, out))
            lines.append(
                f"| {method} | {count / 1e6:,.0f}M | {found.wall:.1f} | {found.memory:.0f} |"
            )
            print(lines[-1], flush=True)
    shutil.rmtree(out)
    models = embedding(arguments.folder / "embedding")
    for method in ("ties", "ties, global"):
        shutil.rmtree(out, ignore_errors=True)
        found = run(ours(method, models, out))
        lines.append(f"| {method}, one tensor | 525M | {found.wall:.1f} | {found.memory:.0f} |")
        print(lines[-1], flush=True)
    shutil.rmtree(out)
    return lines


def embedding(folder: Path) -> list[Path]:
    """Models of a single tensor, the size of Llama-3-8B's embedding."""
    models = [folder / name for name in ("base", "tuned0", "tuned1", "tuned2")]
    for number, model in enumerate(models):
        if not (model / "model.safetensors").exists():
            model.mkdir(parents=True, exist_ok=True)
            tensor = weights("embed", (128256, 4096), number)
            save_file({"embed": tensor}, model / "model.safetensors")
    return models


def main() -> None:
    """Read the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(".benchmark-merging"))
    parser.add_argument("--environment", type=Path, default=Path(".venv-mergekit"))
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    program = arguments.environment / "bin" / "mergekit-yaml"
    if not program.exists():
        subprocess.run(
            [str(HERE / "peers" / "setup_mergekit.sh"), str(arguments.environment)], check=True
        )
    models = make_models(arguments.folder / "400M", 24, 1024)
    lines = [
        "# Merging, against mergekit 0.1.5",
        "",
        f"`python benchmarks/merge_vs_mergekit.py` on {os.cpu_count()} cores, "
        f"{platform.machine()}, {arguments.rounds} rounds, inputs in the system's cache. A base "
        "and three models of 369M parameters, bfloat16, in shards. Wall and CPU: mergekit's "
        "time over stockpot's; share: stockpot's peak anonymous memory over mergekit's.",
        "",
        *compare(arguments, models, program),
        *(large(arguments) if arguments.large else []),
        "",
        LIMITS.strip(),
    ]
    if arguments.write:
        arguments.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
