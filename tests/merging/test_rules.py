"""The merging rules against their formulas, written out in float64, and against known numbers."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.merging import Weights, fisher, linear, task_arithmetic, ties, wise_ft

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

Arrays: TypeAlias = dict[str, np.ndarray]
Model: TypeAlias = dict[str, torch.Tensor]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)
shape_lists = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=4)
quick = settings(max_examples=30, deadline=None)


# Models to merge.


def normal_models(
    seed: int, count: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> list[Model]:
    rng = np.random.default_rng(seed)
    return [
        {f"t{i}": torch.tensor(rng.normal(size=shape)).to(dtype) for i, shape in enumerate(shapes)}
        for _ in range(count)
    ]


def grid_models(
    seed: int, count: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, steps: int = 8
) -> list[Model]:
    """Small multiples of 1/8: differences and sums are exact in every dtype, and often equal."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(rng.integers(-steps, steps + 1, size=shape) / 8.0).to(dtype)

    return [{f"t{i}": draw(shape) for i, shape in enumerate(shapes)} for _ in range(count)]


def fisher_models(
    seed: int, count: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> list[Model]:
    squares = normal_models(seed, count, shapes, dtype)
    return [{name: tensor.square() for name, tensor in model.items()} for model in squares]


def tensors(**values: object) -> Model:
    return {name: torch.tensor(value) for name, value in values.items()}


# The oracle: the formulas in float64 numpy.


def arrays(model: Weights) -> Arrays:
    return {name: tensor.double().numpy() for name, tensor in model.items()}


def oracle_linear(models: Sequence[Weights], weights: Sequence[float], normalize: bool) -> Arrays:
    total = sum(weights) if normalize else 1.0
    thetas = [arrays(model) for model in models]
    return {
        name: np.asarray(sum(w * m[name] for w, m in zip(weights, thetas, strict=True)) / total)
        for name in thetas[0]
    }


def oracle_wise_ft(base: Weights, model: Weights, beta: float) -> Arrays:
    start, end = arrays(base), arrays(model)
    return {name: beta * start[name] + (1 - beta) * end[name] for name in start}


def oracle_task_arithmetic(
    base: Weights, models: Sequence[Weights], scale: float, weights: Sequence[float]
) -> Arrays:
    start, thetas = arrays(base), [arrays(model) for model in models]
    return {
        name: start[name]
        + scale * sum(w * (m[name] - start[name]) for w, m in zip(weights, thetas, strict=True))
        for name in start
    }


def oracle_trim(delta: np.ndarray, density: float) -> np.ndarray:
    k = delta.size - int(delta.size * density)
    if k == 0:
        return delta
    threshold = np.sort(np.abs(delta))[k - 1]
    return np.where(np.abs(delta) >= threshold, delta, 0.0)


def oracle_ties(
    base: Weights, models: Sequence[Weights], density: float, scale: float, per_tensor: bool
) -> Arrays:
    """One vector per model, as the authors do it."""
    start = arrays(base)
    names = list(start)
    ends = np.cumsum([start[name].size for name in names])[:-1]
    vectors = []
    for model in map(arrays, models):
        vector = np.concatenate([(model[name] - start[name]).ravel() for name in names])
        parts = np.split(vector, ends) if per_tensor else [vector]
        vectors.append(np.concatenate([oracle_trim(part, density) for part in parts]))
    deltas = np.stack(vectors)
    signs = np.sign(deltas.sum(axis=0))
    signs[signs == 0] = np.sign(signs.sum())
    selected = np.where(np.where(signs > 0, deltas > 0, deltas < 0), deltas, 0.0)
    mean = selected.sum(axis=0) / np.maximum((selected != 0).sum(axis=0), 1)
    return {
        name: start[name] + scale * part.reshape(start[name].shape)
        for name, part in zip(names, np.split(mean, ends), strict=True)
    }


def oracle_fisher(
    models: Sequence[Weights],
    fishers: Sequence[Weights],
    weights: Sequence[float],
    floor: float,
    normalize: bool,
) -> Arrays:
    thetas, precisions = [arrays(m) for m in models], [arrays(f) for f in fishers]
    norms = [math.sqrt(sum(float((v**2).sum()) for v in f.values())) for f in precisions]
    shares = [w / n if normalize else w for w, n in zip(weights, norms, strict=True)]
    merged = {}
    for name in thetas[0]:
        ws = [s * np.maximum(f[name], floor) for s, f in zip(shares, precisions, strict=True)]
        weighted = sum(w * m[name] for w, m in zip(ws, thetas, strict=True))
        merged[name] = np.asarray(weighted / sum(ws))
    return merged


def assert_rounded_once(
    merged: Weights, expected: Mapping[str, np.ndarray], dtype: torch.dtype, size: float = 8.0
) -> None:
    """`merged` is `expected` but for half a unit of `dtype` and float32 sums of terms up to `size`.

    `size` is the scale that float32 errors are relative to: cancellation may leave less.
    """
    assert list(merged) == list(expected)
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        assert tensor.shape == expected[name].shape
        error = np.abs(tensor.double().numpy() - expected[name])
        half_unit = 0.5 * torch.finfo(dtype).eps * np.abs(expected[name])
        float32_sum = 8 * torch.finfo(torch.float32).eps * size
        assert np.all(error <= 1.01 * half_unit + float32_sum), name


def assert_same_bits(merged: Weights, expected: Weights) -> None:
    assert list(merged) == list(expected)
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype
        bits = BITS[tensor.dtype]
        assert torch.equal(merged[name].view(bits), tensor.view(bits)), name


def assert_close(merged: Weights, expected: Weights) -> None:
    torch.testing.assert_close(dict(merged), dict(expected), rtol=2e-6, atol=2e-6)


# Every rule equals its formula.


@quick
@given(seeds, shape_lists, dtypes, st.integers(1, 4), st.booleans())
def test_linear_equals_formula(
    seed: int, shapes: list[tuple[int, ...]], dtype: torch.dtype, count: int, normalize: bool
) -> None:
    models = normal_models(seed, count, shapes, dtype)
    weights = list(np.random.default_rng(seed).uniform(0.1, 2.0, size=count))
    merged = linear(models, weights, normalize)
    assert_rounded_once(merged, oracle_linear(models, weights, normalize), dtype, size=32)


@quick
@given(seeds, shape_lists, dtypes, st.floats(0, 1))
def test_wise_ft_equals_formula(
    seed: int, shapes: list[tuple[int, ...]], dtype: torch.dtype, beta: float
) -> None:
    base, model = normal_models(seed, 2, shapes, dtype)
    assert_rounded_once(wise_ft(base, model, beta), oracle_wise_ft(base, model, beta), dtype)


@quick
@given(seeds, shape_lists, dtypes, st.integers(1, 4), st.floats(-2, 2))
def test_task_arithmetic_equals_formula(
    seed: int, shapes: list[tuple[int, ...]], dtype: torch.dtype, count: int, scale: float
) -> None:
    base, *models = normal_models(seed, count + 1, shapes, dtype)
    weights = list(np.random.default_rng(seed).uniform(-1.0, 1.0, size=count))
    merged = task_arithmetic(base, models, scale, weights)
    expected = oracle_task_arithmetic(base, models, scale, weights)
    assert_rounded_once(merged, expected, dtype, size=64)


@settings(max_examples=100, deadline=None)
@given(
    seeds,
    shape_lists,
    dtypes,
    st.integers(1, 4),
    st.floats(0.01, 1),
    st.floats(-2, 2),
    st.booleans(),
)
def test_ties_equals_formula(
    seed: int,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    count: int,
    density: float,
    scale: float,
    per_tensor: bool,
) -> None:
    # Few values, so that equal magnitudes and sums of exactly 0 are common.
    base, *models = grid_models(seed, count + 1, shapes, dtype)
    merged = ties(base, models, density, scale, per_tensor)
    expected = oracle_ties(base, models, density, scale, per_tensor)
    assert_rounded_once(merged, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_ties_equals_formula_on_larger_models(dtype: torch.dtype, per_tensor: bool) -> None:
    shapes = [(300, 100), (1,), (7, 11, 13), (2048,)]
    models = normal_models(0, 3, shapes, dtype)
    base = {name: torch.zeros_like(tensor) for name, tensor in models[0].items()}
    for model in models:
        model["t2"] *= 1e-3
    merged = ties(base, models, 0.2, per_tensor=per_tensor)
    assert_rounded_once(merged, oracle_ties(base, models, 0.2, 1.0, per_tensor), dtype)


@quick
@given(seeds, shape_lists, dtypes, st.integers(1, 4), st.sampled_from([1e-6, 0.5]), st.booleans())
def test_fisher_equals_formula(
    seed: int,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    count: int,
    floor: float,
    normalize: bool,
) -> None:
    models = normal_models(seed, count, shapes, dtype)
    fishers = fisher_models(seed + 1, count, shapes, torch.float32)
    weights = list(np.random.default_rng(seed).uniform(0.1, 2.0, size=count))
    merged = fisher(models, fishers, weights, floor, normalize)
    expected = oracle_fisher(models, fishers, weights, floor, normalize)
    assert_rounded_once(merged, expected, dtype)


# A model merged with itself is itself.


@quick
@given(seeds, shape_lists, dtypes, st.integers(1, 4), st.floats(0, 1), st.floats(-2, 2))
def test_model_merged_with_itself_is_itself(
    seed: int,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    count: int,
    beta: float,
    scale: float,
) -> None:
    (model,) = normal_models(seed, 1, shapes, dtype)
    fishers = fisher_models(seed, count, shapes, torch.float32)
    copies = [model] * count
    for merged in (linear(copies), fisher(copies, fishers, normalize=True)):
        assert_rounded_once(merged, arrays(model), dtype)
    for merged in (
        linear([model]),
        wise_ft(model, model, beta),
        task_arithmetic(model, copies, scale),
        ties(model, copies, scale=scale),
    ):
        assert_same_bits(merged, model)


# The order of the models changes nothing but rounding.


@quick
@given(seeds, shape_lists, st.permutations(range(4)))
def test_order_of_models_is_irrelevant(
    seed: int, shapes: list[tuple[int, ...]], order: list[int]
) -> None:
    # Exact sums: a vote of TIES that is 0 in one order is 0 in the other.
    base, *models = grid_models(seed, 5, shapes, torch.float32)
    fishers = fisher_models(seed, 4, shapes, torch.float32)
    weights = [0.1, 0.2, 0.3, 0.7]
    shuffled = [models[i] for i in order]
    shuffled_fishers = [fishers[i] for i in order]
    shuffled_weights = [weights[i] for i in order]

    assert_close(linear(shuffled, shuffled_weights), linear(models, weights))
    assert_close(
        task_arithmetic(base, shuffled, 0.4, shuffled_weights),
        task_arithmetic(base, models, 0.4, weights),
    )
    assert_close(ties(base, shuffled), ties(base, models))
    assert_close(
        fisher(shuffled, shuffled_fishers, shuffled_weights), fisher(models, fishers, weights)
    )


# Linear.


def test_linear_defaults_to_the_uniform_soup() -> None:
    models = [tensors(w=[1.0, 2.0]), tensors(w=[3.0, 8.0])]
    assert linear(models)["w"].tolist() == [2.0, 5.0]


def test_linear_without_normalization_uses_weights_as_they_are() -> None:
    models = [tensors(w=[1.0, 2.0]), tensors(w=[3.0, 8.0])]
    assert linear(models, [0.5, 2.0], normalize=False)["w"].tolist() == [6.5, 17.0]
    assert linear(models, normalize=False)["w"].tolist() == [4.0, 10.0]


@quick
@given(seeds, shape_lists, st.floats(0.01, 100))
def test_linear_normalized_depends_on_ratios_of_weights_only(
    seed: int, shapes: list[tuple[int, ...]], factor: float
) -> None:
    models = normal_models(seed, 3, shapes, torch.float32)
    scaled = [factor * weight for weight in (1.0, 2.0, 3.0)]
    assert_close(linear(models, scaled), linear(models, [1.0, 2.0, 3.0]))


def test_linear_extrapolates_with_negative_weights() -> None:
    models = [tensors(w=[1.0]), tensors(w=[3.0])]
    assert linear(models, [-1.0, 2.0])["w"].tolist() == [5.0]


# WiSE-FT.


@quick
@given(seeds, shape_lists, dtypes)
def test_wise_ft_ends_are_bit_exact(
    seed: int, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    base, model = normal_models(seed, 2, [*shapes, (3,)], dtype)
    name = f"t{len(shapes)}"
    base[name], model[name] = (
        torch.tensor([-0.0, 1.0, torch.finfo(dtype).max]).to(dtype),
        torch.tensor([2.0, -0.0, -torch.finfo(dtype).max]).to(dtype),
    )
    assert_same_bits(wise_ft(base, model, 0.0), model)
    assert_same_bits(wise_ft(base, model, 1.0), base)


def test_wise_ft_beta_is_the_share_of_the_base() -> None:
    assert wise_ft(tensors(w=[0.0]), tensors(w=[4.0]), beta=0.75)["w"].tolist() == [1.0]


@quick
@given(seeds, shape_lists)
def test_wise_ft_at_one_half_halves_the_distance_to_the_base(
    seed: int, shapes: list[tuple[int, ...]]
) -> None:
    base, model = grid_models(seed, 2, shapes, torch.float32)
    merged = wise_ft(base, model, 0.5)
    for name, start in base.items():
        assert torch.equal(2 * (merged[name] - start), model[name] - start)


# Task arithmetic.


@quick
@given(seeds, shape_lists, dtypes)
def test_task_arithmetic_with_one_model_and_scale_1_is_the_model(
    seed: int, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    base, model = normal_models(seed, 2, shapes, dtype)
    assert_rounded_once(task_arithmetic(base, [model]), arrays(model), dtype)


def test_task_arithmetic_scale_and_weights() -> None:
    base, models = tensors(w=[1.0]), [tensors(w=[3.0]), tensors(w=[2.0])]
    assert task_arithmetic(base, models)["w"].tolist() == [4.0]
    assert task_arithmetic(base, models, scale=0.5)["w"].tolist() == [2.5]
    assert task_arithmetic(base, models, weights=[0.5, -1.0])["w"].tolist() == [1.0]
    assert task_arithmetic(base, models, scale=0.0)["w"].tolist() == [1.0]


@quick
@given(seeds, shape_lists)
def test_task_arithmetic_with_weights_that_sum_to_1_is_linear(
    seed: int, shapes: list[tuple[int, ...]]
) -> None:
    base, *models = normal_models(seed, 3, shapes, torch.float32)
    weights = [0.25, 0.75]
    assert_close(task_arithmetic(base, models, weights=weights), linear(models, weights))


# TIES.


def test_ties_trims_over_the_model_or_within_each_tensor() -> None:
    base = tensors(large=[0.0] * 4, small=[0.0] * 4)
    model = tensors(large=[7.0, -8.0, 9.0, 10.0], small=[0.125, 0.25, -0.375, 0.5])

    # D = 8, k = 8 - int(8 * 0.25) = 6: the 6th smallest magnitude is 8, and 8, 9, 10 stay.
    over_model = ties(base, [model], density=0.25)
    assert over_model["large"].tolist() == [0.0, -8.0, 9.0, 10.0]
    assert over_model["small"].tolist() == [0.0, 0.0, 0.0, 0.0]

    # D = 4, k = 4 - int(4 * 0.25) = 3: the 3rd smallest magnitude of each stays, and the largest.
    within_tensors = ties(base, [model], density=0.25, per_tensor=True)
    assert within_tensors["large"].tolist() == [0.0, 0.0, 9.0, 10.0]
    assert within_tensors["small"].tolist() == [0.0, 0.0, -0.375, 0.5]


def test_ties_averages_entries_of_the_elected_sign_by_their_count() -> None:
    base = tensors(w=[10.0, 10.0, 10.0])
    models = [
        tensors(w=[16.0, 9.0, 10.0]),
        tensors(w=[12.0, 7.0, 10.0]),
        tensors(w=[9.0, 11.0, 10.0]),
    ]
    # Deltas (6, 2, -1), (-1, -3, 1), (0, 0, 0): means of (6, 2), of (-1, -3), and of none.
    assert ties(base, models, density=1.0)["w"].tolist() == [14.0, 8.0, 10.0]
    assert ties(base, models, density=1.0, scale=0.5)["w"].tolist() == [12.0, 9.0, 10.0]


@pytest.mark.parametrize("per_tensor", [False, True])
def test_ties_gives_zero_sums_the_majority_sign_of_the_model(per_tensor: bool) -> None:
    base = tensors(a=[0.0, 0.0], b=[0.0, 0.0])
    # Sums: a (0, 4), b (4, -5); signs (0, +), (+, -): the majority is +, and 1 of (1, -1) stays.
    models = [tensors(a=[1.0, 2.0], b=[3.0, -4.0]), tensors(a=[-1.0, 2.0], b=[1.0, -1.0])]
    merged = ties(base, models, density=1.0, per_tensor=per_tensor)
    assert merged["a"].tolist() == [1.0, 2.0]
    assert merged["b"].tolist() == [2.0, -2.5]

    # The majority of the model, -, outvotes the + of the tensor.
    models = [tensors(a=[1.0, 2.0], b=[-3.0, -4.0]), tensors(a=[-1.0, 2.0], b=[-1.0, -1.0])]
    merged = ties(base, models, density=1.0, per_tensor=per_tensor)
    assert merged["a"].tolist() == [-1.0, 2.0]
    assert merged["b"].tolist() == [-2.0, -2.5]


def test_ties_without_a_majority_takes_negative_entries_where_sums_are_zero() -> None:
    base = tensors(w=[0.0, 0.0, 0.0])
    models = [tensors(w=[1.0, 2.0, -3.0]), tensors(w=[-1.0, 2.0, -3.0])]
    assert ties(base, models, density=1.0)["w"].tolist() == [-1.0, 2.0, -3.0]


def test_ties_keeps_all_entries_that_equal_the_threshold() -> None:
    base = tensors(w=[0.0] * 6)
    model = tensors(w=[1.0, 2.0, -2.0, 2.0, 3.0, 0.5])
    # k = 6 - int(6 * 0.2) = 5: the 5th smallest magnitude is 2, and all three of them stay.
    assert ties(base, [model], density=0.2)["w"].tolist() == [0.0, 2.0, -2.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("density", "kept"), [(0.001, 1), (0.1, 11), (0.29, 29), (0.5, 51), (1, 100)]
)
def test_ties_keeps_one_more_than_the_density_asks_for(density: float, kept: int) -> None:
    # int(100 * 0.29) is 28, since 0.29 is a little less than 29 / 100.
    base, model = {"w": torch.zeros(100)}, {"w": torch.arange(1.0, 101.0)}
    assert int((ties(base, [model], density)["w"] != 0).sum()) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_threshold_sees_the_last_bit(dtype: torch.dtype) -> None:
    steps = torch.arange(8, dtype=dtype)
    for size in (1e-30, 1e-3, 1.0, 1e30):
        model = {"w": size * (1 + steps * torch.finfo(dtype).eps)}
        merged = ties({"w": torch.zeros(8, dtype=dtype)}, [model], density=0.25)["w"]
        assert torch.equal(merged, model["w"] * (steps >= 5))


@quick
@given(seeds, shape_lists, st.integers(1, 3))
def test_ties_of_full_density_and_equal_signs_is_the_mean(
    seed: int, shapes: list[tuple[int, ...]], count: int
) -> None:
    base = normal_models(seed, 1, shapes, torch.float32)[0]
    steps = fisher_models(seed, count, shapes, torch.float32)
    models = [{name: base[name] + step[name] + 0.1 for name in base} for step in steps]
    assert_close(ties(base, models, density=1.0), linear(models))


# Fisher.


@quick
@given(seeds, shape_lists)
def test_fisher_eq_15_equals_eq_16(seed: int, shapes: list[tuple[int, ...]]) -> None:
    anchor, model = normal_models(seed, 2, shapes, torch.float64)
    f_o, f_t = fisher_models(seed + 1, 2, shapes, torch.float64)
    merged = fisher([anchor, model], [f_o, f_t], weights=[0.3, 0.7], floor=0.0)
    for name, tensor in merged.items():
        share = 0.3 * f_o[name] / (0.3 * f_o[name] + 0.7 * f_t[name])
        expected = (1 - share) * model[name] + share * anchor[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-13)


def test_fisher_weights_and_floor() -> None:
    models = [tensors(w=[1.0, 1.0, 1.0]), tensors(w=[5.0, 5.0, 5.0])]
    fishers = [tensors(w=[1.0, 0.0, 0.0]), tensors(w=[3.0, 0.0, 1.0])]
    assert fisher(models, fishers)["w"].tolist() == pytest.approx([4.0, 3.0, 5.0], abs=1e-5)
    # Weights 3 to 1 undo Fisher values 1 to 3, and decide alone where both are below the floor.
    merged = fisher(models, fishers, weights=[3.0, 1.0], floor=0.5)
    assert merged["w"].tolist() == pytest.approx([3.0, 2.0, (1.5 + 5.0) / 2.5])


def test_fisher_of_equal_values_is_linear() -> None:
    models = normal_models(0, 3, [(4, 3), (5,)], torch.float32)
    ones = [{name: torch.ones_like(t) for name, t in model.items()} for model in models]
    assert_close(fisher(models, ones, [1.0, 2.0, 3.0]), linear(models, [1.0, 2.0, 3.0]))


def test_fisher_normalizes_over_the_whole_model_before_the_floor() -> None:
    models = [tensors(a=[0.0], b=[0.0]), tensors(a=[1.0], b=[1.0])]
    fishers = [tensors(a=[3.0], b=[4.0]), tensors(a=[0.0], b=[10.0])]
    # Norms 5 and 10. In a: 3 / 5 against max(0, 2) / 10; in b: 4 / 5 against 10 / 10.
    merged = fisher(models, fishers, floor=2.0, normalize=True)
    assert merged["a"].tolist() == pytest.approx([0.2 / 0.8])
    assert merged["b"].tolist() == pytest.approx([1.0 / 1.8])


@quick
@given(seeds, shape_lists, st.floats(1e-3, 1e3))
def test_fisher_normalized_ignores_the_size_of_fisher_values(
    seed: int, shapes: list[tuple[int, ...]], factor: float
) -> None:
    models = normal_models(seed, 2, shapes, torch.float32)
    first, second = fisher_models(seed + 1, 2, shapes, torch.float32)
    scaled = {name: factor * tensor for name, tensor in first.items()}
    assert_close(
        fisher(models, [scaled, second], floor=0.0, normalize=True),
        fisher(models, [first, second], floor=0.0, normalize=True),
    )


def test_fisher_needs_no_values_for_integer_tensors() -> None:
    models = [tensors(w=[1.0], steps=3), tensors(w=[3.0], steps=7)]
    ones = tensors(w=[1.0])
    assert fisher(models, [ones, tensors(w=[1.0], steps=-1)])["w"].tolist() == [2.0]


# What all rules promise.

RULES: dict[str, Callable[[Weights, list[Model]], Model]] = {
    "linear": lambda base, models: linear([base, *models]),
    "wise_ft": lambda base, models: wise_ft(base, models[-1], 0.25),
    "wise_ft 0": lambda base, models: wise_ft(base, models[-1], 0.0),
    "wise_ft 1": lambda base, models: wise_ft(base, models[-1], 1.0),
    "task_arithmetic": lambda base, models: task_arithmetic(base, models, 0.4),
    "ties": lambda base, models: ties(base, models),
    "ties per tensor": lambda base, models: ties(base, models, 0.5, per_tensor=True),
    "fisher": lambda base, models: fisher(
        [base, *models],
        [{n: t.detach().float().abs() for n, t in m.items()} for m in [base, *models]],
    ),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@every_rule
def test_inputs_are_not_modified_nor_shared(
    rule: Callable[[Weights, list[Model]], Model],
) -> None:
    base, *models = normal_models(0, 3, [(4, 3), (), (0, 2)], torch.float32)
    for i, model in enumerate([base, *models]):
        model["steps"] = torch.tensor(i)
    before = copy.deepcopy([base, *models])
    merged = rule(base, models)
    for tensor in merged.values():
        tensor.add_(1)
    torch.testing.assert_close([base, *models], before, rtol=0, atol=0)


@every_rule
def test_integer_tensors_come_from_the_last_model(
    rule: Callable[[Weights, list[Model]], Model],
) -> None:
    base, *models = [
        {
            "bn.num_batches_tracked": torch.tensor(n),
            "w": torch.tensor([1.0 * n]),
            "m": torch.tensor([n > 5]),
        }
        for n in (1, 2**53 + 1, 7)
    ]
    merged = rule(base, models)
    assert merged["bn.num_batches_tracked"].dtype == torch.int64
    assert merged["bn.num_batches_tracked"].item() == 7
    assert merged["m"].tolist() == [True]
    assert list(merged) == list(base)


@every_rule
def test_models_of_integers_only_are_the_last_model(
    rule: Callable[[Weights, list[Model]], Model],
) -> None:
    assert rule(tensors(n=1), [tensors(n=2), tensors(n=3)])["n"].item() == 3


@every_rule
def test_result_has_the_dtype_of_the_first_and_float64_stays(
    rule: Callable[[Weights, list[Model]], Model],
) -> None:
    half, *_ = normal_models(0, 1, [(5,)], torch.bfloat16)
    _, *double = normal_models(0, 3, [(5,)], torch.float64)
    assert rule(half, double)["t0"].dtype == torch.bfloat16
    merged = rule(double[0], [half, double[1]])["t0"]
    assert merged.dtype == torch.float64


def test_float64_is_not_narrowed() -> None:
    base = {"w": torch.tensor([1.0], dtype=torch.float64)}
    model = {"w": torch.tensor([1.0 + 1e-12], dtype=torch.float64)}
    halfway = pytest.approx(1 + 0.5e-12, abs=1e-15)
    assert linear([base, model])["w"].item() == halfway
    assert wise_ft(base, model, 0.5)["w"].item() == halfway
    assert task_arithmetic(base, [model], 0.5)["w"].item() == halfway
    assert ties(base, [model], scale=0.5)["w"].item() == halfway
    assert fisher([base, model], [base, base])["w"].item() == halfway


@every_rule
def test_parameters_and_views_are_accepted(
    rule: Callable[[Weights, list[Model]], Model],
) -> None:
    base, *models = normal_models(0, 3, [(6, 4)], torch.float32)
    views: list[Model] = [{"t0": torch.nn.Parameter(m["t0"].T)} for m in (base, *models)]
    plain = [{"t0": m["t0"].T.contiguous()} for m in (base, *models)]
    merged = rule(views[0], views[1:])
    assert not merged["t0"].requires_grad
    torch.testing.assert_close(merged, rule(plain[0], plain[1:]))


# Errors: what, why, and what would be right.

ONE: Model = tensors(w=[1.0, 2.0])
TWO: Model = tensors(w=[3.0, 4.0])
NAN: Model = tensors(w=[math.nan, 0.0])
INF: Model = tensors(w=[0.0, -math.inf])

REFUSED: dict[str, tuple[Callable[[], object], list[str]]] = {
    "no models": (lambda: linear([]), ["models", "empty", "at least one"]),
    "one mapping": (lambda: linear(ONE), ["models", "mapping", "list"]),  # type: ignore[arg-type]
    "empty model": (lambda: linear([ONE, {}]), ["models[1]", "no tensors"]),
    "not a tensor": (
        lambda: linear([{"w": 1.0}]),  # type: ignore[dict-item]
        ["models[0]", "'w'", "float", "tensors only"],
    ),
    "missing name": (
        lambda: linear([ONE | tensors(head=[1.0]), TWO]),
        ["models[1]", "lacks 'head'", "models[0]", "same names"],
    ),
    "extra name": (
        lambda: task_arithmetic(ONE, [TWO | tensors(head=[1.0])]),
        ["models[0]", "has 'head'", "absent from base"],
    ),
    "many names": (
        lambda: linear([tensors(w=[1.0], a=1.0, b=1.0, c=1.0, d=1.0), tensors(w=[1.0])]),
        ["'a', 'b', 'c' and 1 more"],
    ),
    "shape": (
        lambda: ties(ONE, [TWO, tensors(w=[1.0])]),
        ["models[1]", "'w'", "(1,)", "(2,)", "base"],
    ),
    "shape that broadcasts": (lambda: wise_ft(ONE, tensors(w=1.0), 0.5), ["model:", "'w'", "()"]),
    "kind": (lambda: wise_ft(ONE, tensors(w=[1, 2]), 0.5), ["model:", "'w'", "int64", "float32"]),
    "complex": (lambda: linear([tensors(w=[1j])]), ["models[0]", "'w'", "complex64", "convert"]),
    "float8": (
        lambda: linear([{"w": torch.zeros(2).to(torch.float8_e4m3fn)}]),
        ["models[0]", "'w'", "float8_e4m3fn", "convert"],
    ),
    "NaN": (lambda: linear([ONE, NAN]), ["models[1]", "'w'", "NaN"]),
    "infinity": (lambda: task_arithmetic(INF, [ONE]), ["base", "'w'", "infinity"]),
    "number of weights": (lambda: linear([ONE, TWO], [1.0]), ["weights", "1 numbers", "2 models"]),
    "weight NaN": (lambda: linear([ONE, TWO], [1.0, math.nan]), ["weights[1]", "nan", "finite"]),
    "weight inf": (
        lambda: task_arithmetic(ONE, [TWO], weights=[math.inf]),
        ["weights[0]", "inf", "finite"],
    ),
    "weights of sum 0": (lambda: linear([ONE, TWO], [1.0, -1.0]), ["weights", "sum to 0"]),
    "weights all 0": (lambda: linear([ONE, TWO], [0.0, 0.0]), ["weights", "sum to 0"]),
    "beta above 1": (lambda: wise_ft(ONE, TWO, 1.1), ["beta", "1.1", "[0, 1]", "share"]),
    "beta below 0": (lambda: wise_ft(ONE, TWO, -0.1), ["beta", "-0.1"]),
    "beta NaN": (lambda: wise_ft(ONE, TWO, math.nan), ["beta", "nan"]),
    "scale": (lambda: task_arithmetic(ONE, [TWO], math.inf), ["scale", "inf", "finite"]),
    "scale beyond float32": (lambda: ties(ONE, [TWO], scale=1e300), ["scale", "float32"]),
    "density 0": (lambda: ties(ONE, [TWO], 0.0), ["density", "(0, 1]"]),
    "density in percent": (lambda: ties(ONE, [TWO], 20), ["density", "20", "0.2"]),
    "density NaN": (lambda: ties(ONE, [TWO], math.nan), ["density", "nan"]),
    "number of Fishers": (lambda: fisher([ONE, TWO], [ONE]), ["fishers", "1 entries", "2 models"]),
    "Fisher mapping": (
        lambda: fisher([ONE], ONE),  # type: ignore[arg-type]
        ["fishers", "mapping", "list"],
    ),
    "Fisher lacks": (lambda: fisher([ONE, TWO], [ONE, {}]), ["fishers[1]", "lacks 'w'"]),
    "Fisher extra": (lambda: fisher([ONE], [ONE | {"x": ONE["w"]}]), ["fishers[0]", "has 'x'"]),
    "Fisher shape": (lambda: fisher([ONE], [tensors(w=[1.0])]), ["fishers[0]", "'w'", "(1,)"]),
    "Fisher integers": (lambda: fisher([ONE], [tensors(w=[1, 2])]), ["fishers[0]", "'w'", "int64"]),
    "Fisher negative": (
        lambda: fisher([ONE, TWO], [ONE, tensors(w=[0.0, -1e-9])]),
        ["fishers[1]", "'w'", "negative"],
    ),
    "Fisher NaN": (lambda: fisher([ONE], [NAN]), ["fishers[0]", "'w'", "NaN"]),
    "Fisher weights": (
        lambda: fisher([ONE, TWO], [ONE, ONE], [1.0, -0.5]),
        ["weights", "-0.5", "negative"],
    ),
    "Fisher weights 0": (lambda: fisher([ONE], [ONE], [0.0]), ["weights", "0"]),
    "floor": (lambda: fisher([ONE], [ONE], floor=-1e-6), ["floor", "negative"]),
    "floor NaN": (lambda: fisher([ONE], [ONE], floor=math.nan), ["floor", "nan"]),
    "floor 0": (
        lambda: fisher([ONE, TWO], [tensors(w=[1.0, 0.0])] * 2, floor=0.0),
        ["'w'", "are 0", "raise floor"],
    ),
    "Fisher norm 0": (
        lambda: fisher([ONE, TWO], [ONE, tensors(w=[0.0, 0.0])], normalize=True),
        ["fishers[1]", "no norm", "normalize=False"],
    ),
    "overflow": (
        lambda: task_arithmetic({"w": torch.zeros(2).half()}, [TWO], scale=1e5),
        ["'w'", "overflow", "float16", "scale"],
    ),
}


@pytest.mark.parametrize(("call", "fragments"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_name_the_culprit(call: Callable[[], object], fragments: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the message is what is tested)
        call()
    for fragment in fragments:
        assert fragment in str(refusal.value)


def test_layout_is_checked_before_values() -> None:
    with pytest.raises(ValueError, match="lacks 'head'"):
        linear([NAN | tensors(head=[1.0]), ONE])
