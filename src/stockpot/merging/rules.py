"""Merging rules as pure functions of models in memory.

What all rules have in common:

- **Models** are mappings from names to tensors. All models of one call have the same names, and
  tensors of one name have the same shape. Tied weights are merged once if they are given once.
- **Precision.** Sums are accumulated in float32, or in float64 where an input holds float64, and
  rounded once, to the dtype of the base, or of the first model where a rule has no base.
- **Non-floating tensors** (counters such as BatchNorm's ``num_batches_tracked``, masks, position
  ids) have no mean. They are taken unchanged from the last model.
- **Inputs are never modified**, and no result shares memory with an input.
- **Errors** are `ValueError`: names, shapes or kinds that do not match, a number outside its range,
  NaN or infinity in an input, and results that are not finite in the dtype of the result.

The formulas are in `stockpot.merging.formulas`; `stockpot.merging.on_disk` applies the same ones to
checkpoints on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from stockpot.merging import formulas
from stockpot.merging._validation import (
    Weights,
    check_number,
    check_share,
    refuse,
    validate,
    validate_fishers,
)
from stockpot.merging.in_memory import apply

__all__ = [
    "Weights",
    "breadcrumbs",
    "dare",
    "fisher",
    "linear",
    "lines",
    "magmax",
    "model_stock",
    "slerp",
    "task_arithmetic",
    "ties",
    "wise_ft",
]


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
        shares.check_totals()
    return apply(formulas.Linear(shares, normalize), models)


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
    return apply(formulas.WiseFT(beta), [model], base)


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

    return apply(formulas.TaskArithmetic(shares, scale), models, base)


def ties(
    base: Weights,
    models: Sequence[Weights],
    density: float = 0.2,
    scale: float = 1.0,
    per_tensor: bool = False,
    weights: Sequence[float] | None = None,
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
        weights: one number above 0 per model, 1 each by default. Task vectors are multiplied by
            them between steps 1 and 2, and the mean of step 3 is divided by the sum of the weights
            of those that agree, so that only their ratios matter.

    Returns:
        The merged model, with the names, shapes and dtypes of the base.

    Raises:
        ValueError: see the module; also if `density` is outside (0, 1] or `scale` is not finite.
    """
    if not 0.0 < density <= 1.0:
        refuse("density", f"{density} is outside (0, 1]", "20 % is written 0.2")
    check_number("scale", scale)
    shares = validate(models, base=base, weights=weights)
    shares.check_positive()
    rule = formulas.Ties(shares, density, scale, passes_over_whole_model=not per_tensor)
    return apply(rule, models, base)


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
    if min(shares.default) < 0.0 or max(shares.default) == 0.0:
        reason = f"{list(shares.default)} are negative or all 0"
        refuse("weights", reason, "give each model a share above 0")
    validate_fishers(fishers, models)
    return apply(formulas.Fisher(shares, floor, normalize), models, fishers=fishers)


def slerp(first: Weights, second: Weights, t: float) -> dict[str, torch.Tensor]:
    """Interpolate along the arc between two models, each tensor taken as one vector.

    theta = sin((1-t) W)/sin(W) theta_first + sin(t W)/sin(W) theta_second, where cos(W) is the
    cosine of the two tensors. Their norms are not equalised first. Tensors that are parallel
    (cosine beyond 0.9995) or 0 are interpolated linearly.

    Animating rotation with quaternion curves (Shoemake, 1985).

    Args:
        first: the model at t = 0.
        second: the model at t = 1.
        t: share of the second model's direction, in [0, 1].

    Returns:
        The merged model, with the names, shapes and dtypes of the first.

    Raises:
        ValueError: see the module; also if `t` is outside [0, 1].
    """
    check_share("t", t)
    validate([first, second])
    return apply(formulas.Slerp(t), [first, second])


def dare(
    base: Weights,
    models: Sequence[Weights],
    drop_rate: float = 0.9,
    scale: float = 1.0,
    combine: Literal["linear", "ties"] = "linear",
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    seed: int = 0,
    labels: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Drop entries of task vectors at random, divide the others by 1 - p, and merge.

    delta_i = (theta_i - theta_base) * m / (1 - p), m = 1 with probability 1 - p, else 0: the
    expectation stays. Then ``linear``: theta = theta_base + scale * sum_i w_i delta_i / sum_i w_i;
    or ``ties``: sign election and disjoint mean as in `ties`, the drop in place of its trim.

    Language models are super mario: absorbing abilities from homologous models as a free lunch (Yu
    et al., 2024), which divides by 1 - p; mergekit rescales to the L1 norm from before the drop.

    Args:
        base: the model that all models were fine-tuned from.
        models: one or more fine-tuned models.
        drop_rate: p, in [0, 1).
        scale: factor of the merged task vector.
        combine: how task vectors are merged.
        weights: one number per model, 1 each by default.
        normalize: divide by the sum of the weights (``linear`` only; ``ties`` always does, by the
            sum over those that agree).
        seed: with a model's label and a tensor's name, the key of its draws: they depend on
            nothing else.
        labels: per model the name in that key; by default its number.

    Returns:
        The merged model, with the names, shapes and dtypes of the base.

    Raises:
        ValueError: see the module; also if `drop_rate` is outside [0, 1).
    """
    if not 0.0 <= drop_rate < 1.0:
        refuse("drop_rate", f"{drop_rate} is outside [0, 1)", "to drop 90 % is written 0.9")
    check_number("scale", scale)
    shares = validate(models, base=base, weights=weights)
    if combine == "ties":
        shares.check_positive()
    elif normalize:
        shares.check_one_sign()
    names = tuple(labels) if labels is not None else tuple(map(str, range(len(models))))
    rule = formulas.Dare(shares, drop_rate, scale, combine, normalize, seed, names)
    return apply(rule, models, base)


def magmax(
    base: Weights,
    models: Sequence[Weights],
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
) -> dict[str, torch.Tensor]:
    """Per coordinate, add the task vector's entry of largest magnitude.

    theta = theta_base + scale * w_j delta_j, j = argmax_i |w_i delta_i|; of equals the positive.

    MagMax: leveraging model merging for seamless continual learning (Marczak et al., 2024).

    Args:
        base: the model that all models were fine-tuned from.
        models: one or more fine-tuned models.
        scale: factor of the merged task vector.
        weights: factors of the task vectors, 1 each by default.

    Returns:
        The merged model, with the names, shapes and dtypes of the base.

    Raises:
        ValueError: see the module.
    """
    check_number("scale", scale)
    shares = validate(models, base=base, weights=weights)
    return apply(formulas.MagMax(shares, scale), models, base)


def model_stock(base: Weights, models: Sequence[Weights]) -> dict[str, torch.Tensor]:
    """Between the base and the mean of the models, per tensor, at the place their angles tell.

    theta = t mean_i theta_i + (1-t) theta_base with t = N cos / (1 + (N-1) cos), where cos is the
    mean cosine of all pairs of task vectors of the tensor; 0 where it is negative.

    Model Stock: all we need is just a few fine-tuned models (Jang et al., 2024).

    Args:
        base: the model that all models were fine-tuned from.
        models: two or more fine-tuned models.

    Returns:
        The merged model, with the names, shapes and dtypes of the base.

    Raises:
        ValueError: see the module; also if there is only one model.
    """
    validate(models, base=base)
    if len(models) < 2:
        refuse("models", "is one model, which has no angle to another", "give two or more")
    return apply(formulas.ModelStock(), models, base)


def breadcrumbs(
    base: Weights,
    models: Sequence[Weights],
    density: float = 0.9,
    gamma: float = 0.01,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
) -> dict[str, torch.Tensor]:
    """Task arithmetic without the largest and the smallest changes of each tensor.

    Per model and tensor of n elements, the int(gamma n) entries of largest |delta| become 0, and of
    the others all but the round(density n) largest; entries that equal the smallest or the largest
    of those kept are kept too. theta = theta_base + scale * sum_i w_i delta_i.

    Model Breadcrumbs: scaling multi-task model merging with sparse masks (Davari & Belilovsky,
    2024).

    Args:
        base: the model that all models were fine-tuned from.
        models: one or more fine-tuned models.
        density: share of the entries that are kept.
        gamma: share that are dropped as outliers.
        scale: factor of the sum.
        weights: factors of the task vectors, 1 each by default.

    Returns:
        The merged model, with the names, shapes and dtypes of the base.

    Raises:
        ValueError: see the module; also if `density` or `gamma` is outside [0, 1], or their sum is.
    """
    check_share("density", density)
    check_share("gamma", gamma)
    if density + gamma > 1.0:
        refuse("density", f"{density} and gamma {gamma} exceed 1", "what is dropped is not kept")
    check_number("scale", scale)
    shares = validate(models, base=base, weights=weights)
    return apply(formulas.Breadcrumbs(shares, density, gamma, scale), models, base)


def lines(
    base: Weights,
    models: Sequence[Weights],
    alpha: float = 0.5,
    beta: float = 0.5,
    weights: Sequence[float] | None = None,
) -> dict[str, torch.Tensor]:
    """Task arithmetic whose scale grows linearly with depth.

    theta = theta_base + (alpha + beta l/(L-1)) sum_i w_i delta_i for a tensor of layer l = 0..L-1.
    Shallow layers, which hold what tasks share, move less. The first number in a tensor's name is
    its layer. Without a number, embeddings belong to the first layer, all else to the last.

    LiNeS: post-training layer scaling prevents forgetting and enhances model merging (Wang et al.,
    2024).

    Args:
        base: the model that all models were fine-tuned from.
        models: one or more fine-tuned models.
        alpha: scale of the first layer.
        beta: how much more the last layer has.
        weights: factors of the task vectors, 1 each by default.

    Returns:
        The merged model, with the names, shapes and dtypes of the base.

    Raises:
        ValueError: see the module.
    """
    check_number("alpha", alpha)
    check_number("beta", beta)
    shares = validate(models, base=base, weights=weights)
    rule = formulas.Lines(shares, alpha=alpha, beta=beta, names=tuple(base))
    return apply(rule, models, base)
