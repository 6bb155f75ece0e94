"""The average itself, and the anchor it is taken with."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from stockpot.averaging import Anchor, average_
from stockpot.errors import NonFiniteError, StockpotError

quick = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)
betas = st.floats(0.0, 1.0)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)

INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
DTYPES = list(INTEGER)


def bits(tensor: Tensor) -> list[int]:
    """What is in memory: tells -0 from 0."""
    tensor = tensor.detach().cpu().contiguous().flatten()
    return tensor.view(INTEGER.get(tensor.dtype, tensor.dtype)).tolist()


def all_bits(weights: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: bits(tensor) for name, tensor in weights.items()}


def state(model: nn.Module) -> dict[str, list[int]]:
    return all_bits(model.state_dict())


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape) * scale).to(dtype)


def exactly(weight: Tensor, anchor: Tensor, beta: float) -> np.ndarray:
    """The average in float64, where the products of what follows are as good as exact."""
    theta, theta_o = weight.double().numpy(), anchor.double().numpy()
    return beta * theta_o + (1.0 - beta) * theta


def spacing(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbouring numbers of ``dtype`` at ``values``."""
    info = torch.finfo(dtype)
    lowest = math.log2(info.tiny)
    with np.errstate(divide="ignore"):
        exponent = np.maximum(np.floor(np.log2(np.abs(values))), lowest)
    return info.eps * 2.0**exponent


# The average against float64.


@quick
@given(seeds, shapes, betas, st.sampled_from([1e-3, 1.0, 1e3]))
def test_float32_is_the_float64_average(
    seed: int, shape: tuple[int, ...], beta: float, scale: float
) -> None:
    weight = normal(seed, shape, torch.float32, scale)
    anchor = normal(seed + 1, shape, torch.float32)
    expected = exactly(weight, anchor, beta)
    size = np.maximum(weight.abs().numpy(), anchor.abs().numpy())
    weights = {"w": weight}
    assert average_(weights, {"w": anchor}, beta) == []
    assert weights["w"].dtype == torch.float32
    error = np.abs(weights["w"].double().numpy() - expected)
    assert (error <= 4 * 2.0**-24 * size).all()


@quick
@given(seeds, betas)
def test_float64_is_not_narrowed(seed: int, beta: float) -> None:
    weight, anchor = (normal(seed + i, (40,), torch.float64) for i in range(2))
    expected = exactly(weight, anchor, beta)
    average_({"w": weight}, {"w": anchor}, beta)
    np.testing.assert_allclose(weight.numpy(), expected, rtol=0, atol=8 * 2.0**-53 * 5)


@quick
@given(
    seeds,
    betas,
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.sampled_from(["same", torch.float32, torch.float64]),
)
def test_half_precision_is_rounded_once(
    seed: int, beta: float, dtype: torch.dtype, anchor_dtype: str | torch.dtype
) -> None:
    weight = normal(seed, (64,), dtype)
    anchor = normal(seed + 1, (64,), dtype if isinstance(anchor_dtype, str) else anchor_dtype)
    expected = exactly(weight, anchor, beta)
    size = np.maximum(weight.double().abs().numpy(), anchor.double().abs().numpy())
    average_({"w": weight}, {"w": anchor}, beta)
    assert weight.dtype == dtype
    error = np.abs(weight.double().numpy() - expected)
    # Half a unit in the last place, and the rounding of the float32 arithmetic before it.
    assert (error <= 0.5 * spacing(expected, dtype) + 5 * 2.0**-24 * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bound_above_catches_arithmetic_in_half_precision(dtype: torch.dtype) -> None:
    weight, anchor = (normal(i, (1000,), dtype) for i in range(2))
    expected = exactly(weight, anchor, 0.3)
    narrow = 0.3 * anchor + 0.7 * weight
    error = np.abs(narrow.double().numpy() - expected)
    assert (error > 0.51 * spacing(expected, dtype)).sum() > 100


def test_by_hand() -> None:
    weights = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(-4.0)}
    anchor = {"w": torch.tensor([3.0, -2.0]), "b": torch.tensor(0.0)}
    average_(weights, anchor, 0.25)
    assert weights["w"].tolist() == [1.5, 1.0]
    assert weights["b"].item() == -3.0


# Both ends, bit for bit.

no_zeros = st.floats(2.0**-20, 2.0**20, width=32).flatmap(lambda x: st.sampled_from([x, -x]))


@quick
@given(st.lists(st.tuples(no_zeros, no_zeros), min_size=1, max_size=40))
@pytest.mark.parametrize("dtype", DTYPES)
def test_beta_0_keeps_and_beta_1_puts_back(
    dtype: torch.dtype, pairs: list[tuple[float, float]]
) -> None:
    limit = 0.99 * torch.finfo(dtype).max
    weight, anchor = (
        torch.tensor(column, dtype=torch.float64).clamp(-limit, limit).to(dtype)
        for column in zip(*pairs, strict=True)
    )
    kept, replaced = weight.clone(), weight.clone()
    average_({"w": kept}, {"w": anchor}, 0.0)
    average_({"w": replaced}, {"w": anchor}, 1.0)
    assert bits(kept) == bits(weight)
    assert bits(replaced) == bits(anchor)


SIGNED_ZEROS = [(a, b) for a in (0.0, -0.0, 1.0, -1.0) for b in (0.0, -0.0, 1.0, -1.0)]


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ends_keep_the_sign_of_zero(dtype: torch.dtype, beta: float) -> None:
    weight, anchor = (torch.tensor(v, dtype=dtype) for v in zip(*SIGNED_ZEROS, strict=True))
    expected = bits(anchor if beta else weight)
    average_({"w": weight}, {"w": anchor}, beta)
    assert bits(weight) == expected


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_far_apart_average_to_what_lies_between(dtype: torch.dtype, beta: float) -> None:
    large = torch.tensor(0.75 * torch.finfo(dtype).max, dtype=dtype).item()
    weights = {"w": torch.tensor([large], dtype=dtype)}
    average_(weights, {"w": torch.tensor([-large], dtype=dtype)}, beta)
    assert weights["w"].item() == pytest.approx(large * (1 - 2 * beta))


def test_many_large_finite_float64_weights_are_finite() -> None:
    weights = {"w": torch.full((3,), 1e308, dtype=torch.float64)}
    average_(weights, {"w": torch.full((3,), 1e308, dtype=torch.float64)}, 0.5)
    assert weights["w"].tolist() == [1e308] * 3


# What is averaged, what is not.


class Model(nn.Module):
    """A bit of everything: tied, frozen, scalar, empty and transposed weights, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.transposed = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


TRAINABLE = ["scale", "empty", "transposed", "embed.weight", "norm.weight", "norm.bias"]


def filled(value: float) -> Model:
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def test_every_trainable_parameter_once_and_nothing_else() -> None:
    model, other = filled(4.0), filled(8.0)
    frozen_before = bits(model.frozen.weight)
    buffers = {name: bits(b) for name, b in model.named_buffers()}
    anchor = {name: p.detach().clone() for name, p in other.named_parameters()}
    assert average_(model, anchor, 0.25) == []
    for name, parameter in model.named_parameters():
        if name.startswith("frozen"):
            continue
        assert (parameter == 5.0).all(), name  # a tied weight averaged twice would be 5.75
    assert bits(model.frozen.weight) == frozen_before
    assert {name: bits(b) for name, b in model.named_buffers()} == buffers
    assert model.head.weight is model.embed.weight


def test_written_in_place_without_a_trace_in_autograd() -> None:
    model = filled(1.0)
    model.scale.grad = torch.tensor(3.0)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    anchor = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    average_(model, anchor, 0.5)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    assert model.scale.grad.item() == 3.0
    assert all(p.grad_fn is None and p.is_leaf for p in model.parameters())
    assert model.scale.requires_grad
    assert not model.frozen.weight.requires_grad
    assert all((t == 0).all() and not t.requires_grad for t in anchor.values())


def test_two_names_for_one_tensor_are_averaged_once() -> None:
    shared = torch.tensor([4.0])
    average_({"a": shared, "b": shared}, {"a": torch.zeros(1), "b": torch.zeros(1)}, 0.5)
    assert shared.item() == 2.0


def test_missing_names_are_reported_in_order_and_left_alone() -> None:
    model = filled(1.0)
    anchor = {"scale": torch.tensor(3.0), "not.in.the.model": torch.zeros(7)}
    left_alone = average_(model, anchor, 0.5)
    assert left_alone == [name for name in TRAINABLE if name != "scale"]
    assert model.scale.item() == 2.0
    assert (model.embed.weight == 1.0).all()
    assert average_({"w": torch.zeros(1)}, {}, 1.0) == ["w"]


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_counters_among_named_weights_are_not_blurred(beta: float) -> None:
    weights = {"w": torch.ones(1), "steps": torch.tensor(2**25 + 1)}
    average_(weights, {"w": torch.ones(1), "steps": torch.tensor(2**25 + 1)}, beta)
    assert weights["steps"].item() == 2**25 + 1


# What is refused, with nothing written.


def cannot_be_averaged() -> list[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    def good(**extra: Tensor) -> dict[str, Tensor]:
        return {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.float16), **extra}

    infinity, nan = math.inf, math.nan
    return [
        ("nan in the model", good(z=torch.tensor([1.0, nan])), good(z=torch.zeros(2))),
        ("inf in the model", good(z=torch.tensor([1.0, infinity])), good(z=torch.zeros(2))),
        ("inf and -inf", good(z=torch.tensor([infinity, -infinity])), good(z=torch.zeros(2))),
        ("nan in the anchor", good(z=torch.zeros(2)), good(z=torch.tensor([nan, 1.0]))),
        ("inf in the anchor", good(z=torch.zeros(2)), good(z=torch.tensor([1.0, -infinity]))),
        ("beyond float16", good(), good(b=torch.tensor([1.0, 1e6]))),
        ("float64 anchor", good(), good(a=torch.full((3,), 1e300, dtype=torch.float64))),
    ]


@pytest.mark.parametrize(
    ("weights", "anchor"),
    [pytest.param(w, a, id=name) for name, w, a in cannot_be_averaged()],
)
def test_non_finite_averages_leave_all_weights_untouched(
    weights: dict[str, Tensor], anchor: dict[str, Tensor]
) -> None:
    before = all_bits(weights)
    culprit = next(
        name
        for name in weights
        if not torch.isfinite(weights[name]).all()
        or not torch.isfinite(anchor[name].to(weights[name].dtype)).all()
    )
    with pytest.raises(NonFiniteError, match=repr(culprit)):
        average_(weights, anchor, 0.5)
    assert all_bits(weights) == before


def test_a_diverged_last_layer_leaves_the_whole_model_untouched() -> None:
    model = filled(1.0)
    with torch.no_grad():
        model.transposed[2, 1] = math.nan
    before = state(model)
    anchor = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with pytest.raises(NonFiniteError, match="'transposed'"):
        average_(model, anchor, 0.5)
    assert state(model) == before


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (1, 3), (4,), (2, 3)])
def test_shapes_must_agree_even_if_they_broadcast(shape: tuple[int, ...]) -> None:
    weights = {"a": torch.ones(2), "w": torch.ones(3)}
    anchor = {"a": torch.zeros(2), "w": torch.zeros(shape)}
    with pytest.raises(StockpotError, match=r"'w'.*\(3,\).*another model"):
        average_(weights, anchor, 0.5)
    assert weights["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("beta", [-1e-9, 1.0000001, 50, math.nan, math.inf, "0.5", None])
def test_beta_out_of_range_is_refused_by_name(beta: object) -> None:
    weights = {"w": torch.ones(1)}
    with pytest.raises(ValueError, match=r"^beta = .*not in \[0, 1\]"):
        average_(weights, {"w": torch.zeros(1)}, beta)  # type: ignore[arg-type]
    assert weights["w"].item() == 1.0


# The anchor.


@pytest.mark.parametrize("store", ["cpu", "device"])
def test_capture_is_a_copy_of_the_trainable_weights(store: str) -> None:
    model = filled(1.0)
    anchor = Anchor.capture(model, store=store)  # type: ignore[arg-type]
    assert list(anchor) == TRAINABLE
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert all((anchor[name] == 1.0).all() for name in anchor)
    assert not any(anchor[name].requires_grad for name in anchor)
    average_(model, anchor, 1.0)
    assert model.scale.item() == 1.0


def test_an_anchor_is_a_read_only_mapping() -> None:
    anchor = Anchor({"w": torch.ones(2)})
    assert len(anchor) == 1
    assert "w" in anchor
    assert "x" not in anchor
    with pytest.raises(KeyError):
        anchor["x"]
    with pytest.raises(TypeError):
        anchor["w"] = torch.zeros(2)  # type: ignore[index]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_model_is_no_anchor(value: float) -> None:
    model = filled(1.0)
    with torch.no_grad():
        model.transposed[0, 1] = value
    with pytest.raises(NonFiniteError, match="'transposed'"):
        Anchor.capture(model)


def test_frozen_weights_do_not_keep_a_model_from_being_an_anchor() -> None:
    model = filled(1.0)
    model.frozen.weight.fill_(math.nan)
    assert "frozen.weight" not in Anchor.capture(model)


def every_kind() -> dict[str, Tensor]:
    tensors = {str(dtype): normal(0, (3, 2), dtype) for dtype in DTYPES}
    return {
        **tensors,
        "signed zeros": torch.tensor([0.0, -0.0]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "view": torch.arange(12.0).reshape(3, 4).T[1:],
    }


@pytest.mark.parametrize("store", ["cpu", "device", "disk"])
def test_saved_and_loaded_it_is_the_same_bit_for_bit(store: str, tmp_path: Path) -> None:
    kinds = every_kind()
    Anchor(kinds).save(tmp_path / "anchor.safetensors")
    anchor = Anchor.load(tmp_path / "anchor.safetensors", store=store)  # type: ignore[arg-type]
    assert set(anchor) == set(kinds)
    assert len(anchor) == len(kinds)
    for name, tensor in kinds.items():
        assert anchor[name].dtype == tensor.dtype
        assert anchor[name].shape == tensor.shape
        assert bits(anchor[name]) == bits(tensor)
    assert anchor.fingerprint() == Anchor(kinds).fingerprint()
    with pytest.raises(KeyError):
        anchor["nothing of the kind"]


def test_all_stores_average_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    Anchor.capture(start).save(tmp_path / "anchor.safetensors")
    anchors = [
        Anchor.capture(start, store="cpu"),
        Anchor.capture(start, store="device"),
        *(Anchor.load(str(tmp_path / "anchor.safetensors"), s) for s in ("cpu", "device", "disk")),
    ]
    results = []
    for anchor in anchors:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        assert average_(model, anchor, 0.3) == []
        results.append(state(model))
    assert all(result == results[0] for result in results)
    assert results[0] != state(start)


def test_disk_keeps_nothing_in_memory_between_two_requests(tmp_path: Path) -> None:
    Anchor({"w": torch.ones(2)}).save(tmp_path / "anchor.safetensors")
    anchor = Anchor.load(tmp_path / "anchor.safetensors", store="disk")
    assert anchor["w"] is not anchor["w"]


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    for store in ("cpu", "device", "disk"):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
            Anchor.load(tmp_path / "nowhere.safetensors", store=store)  # type: ignore[arg-type]


def test_an_anchor_in_host_memory_outlives_a_change_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "anchor.safetensors"
    Anchor({"w": torch.ones(10_000)}).save(path)
    anchor = Anchor.load(path, store="cpu")
    with path.open("r+b") as file:
        file.seek(-40_000, 2)
        file.write(bytes(40_000))
    assert anchor["w"].sum().item() == 10_000.0


def test_non_finite_weights_are_not_saved_as_an_anchor(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        Anchor({"w": torch.tensor([1.0, math.nan])}).save(tmp_path / "anchor.safetensors")


@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_a_non_finite_file_is_refused_at_the_latest_when_averaging(
    store: str, tmp_path: Path
) -> None:
    save_file({"w": torch.tensor([1.0, math.inf])}, str(tmp_path / "bad.safetensors"))
    weights = {"w": torch.zeros(2)}
    with pytest.raises(NonFiniteError):
        average_(weights, Anchor.load(tmp_path / "bad.safetensors", store), 0.5)  # type: ignore[arg-type]
    assert weights["w"].tolist() == [0.0, 0.0]


# The fingerprint.


def test_equal_weights_have_one_fingerprint() -> None:
    kinds = every_kind()
    backwards = {name: kinds[name].clone() for name in reversed(kinds)}
    assert Anchor(kinds).fingerprint() == Anchor(backwards).fingerprint()


CHANGED: dict[str, dict[str, Tensor]] = {
    "one bit": {"a": torch.tensor([1.0, 0.0]).nextafter(torch.tensor([2.0, 0.0]))},
    "sign of zero": {"a": torch.tensor([1.0, -0.0])},
    "shape": {"a": torch.tensor([[1.0, 0.0]])},
    "dtype": {"a": torch.tensor([1.0, 0.0]).double()},
    "dtype of the same bytes": {"a": torch.tensor([1.0, 0.0]).view(torch.int32)},
    "name": {"b": torch.tensor([1.0, 0.0])},
    "one more": {"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(0)},
    "none": {},
}


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED.keys())
def test_any_change_changes_the_fingerprint(changed: dict[str, Tensor]) -> None:
    original = Anchor({"a": torch.tensor([1.0, 0.0])})
    assert Anchor(changed).fingerprint() != original.fingerprint()
