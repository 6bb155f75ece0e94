"""Bad input is refused with the option and the tensor named, and the model stays as it is."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stockpot.averaging import SFA, Anchor
from stockpot.errors import NonFiniteError, StockpotError


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).to(dtype)


def named(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def step_of(model: nn.Module, optimizer: Any, seed: int) -> None:
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("total", [math.inf, math.nan, 0, -1, 2.5])
def test_a_number_of_steps_that_is_none_is_refused(total: Any) -> None:
    with pytest.raises(ValueError, match="total_steps"):
        SFA().attach(net(), total_steps=total)


def write(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = named(net())
    change(tensors)
    save_file(tensors, path)
    return path


def truncated(path: Path) -> Path:
    path.write_bytes(write(path, lambda t: None).read_bytes()[:-8])
    return path


def pickle(path: Path) -> Path:
    torch.save(named(net()), path.with_suffix(".bin"))
    return path.with_suffix(".bin")


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda p: p, "no anchor at"),
    "damaged": (truncated, "damaged"),
    "a pickle": (pickle, "pickle"),
    "not finite": (
        lambda p: write(p, lambda t: t["2.bias"].fill_(math.nan)),
        "'2.bias' is not finite",
    ),
    "another shape": (
        lambda p: write(p, lambda t: t.update({"2.bias": torch.zeros(3)})),
        "'2.bias' has shape",
    ),
    "another model": (
        lambda p: write(p, lambda t: (t.clear(), t.update(x=torch.ones(1)))),
        "none of the model's trainable weights",
    ),
}


@pytest.mark.parametrize("store", ["device", "cpu", "disk"])
@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_anchor_is_refused_before_anything_is_written(
    kind: str, store: Any, tmp_path: Path
) -> None:
    make, word = BAD[kind]
    model = net()
    before = named(model)
    with pytest.raises((StockpotError, FileNotFoundError), match=word):
        SFA(anchor=make(tmp_path / "anchor.safetensors"), store=store).attach(model, total_steps=4)
    assert all(torch.equal(before[n], w) for n, w in named(model).items())


def test_what_the_anchor_lacks_is_left_alone_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lambda t: t.pop("2.bias"))
    model = net()
    with torch.no_grad():
        model[2].bias.add_(1.0)
    kept = model[2].bias.detach().clone()
    sfa = SFA(p=1, beta=1.0, anchor=path).attach(model, total_steps=1)
    sfa.step()
    assert sfa.left_alone == ["2.bias"]
    assert torch.equal(model[2].bias, kept)


def test_a_folder_of_shards_is_an_anchor(tmp_path: Path) -> None:
    tensors = named(net())
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    names = sorted(tensors)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, tmp_path / file)
    table = {n: file for file, part in parts.items() for n in part}
    import json

    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    SFA(p=1, beta=1.0, anchor=tmp_path, store="disk").attach(model, total_steps=1).step()
    assert all(torch.equal(tensors[n], w) for n, w in named(model).items())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing"):
        SFA(anchor=tmp_path)


def test_a_tied_weight_is_found_under_its_other_name(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    save_file({"head.weight": torch.ones(5, 3)}, tmp_path / "a.safetensors")
    SFA(p=1, beta=1.0, anchor=tmp_path / "a.safetensors").attach(model, total_steps=1).step()
    assert torch.equal(model.embedding.weight, torch.ones(5, 3))


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(StockpotError, match=r"parameters: 'heads\.\*' matches no"):
        SFA(parameters="heads.*").attach(net(), total_steps=4)


def test_only_the_parameters_that_are_chosen_are_averaged() -> None:
    model = net()
    sfa = SFA(p=1, beta=1.0, parameters=["0.*"]).attach(model, total_steps=1)
    start = named(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    sfa.step()
    for name, weight in named(model).items():
        assert torch.equal(weight, start[name]) == name.startswith("0.")


class OwnCopies(torch.optim.Optimizer):
    """Steps float32 copies of bf16 weights, in groups or hidden, and copies them back."""

    def __init__(self, parameters: Any, hidden: bool) -> None:
        self.live = list(parameters)
        copies = [p.detach().float().requires_grad_() for p in self.live]
        self.inner = torch.optim.AdamW(copies, lr=1e-3)
        shown = self.live if hidden else copies
        super().__init__(shown, {"lr": 1e-3, "betas": (0.9, 0.999)})
        self.copies = copies

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, own in zip(self.live, self.copies, strict=True):
            own.grad = None if p.grad is None else p.grad.float()
        self.inner.step()
        for p, own in zip(self.live, self.copies, strict=True):
            p.copy_(own)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.live:
            p.grad = None


def test_an_optimizer_that_shows_its_copies_is_refused() -> None:
    model = net(torch.bfloat16)
    with pytest.raises(StockpotError, match=r"steps a copy of '0\.weight'"):
        SFA().attach(model, OwnCopies(model.parameters(), hidden=False), total_steps=4)


def test_an_optimizer_that_hides_its_copies_is_found_at_the_next_step(tmp_path: Path) -> None:
    model = net(torch.bfloat16)
    optimizer = OwnCopies(model.parameters(), hidden=True)
    anchor = write(tmp_path / "a.safetensors", lambda t: [w.add_(3.0) for w in t.values()])
    sfa = SFA(every=2, anchor=anchor).attach(model, optimizer, total_steps=4)
    for step in (1, 2):
        step_of(model, optimizer, step)
        sfa.step()
    step_of(model, optimizer, 3)
    with pytest.raises(StockpotError, match="was undone by the next optimizer step"):
        sfa.step()


def test_a_schedule_free_optimizer_is_refused() -> None:
    class AdamWScheduleFree(torch.optim.SGD):
        pass

    model = net()
    with pytest.raises(StockpotError, match="schedule-free"):
        SFA().attach(model, AdamWScheduleFree(model.parameters(), lr=0.1), total_steps=4)


@pytest.mark.parametrize("policy", ["keep", "scale", "reset"])
def test_moments_are_kept_scaled_or_forgotten(policy: Any) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sfa = SFA(p=1, beta=0.4, optimizer_state=policy).attach(model, optimizer, total_steps=2)
    for step in (1, 2):
        step_of(model, optimizer, step)
    before = {p: s["exp_avg"].clone() for p, s in optimizer.state.items()}
    sfa.step(2)
    for p, moment in before.items():
        if policy == "reset":
            assert not optimizer.state[p]
        else:
            factor = 0.6 if policy == "scale" else 1.0
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], factor * moment)
    step_of(model, optimizer, 3)  # training goes on from there


def test_scale_needs_a_first_moment() -> None:
    model = net()
    optimizer = torch.optim.Adagrad(model.parameters())
    sfa = SFA(p=1, optimizer_state="scale").attach(model, optimizer, total_steps=1)
    step_of(model, optimizer, 1)
    with pytest.raises(StockpotError, match="Adagrad has no first moment"):
        sfa.step()


@pytest.mark.parametrize("policy", ["keep", "average"])
def test_float_buffers_are_kept_or_averaged(policy: Any) -> None:
    model = net()
    start = model[1].running_var.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sfa = SFA(p=1, beta=0.4, buffers=policy).attach(model, optimizer, total_steps=1)
    step_of(model, optimizer, 1)
    moved = model[1].running_var.clone()
    sfa.step()
    expected = moved if policy == "keep" else 0.4 * start + 0.6 * moved
    torch.testing.assert_close(model[1].running_var, expected)
    assert int(model[1].num_batches_tracked) == 1


def test_a_step_that_a_grad_scaler_skips_still_counts() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    sfa = SFA(every=2, beta=1.0).attach(model, optimizer, total_steps=4)
    start = named(model)
    for step in (1, 2):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean() * (math.inf if step == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        event = sfa.step()
    assert event is not None
    assert all(torch.equal(start[n], w) for n, w in named(model).items())


def test_a_diverged_model_is_not_averaged() -> None:
    model = net()
    sfa = SFA(every=1).attach(model, total_steps=4)
    with torch.no_grad():
        model[2].weight[0, 0] = math.inf
        model[0].weight.add_(1.0)
    before = named(model)
    with pytest.raises(NonFiniteError, match=r"'2\.weight' is not finite"):
        sfa.step()
    assert all(torch.equal(before[n], w) for n, w in named(model).items())


def test_two_at_once_are_refused_until_the_first_is_done() -> None:
    model = net()
    first = SFA(every=1).attach(model, total_steps=1)
    with pytest.raises(StockpotError, match="another SFA"):
        SFA().attach(model, total_steps=4)
    first.step()
    SFA().attach(model, total_steps=4)


def test_an_anchor_in_memory_is_not_on_disk() -> None:
    with pytest.raises(ValueError, match=r"anchor\.save\(path\)"):
        SFA(anchor=Anchor({}), store="disk")
