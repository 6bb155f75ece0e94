"""Merging rules: linear, WiSE-FT, task arithmetic, TIES and Fisher.

What all rules have in common:

- **Models** are mappings from names to tensors. All models of one call have the same names, and
  tensors of one name have the same shape. Tied weights are merged once if they are given once.
- **Precision.** Sums are accumulated in float32, or in float64 where an input is float64, and
  rounded once, to the dtype of the base, or of the first model where a rule has no base.
- **Non-floating tensors** (counters such as BatchNorm's ``num_batches_tracked``, masks, position
  ids) have no mean. They are taken unchanged from the last model.
- **Inputs are never modified**, and no result shares memory with an input.
- **Errors** are `ValueError`: names, shapes or kinds that do not match, a number outside its range,
  NaN or infinity in an input, and results that are not finite in the dtype of the result.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from stockpot.arithmetic import is_finite, lerp
from stockpot.merging._validation import (
    Weights,
    check_number,
    refuse,
    validate,
    validate_fishers,
)

__all__ = ["Weights", "fisher", "linear", "task_arithmetic", "ties", "wise_ft"]

# Dividing by a sum of weights that cancel to less than this share of their size multiplies the
# rounding error of float32 until nothing is left of the mean.
_SMALLEST_TOTAL = 1e-6


def linear(
    models: Sequence[Weights],
    weights: Sequence[float] | None = None,
    normalize: bool = True,
) -> dict[str, torch.Tensor]:
    """Weighted mean of models; by default the uniform soup.

    theta = sum_i w_i theta_i / sum_i w_i, or without the division if `normalize` is False.

    Model soups: averaging weights of multiple fine-tuned models improves accuracy without
    increasing inference time (Wortsman et al., 2022).

    Args:
        models: one or more models.
        weights: one number per model, 1 each by default. Negative weights extrapolate.
        normalize: divide by the sum of the weights. If False, the weights are used as they are:
            without `weights`, the result is the plain sum of the models.

    Returns:
        The merged model, with the names, shapes and dtypes of the first model.

    Raises:
        ValueError: see the module; also if `normalize` and the weights sum to (almost) 0.
    """
    shares = validate(models, weights=weights)
    if normalize:
        total = math.fsum(shares)
        if abs(total) <= _SMALLEST_TOTAL * math.fsum(map(abs, shares)):
            refuse("weights", f"{shares} sum to {total:g}", "normalize needs a sum away from 0")
        shares = [share / total for share in shares]

    def mean(name: str) -> torch.Tensor:
        thetas = _widened([model[name] for model in models])
        result = next(thetas) * shares[0]
        for theta, share in zip(thetas, shares[1:], strict=True):
            result.add_(theta, alpha=share)
        return result

    return _merge(mean, like=models[0], last=models[-1])


def wise_ft(base: Weights, model: Weights, beta: float) -> dict[str, torch.Tensor]:
    """Interpolate between a base and a model fine-tuned from it.

    theta = beta * theta_base + (1 - beta) * theta_model. `beta` is the share of the base, as in
    Sequential Fine-tuning with Averaging; the alpha of WiSE-FT is 1 - beta.

    Robust fine-tuning of zero-shot models (Wortsman et al., 2022).

    Args:
        base: the model before fine-tuning.
        model: the fine-tuned model.
        beta: share of the base, from 0 (the model, bit for bit) to 1 (the base, bit for bit). Bit
            for bit holds for floating tensors if both have the same dtype.

    Returns:
        The merged model, with the names, shapes and dtypes of the base.

    Raises:
        ValueError: see the module; also if `beta` is outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        refuse("beta", f"{beta} is outside [0, 1]", "it is the share of the base")
    validate([model], base=base, label="model")

    def interpolate(name: str) -> torch.Tensor:
        start, end = _widened([base[name], model[name]])
        return lerp(end, start, beta)

    return _merge(interpolate, like=base, last=model)


def task_arithmetic(
    base: Weights,
    models: Sequence[Weights],
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
) -> dict[str, torch.Tensor]:
    """Add task vectors to the base.

    theta = theta_base + scale * sum_i w_i (theta_i - theta_base). A negative weight forgets a task.

    Editing models with task arithmetic (Ilharco et al., 2023), where `scale` is chosen on
    validation data; 0.3 to 0.4 is typical for sums of several task vectors.

    Args:
        base: the model that all models were fine-tuned from.
        models: one or more fine-tuned models.
        scale: lambda of the paper, the factor of the sum.
        weights: one number per model, 1 each by default; not normalised.

    Returns:
        The merged model, with the names, shapes and dtypes of the base.

    Raises:
        ValueError: see the module; also if `scale` is not finite.
    """
    check_number("scale", scale)
    shares = validate(models, base=base, weights=weights)

    def add_task_vectors(name: str) -> torch.Tensor:
        thetas = _widened([base[name], *(model[name] for model in models)])
        start = next(thetas)
        task_vector = torch.zeros_like(start)
        for theta, share in zip(thetas, shares, strict=True):
            task_vector.add_(theta - start, alpha=share)
        return start.add(task_vector, alpha=scale)

    return _merge(add_task_vectors, like=base, last=models[-1])


def ties(
    base: Weights,
    models: Sequence[Weights],
    density: float = 0.2,
    scale: float = 1.0,
    per_tensor: bool = False,
) -> dict[str, torch.Tensor]:
    """Trim task vectors, elect a sign per coordinate, and average those that agree with it.

    With task vectors delta_i = theta_i - theta_base over the D floating coordinates of the model:

    1. Trim: per model, keep |delta| >= the k-th smallest |delta|, k = D - int(D * density). This
       keeps int(D * density) + 1 entries and all that equal the smallest of them; the rest becomes
       0. density = 1 keeps all. int() truncates: density 0.29 of D = 100 counts as 28.
    2. Elect: s = sign(sum_i delta_i) per coordinate. Coordinates whose sum is exactly 0 take the
       majority sign, the sign of the sum of s over all coordinates of the model.
    3. Disjoint mean: tau = mean of the entries of sign s, divided by their count (0 if there are
       none). If the majority sign is 0 too, negative entries are averaged.

    theta = theta_base + scale * tau.

    TIES-Merging: resolving interference when merging models (Yadav et al., 2023), including the
    details of the authors' implementation that the paper leaves open (the counts above, ties, zero
    sums). The paper trims over the whole model; other libraries trim within each tensor, which is a
    different method: tensors that fine-tuning moved little keep little in the former.

    Args:
        base: the model that all models were fine-tuned from.
        models: one or more fine-tuned models.
        density: the share of entries to keep, in (0, 1].
        scale: lambda of the paper, 1 in its recipe without validation data.
        per_tensor: trim within each tensor, with D its number of elements. The majority sign
            remains that of the whole model: only step 1 changes.

    Returns:
        The merged model, with the names, shapes and dtypes of the base.

    Raises:
        ValueError: see the module; also if `density` is outside (0, 1] or `scale` is not finite.
    """
    if not 0.0 < density <= 1.0:
        refuse("density", f"{density} is outside (0, 1]", "20 % is written 0.2")
    check_number("scale", scale)
    validate(models, base=base)
    sizes = {name: tensor.numel() for name, tensor in base.items() if tensor.is_floating_point()}
    # A threshold compares magnitudes across tensors, so that one dtype serves the whole model.
    dtype = _accumulation_dtype(tensor for model in [base, *models] for tensor in model.values())

    # Task vectors are computed anew in each step: cheaper than keeping a copy of every model.
    task_vectors = [functools.partial(_task_vector, base, model, dtype) for model in models]
    thresholds = [_trim_thresholds(vector, sizes, density, per_tensor) for vector in task_vectors]
    trimmed = functools.partial(_trimmed, task_vectors, thresholds)
    signs = _elect_signs(sizes, trimmed)

    def add_disjoint_mean(name: str) -> torch.Tensor:
        (start,) = _widened([base[name]], dtype)
        return start.add(_disjoint_mean(trimmed(name), signs[name]), alpha=scale)

    return _merge(add_disjoint_mean, like=base, last=models[-1])


def fisher(
    models: Sequence[Weights],
    fishers: Sequence[Weights],
    weights: Sequence[float] | None = None,
    floor: float = 1e-6,
    normalize: bool = False,
) -> dict[str, torch.Tensor]:
    """Average models coordinate by coordinate, weighted by their diagonal Fisher information.

    theta = sum_i w_i max(F_i, floor) theta_i / sum_i w_i max(F_i, floor), elementwise.

    Merging models with Fisher-weighted averaging (Matena & Raffel, 2022); for two models, eq. 15 of
    Soup to go. As in the authors' implementation, `normalize` divides w_i by the L2 norm of F_i
    over the whole model, and each sees F_i as given: the norm is that of F_i before the floor, and
    the floor applies to F_i before the division. Two defaults differ from theirs: every model gets
    the floor (theirs: only the first), and `normalize` is False (theirs: True).

    Args:
        models: one or more models.
        fishers: per model its Fisher information, with a tensor for each floating tensor of the
            model, of the same shape, without negative values.
        weights: one non-negative number per model, 1 each by default; only their ratios matter.
        floor: the smallest Fisher value, which decides where a value is 0. Coordinates where all
            values are below it become the weighted mean.
        normalize: weigh models as if their Fisher information had the same norm.

    Returns:
        The merged model, with the names, shapes and dtypes of the first model.

    Raises:
        ValueError: see the module; also if Fisher values are missing or negative, if `weights` are
            negative or all 0, if `floor` is negative, or if it is 0 where all Fisher values are.
    """
    check_number("floor", floor)
    if floor < 0.0:
        refuse("floor", f"{floor} is negative", "it is 0 or a small number such as 1e-6")
    shares = validate(models, weights=weights)
    if min(shares) < 0.0 or max(shares) == 0.0:
        refuse("weights", f"{shares} are negative or all 0", "give each model a share above 0")
    validate_fishers(fishers, models)
    if normalize:
        names = [name for name, tensor in models[0].items() if tensor.is_floating_point()]
        norms = [_norm(values, names, f"fishers[{i}]") for i, values in enumerate(fishers)]
        shares = [share / norm for share, norm in zip(shares, norms, strict=True)]

    def weighted_mean(name: str) -> torch.Tensor:
        thetas = _widened([model[name] for model in models])
        device = models[0][name].device
        precisions = _widened([values[name].to(device) for values in fishers])
        numerator = denominator = torch.zeros((), device=device)
        for theta, precision, share in zip(thetas, precisions, shares, strict=True):
            weight = precision.clamp(min=floor).mul_(share)
            numerator = numerator + weight * theta
            denominator = denominator + weight
        if not denominator.all():
            refuse(f"tensor {name!r}", "all Fisher values of a coordinate are 0", "raise floor")
        return numerator / denominator

    return _merge(weighted_mean, like=models[0], last=models[-1])


def _merge(
    rule: Callable[[str], torch.Tensor], *, like: Weights, last: Weights
) -> dict[str, torch.Tensor]:
    """Apply `rule` to each floating tensor, rounding once to `like`; copy others from `last`."""
    merged = {}
    for name, reference in like.items():
        if not reference.is_floating_point():
            merged[name] = last[name].detach().to(reference.device, copy=True)
            continue
        # A copy even where the dtype stays: a rule may return one of its inputs.
        result = rule(name).to(reference.dtype, copy=True)
        if not is_finite(result):
            refuse(
                f"tensor {name!r}",
                f"the merged values overflow {reference.dtype}",
                "lower the scale or the weights, or merge in a wider dtype",
            )
        merged[name] = result
    return merged


def _accumulation_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """float32, or float64 if one of the tensors is."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _widened(
    tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None
) -> Iterator[torch.Tensor]:
    """Tensors in the dtype to accumulate in, on the device of the first, one at a time.

    They may be the inputs themselves: never write to them.
    """
    dtype = dtype or _accumulation_dtype(tensors)
    for tensor in tensors:
        yield tensor.detach().to(tensors[0].device, dtype)


def _task_vector(base: Weights, model: Weights, dtype: torch.dtype, name: str) -> torch.Tensor:
    """theta_model - theta_base."""
    start, theta = _widened([base[name], model[name]], dtype)
    return theta - start


def _trimmed(
    task_vectors: Sequence[Callable[[str], torch.Tensor]],
    thresholds: Sequence[Mapping[str, float]],
    name: str,
) -> Iterator[torch.Tensor]:
    """The task vector of each model, its small entries 0."""
    for task_vector, threshold in zip(task_vectors, thresholds, strict=True):
        delta = task_vector(name)
        yield delta.masked_fill_(delta.abs() < threshold[name], 0.0)


def _trim_thresholds(
    task_vector: Callable[[str], torch.Tensor],
    sizes: Mapping[str, int],
    density: float,
    per_tensor: bool,
) -> dict[str, float]:
    """The smallest |delta| that is kept, by the name of the tensor; 0 keeps all."""
    thresholds = {}
    for scope in [[name] for name in sizes] if per_tensor else [list(sizes)]:
        size = sum(sizes[name] for name in scope)
        k = size - int(size * density)
        # A new iterator for each pass of the selection: one task vector in memory at a time.
        vectors = functools.partial(map, task_vector, scope)
        threshold = _kth_smallest_magnitude(vectors, k) if k else 0.0
        thresholds.update(dict.fromkeys(scope, threshold))
    return thresholds


def _kth_smallest_magnitude(vectors: Callable[[], Iterable[torch.Tensor]], k: int) -> float:
    """The k-th smallest magnitude (k from 1) of all entries of tensors of one dtype.

    Selects by radix, 16 bits at a time from the top: the bits of non-negative IEEE 754 numbers,
    read as integers, have the order of the numbers. `vectors` is called two times for float32,
    four times for float64, and memory stays that of the largest tensor, where sorting would need
    several times that of the model.
    """
    floating, integer, prefix = torch.float32, torch.int32, 0
    if next(iter(vectors())).dtype == torch.float64:
        floating, integer = torch.float64, torch.int64
    highest = 8 * floating.itemsize - 16
    for shift in range(highest, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for vector in vectors():
            bits = vector.abs().view(integer).flatten()
            if shift < highest:
                bits = bits[(bits >> (shift + 16)) == prefix]
            counts += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16).cpu()
        up_to = counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, k))
        k -= int(up_to[digit] - counts[digit])
        prefix = (prefix << 16) | digit
    return float(torch.tensor(prefix, dtype=integer).view(floating))


def _elect_signs(
    names: Iterable[str], trimmed: Callable[[str], Iterable[torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The sign of the summed task vectors; where the sum is 0, that of the model's majority."""
    # int8: the one thing kept for the whole model, since the majority is known only at the end.
    signs = {
        name: functools.reduce(operator.add, trimmed(name)).sign().to(torch.int8) for name in names
    }
    balance = sum(int(sign.sum(dtype=torch.int64)) for sign in signs.values())
    majority = (balance > 0) - (balance < 0)
    return {name: sign.masked_fill_(sign == 0, majority) for name, sign in signs.items()}


def _disjoint_mean(deltas: Iterable[torch.Tensor], sign: torch.Tensor) -> torch.Tensor:
    """Mean over the entries of the elected sign; 0 where there are none."""
    total = torch.zeros((), device=sign.device)
    count = torch.zeros((), device=sign.device)
    for delta in deltas:
        agrees = torch.where(sign > 0, delta > 0, delta < 0)
        total = total + delta.masked_fill(~agrees, 0.0)
        count = count + agrees
    return total / count.clamp(min=1)


def _norm(values: Weights, names: Sequence[str], label: str) -> float:
    """L2 norm over the named tensors together."""
    norm = math.hypot(
        *(float(torch.linalg.vector_norm(values[name], dtype=torch.float64)) for name in names)
    )
    if norm == 0.0:
        refuse(label, "all values are 0, so that it has no norm", "pass normalize=False")
    return norm
