"""Adapters: the average of models, not of factors. The oracle multiplies everything out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stockpot.averaging import SFA
from stockpot.errors import StockpotError

peft = pytest.importorskip("peft")

BETA = 0.3


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 8)
        self.conv = nn.Conv1d(8, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(tokens))).transpose(1, 2)
        out: Tensor = self.head(self.conv(hidden).mean(2))
        return out


def adapted(base: nn.Module | None = None, **settings: Any) -> Any:
    torch.manual_seed(1)
    values = {"r": 3, "target_modules": ["embedding", "body", "conv"], **settings}
    return peft.get_peft_model(base or Base(), peft.LoraConfig(**values)).double()


def train(model: nn.Module, steps: int, after: Any = lambda: None) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        tokens = torch.randint(11, (8, 4), generator=generator)
        optimizer.zero_grad()
        (model(tokens)[:, 0] - tokens.double().mean(1)).square().mean().backward()
        optimizer.step()
        after()


def merged(model: Any) -> dict[str, Tensor]:
    whole = copy.deepcopy(model).merge_and_unload()
    return {n: p.detach().double() for n, p in whole.named_parameters()}


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"modules_to_save": ["head"]}, {"bias": "lora_only"}],
    ids=str,
)
def test_a_fresh_adapter_is_averaged_exactly(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    start = merged(model)
    sfa = SFA(p=1, beta=BETA).attach(model, total_steps=5)
    train(model, 5)
    trained = merged(model)
    assert sum(float((trained[n] - start[n]).norm()) for n in start) > 1
    sfa.step(5)
    for name, weight in merged(model).items():
        expected = BETA * start[name] + (1 - BETA) * trained[name]
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-9)


def test_a_checkpoint_of_the_base_is_an_anchor_for_a_fresh_adapter(tmp_path: Path) -> None:
    base = Base().double()
    save_file({n: p.detach() for n, p in base.named_parameters()}, tmp_path / "base.safetensors")
    model = adapted(base, modules_to_save=["head"])
    start = merged(model)
    sfa = SFA(p=1, beta=BETA, anchor=tmp_path / "base.safetensors").attach(model, total_steps=5)
    train(model, 5)
    trained = merged(model)
    sfa.step(5)
    assert sfa.left_alone == []
    for name, weight in merged(model).items():
        expected = BETA * start[name] + (1 - BETA) * trained[name]
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-9)


def test_a_continued_adapter_is_refused_and_untouched() -> None:
    model = adapted()
    train(model, 3)
    before = bits(model)
    with pytest.raises(StockpotError, match=r"'.*lora_.*' was trained before.*lora='factors'"):
        SFA().attach(model, total_steps=5)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(model), strict=True))


def test_factor_averaging_is_off_by_what_the_docs_say(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(target_modules=["body"])
    train(model, 3)
    layer = model.base_model.model.body
    factors = layer.lora_A["default"], layer.lora_B["default"]
    a0, b0 = (f.weight.detach().clone() for f in factors)
    start = merged(model)
    sfa = SFA(p=1, beta=BETA, lora="factors").attach(model, total_steps=5)
    train(model, 5)
    a1, b1 = (f.weight.detach().clone() for f in factors)
    trained = merged(model)
    with caplog.at_level("INFO", logger="stockpot"):
        sfa.step(5)
    off = merged(model)["body.weight"]
    off = off - (BETA * start["body.weight"] + (1 - BETA) * trained["body.weight"])
    error = -BETA * (1 - BETA) * layer.scaling["default"] * (b1 - b0) @ (a1 - a0)
    torch.testing.assert_close(off, error, rtol=1e-8, atol=1e-10)
    relative = float(error.norm() / (trained["body.weight"] - start["body.weight"]).norm())
    assert f"relative error {relative:.3g}" in caplog.text


def test_svd_is_the_best_adapter_of_the_same_rank(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(target_modules=["body", "conv", "embedding"])
    train(model, 3)
    start = merged(model)
    base = {n: p.detach().double() for n, p in Base().named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    sfa = SFA(p=1, beta=BETA, lora="svd").attach(model, optimizer, total_steps=5)
    train(model, 5)
    trained = merged(model)
    with caplog.at_level("INFO", logger="stockpot"):
        event = sfa.step(5)
    lost = kept = square = 0.0
    for name in ("body.weight", "conv.weight", "embedding.weight"):
        flat = [w[name].flatten(1) for w in (start, trained, merged(model), base)]
        average = BETA * flat[0] + (1 - BETA) * flat[1] - flat[3]
        u, s, v = torch.linalg.svd(average, full_matrices=False)
        best = u[:, :3] * s[:3] @ v[:3]
        torch.testing.assert_close(flat[2] - flat[3], best, rtol=1e-6, atol=1e-7)
        lost, kept = lost + float(s[3:].square().sum()), kept + float(s.square().sum())
        square += float((flat[1] - flat[0]).square().sum())
    assert f"rank {(lost / kept) ** 0.5:.3g}" in caplog.text
    assert event is not None
    assert event.distance_before == pytest.approx(
        square**0.5 / (8 / 3), rel=1e-5
    )  # alpha / r = 8 / 3


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True, "target_modules": ["body"]}, "DoRA"),
        ({"init_lora_weights": "pissa", "target_modules": ["body"]}, "pissa"),
        ({"init_lora_weights": "olora", "target_modules": ["body"]}, "olora"),
    ],
)
def test_adapters_that_are_not_linear_in_b_are_refused(settings: dict[str, Any], word: str) -> None:
    model = adapted(**settings)
    with pytest.raises(StockpotError, match=word):
        SFA().attach(model, total_steps=5)


def test_adalora_is_refused() -> None:
    config = peft.AdaLoraConfig(target_modules=["body"], total_step=10, tinit=1, tfinal=1)
    with pytest.raises(StockpotError, match="ADALORA"):
        SFA().attach(peft.get_peft_model(Base(), config), total_steps=5)
