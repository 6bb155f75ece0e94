"""What can be merged: names, shapes, kinds and numbers are checked before anything is computed."""

from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeAlias

import torch

from stockpot.arithmetic import is_finite
from stockpot.merging.shares import Shares

__all__ = [
    "Weights",
    "check_number",
    "check_share",
    "refuse",
    "validate",
    "validate_fishers",
]

Weights: TypeAlias = Mapping[str, torch.Tensor]

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def validate(
    models: Sequence[Weights],
    *,
    base: Weights | None = None,
    weights: Sequence[float] | None = None,
    label: str = "models[{}]",
) -> Shares:
    """Refuse models that cannot be merged, and return the models' weights.

    What can be told without reading values (names, shapes, kinds) is checked first, for all models.
    """
    if isinstance(models, Mapping):
        refuse("models", "is one mapping", "pass a list of models")
    if len(models) == 0:
        refuse("models", "is empty", "pass at least one model")
    labelled = {} if base is None else {"base": base}
    labelled.update({label.format(i): model for i, model in enumerate(models)})
    for each, model in labelled.items():
        if not model:
            refuse(each, "holds no tensors", "pass a mapping from names to tensors")
        _check_kinds(each, model)
    reference_label, reference = next(iter(labelled.items()))
    for each, model in labelled.items():
        _check_same_layout(each, model, reference_label, reference)
    for each, model in labelled.items():
        _check_finite(each, model)

    return Shares.make(weights, len(models))


def validate_fishers(fishers: Sequence[Weights], models: Sequence[Weights]) -> None:
    """Refuse Fisher information that does not fit the models, whose own checks have passed."""
    if isinstance(fishers, Mapping) or len(fishers) != len(models):
        count = "is one mapping" if isinstance(fishers, Mapping) else f"has {len(fishers)} entries"
        refuse("fishers", f"{count} for {len(models)} models", "one mapping per model, as a list")
    needed = {name: tensor for name, tensor in models[0].items() if tensor.is_floating_point()}
    for i, values in enumerate(fishers):
        label = f"fishers[{i}]"
        # Values for counters and the like mean nothing, and harm nothing.
        ignored = models[0].keys() - needed.keys()
        relevant = {name: values[name] for name in values if name not in ignored}
        _check_kinds(label, relevant)
        _check_same_layout(label, relevant, "the floating tensors of models[0]", needed)
        _check_finite(label, relevant)
        for name, tensor in relevant.items():
            if tensor.numel() and bool(tensor.min() < 0):
                refuse(
                    f"{label}: tensor {name!r}",
                    "holds negative values",
                    "Fisher information is a mean of squares",
                )


def _check_kinds(label: str, model: Weights) -> None:
    """Refuse what is no tensor, and tensors of a kind that has no mean."""
    for name, tensor in model.items():
        if not isinstance(tensor, torch.Tensor):
            refuse(f"{label}: {name!r}", f"is a {type(tensor).__name__}", "pass tensors only")
        # float8 holds the codes of quantised weights, whose scales are elsewhere.
        inexact = tensor.is_floating_point() or tensor.is_complex()
        if inexact and tensor.dtype not in _FLOATING:
            refuse(
                f"{label}: tensor {name!r}",
                f"has the dtype {tensor.dtype}",
                "convert it to float64, float32, bfloat16 or float16 first",
            )


def _check_same_layout(
    label: str, model: Weights, reference_label: str, reference: Weights
) -> None:
    """Refuse names, shapes and kinds of tensors that differ from those of the reference."""
    remedy = "merge models of one architecture, saved under the same names"
    if missing := [name for name in reference if name not in model]:
        refuse(label, f"lacks {_listed(missing)}, present in {reference_label}", remedy)
    if extra := [name for name in model if name not in reference]:
        refuse(label, f"has {_listed(extra)}, absent from {reference_label}", remedy)
    for name, expected in reference.items():
        tensor = model[name]
        subject = f"{label}: tensor {name!r}"
        if tensor.shape != expected.shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(expected.shape)}"
            refuse(subject, f"has the shape {shapes} as in {reference_label}", remedy)
        if tensor.is_floating_point() != expected.is_floating_point():
            kinds = f"is {tensor.dtype}, but {expected.dtype} in {reference_label}"
            refuse(subject, kinds, "both must be floating, or neither")


def _check_finite(label: str, model: Weights) -> None:
    """Refuse NaN and infinity, naming the tensor."""
    for name, tensor in model.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            refuse(
                f"{label}: tensor {name!r}",
                "holds NaN or infinity",
                "merge models whose training did not diverge",
            )


def check_number(label: str, value: float) -> None:
    """Refuse a factor that is NaN or infinite, or would be in float32."""
    if not abs(value) <= torch.finfo(torch.float32).max:
        refuse(label, f"is {value}", "give a number that is finite in float32")


def check_share(label: str, value: float) -> None:
    """Refuse what is no share of a whole."""
    if not 0.0 <= value <= 1.0:
        refuse(label, f"{value} is outside [0, 1]", "20 % is written 0.2")


def _listed(names: Sequence[str]) -> str:
    """The first names, quoted, and how many more there are."""
    listed = ", ".join(repr(name) for name in names[:3])
    return listed if len(names) <= 3 else f"{listed} and {len(names) - 3} more"


def refuse(subject: str, reason: str, remedy: str) -> NoReturn:
    """Raise the one kind of error of this module: what, why, and what would be right."""
    raise ValueError(f"{subject}: {reason}; {remedy}")
