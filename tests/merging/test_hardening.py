"""Inputs that someone set out to break merging with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.merging.conftest import load
from tests.support import merging as reference
from tests.support.merging import write_model

from stockpot.errors import ConfigError, StockpotError
from stockpot.merging import merge
from stockpot.merging.checkpoint import CheckpointError, open_checkpoint
from stockpot.merging.on_disk import Settings
from stockpot.merging.recipe import load_recipe, make_recipe

OVER = Settings(overwrite=True)


def model(folder: Path, **tensors: Any) -> str:
    return str(
        write_model(
            folder, {name: torch.as_tensor(value) for name, value in tensors.items()}, {"a": 1}
        )
    )


def adapter(folder: Path, config: Any = None, **tensors: torch.Tensor) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    factors = {
        "base_model.model.m.lora_A.weight": torch.ones(2, 6),
        "base_model.model.m.lora_B.weight": torch.ones(4, 2),
    }
    save_file({**factors, **tensors}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


# Inputs are never the price of an output.


def test_overwrite_never_takes_an_input(tmp_path: Path) -> None:
    real = model(tmp_path / "real" / "A", w=torch.ones(3))
    (tmp_path / "link").symlink_to("real")
    blob = tmp_path / "blobs" / "x"
    blob.parent.mkdir()
    (tmp_path / "real" / "A" / "model.safetensors").rename(blob)
    (tmp_path / "real" / "A" / "model.safetensors").symlink_to(blob)
    inside = adapter(tmp_path / "out" / "L1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for method, source, out in (
        ("linear", str(tmp_path / "link" / "A"), tmp_path / "link" / "A"),
        ("linear", str(tmp_path / "link" / "A"), tmp_path / "real" / "A"),
        ("linear", real, tmp_path / "real"),
        ("linear", real, tmp_path / "blobs"),
        ("lora", inside, tmp_path / "out"),
    ):
        with pytest.raises(StockpotError, match="is an input"):
            merge(method, [source], out, settings=OVER)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("kind", ["file", "fifo", "link"])
def test_output_that_is_no_folder(kind: str, tmp_path: Path) -> None:
    source, out = model(tmp_path / "A", w=torch.ones(3)), tmp_path / "out"
    if kind == "file":
        out.write_text("x")
    elif kind == "fifo":
        os.mkfifo(out)
    else:
        out.symlink_to(tmp_path / "A")
    with pytest.raises(StockpotError, match="is no folder"):
        merge("linear", [source], out, settings=OVER)
    assert out.is_symlink() or not out.is_dir()


def test_what_another_merge_left_is_not_taken_over(tmp_path: Path) -> None:
    source = model(tmp_path / "A", w=torch.ones(3))
    staging = tmp_path / ".out.partial"
    (staging / "beta=1").mkdir(parents=True)
    (staging / "model-00001-of-00009.safetensors").write_bytes(b"stale")
    merge("linear", [source], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.json",
        "merge.yaml",
        "README.md",
    }


def test_other_shards_are_not_a_resumed_merge(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {f"w{i}": rng.normal(size=(40, 4096)).astype(np.float32) for i in range(8)}
    source = model(tmp_path / "A", **values)
    seen = 0

    def stop(phase: str, count: int) -> None:
        nonlocal seen
        seen += phase == "merge" and count > 0
        if seen == 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge("linear", [source], tmp_path / "out", settings=Settings(chunk=4096), progress=stop)
    merge("linear", [source], tmp_path / "out", settings=Settings(chunk=4096, shard_bytes=10**6))
    found = load(tmp_path / "out")
    assert all(np.array_equal(found[name].numpy(), value) for name, value in values.items())


# Numbers.


@pytest.mark.parametrize("size", [1e-24, 1e-12, 1e19, 1e36])
@pytest.mark.parametrize("method", ["slerp", "model-stock"])
def test_angles_of_tiny_and_huge_numbers(method: str, size: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    one = rng.normal(size=5000)
    two = one[::-1].copy() if method == "slerp" else one + 0.3 * rng.normal(size=5000)
    arrays = [(each * size).astype(np.float32) for each in (one, two)]
    sources = [model(tmp_path / f"m{i}", w=each) for i, each in enumerate(arrays)]
    base = model(tmp_path / "base", w=np.zeros(5000, np.float32))
    merge(method, sources, tmp_path / "out", base=None if method == "slerp" else base)  # type: ignore[arg-type]
    models = [{"w": each.astype(np.float64)} for each in arrays]
    expected = (
        reference.slerp(models[0], models[1], 0.5)
        if method == "slerp"
        else reference.model_stock({"w": np.zeros(5000)}, models)
    )["w"]
    found = load(tmp_path / "out")["w"].double().numpy()
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_a_difference_that_overflows_changes_no_other_element(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(size=100_000).astype(np.float32)
    tuned = base + rng.normal(size=100_000).astype(np.float32) * np.float32(0.1)
    base[0], tuned[0] = -3e38, 3e38
    sources = model(tmp_path / "b", w=base), model(tmp_path / "t", w=tuned)
    outputs = []
    for chunk in (4096, 1 << 18):
        out = tmp_path / f"out{chunk}"
        merge(
            "wise-ft", [sources[1]], out, base=sources[0], beta=0.3, settings=Settings(chunk=chunk)
        )
        outputs.append((out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    found = load(tmp_path / "out4096")["w"].double().numpy()
    expected = 0.3 * base.astype(np.float64) + 0.7 * tuned.astype(np.float64)
    assert np.abs(found / expected - 1).max() < 1e-4
    merge("linear", list(sources), tmp_path / "mean")
    assert float(load(tmp_path / "mean")["w"][0]) == 0.0


@pytest.mark.parametrize("weight", [1e-40, 1e-30, 1.0, 3e38])
def test_ties_depends_on_ratios_of_weights_only(weight: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    arrays = [rng.normal(size=500).astype(np.float32) * np.float32(1e-3) for _ in range(2)]
    sources = [model(tmp_path / f"m{i}", w=each) for i, each in enumerate(arrays)]
    base = model(tmp_path / "base", w=np.zeros(500, np.float32))
    merge("ties", sources, tmp_path / "out", base=base, weights=[weight] * 2, density=1.0)  # type: ignore[arg-type]
    models = [{"w": each.astype(np.float64)} for each in arrays]
    expected = reference.ties({"w": np.zeros(500)}, models, 1.0, 1.0)["w"]
    assert np.abs(load(tmp_path / "out")["w"].double().numpy() - expected).max() < 1e-9


def ascending(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(np.abs(rng.normal(size=n))) * np.sign(rng.normal(size=n))


@pytest.mark.parametrize("trim", ["global", "per-tensor"])
@pytest.mark.parametrize(
    "draw",
    [
        ascending,
        lambda n, rng: np.where(np.arange(n) == n // 2, 1e6, rng.normal(size=n)),
        lambda n, rng: rng.normal(size=n) * (rng.random(n) < 0.05),
        lambda n, rng: np.sign(rng.normal(size=n)),
        lambda n, rng: np.zeros(n),
        lambda n, rng: rng.normal(size=n) * np.where(np.arange(n) % 4096 < 2048, 1e-6, 1.0),
        lambda n, rng: np.round(rng.normal(size=n) * 4) / 4,
    ],
    ids=["ascending", "outlier", "zeros", "equal", "nothing", "striped", "grid"],
)
def test_thresholds_where_a_sample_misleads(
    draw: Callable[[int, np.random.Generator], np.ndarray], trim: str, tmp_path: Path
) -> None:
    """The bits of the rule in memory, which selects by radix and samples nothing."""
    from stockpot.merging import ties

    rng = np.random.default_rng(4)
    sizes = {"a": 300_001, "b": 70_000, "c": 5}
    arrays = [
        {name: draw(size, rng).astype(np.float32) for name, size in sizes.items()} for _ in range(2)
    ]
    sources = [model(tmp_path / f"m{i}", **each) for i, each in enumerate(arrays)]
    zeros = {name: np.zeros(size, np.float32) for name, size in sizes.items()}
    base = model(tmp_path / "base", **zeros)
    merge("ties", sources, tmp_path / "out", base=base, density=0.2, trim=trim)  # type: ignore[arg-type]
    found = load(tmp_path / "out")
    tensors = [{name: torch.from_numpy(value) for name, value in each.items()} for each in arrays]
    start = {name: torch.from_numpy(value) for name, value in zeros.items()}
    expected = ties(start, tensors, density=0.2, per_tensor=trim == "per-tensor")
    for name in sizes:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_long_vectors_are_counted(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of counts in place of numbers, as for billions, at ten thousand."""
    from stockpot.merging import survey

    monkeypatch.setattr(survey, "_LONG", 1000)
    rng = np.random.default_rng(5)
    numbers = np.abs(np.round(rng.normal(size=10_000), 1)).astype(dtype)
    for rank in (3000, 8000):
        # A bracket of a single number is narrow in float64 as well.
        sample = np.full(4096, np.sort(numbers)[rank - 1])
        found = survey.OrderStatistics(numbers.size, [rank], sample)
        for part in np.split(numbers, 4):
            found.add(part)
        assert found.result() == [float(np.sort(numbers)[rank - 1])]


def test_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "a", w=torch.ones(3))
    monkeypatch.chdir(tmp_path / "a")
    merge("linear", ["."], tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")["w"], torch.ones(3))


def test_dare_draws_for_checkpoints_of_one_name(tmp_path: Path) -> None:
    sources = [model(tmp_path / run / "ck", w=np.ones(20_000, np.float32)) for run in "xy"]
    base = model(tmp_path / "base", w=np.zeros(20_000, np.float32))
    merge("dare-linear", sources, tmp_path / "out", base=base, drop_rate=0.5)  # type: ignore[arg-type]
    counts = {
        float(v): int(n)
        for v, n in zip(*np.unique(load(tmp_path / "out")["w"], return_counts=True), strict=True)
    }
    assert abs(counts[1.0] - 10_000) < 400
    assert abs(counts[2.0] - 5_000) < 400
    with pytest.raises(ConfigError, match="given twice"):
        merge("dare-linear", [sources[0], sources[0] + "/"], tmp_path / "o", base=base)


def test_negative_fisher_values(tmp_path: Path) -> None:
    sources = [model(tmp_path / name, w=torch.ones(9)) for name in "ab"]
    fishers = [
        model(tmp_path / "fa", w=torch.ones(9)),
        model(tmp_path / "fb", w=-torch.ones(9)),
    ]
    with pytest.raises(CheckpointError, match=r"'w'.*negative"):
        merge("fisher", sources, tmp_path / "out", fishers=fishers)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_fisher_values_of_any_size_normalise(size: float, tmp_path: Path) -> None:
    sources = [model(tmp_path / f"m{i}", w=torch.full((9,), float(i))) for i in range(2)]
    fishers = [model(tmp_path / f"f{i}", w=torch.full((9,), size * (i + 1))) for i in range(2)]
    merge("fisher", sources, tmp_path / "out", fishers=fishers, normalize=True, floor=0.0)  # type: ignore[arg-type]
    assert torch.allclose(load(tmp_path / "out")["w"], torch.full((9,), 0.5))


# Adapters.


def test_adapter_into_weights_that_are_codes(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one")
    base = tmp_path / "base"
    base.mkdir()
    save_file({"m.weight": torch.zeros(4, 6, dtype=torch.int8)}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'m.weight' is I8"):
        merge("lora", [one], tmp_path / "out", base=str(base))
    quantised = write_model(
        tmp_path / "q", {"m.weight": torch.zeros(4, 6)}, {"quantization_config": {"bits": 4}}
    )
    with pytest.raises(CheckpointError, match="quantised"):
        merge("lora", [one], tmp_path / "out", base=str(quantised))


def test_average_of_adapters_that_overflows(tmp_path: Path) -> None:
    half = {
        "base_model.model.m.lora_A.weight": torch.ones(2, 6).half(),
        "base_model.model.m.lora_B.weight": torch.full((4, 2), 6e4).half(),
    }
    sources = [adapter(tmp_path / name, **half) for name in "ab"]
    with pytest.raises(StockpotError, match="overflow F16"):
        merge("lora", sources, tmp_path / "out", scale=10.0)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_alpha_of_zero_is_zero(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", {"lora_alpha": 0})
    base = model(tmp_path / "base", **{"m.weight": torch.ones(4, 6)})
    merge("lora", [one], tmp_path / "out", base=base)
    assert torch.equal(load(tmp_path / "out")["m.weight"], torch.ones(4, 6))


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": "abc"},
        {"lora_alpha": [1]},
        {"lora_alpha": float("nan")},
        {"alpha_pattern": ["x"]},
        {"alpha_pattern": {"(": 3}},
        {"alpha_pattern": {"m": "z"}},
    ],
    ids=str,
)
def test_adapter_configs_of_nonsense(config: dict[str, Any], tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", config)
    base = model(tmp_path / "base", **{"m.weight": torch.ones(4, 6)})
    with pytest.raises(CheckpointError, match="adapter_config"):
        merge("lora", [one], tmp_path / "out", base=base)


def test_adapters_of_odd_shapes(tmp_path: Path) -> None:
    base = model(tmp_path / "base", **{"m.weight": torch.ones(4, 6)})
    for number, factor in enumerate((torch.zeros(0, 6), torch.tensor(1.0))):
        one = adapter(tmp_path / str(number), **{"base_model.model.m.lora_A.weight": factor})
        with pytest.raises(CheckpointError, match="a factor is a matrix"):
            merge("lora", [one], tmp_path / "out", base=base)
    whole = adapter(tmp_path / "w", **{"base_model.model.n.weight": torch.ones(3).long()})
    other = model(tmp_path / "other", **{"m.weight": torch.ones(4, 6), "n.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match="both must be floating"):
        merge("lora", [whole], tmp_path / "out", base=other)
    pair = [adapter(tmp_path / name) for name in "ab"]
    with pytest.raises(ConfigError, match="sum to 0"):
        merge("lora", pair, tmp_path / "out", weights=[1, -1])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no tensor's name matches"):
        merge("lora", pair, tmp_path / "out", weights_by_name={"typo*": [1, 2]})  # type: ignore[arg-type]


# Words.


def test_shapes_of_scalars_and_vectors(tmp_path: Path) -> None:
    sources = [model(tmp_path / "a", w=1.0), model(tmp_path / "b", w=torch.ones(3))]
    with pytest.raises(CheckpointError, match=r"shape \[3\].*but \[\]"):
        merge("linear", sources, tmp_path / "out")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["{broken", '{"model": {"vocab": "abc"}}', '{"model": {"vocab": [1, 2]}}', "[" * 100_000],
    ids=["json", "text", "numbers", "deep"],
)
def test_tokenizers_of_nonsense(text: str, tmp_path: Path) -> None:
    sources = [model(tmp_path / name, w=torch.ones(3)) for name in "ab"]
    (tmp_path / "a" / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        merge("linear", sources, tmp_path / "out")  # type: ignore[arg-type]


def test_added_tokens_count(tmp_path: Path) -> None:
    sources = [model(tmp_path / name, w=torch.ones(3)) for name in "ab"]
    for source, numbers in zip(sources, ((5, 6), (6, 5)), strict=True):
        added = [{"content": word, "id": n} for word, n in zip("xy", numbers, strict=True)]
        described = {"model": {"vocab": {"a": 0}}, "added_tokens": added}
        (Path(source) / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="2 of 3 words"):
        merge("linear", sources, tmp_path / "out")  # type: ignore[arg-type]


def test_paths_of_nonsense(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint("~nosuchuser/x")
    with pytest.raises(StockpotError, match="cannot be an output"):
        merge("linear", [model(tmp_path / "a", w=torch.ones(3))], "/", settings=OVER)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("[" * 100_000)
    model_file = tmp_path / "b" / "model.safetensors"
    save_file({"w": torch.ones(3)}, model_file)
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        merge("linear", [str(tmp_path / "b")], tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "linear", "models": ["a"], "base": "b"}, "uses no base"),
        (
            {
                "method": "ties",
                "models": ["a"],
                "base": "b",
                "parameters": {"density": 0.7},
                "sweep": {"density": [0.1, 0.2]},
            },
            "swept and has a single value",
        ),
        (
            {"method": "lora", "models": ["a"], "base": "b", "parameters": {"rank": 1}},
            "averages without a base",
        ),
        ({"method": 5, "models": ["a"]}, "method"),
        ({"method": "linear", "models": "a"}, "models"),
        ({"method": "linear", "models": [3]}, "models"),
        ({"method": "linear", "models": ["a"], "parameters": [1]}, "parameters"),
        ({"method": "linear", "models": ["a"], "weights": {"x": "y"}}, "weights"),
        ({"method": "linear", "models": ["a"], "sweep": {"normalize": 3}}, "sweep"),
        ({"method": "linear", "models": [{"model": "a", "sha256": "12"}]}, "64 hexadecimal"),
    ],
)
def test_recipes_of_nonsense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe(values)


def test_sweeps_of_close_values() -> None:
    recipe = make_recipe(
        {
            "method": "task-arithmetic",
            "models": ["a"],
            "base": "b",
            "sweep": {"scale": [0.1234567, 0.12345678]},
        }
    )
    assert [point.name for point in recipe.points()] == ["scale=0.1234567", "scale=0.12345678"]


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: ties\nbase_model: b\nmodels: [x]\nparameters: 5",
        "merge_method: []\nmodels: [x]",
        "merge_method: ties\nbase_model: b\nmodels: [x]\nparameters: {density: abc}",
        "merge_method: linear\nmodels: {x: 1}",
    ],
)
def test_mergekit_recipes_of_nonsense(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_recipe(path)
