"""Merging methods written out from their papers in float64, and small checkpoints to merge.

Nothing here uses the package: it is what the package is held against.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray]
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
}


def tensors_of(
    seed: int,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    near: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """A model of random weights, or one tuned from another."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape) * 0.02
        if near is not None:
            values = near[name].double().numpy() + rng.normal(size=shape) * 1e-3
        found[name] = torch.tensor(values).to(TORCH[dtype])
    return found


def write_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file, byte by byte as the format's page describes it."""
    names = {value: key for key, value in TORCH.items()}
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        raw = (
            tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            if tensor.numel()
            else b""
        )
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """A model folder of one or several shards, with a config if given."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        write_file(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def wide(model: Mapping[str, torch.Tensor]) -> Arrays:
    """float64 copies."""
    return {name: tensor.double().numpy() for name, tensor in model.items()}


# The methods.


def linear(models: Sequence[Arrays], weights: Sequence[float]) -> Arrays:
    total = math.fsum(weights)
    return {
        name: sum(w / total * m[name] for w, m in zip(weights, models, strict=True))
        for name in models[0]
    }


def task_vectors(base: Arrays, models: Sequence[Arrays]) -> list[Arrays]:
    return [{name: m[name] - base[name] for name in base} for m in models]


def task_arithmetic(
    base: Arrays, models: Sequence[Arrays], weights: Sequence[float], scale: float
) -> Arrays:
    deltas = task_vectors(base, models)
    return {
        name: base[name] + scale * sum(w * d[name] for w, d in zip(weights, deltas, strict=True))
        for name in base
    }


def wise_ft(base: Arrays, model: Arrays, beta: float) -> Arrays:
    return {name: beta * base[name] + (1 - beta) * model[name] for name in base}


def slerp(first: Arrays, second: Arrays, t: float) -> Arrays:
    merged = {}
    for name, a in first.items():
        b = second[name]
        x, y = a.ravel(), b.ravel()
        norm = np.linalg.norm(x) * np.linalg.norm(y)
        cosine = x @ y / norm if norm else 1.0
        if abs(cosine) > 0.9995:
            merged[name] = (1 - t) * a + t * b
            continue
        angle = np.arccos(np.clip(cosine, -1, 1))
        merged[name] = (
            np.sin((1 - t) * angle) / np.sin(angle) * a + np.sin(t * angle) / np.sin(angle) * b
        )
    return merged


def ties(
    base: Arrays,
    models: Sequence[Arrays],
    density: float,
    scale: float,
    scope: str = "global",
    weights: Sequence[float] | None = None,
) -> Arrays:
    """As the authors' code: one vector per model, sorted; kthvalue; sum; majority for zeros."""
    weights = weights or [1.0] * len(models)
    rows = []
    for delta, weight in zip(task_vectors(base, models), weights, strict=True):
        groups = [list(delta)] if scope == "global" else [[name] for name in delta]
        kept = {}
        for names in groups:
            vector = np.concatenate([np.abs(delta[name]).ravel() for name in names])
            k = vector.size - int(vector.size * density)
            threshold = np.sort(vector)[k - 1] if k else 0.0
            for name in names:
                kept[name] = np.where(np.abs(delta[name]) >= threshold, delta[name], 0.0)
        rows.append(np.concatenate([kept[name].ravel() for name in base]) * weight)
    return _elect(base, np.stack(rows), weights, scale)


def _elect(base: Arrays, rows: np.ndarray, weights: Sequence[float], scale: float) -> Arrays:
    sign = np.sign(rows.sum(axis=0))
    majority = np.sign(sign.sum())
    sign[sign == 0] = majority
    agrees = np.where(sign > 0, rows > 0, rows < 0)
    counts = (agrees * np.asarray(weights)[:, None]).sum(axis=0)
    merged = (rows * agrees).sum(axis=0) / np.where(counts == 0, 1.0, counts)
    found, start = {}, 0
    for name, value in base.items():
        found[name] = value + scale * merged[start : start + value.size].reshape(value.shape)
        start += value.size
    return found


def fisher(
    models: Sequence[Arrays], fishers: Sequence[Arrays], floor: float, normalize: bool
) -> Arrays:
    norms = [
        math.sqrt(sum(float((v**2).sum()) for v in f.values())) if normalize else 1.0
        for f in fishers
    ]
    merged = {}
    for name in models[0]:
        rows = [np.maximum(f[name], floor) / n for f, n in zip(fishers, norms, strict=True)]
        merged[name] = sum(r * m[name] for r, m in zip(rows, models, strict=True)) / sum(rows)
    return merged


def magmax(base: Arrays, models: Sequence[Arrays], scale: float) -> Arrays:
    merged = {}
    for name in base:
        deltas = np.stack([m[name] - base[name] for m in models])
        high, low = deltas.max(axis=0), deltas.min(axis=0)
        merged[name] = base[name] + scale * np.where(high >= -low, high, low)
    return merged


def model_stock(base: Arrays, models: Sequence[Arrays]) -> Arrays:
    merged = {}
    n = len(models)
    for name in base:
        deltas = [(m[name] - base[name]).ravel() for m in models]
        cosines = []
        for i in range(n):
            for j in range(i + 1, n):
                norm = np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j])
                cosines.append(deltas[i] @ deltas[j] / norm if norm else 0.0)
        cosine = max(0.0, float(np.mean(cosines)))
        t = n * cosine / (1 + (n - 1) * cosine)
        mean = sum(m[name] for m in models) / n
        merged[name] = t * mean + (1 - t) * base[name]
    return merged


def breadcrumbs(
    base: Arrays, models: Sequence[Arrays], density: float, gamma: float, scale: float
) -> Arrays:
    merged = {}
    for name in base:
        total = np.zeros_like(base[name])
        for model in models:
            delta = model[name] - base[name]
            if delta.size:
                order = np.sort(np.abs(delta).ravel())
                top = int(gamma * delta.size)
                rest = order[: delta.size - top]
                kept = rest[max(0, rest.size - round(density * delta.size)) :]
                low, high = (kept[0], kept[-1]) if kept.size else (rest[-1], rest[-1])
                delta = np.where((np.abs(delta) >= low) & (np.abs(delta) <= high), delta, 0.0)
            total = total + delta
        merged[name] = base[name] + scale * total
    return merged


def lines(base: Arrays, models: Sequence[Arrays], alpha: float, beta: float, depths: Any) -> Arrays:
    deltas = task_vectors(base, models)
    return {
        name: base[name] + (alpha + beta * depths[name]) * sum(d[name] for d in deltas)
        for name in base
    }
