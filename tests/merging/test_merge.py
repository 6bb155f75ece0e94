"""Every method on files, against float64 references written from the papers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.merging.conftest import SHAPES, load
from tests.support import merging as reference
from tests.support.merging import TORCH, tensors_of, wide, write_file, write_model

from stockpot.merging import merge
from stockpot.merging.on_disk import Settings

Models = Callable[..., tuple[Path, list[Path]]]

EPSILON = {"F64": 2.0**-52, "F32": 2.0**-23, "BF16": 2.0**-7, "F16": 2.0**-10}
DEPTHS = {
    name: {"0": 0.0, "1": 0.5, "2": 1.0}.get(
        name.split(".")[2] if ".layers." in name else "", 0.0 if "embed" in name else 1.0
    )
    for name in SHAPES
}


def close(found: dict[str, torch.Tensor], expected: dict[str, np.ndarray], dtype: str) -> None:
    """Within one rounding of the format, and the float32 sums before it."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == TORCH[dtype], name
        assert tuple(tensor.shape) == expected[name].shape, name
        bound = EPSILON[dtype] * np.abs(expected[name]) * 0.51 + 6e-8
        error = np.abs(tensor.double().numpy() - expected[name])
        assert (error <= bound).all(), (name, float((error - bound).max()))


def case(name: str, base: Any, models: list[Any]) -> tuple[dict[str, Any], Any]:
    """Arguments of `merge`, and what the reference says."""
    weights = [1.0, 0.5, 2.0][: len(models)]
    return {
        "linear": (
            {"weights": weights},
            lambda: reference.linear(models, weights),
        ),
        "wise-ft": ({"beta": 0.3}, lambda: reference.wise_ft(base, models[0], 0.3)),
        "slerp": ({"t": 0.3}, lambda: reference.slerp(models[0], models[1], 0.3)),
        "task-arithmetic": (
            {"scale": 0.4, "weights": [1.0, -0.5, 1.0][: len(models)]},
            lambda: reference.task_arithmetic(base, models, [1.0, -0.5, 1.0], 0.4),
        ),
        "ties": ({"density": 0.3}, lambda: reference.ties(base, models, 0.3, 1.0)),
        "ties per tensor": (
            {"density": 0.3, "trim": "per-tensor", "scale": 0.7},
            lambda: reference.ties(base, models, 0.3, 0.7, "tensor"),
        ),
        "ties weighted": (
            {"density": 0.5, "weights": weights},
            lambda: reference.ties(base, models, 0.5, 1.0, weights=weights),
        ),
        "magmax": ({"scale": 0.8}, lambda: reference.magmax(base, models, 0.8)),
        "model-stock": ({}, lambda: reference.model_stock(base, models)),
        "breadcrumbs": (
            {"density": 0.6, "gamma": 0.05, "scale": 0.5},
            lambda: reference.breadcrumbs(base, models, 0.6, 0.05, 0.5),
        ),
        "lines": (
            {"alpha": 0.2, "beta": 0.6},
            lambda: reference.lines(base, models, 0.2, 0.6, DEPTHS),
        ),
    }[name]


METHODS = [
    "linear",
    "wise-ft",
    "slerp",
    "task-arithmetic",
    "ties",
    "ties per tensor",
    "ties weighted",
    "magmax",
    "model-stock",
    "breadcrumbs",
    "lines",
]
BASELESS = ("linear", "slerp")
DEVICE_METHODS = {
    "linear": 3,
    "wise-ft": 1,
    "slerp": 2,
    "task-arithmetic": 3,
    "ties": 3,
    "dare-linear": 3,
    "dare-ties": 3,
    "magmax": 3,
    "model-stock": 3,
    "breadcrumbs": 3,
    "lines": 3,
}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("name", METHODS)
def test_method_equals_its_paper(name: str, dtype: str, models: Models, tmp_path: Path) -> None:
    base, tuned = models(dtype=dtype)
    method = name.split()[0]
    tuned = tuned[: {"wise-ft": 1, "slerp": 2}.get(method, 3)]
    arguments, expected = case(name, wide(load(base)), [wide(load(each)) for each in tuned])
    merge(
        method,
        [str(each) for each in tuned],
        tmp_path / "out",
        base=None if method in BASELESS else str(base),
        settings=Settings(threads=2, chunk=4096),
        **arguments,
    )
    close(load(tmp_path / "out"), expected(), dtype)


@pytest.mark.parametrize("normalize", [False, True])
def test_fisher_equals_its_paper(normalize: bool, models: Models, tmp_path: Path) -> None:
    _, tuned = models(dtype="F32")
    values, files = [], []
    for i in range(3):
        drawn = {
            name: tensor.square() for name, tensor in tensors_of(50 + i, SHAPES, "F32").items()
        }
        write_file(tmp_path / f"fisher{i}.safetensors", drawn)
        values.append(wide(drawn))
        files.append(str(tmp_path / f"fisher{i}.safetensors"))
    merge("fisher", list(map(str, tuned)), tmp_path / "out", fishers=files, normalize=normalize)
    expected = reference.fisher([wide(load(m)) for m in tuned], values, 1e-6, normalize)
    close(load(tmp_path / "out"), expected, "F32")


def test_dare_drops_and_rescales(models: Models, tmp_path: Path) -> None:
    """Dropped entries are the base's; the others are moved by 1/(1-p); the rate is p."""
    base, tuned = models(count=1, dtype="F32")
    merge("dare-linear", [str(tuned[0])], tmp_path / "out", base=str(base), drop_rate=0.7)
    start, end, found = wide(load(base)), wide(load(tuned[0])), wide(load(tmp_path / "out"))
    kept = total = 0
    for name in SHAPES:
        moved = found[name] - start[name]
        expected = (end[name] - start[name]) / 0.3
        dropped = found[name] == start[name]
        assert np.abs(moved - expected)[~dropped].max(initial=0) < 1e-7, name
        kept += int((~dropped).sum())
        total += moved.size
    assert abs(kept / total - 0.3) < 4 * (0.21 / total) ** 0.5


def test_dare_ties_elects_among_what_is_left(models: Models, tmp_path: Path) -> None:
    """Its own draws, read off single merges, in the reference of TIES without a trim."""
    base, tuned = models(dtype="F32")
    start = wide(load(base))
    rows = []
    for i, each in enumerate(tuned):
        merge("dare-linear", [str(each)], tmp_path / f"one{i}", base=str(base), drop_rate=0.5)
        rows.append(wide(load(tmp_path / f"one{i}")))
    merge("dare-ties", list(map(str, tuned)), tmp_path / "out", base=str(base), drop_rate=0.5)
    expected = reference.ties(start, rows, 1.0, 1.0)
    found = wide(load(tmp_path / "out"))
    for name in SHAPES:
        assert np.abs(found[name] - expected[name]).max(initial=0) < 3e-7, name


@pytest.mark.parametrize("method", ["dare-linear", "ties", "slerp", "model-stock", "linear"])
def test_same_bytes_for_any_threads_and_chunks(method: str, models: Models, tmp_path: Path) -> None:
    base, tuned = models(shards=2)
    inputs = list(map(str, tuned[:2]))
    seen = set()
    for number, (threads, chunk) in enumerate([(1, 1 << 20), (2, 4096), (5, 8192)]):
        merge(
            method,
            inputs,  # type: ignore[arg-type]
            tmp_path / f"out{number}",
            base=None if method in BASELESS else str(base),
            settings=Settings(threads=threads, chunk=chunk),
        )
        seen.add((tmp_path / f"out{number}" / "model.safetensors").read_bytes())
    assert len(seen) == 1


@pytest.mark.parametrize("method", sorted(DEVICE_METHODS))
def test_same_bytes_with_torch(method: str, models: Models, tmp_path: Path) -> None:
    """A device is torch's; the processor as one stands for any."""
    base, tuned = models()
    outputs = []
    for device in ("cpu", "cpu:0"):
        out = tmp_path / device
        merge(
            method,
            [str(each) for each in tuned[: DEVICE_METHODS[method]]],
            out,
            base=None if method in BASELESS else str(base),
            settings=Settings(device=device, chunk=4096, hashes="none"),
        )
        outputs.append((out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "ties", "magmax", "dare-ties"])
def test_files_and_memory_give_the_same_bits(method: str, models: Models, tmp_path: Path) -> None:
    """numpy on files, torch on tensors: one formula."""
    from stockpot.merging import rules

    base, tuned = models(dtype="F32")
    merge(
        method,
        list(map(str, tuned)),
        tmp_path / "out",
        base=None if method == "linear" else str(base),
    )
    start, thetas = load(base), [load(each) for each in tuned]
    expected = {
        "linear": lambda: rules.linear(thetas),
        "task-arithmetic": lambda: rules.task_arithmetic(start, thetas),
        "ties": lambda: rules.ties(start, thetas),
        "magmax": lambda: rules.magmax(start, thetas),
        "dare-ties": lambda: rules.dare(
            start, thetas, combine="ties", labels=[each.name for each in tuned]
        ),
    }[method]()
    found = load(tmp_path / "out")
    for name in SHAPES:
        assert torch.equal(found[name], expected[name]), name


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    shapes=st.dictionaries(
        st.sampled_from("abcdef"),
        st.lists(st.integers(1, 70), min_size=0, max_size=2).map(tuple),
        min_size=1,
    ),
    method=st.sampled_from(["linear", "ties", "slerp", "magmax", "model-stock", "breadcrumbs"]),
)
def test_a_model_merged_with_itself_is_itself(
    seed: int,
    dtype: str,
    shapes: dict[str, tuple[int, ...]],
    method: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("same")
    model = tensors_of(seed, shapes, dtype)
    base = tensors_of(seed + 1, shapes, dtype, model)
    write_model(folder / "base", base)
    inputs = [str(write_model(folder / each, model)) for each in ("one", "two")]
    extra: dict[str, Any] = {
        "ties": {"density": 1.0},
        "breadcrumbs": {"density": 1.0, "gamma": 0.0, "scale": 0.5},
    }.get(method, {})
    merge(
        method,
        inputs,  # type: ignore[arg-type]
        folder / "out",
        base=None if method in BASELESS else str(folder / "base"),
        **extra,
    )
    found = load(folder / "out")
    for name, tensor in model.items():
        start = base[name].double()
        bound = EPSILON[dtype] * tensor.double().abs() * 0.51 + 2e-7 * (1 + start.abs())
        assert ((found[name].double() - tensor.double()).abs() <= bound).all(), name


@pytest.mark.parametrize("method", ["linear", "ties", "magmax", "model-stock", "task-arithmetic"])
def test_order_of_models_changes_nothing(method: str, models: Models, tmp_path: Path) -> None:
    base, tuned = models()
    outputs = []
    for number, order in enumerate([[0, 1, 2], [2, 0, 1]]):
        merge(
            method,
            [str(tuned[i]) for i in order],
            tmp_path / f"out{number}",
            base=None if method in BASELESS else str(base),
        )
        outputs.append(load(tmp_path / f"out{number}"))
    for name in SHAPES:
        first, second = (each[name].double() for each in outputs)
        # Sums in another order differ in float32's last bits, and rarely round differently.
        assert (first - second).abs().max() <= 2.0**-7 * first.abs().max() if first.numel() else 1
        assert (first != second).float().mean() < 0.01 if first.numel() else True


def test_golden_hashes(models: Models, tmp_path: Path) -> None:
    """The numbers of this version; a change here is a change of what users get."""
    base, tuned = models()
    found = {}
    for method in ("linear", "ties", "dare-ties", "slerp", "breadcrumbs"):
        merge(
            method,
            [str(each) for each in tuned[:2]],
            tmp_path / method,
            base=None if method in BASELESS else str(base),
        )
        digest = hashlib.sha256()
        for name, tensor in sorted(load(tmp_path / method).items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        found[method] = digest.hexdigest()[:16]
    golden = json.loads((Path(__file__).parent / "golden.json").read_text())
    assert found == golden


def test_sweep_writes_each_point_as_a_merge_of_its_own(models: Models, tmp_path: Path) -> None:
    base, tuned = models()
    result = merge(
        "wise-ft",
        [str(tuned[0])],
        tmp_path / "sweep",
        base=str(base),
        sweep={"beta": [0.0, 0.5, 1.0]},
    )
    assert [each.name for each in result.outputs] == ["beta=0", "beta=0.5", "beta=1"]
    merge("wise-ft", [str(tuned[0])], tmp_path / "one", base=str(base), beta=0.5)
    half, one = load(tmp_path / "sweep" / "beta=0.5"), load(tmp_path / "one")
    ends = load(tmp_path / "sweep" / "beta=0"), load(tmp_path / "sweep" / "beta=1")
    for name in SHAPES:
        assert torch.equal(half[name], one[name])
        assert torch.equal(ends[0][name], load(tuned[0])[name])
        assert torch.equal(ends[1][name], load(base)[name])


def test_weights_by_pattern(models: Models, tmp_path: Path) -> None:
    _, tuned = models(dtype="F32")
    merge(
        "linear",
        [str(each) for each in tuned[:2]],
        tmp_path / "out",
        weights=[1.0, 1.0],
        weights_by_name={"*.mlp.*": [1.0, 0.0], "*norm*": [0.0, 1.0]},
    )
    found, first, second = load(tmp_path / "out"), load(tuned[0]), load(tuned[1])
    for name in SHAPES:
        expected = (first[name] + second[name]) / 2
        expected = first[name] if ".mlp." in name else expected
        expected = second[name] if "norm" in name else expected
        assert torch.allclose(found[name], expected, rtol=0, atol=1e-8), name
