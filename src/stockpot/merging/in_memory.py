"""A formula applied to models in memory: what a rule of `stockpot.merging.rules` does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from stockpot.arithmetic import is_finite
from stockpot.merging._validation import Weights, refuse
from stockpot.merging.arrays import ops_for
from stockpot.merging.formulas import Facts, Notes, Part, Rule
from stockpot.merging.survey import (
    InnerProducts,
    check_norms,
    kth_smallest_magnitude,
    vectors_of,
)

__all__ = ["apply"]


def apply(
    rule: Rule,
    models: Sequence[Weights],
    base: Weights | None = None,
    fishers: Sequence[Weights] = (),
) -> dict[str, Tensor]:
    """Merge tensor by tensor; inputs have been validated.

    Raises:
        ValueError: if a result is not finite in the dtype of the base, or of the first model.
    """
    like = models[0] if base is None else base
    inputs = [like, *models, *fishers]
    # One precision for the whole model: a threshold compares magnitudes across tensors.
    wide = any(tensor.dtype == torch.float64 for each in inputs for tensor in each.values())
    part = functools.partial(_part, base, models, fishers, torch.float64 if wide else torch.float32)
    names = [name for name, tensor in like.items() if tensor.is_floating_point()]
    facts = _survey(rule, part, names)
    merged: dict[str, Tensor] = {}
    balance, undecided = 0, []
    for name, reference in like.items():
        if not reference.is_floating_point():
            merged[name] = models[-1][name].detach().to(reference.device, copy=True)
            continue
        notes = Notes()
        merged[name] = _blend(rule, part(name), facts, notes, reference)
        balance += notes.balance
        if notes.undecided is not None:
            undecided.append(name)
    facts.majority = (balance > 0) - (balance < 0)
    if facts.majority != Facts().majority:
        for name in undecided:
            merged[name] = _blend(rule, part(name), facts, Notes(), like[name])
    return merged


def _part(
    base: Weights | None,
    models: Sequence[Weights],
    fishers: Sequence[Weights],
    dtype: torch.dtype,
    name: str,
) -> Part:
    device = (models[0] if base is None else base)[name].device

    def widened(tensors: Weights) -> Tensor:
        return tensors[name].detach().to(device, dtype).flatten()

    return Part(
        name,
        0,
        None if base is None else widened(base),
        [widened(model) for model in models],
        [widened(values) for values in fishers],
    )


def _blend(rule: Rule, part: Part, facts: Facts, notes: Notes, reference: Tensor) -> Tensor:
    """The merged tensor, rounded once."""
    merged = rule.blend(part, facts, notes)
    if notes.problem is not None:
        refuse(f"tensor {part.name!r}", *notes.problem.split("; "))
    # A copy even where the dtype stays: a rule may return one of its inputs.
    result: Tensor = merged.to(reference.dtype, copy=True).view(reference.shape)
    if not is_finite(result):
        refuse(
            f"tensor {part.name!r}",
            f"the merged values overflow {reference.dtype}",
            "lower the scale or the weights, or merge in a wider dtype",
        )
    return result


def _survey(rule: Rule, part: Callable[[str], Part], names: Sequence[str]) -> Facts:
    """Thresholds and inner products, one tensor in memory at a time."""
    facts = Facts()
    if not names:
        return facts
    scopes = {"": names} if rule.passes_over_whole_model else {name: [name] for name in names}
    sizes = {name: part(name).models[0].numel() for name in names}
    count = len(part(names[0]).models)
    facts.thresholds = [{} for _ in range(count)]
    for scope, members in scopes.items():
        ranks = rule.ranks(sum(sizes[name] for name in members))
        for model, thresholds in enumerate(facts.thresholds):
            # A new iterator for each pass of the selection: one task vector in memory at a time.
            vectors = functools.partial(_deltas, part, members, model)
            thresholds[scope] = [kth_smallest_magnitude(vectors, rank) for rank in ranks]
        if (kind := rule.products_of) is not None:
            products = InnerProducts()
            for name in members:
                products.add(vectors_of(kind, part(name)), diagonal=kind == "fishers")
            facts.products[scope] = products.matrix(count)
            check_norms(rule, facts.products[scope])
    return facts


def _deltas(part: Callable[[str], Part], names: Sequence[str], model: int) -> Iterator[np.ndarray]:
    for name in names:
        each = part(name)
        delta = each.models[model] - each.base
        yield ops_for(delta).to_numpy(delta)
