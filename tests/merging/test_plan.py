"""What is settled before tensor data is read; among it, what mergekit 0.1.5 gets wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.merging.conftest import SHAPES, load
from tests.support.merging import tensors_of, write_model

from stockpot.errors import ConfigError, StockpotError
from stockpot.merging import merge
from stockpot.merging.checkpoint import CheckpointError
from stockpot.merging.estimate import estimate
from stockpot.merging.on_disk import Settings, merge_recipe
from stockpot.merging.recipe import load_recipe, make_recipe, parse_model, parse_sweep

Models = Callable[..., tuple[Path, list[Path]]]


def pair(tmp_path: Path, one: Any, two: Any, **config: Any) -> list[str]:
    folders = []
    for name, tensors in (("one", one), ("two", two)):
        folders.append(str(write_model(tmp_path / name, tensors, {"model_type": "x", **config})))
    return folders


W = {"layers.0.w": (4, 3), "head.w": (2, 3)}


# Tensors that only some inputs have.


def test_tensor_that_only_some_have_is_refused_then_settled(tmp_path: Path) -> None:
    base = tensors_of(0, W, "F32")
    extra = {**tensors_of(1, W, "F32"), "score.weight": torch.ones(2, 3)}
    folders = pair(tmp_path, base, extra)
    with pytest.raises(CheckpointError, match=r"'score.weight' is in .*two, but not in .*one"):
        merge("linear", folders, tmp_path / "out")  # type: ignore[arg-type]
    result = merge("linear", folders, tmp_path / "skip", missing="skip")  # type: ignore[arg-type]
    assert any("left out: score.weight" in note for note in result.notes)
    assert set(load(tmp_path / "skip")) == set(W)
    assert "left out: score.weight" in (tmp_path / "skip" / "README.md").read_text()


def test_base_stands_in_for_a_model_that_lacks_a_tensor(tmp_path: Path) -> None:
    base, model = tensors_of(0, W, "F32"), tensors_of(1, W, "F32")
    fewer = {name: tensor for name, tensor in model.items() if name != "head.w"}
    folders = pair(tmp_path, base, fewer)
    result = merge(
        "task-arithmetic",
        folders[1:],
        tmp_path / "out",
        base=folders[0],
        missing="base",  # type: ignore[arg-type]
    )
    found = load(tmp_path / "out")
    assert torch.equal(found["head.w"], base["head.w"])
    assert torch.allclose(found["layers.0.w"], model["layers.0.w"], atol=1e-7)
    assert any("taken from the base: head.w" in note for note in result.notes)
    with pytest.raises(CheckpointError, match="the base lacks it"):
        merge(
            "task-arithmetic",
            folders[:1],
            tmp_path / "o",
            base=folders[1],
            missing="base",  # type: ignore[arg-type]
        )


def test_tensors_that_no_architecture_knows_are_merged(tmp_path: Path) -> None:
    shapes = {**W, "adapter.x": (3,), "mtp_head.y": (2, 2)}
    folders = pair(tmp_path, tensors_of(0, shapes, "F32"), tensors_of(1, shapes, "F32"))
    merge("linear", folders, tmp_path / "out")  # type: ignore[arg-type]
    assert set(load(tmp_path / "out")) == set(shapes)


def test_shape_mismatch_is_found_before_anything_is_written(tmp_path: Path) -> None:
    folders = pair(tmp_path, tensors_of(0, W, "F32"), tensors_of(1, {**W, "head.w": (2, 4)}, "F32"))
    with pytest.raises(CheckpointError, match=r"'head.w' has the shape \[2, 4\]"):
        merge("linear", folders, tmp_path / "out")  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".*out*"))


def test_vocabularies_of_two_sizes(tmp_path: Path) -> None:
    folders = []
    for rows, name in ((50, "one"), (52, "two")):
        tensors = tensors_of(rows, {"embed.weight": (rows, 4)}, "F32")
        folders.append(str(write_model(tmp_path / name, tensors, {"vocab_size": rows})))
    with pytest.raises(CheckpointError, match=r"52 and 50 words.*resize_token_embeddings"):
        merge("linear", folders, tmp_path / "out")  # type: ignore[arg-type]


def test_tokenizers_that_differ(tmp_path: Path) -> None:
    folders = pair(tmp_path, tensors_of(0, W, "F32"), tensors_of(1, W, "F32"))
    for folder, words in zip(folders, ({"a": 0, "b": 1}, {"a": 1, "b": 0}), strict=True):
        text = json.dumps({"model": {"vocab": words}})
        (Path(folder) / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"2 of 2 words.*--tokenizers any"):
        merge("linear", folders, tmp_path / "out")  # type: ignore[arg-type]
    result = merge("linear", folders, tmp_path / "out", tokenizers="any")  # type: ignore[arg-type]
    assert "merged all the same" in result.notes[0]


# Tied weights, buffers, formats.


TIED = {"model.embed_tokens.weight": (9, 4), "model.w": (3, 3)}


@pytest.mark.parametrize("stored", [False, True])
def test_tied_weights_are_merged_once(stored: bool, tmp_path: Path) -> None:
    models = [tensors_of(i, TIED, "F32") for i in range(2)]
    if stored:
        for model in models:
            model["lm_head.weight"] = model["model.embed_tokens.weight"].clone()
    folders = pair(tmp_path, *models, tie_word_embeddings=True, vocab_size=9)
    result = merge("linear", folders, tmp_path / "out")  # type: ignore[arg-type]
    assert set(load(tmp_path / "out")) == set(TIED)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert bool(result.notes) == stored


def test_an_input_that_unties_unties_the_output(tmp_path: Path) -> None:
    one, two = tensors_of(0, TIED, "F32"), tensors_of(1, TIED, "F32")
    two["lm_head.weight"] = torch.ones(9, 4)
    folders = pair(tmp_path, one, two, tie_word_embeddings=True, vocab_size=9)
    merge("linear", folders, tmp_path / "out")  # type: ignore[arg-type]
    found = load(tmp_path / "out")
    expected = (one["model.embed_tokens.weight"] + 1) / 2
    assert torch.allclose(found["lm_head.weight"], expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_counters_come_from_the_last_model_and_are_reported(tmp_path: Path) -> None:
    one = {**tensors_of(0, W, "F32"), "bn.num_batches_tracked": torch.tensor(5)}
    two = {**tensors_of(1, W, "F32"), "bn.num_batches_tracked": torch.tensor(9)}
    result = merge("linear", pair(tmp_path, one, two), tmp_path / "out")  # type: ignore[arg-type]
    assert int(load(tmp_path / "out")["bn.num_batches_tracked"]) == 9
    assert any("bn.num_batches_tracked" in note for note in result.notes)


def test_mixed_formats_take_the_first(tmp_path: Path) -> None:
    one, two = tensors_of(0, W, "BF16"), tensors_of(1, W, "F32")
    merge("linear", pair(tmp_path, one, two), tmp_path / "out")  # type: ignore[arg-type]
    found = load(tmp_path / "out")
    for name in W:
        expected = ((one[name].double() + two[name].double()) / 2).float().bfloat16()
        assert torch.equal(found[name], expected)


def test_float8_and_quantised_models_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "f8").mkdir()
    save_file({"w": torch.zeros(3).to(torch.float8_e4m3fn)}, tmp_path / "f8" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'w' has the dtype F8_E4M3.*convert"):
        merge("linear", [str(tmp_path / "f8")], tmp_path / "out")
    folders = pair(
        tmp_path, tensors_of(0, W, "F32"), tensors_of(1, W, "F32"), quantization_config={"bits": 4}
    )
    with pytest.raises(CheckpointError, match="quantised"):
        merge("linear", folders, tmp_path / "out")  # type: ignore[arg-type]


# Numbers and names.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "linea", "models": ["a"]}, "did you mean 'linear'"),
        ({"method": "linear", "modles": ["a"]}, "unknown key 'modles'.*did you mean 'models'"),
        ({"method": "linear", "models": []}, "at least 1 item"),
        ({"method": "linear", "models": ["a:1", "b:-1"]}, "sum to 0"),
        (
            {
                "method": "task-arithmetic",
                "base": "b",
                "models": ["a:1", "c:-0.9"],
                "parameters": {"normalize": True},
            },
            "both signs",
        ),
        ({"method": "linear", "models": ["a:nan", "b"]}, "finite"),
        ({"method": "slerp", "models": ["a"]}, "takes 2, not 1"),
        ({"method": "slerp", "models": ["a:2", "b"]}, "takes none"),
        ({"method": "ties", "models": ["a"]}, "--base"),
        ({"method": "ties", "models": ["a:-1"], "base": "b"}, "above 0"),
        (
            {"method": "ties", "models": ["a"], "base": "b", "parameters": {"densty": 1}},
            "'densty'.*did you mean 'density'",
        ),
        (
            {"method": "ties", "models": ["a"], "base": "b", "parameters": {"density": 0}},
            "greater than 0",
        ),
        (
            {"method": "ties", "models": ["a"], "base": "b", "parameters": {"trim": "globl"}},
            "did you mean 'global'",
        ),
        ({"method": "dare-linear", "models": ["a", "a"], "base": "b"}, "given twice"),
        ({"method": "fisher", "models": ["a"]}, "stockpot fisher"),
        ({"method": "linear", "models": ["a"], "weights": {"*.x": [1, 2]}}, "2 numbers for 1"),
        ({"method": "linear", "models": ["a"], "missing": "base"}, "needs a base"),
        ({"method": "linear", "models": ["a"], "dtype": "float12"}, "float12"),
        ({"method": "wise-ft", "models": ["a"], "base": "b", "sweep": {"bet": [1]}}, "'bet'"),
        (
            {"method": "wise-ft", "models": ["a"], "base": "b", "sweep": {"beta": [0.5, 2.0]}},
            "less than or equal to 1",
        ),
    ],
)
def test_wrong_recipes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe(values)


def test_a_recipe_file_names_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("method: ties\nbase: b\nmodels:\n  - {model: a, wieght: 1}\n")
    with pytest.raises(ConfigError, match=r"r.yaml:4: .*'wieght'.*did you mean 'weight'"):
        load_recipe(path)


def test_pattern_that_matches_nothing(models: Models, tmp_path: Path) -> None:
    _, tuned = models(count=2)
    with pytest.raises(ConfigError, match=r"no tensor's name matches '\*.mpl.\*'"):
        merge("linear", list(map(str, tuned)), tmp_path / "o", weights_by_name={"*.mpl.*": [1, 2]})


def test_models_and_sweeps_of_the_command_line(tmp_path: Path) -> None:
    assert parse_model("a:0.5") == {"model": "a", "weight": 0.5}
    assert parse_model("org/a:-1e-2") == {"model": "org/a", "weight": -0.01}
    assert parse_model("C:folder") == {"model": "C:folder"}
    (tmp_path / "x:1").mkdir()
    assert parse_model(f"{tmp_path}/x:1") == {"model": f"{tmp_path}/x:1"}
    assert parse_sweep("beta=0:1:0.25") == ("beta", [0.0, 0.25, 0.5, 0.75, 1.0])
    assert parse_sweep("beta=0:0.3:0.1") == ("beta", [0.0, 0.1, 0.2, 0.3])
    assert parse_sweep("trim=global,per-tensor") == ("trim", ["global", "per-tensor"])
    for wrong in ("beta", "beta=", "beta=0:1", "beta=1:0:0.1", "beta=0:1:0"):
        with pytest.raises(ConfigError, match="--sweep"):
            parse_sweep(wrong)


# What is written beside the weights.


def test_companions_come_from_the_base_always(models: Models, tmp_path: Path) -> None:
    base, tuned = models()
    for number, folder in enumerate([base, *tuned]):
        (folder / "generation_config.json").write_text(json.dumps({"n": number}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"n": number}))
    merge("ties", list(map(str, tuned)), tmp_path / "out", base=str(base))
    merge("linear", list(map(str, tuned)), tmp_path / "baseless")
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == {"n": 0}
        assert json.loads((tmp_path / "baseless" / name).read_text()) == {"n": 1}


@pytest.mark.parametrize("kind", ["xxh3", "sha256"])
def test_provenance(kind: str, models: Models, tmp_path: Path) -> None:
    import hashlib

    import xxhash
    from safetensors import safe_open

    base, tuned = models(shards=2)
    result = merge(
        "ties",
        list(map(str, tuned)),
        tmp_path / "out",
        base=str(base),
        density=0.5,
        settings=Settings(hashes=kind),
    )
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    told = json.loads(metadata["stockpot"])
    assert told["parameters"] == {"density": 0.5, "scale": 1.0, "trim": "global"}
    for entry, folder in zip(told["inputs"], [base, *tuned], strict=True):
        for name, digest in entry["files"].items():
            content = (folder / name).read_bytes()
            if kind == "sha256":
                assert digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
            else:
                assert digest == f"xxh3:{xxhash.xxh3_128(content).hexdigest()}"
            assert result.hashes[str(folder / name)] == digest
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["merge", "stockpot"]
    recipe, _ = load_recipe(tmp_path / "out" / "merge.yaml")
    merge_recipe(recipe, tmp_path / "again", Settings())
    again, out = load(tmp_path / "again"), load(tmp_path / "out")
    assert all(torch.equal(again[name], out[name]) for name in SHAPES)


def test_shards(models: Models, tmp_path: Path) -> None:
    _, tuned = models(shards=3)
    merge("linear", list(map(str, tuned)), tmp_path / "one")
    merge("linear", list(map(str, tuned)), tmp_path / "many", settings=Settings(shard_bytes=8000))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(SHAPES)
    assert len(set(index["weight_map"].values())) > 2
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in SHAPES)


def test_dry_run_writes_nothing_and_knows_sizes(models: Models, tmp_path: Path) -> None:
    base, tuned = models()
    recipe = make_recipe({"method": "ties", "base": str(base), "models": list(map(str, tuned))})
    before = set(tmp_path.rglob("*"))
    found = estimate(recipe, tmp_path / "out", Settings())
    assert set(tmp_path.rglob("*")) == before
    merge_recipe(recipe, tmp_path / "out", Settings())
    assert found.outputs[0][2] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found.passes == 2


# mergekit's YAML.


def kit(tmp_path: Path, text: str) -> tuple[Any, list[str]]:
    path = tmp_path / "kit.yml"
    path.write_text(text)
    return load_recipe(path)


def test_mergekit_ties(tmp_path: Path) -> None:
    recipe, notes = kit(
        tmp_path,
        """
merge_method: ties
base_model: b
models:
  - model: b
  - {model: x, parameters: {weight: 0.5}}
  - {model: y, parameters: {weight: [{filter: mlp, value: 0.3}, {value: 0.7}]}}
parameters: {density: 0.4, lambda: 0.9, int8_mask: true}
dtype: bfloat16
""",
    )
    assert recipe.base.model == "b"
    assert [model.model for model in recipe.models] == ["x", "y"]
    assert recipe.parameters == {"density": 0.4, "scale": 0.9, "trim": "per-tensor"}
    assert recipe.weights == {"*mlp*": [0.5, 0.3], "*": [0.5, 0.7]}
    assert recipe.dtype == "bfloat16"
    assert any("float32" in note for note in notes)
    assert any("majority" in note for note in notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: ties\nmodels: [a]\nbase_modl: b", "did you mean 'base_model'"),
        ("merge_method: nuslerp\nmodels: [a]", "not one of those"),
        ("merge_method: linear\nslices: []\nmodels: [a]", "slices"),
        ("merge_method: linear\nmodels:\n - {model: a, parametrs: {}}", "parametrs"),
        ("merge_method: linear\nmodels:\n - {model: a, parameters: {wieght: 1}}", "wieght"),
        (
            "merge_method: slerp\nbase_model: b\nmodels: [b, a]\nparameters: {t: [0, 0.5, 1]}",
            "one number",
        ),
        ("merge_method: linear\nmodels: [a]\ntokenizer_source: union", "only 'base'"),
    ],
)
def test_mergekit_yaml_that_is_not_understood(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StockpotError, match=message):
        kit(tmp_path, text)


def test_mergekit_dare_and_slerp(tmp_path: Path) -> None:
    recipe, _ = kit(
        tmp_path,
        "merge_method: dare_linear\nbase_model: b\nmodels: [x]\nparameters: {density: 0.25}",
    )
    assert recipe.parameters == {"scale": 1.0, "drop_rate": 0.75, "normalize": False}
    recipe, _ = kit(
        tmp_path,
        "merge_method: slerp\nbase_model: b\nmodels: [b, x]\nparameters: {t: 0.25}",
    )
    assert (recipe.base.model, recipe.models[0].model) == ("b", "x")
    assert recipe.parameters == {"t": 0.25}
