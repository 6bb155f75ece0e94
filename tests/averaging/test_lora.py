"""Adapters: the average of models, not of factors. The oracle multiplies everything out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stockpot.averaging import SFA, Anchor
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


# A continued adapter that moves into the base.


def continued(**settings: Any) -> Any:
    model = adapted(**settings)
    train(model, 3)
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"modules_to_save": ["head"]}], ids=str
)
def test_merged_and_restarted_an_adapter_is_averaged_exactly(settings: dict[str, Any]) -> None:
    model = continued(**settings)
    tokens = torch.arange(11).reshape(1, 11)
    start, out = merged(model), model(tokens)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    sfa = SFA(p=0.5, beta=BETA, lora="merge-and-restart").attach(model, optimizer, total_steps=10)
    torch.testing.assert_close(model(tokens), out)
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}
    zero = [n for n, p in factors.items() if not p.any()]
    assert sorted(n.split(".lora_")[1] for n in zero) == [
        "B.default.weight", "B.default.weight", "embedding_A.default"
    ]  # fmt: skip
    train(model, 5, sfa.step)
    trained_once = merged(model)  # averaged at step 5
    train(model, 4)
    train(model, 1)
    trained = merged(model)
    sfa.step(10)
    assert sum(float((trained[n] - trained_once[n]).norm()) for n in start) > 1
    for name, weight in merged(model).items():
        expected = BETA * start[name] + (1 - BETA) * trained[name]
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-9)


def resumable(lora: Any = "merge-and-restart") -> tuple[Any, SFA]:
    model = continued()
    return model, SFA(p=0.5, beta=BETA, lora=lora)


def adapter_of(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_a_resumed_run_merges_the_old_adapter_into_its_fresh_base(tmp_path: Path) -> None:
    whole, sfa = resumable()
    sfa.attach(whole, total_steps=10, anchor_path=tmp_path / "anchor.safetensors")
    train(whole, 5, sfa.step)
    state, adapter = sfa.state_dict(), adapter_of(whole)
    train(whole, 5, sfa.step)

    again = adapted()  # the base as it was loaded at first, under the checkpoint's adapter
    again.load_state_dict(adapter, strict=False)
    second = SFA(p=0.5, beta=BETA, lora="merge-and-restart")
    second.attach(again, total_steps=10, anchor=Anchor.load(tmp_path / "anchor.safetensors"))
    before = bits(again)
    with pytest.raises(StockpotError, match=r"load_state_dict\(\) first"):
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(before, bits(again), strict=True))
    second.load_state_dict(state)
    train(again, 5, second.step)
    assert all(torch.equal(a, b) for a, b in zip(bits(whole), bits(again), strict=True))
    assert second.events == [*sfa.events[:1], second.events[1]]

    other = adapted()
    other.load_state_dict(adapter, strict=False)
    with torch.no_grad():
        other.base_model.model.embedding.base_layer.weight.add_(1)
    third = SFA(p=0.5, beta=BETA, lora="merge-and-restart")
    third.attach(other, total_steps=10, anchor=Anchor.load(tmp_path / "anchor.safetensors"))
    with pytest.raises(StockpotError, match="the base model is not the one"):
        third.load_state_dict(state)


def test_a_second_attempt_does_not_merge_twice() -> None:
    model, sfa = resumable()
    sfa.attach(model, total_steps=10)
    anchor = sfa.anchor
    base = model.base_model.model.body.base_layer.weight.clone()
    train(model, 2, sfa.step)
    sfa.attach(model, total_steps=10, anchor=anchor)
    assert torch.equal(base, model.base_model.model.body.base_layer.weight)
    sfa.step()


def test_a_fresh_adapter_needs_no_restart() -> None:
    model = adapted()
    before = bits(model)
    SFA(lora="merge-and-restart").attach(model, total_steps=5)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(model), strict=True))


def test_a_base_that_would_round_is_refused_and_one_in_bf16_is_rounded_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = continued(target_modules=["body"])
    layer = model.base_model.model.body
    layer.base_layer.weight.requires_grad_(True)
    before = bits(model)
    with pytest.raises(StockpotError, match=r"body.*its base trains as well.*lora='svd'"):
        SFA(lora="merge-and-restart").attach(model, total_steps=5)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(model), strict=True))
    layer.base_layer.weight.requires_grad_(False)
    layer.base_layer.to(torch.bfloat16)
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default")
    with caplog.at_level("INFO", logger="stockpot"):
        SFA(lora="merge-and-restart").attach(model, total_steps=5)
    assert torch.equal(layer.base_layer.weight, exact.to(torch.bfloat16))
    assert "relative error of rounding the base 0.00" in caplog.text
