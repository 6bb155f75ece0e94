"""Low-rank adapters: merged into their base, or averaged with each other, by their products.

An adapter adds s B A to a weight, with s = alpha / r. The mean of two products is not the product
of two means: averaging factors is another model. Products are exact. Into a base, they are added to
its weights. Without one, the mean of the products sum_i w_i s_i B_i A_i is itself a product, of the
factors put side by side, whose rank is the sum of the ranks; or the nearest of a smaller rank, by
singular values.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stockpot import __version__
from stockpot.errors import NonFiniteError, nearest
from stockpot.files import write_json, write_text
from stockpot.merging.arrays import Array
from stockpot.merging.card import adapter_card, recipe_text
from stockpot.merging.checkpoint import Checkpoint, CheckpointError, TensorInfo, open_checkpoint
from stockpot.merging.dtypes import FLOATING, fits, looks_finite, narrow, stored_as, widen
from stockpot.merging.formulas import Facts, Notes, Part, Rule
from stockpot.merging.output import (
    clear,
    header_of,
    refuse_inputs_in,
    staged,
)
from stockpot.merging.plan import Entry, MergePlan, check_patterns, refuse_quantised
from stockpot.merging.recipe import DTYPES, MergeRecipe
from stockpot.merging.settings import Context, Lora
from stockpot.merging.shares import Shares

if TYPE_CHECKING:
    from stockpot.merging.on_disk import MergeResult, Settings

__all__ = ["Adapter", "LoraInto", "average_adapters", "make_adapter_plan", "open_adapter"]

_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.lora_"
    r"(?:(?P<embedding>embedding_)?(?P<factor>[AB]))(?:\.default)?(?:\.weight)?"
)
_PREFIX = "base_model.model."
_ROWS_OF = 1 << 16  # elements of a block of rows that is multiplied out at once


@dataclass
class Product:
    """scale * B A, the change of one weight: rows x columns."""

    a: np.ndarray
    """r x columns."""
    b: np.ndarray
    """rows x r."""
    scale: float
    transposed: bool = False
    """The weight holds the product's transpose: embeddings, and Conv1D of GPT-2."""

    @cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Left and right factors of the weight's own rows and columns; the scale in the left."""
        left, right = (self.a.T, self.b.T) if self.transposed else (self.b, self.a)
        return left * np.float32(self.scale), right


@dataclass
class Adapter:
    """One adapter in memory: it is small."""

    checkpoint: Checkpoint
    products: dict[str, Product]
    """By module."""
    whole: dict[str, TensorInfo] = field(default_factory=dict)
    """Tensors that it replaces: biases and modules_to_save, by their names in the model."""


def open_adapter(source: str) -> Adapter:
    """Read an adapter of PEFT.

    Raises:
        CheckpointError: if it is none, or of a kind whose change is not a scaled product.
    """
    checkpoint = open_checkpoint(source)
    config = checkpoint.adapter_config
    if not config:
        raise CheckpointError(f"{source} is no adapter: it has no adapter_config.json")
    _refuse_kinds(source, config)
    factors: dict[str, dict[str, np.ndarray]] = {}
    embeddings = set()
    whole = {}
    for name, info in checkpoint.tensors.items():
        found = _FACTOR.fullmatch(name)
        if found is None:
            if "lora_" in name:
                raise CheckpointError(f"{source}: {name!r} is a factor of an unknown kind")
            # PEFT saves embeddings under adapters whole as well, as their base layer.
            whole[name.removeprefix(_PREFIX).replace(".base_layer.", ".")] = info
            continue
        factors.setdefault(found["module"], {})[found["factor"]] = read_tensor(info)
        if found["embedding"]:
            embeddings.add(found["module"])
    products = {}
    for module, pair in factors.items():
        if set(pair) != {"A", "B"}:
            lacking = ({"A", "B"} - set(pair)).pop()
            raise CheckpointError(f"{source}: {module} has no lora_{lacking}")
        for factor, values in pair.items():
            if values.ndim < 2 or not values.size:
                raise CheckpointError(
                    f"{source}: lora_{factor} of {module} has the shape {list(values.shape)}; a "
                    "factor is a matrix"
                )
        a = pair["A"].reshape(pair["A"].shape[0], -1)
        b = pair["B"].reshape(pair["B"].shape[0], -1)
        if b.shape[1] != a.shape[0]:
            raise CheckpointError(
                f"{source}: the factors of {module} have ranks {a.shape[0]} and {b.shape[1]}"
            )
        transposed = module in embeddings or bool(config.get("fan_in_fan_out"))
        products[module] = Product(a, b, _scale(source, config, module, len(a)), transposed)
    return Adapter(checkpoint, products, whole)


def _refuse_kinds(source: str, config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type", "LORA"))
    if kind != "LORA":
        raise CheckpointError(f"{source} is an adapter of type {kind}; LORA is known here")
    if config.get("use_dora"):
        raise CheckpointError(
            f"{source} uses DoRA, whose change is no product; merge it with PEFT (merge_and_unload)"
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if any(init.startswith(kind) for kind in ("pissa", "olora", "corda", "loftq")):
        raise CheckpointError(
            f"{source} was initialised by {init}, which changes the base as well: its factors do "
            "not fit the base as published. Convert it with PEFT "
            "(path_initial_model_for_weight_conversion) first"
        )


def _scale(source: str, config: Mapping[str, Any], module: str, rank: int) -> float:
    """Alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA; patterns as PEFT matches them."""
    alpha = config.get("lora_alpha")
    try:
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        number = float(8 if alpha is None else alpha)  # PEFT's default
        if not math.isfinite(number):
            raise ValueError(number)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"{source}: adapter_config.json: lora_alpha and alpha_pattern must be numbers: {error}"
        ) from error
    return number / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_tensor(info: TensorInfo) -> np.ndarray:
    """A small tensor as float32 (float64 stays).

    Raises:
        CheckpointError: if it is not floating.
        NonFiniteError: if it holds NaN or infinity.
    """
    if info.dtype not in FLOATING:
        raise CheckpointError(f"{info.path}: tensor {info.name!r} has the dtype {info.dtype}")
    with info.path.open("rb") as file:
        file.seek(info.offset)
        stored = np.frombuffer(file.read(info.nbytes), stored_as(info.dtype))
    values = np.empty(stored.size, np.float64 if info.dtype == "F64" else np.float32)
    widen(stored, info.dtype, values)
    if not looks_finite(stored, info.dtype) and not np.isfinite(values).all():
        raise NonFiniteError(f"{info.path}: tensor {info.name!r} holds NaN or infinity")
    return values.reshape(info.shape)


# Into a base.


@dataclass
class LoraInto(Rule):
    """theta = theta_0 + scale sum_i w_i s_i B_i A_i; tensors that adapters hold whole likewise.

    Products are multiplied out in blocks of rows that do not depend on how a tensor is cut.
    """

    shares: Shares
    scale: float
    normalize: bool
    products: Mapping[str, Sequence[tuple[int, Product]]]
    """By tensor: the number of the adapter, and its product."""
    wholes: Mapping[str, Sequence[int]]
    """By tensor: the adapters that hold it whole."""
    columns: Mapping[str, int]
    temporaries: ClassVar[int] = 3

    def blend(self, part: Part, facts: Facts, notes: Notes) -> Array:
        """The formula of the class."""
        shares = self.shares.of(part.name, self.normalize)
        result = (part.models[0] if part.base is None else part.base) * 1.0
        if part.base is not None:
            for number, model in zip(self.wholes[part.name], part.models, strict=True):
                result += (model - part.base) * (self.scale * shares[number])
        for number, product in self.products.get(part.name, ()):
            change = self._change(part.name, product, part.start, len(result))
            change *= self.scale * shares[number]
            result += _like(change, result)
        return result

    def _change(self, name: str, product: Product, start: int, size: int) -> np.ndarray:
        left, right = product.factors
        columns = max(1, self.columns[name])
        rows = max(1, _ROWS_OF // columns)
        first = start // columns // rows * rows
        last = -(-(start + size) // columns)
        blocks = [left[row : row + rows] @ right for row in range(first, last, rows)]
        whole = np.concatenate(blocks).reshape(-1)
        begin = start - first * columns
        return whole[begin : begin + size]


def _like(values: np.ndarray, reference: Array) -> Array:
    if isinstance(reference, np.ndarray):
        return values
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(reference.device, reference.dtype)


@dataclass(frozen=True)
class AdapterPlan(MergePlan):
    """A plan whose rule holds the adapters' factors."""

    products: Mapping[str, Sequence[tuple[int, Product]]] = field(default_factory=dict)
    wholes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def context(self) -> Context:
        """With the factors."""
        columns = {
            entry.name: math.prod(entry.shape[1:])
            for entry in self.entries
            if entry.name in self.products
        }
        return super().context.model_copy(update={"factors": (self.products, self.wholes, columns)})


def make_adapter_plan(recipe: MergeRecipe) -> AdapterPlan:
    """Open a base and its adapters, and find each factor's weight.

    Raises:
        CheckpointError: if an adapter does not fit the base.
    """
    assert recipe.base is not None
    base = open_checkpoint(recipe.base.model)
    refuse_quantised(base)
    adapters = [open_adapter(model.model) for model in recipe.models]
    products: dict[str, list[tuple[int, Product]]] = {}
    wholes: dict[str, list[int]] = {}
    infos: dict[str, list[TensorInfo]] = {}
    for number, adapter in enumerate(adapters):
        for module, product in adapter.products.items():
            name = _name_in(base, f"{module}.weight", adapter)
            left, right = product.factors
            shape = base.tensors[name].shape
            if base.tensors[name].dtype not in FLOATING:
                raise CheckpointError(
                    f"{base.source}: {name!r} is {base.tensors[name].dtype}, to which nothing can "
                    "be added; merge into the weights that it was made from"
                )
            if (left.shape[0], right.shape[1]) != (shape[0], math.prod(shape[1:])):
                raise CheckpointError(
                    f"{adapter.checkpoint.source}: the product for {module} is "
                    f"{left.shape[0]} x {right.shape[1]}, the base's weight {list(shape)}"
                )
            products.setdefault(name, []).append((number, product))
        for tensor, info in adapter.whole.items():
            name = _name_in(base, tensor, adapter)
            if info.shape != base.tensors[name].shape:
                raise CheckpointError(
                    f"{adapter.checkpoint.source}: {tensor} has the shape {list(info.shape)}, the "
                    f"base's {list(base.tensors[name].shape)}"
                )
            if {info.dtype, base.tensors[name].dtype} - set(FLOATING):
                raise CheckpointError(
                    f"{adapter.checkpoint.source}: {tensor} is {info.dtype}, the base's "
                    f"{base.tensors[name].dtype}; both must be floating"
                )
            wholes.setdefault(name, []).append(number)
            infos.setdefault(name, []).append(info)
    check_patterns(recipe, [*products, *wholes])
    dtype = DTYPES[recipe.dtype] if recipe.dtype else None
    entries = []
    for name, info in base.tensors.items():
        wanted = dtype if dtype and info.dtype in FLOATING else info.dtype
        start, models = (info, tuple(infos[name])) if name in wholes else (None, (info,))
        entries.append(Entry(name, wanted, info.shape, start, models))
    return AdapterPlan(
        recipe=recipe,
        points=tuple(recipe.points()),
        base=base,
        models=tuple(adapter.checkpoint for adapter in adapters),
        fishers=(),
        entries=tuple(entries),
        products=products,
        wholes=wholes,
    )


def _name_in(base: Checkpoint, name: str, adapter: Adapter) -> str:
    """A tensor's name in the base's files, which may lack or have the model's prefix."""
    for candidate in (name, name.removeprefix("model."), f"model.{name}"):
        if candidate in base.tensors:
            return candidate
    raise CheckpointError(
        f"{adapter.checkpoint.source} changes {name!r}, which {base.source} does not hold"
        f"{nearest(name, base.tensors)}"
    )


# With each other.


def average_adapters(recipe: MergeRecipe, output: Path, settings: Settings) -> MergeResult:
    """Write the adapter whose product is the mean of the adapters' products.

    Raises:
        CheckpointError: if the adapters do not fit each other.
    """
    from stockpot.merging.on_disk import MergeResult, make_hasher

    began = time.monotonic()
    adapters = [open_adapter(model.model) for model in recipe.models]
    checkpoints = tuple(adapter.checkpoint for adapter in adapters)
    refuse_inputs_in(output, checkpoints)
    check_patterns(recipe, [name for each in adapters for name in (*each.products, *each.whole)])
    outputs, notes, written, count = [], [], 0, 0
    with make_hasher(recipe, checkpoints, settings, None) as hasher, staged(output) as staging:
        clear(staging)
        hashes = hasher.result()
        for point in recipe.points():
            method = point.method
            assert isinstance(method, Lora)
            tensors, config, error = _averaged(recipe, adapters, method)
            folder = staging / point.name
            folder.mkdir(exist_ok=True)
            first = next(iter(adapters[0].checkpoint.tensors.values())).dtype
            dtype = DTYPES[recipe.dtype] if recipe.dtype else first
            written += _write(folder / "adapter_model.safetensors", tensors, dtype)
            count = len(tensors)
            write_json(folder / "adapter_config.json", config)
            if error is not None:
                notes.append(
                    f"rank {method.rank}: the relative error of the products is {error:.3g}"
                )
            write_text(folder / "merge.yaml", recipe_text(recipe, point))
            write_text(folder / "README.md", adapter_card(recipe, point, adapters, hashes, notes))
            outputs.append(output / point.name if point.name else output)
    return MergeResult(
        folder=output,
        outputs=tuple(outputs),
        tensors=count,
        elements=sum(info.numel for a in adapters for info in a.checkpoint.tensors.values()),
        bytes_written=written,
        bytes_read=sum(checkpoint.nbytes for checkpoint in checkpoints),
        seconds=time.monotonic() - began,
        notes=tuple(notes),
        hashes={str(path): digest for path, digest in hashes.items()},
    )


def _averaged(
    recipe: MergeRecipe, adapters: Sequence[Adapter], method: Lora
) -> tuple[dict[str, np.ndarray], dict[str, Any], float | None]:
    """Tensors and config of the mean, and the relative error if its rank was cut."""
    shares = recipe.shares()
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    lost = total = 0.0
    modules = dict.fromkeys(module for adapter in adapters for module in adapter.products)
    for module in modules:
        row = shares.of(module, normalize=True)
        lefts, rights = [], []
        for share, adapter in zip(row, adapters, strict=True):
            if (product := adapter.products.get(module)) is not None:
                lefts.append(product.b * np.float32(share * product.scale * method.scale))
                rights.append(product.a)
        _check_same(module, lefts, rights)
        b, a = np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0)
        if method.rank is not None and method.rank < a.shape[0]:
            b, a, gone, all_of_it = _truncated(b, a, method.rank)
            lost += gone
            total += all_of_it
        ranks[module] = a.shape[0]
        tensors |= _named(module, a, b, adapters)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.whole):
        holders = [adapter.whole.get(name) for adapter in adapters]
        if any(info is None for info in holders):
            raise CheckpointError(f"{name!r} is whole in some adapters only; use a --base")
        values = [read_tensor(info) for info in holders if info is not None]
        row = shares.of(name, normalize=True)
        assert holders[0] is not None
        tensors[holders[0].name] = sum(
            (value * np.float32(share) for value, share in zip(values, row, strict=True)),
            np.zeros_like(values[0]),
        )
    error = math.sqrt(lost / total) if total else None
    return tensors, _config(adapters[0].checkpoint.adapter_config, ranks), error


def _check_same(module: str, lefts: Sequence[np.ndarray], rights: Sequence[np.ndarray]) -> None:
    shapes = {(left.shape[0], right.shape[1]) for left, right in zip(lefts, rights, strict=True)}
    if len(shapes) > 1:
        raise CheckpointError(f"{module}: the adapters' products have the shapes {sorted(shapes)}")


def _truncated(
    b: np.ndarray, a: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The nearest product of a lower rank (Eckart & Young 1936), by way of the small core."""
    left, left_core = np.linalg.qr(b.astype(np.float64))
    right, right_core = np.linalg.qr(a.T.astype(np.float64))
    u, sizes, v = np.linalg.svd(left_core @ right_core.T)
    roots = np.sqrt(sizes[:rank])
    new_b = (left @ u[:, :rank]) * roots
    new_a = roots[:, None] * (v[:rank] @ right.T)
    lost = float((sizes[rank:] ** 2).sum())
    return new_b.astype(b.dtype), new_a.astype(a.dtype), lost, float((sizes**2).sum())


def _named(
    module: str, a: np.ndarray, b: np.ndarray, adapters: Sequence[Adapter]
) -> dict[str, np.ndarray]:
    """Under the names, and in the shapes, that the adapters use."""
    found = {}
    for adapter in adapters:
        for name, info in adapter.checkpoint.tensors.items():
            match = _FACTOR.fullmatch(name)
            if match is not None and match["module"] == module:
                factor = a if match["factor"] == "A" else b
                shape = list(info.shape)
                shape[0 if match["factor"] == "A" else 1] = a.shape[0]
                found[name] = factor.reshape(shape)
        if found:
            return found
    raise AssertionError(module)


def _config(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Alpha = r, so that the scale is 1; ranks that differ by module as patterns."""
    common = max(set(ranks.values()), key=list(ranks.values()).count) if ranks else 1
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != common}
    return {
        **config,
        "r": common,
        "lora_alpha": common,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "init_lora_weights": True,
    }


def _write(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> int:
    """A small safetensors file; its folder is not public yet."""
    shapes = {name: (dtype, values.shape) for name, values in tensors.items()}
    metadata = {"format": "pt", "stockpot": json.dumps({"version": __version__})}
    header = header_of(shapes, metadata)
    with path.open("wb") as file:
        file.write(header)
        for name, values in tensors.items():
            if values.size and not fits(values, dtype):
                raise NonFiniteError(
                    f"tensor {name!r}: merged values overflow {dtype}; merge in a wider --dtype"
                )
            file.write(np.ascontiguousarray(narrow(values.reshape(-1), dtype)).tobytes())
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size
