"""Low-rank adapters, against PEFT's own merge and against products in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.merging.conftest import load
from transformers import LlamaConfig, LlamaForCausalLM

from stockpot.errors import StockpotError
from stockpot.merging import merge
from stockpot.merging.checkpoint import CheckpointError
from stockpot.merging.on_disk import Settings

TARGETS = ["q_proj", "down_proj", "embed_tokens"]


def base_model(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=30,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """An adapter with factors drawn at random, as after training."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **config}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder)
    return dict(model.merge_and_unload().state_dict())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base_model(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_one_adapter_into_its_base_as_peft_does(
    config: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    one = adapter(base, tmp_path / "one", 1, **config)
    merge("lora", [str(one)], tmp_path / "out", base=str(base), settings=Settings(chunk=4096))
    expected, found = merged_by_peft(base, one), load(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name
    LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_several_adapters_add_their_products(base: Path, tmp_path: Path) -> None:
    one = adapter(base, tmp_path / "one", 1)
    two = adapter(base, tmp_path / "two", 2, r=8, target_modules=["q_proj", "v_proj"])
    merge(
        "lora", [str(one), str(two)], tmp_path / "out", base=str(base), weights=[0.5, -1], scale=0.8
    )
    start, found = load(base), load(tmp_path / "out")
    parts = [merged_by_peft(base, each) for each in (one, two)]
    for name, theta in start.items():
        moved = [part[name].double() - theta.double() for part in parts]
        expected = theta.double() + 0.8 * (0.5 * moved[0] - moved[1])
        assert (found[name].double() - expected).abs().max() < 1e-6, name


@pytest.mark.parametrize("chunk", [4096, 1 << 18])
def test_same_bytes_for_any_chunk(chunk: int, base: Path, tmp_path: Path) -> None:
    one = adapter(base, tmp_path / "one", 1)
    outputs = []
    for size in (chunk, 1 << 20):
        out = tmp_path / f"out{size}"
        merge("lora", [str(one)], out, base=str(base), settings=Settings(chunk=size))
        outputs.append((out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


def test_average_without_a_base_is_the_mean_of_the_products(base: Path, tmp_path: Path) -> None:
    one = adapter(base, tmp_path / "one", 1)
    two = adapter(base, tmp_path / "two", 2, r=8, lora_alpha=5)
    merge("lora", [str(one), str(two)], tmp_path / "mean")
    start = load(base)
    parts = [merged_by_peft(base, each) for each in (one, two)]
    found = merged_by_peft(base, tmp_path / "mean")
    for name, theta in start.items():
        expected = sum(part[name].double() for part in parts) / 2
        assert (found[name].double() - expected).abs().max() < 1e-6, name
        factors = load_file(one / "adapter_model.safetensors")
        del factors, theta
    # The mean of the factors is another model: what is exact here is known to be needed.
    a, b = (load_file(each / "adapter_model.safetensors") for each in (one, one))
    assert a.keys() == b.keys()


def test_cut_to_a_rank_is_the_nearest_and_says_how_far(base: Path, tmp_path: Path) -> None:
    one, two = (adapter(base, tmp_path / name, seed) for seed, name in ((1, "one"), (2, "two")))
    result = merge("lora", [str(one), str(two)], tmp_path / "cut", rank=3)
    start = load(base)
    parts = [merged_by_peft(base, each) for each in (one, two)]
    found = merged_by_peft(base, tmp_path / "cut")
    lost = total = 0.0
    for name, theta in start.items():
        mean = sum(part[name].double() for part in parts) / 2 - theta.double()
        if mean.dim() == 2 and mean.abs().max() > 0:
            sizes = torch.linalg.svdvals(mean)
            lost += float((sizes[3:] ** 2).sum())
            total += float((sizes**2).sum())
            gone = (found[name].double() - theta.double() - mean).square().sum()
            assert abs(float(gone) - float((sizes[3:] ** 2).sum())) < 1e-6
    told = float(result.notes[0].split()[-1])
    assert abs(told - (lost / total) ** 0.5) < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
    ],
)
def test_kinds_that_are_no_product_are_refused(
    change: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    one = adapter(base, tmp_path / "one", 1)
    path = one / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        merge("lora", [str(one)], tmp_path / "out", base=str(base))


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    one = adapter(base, tmp_path / "one", 1)
    path = one / "adapter_model.safetensors"
    tensors = load_file(path)
    renamed = {name.replace("layers.1", "layers.7"): value for name, value in tensors.items()}
    save_file(renamed, path)
    with pytest.raises(CheckpointError, match=r"layers.7.*does not hold"):
        merge("lora", [str(one)], tmp_path / "out", base=str(base))
    with pytest.raises(StockpotError, match="method 'lora'"):
        merge("linear", [str(one)], tmp_path / "out")
