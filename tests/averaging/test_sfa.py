"""SFA in a bare PyTorch loop: Algorithm 1, and what the paper says it is equal to."""

import copy
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stockpot.averaging import SFA, Anchor
from stockpot.errors import NonFiniteError, StockpotError

Weights = dict[str, Tensor]

T = 40


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batches(dtype: torch.dtype = torch.float32, steps: int = T) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(steps)
    ]


def snapshot(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(
        left[name].numpy().tobytes() == right[name].numpy().tobytes() for name in left
    )


def distance(left: Weights, right: Weights) -> float:
    flat = [np.ravel(left[n].double().numpy() - right[n].double().numpy()) for n in left]
    return float(np.sqrt(np.sum(np.concatenate(flat) ** 2)))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.02)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(
    model: nn.Module,
    after_step: Callable[[int], Any] = lambda step: None,
    optimizer: torch.optim.Optimizer | None = None,
    steps: range = range(1, T + 1),
) -> nn.Module:
    """The loop a user has: ``after_step`` is where the one line goes."""
    optimizer = adam(model) if optimizer is None else optimizer
    data = batches(next(model.parameters()).dtype, max(steps))
    for step in steps:
        x, y = data[step - 1]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after_step(step)
    return model


# When, and how far.


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"p": 1}, [40]),
        ({"p": 0.98}, [39, 40]),  # 39.2
        ({"p": 0.75}, [30, 40]),
        ({}, [10, 20, 30, 40]),
        ({"p": 0.17}, [7, 14, 20, 27, 34, 40]),  # 6.8, 13.6, 20.4, 27.2, 34
        ({"every": 15}, [15, 30, 40]),
        ({"every": 100}, [40]),
    ],
)
def test_events_come_at_the_right_steps_with_the_right_distances(
    settings: dict[str, Any], expected: list[int]
) -> None:
    model = mlp()
    start = snapshot(model)
    sfa = SFA(beta=0.3, **settings).attach(model, total_steps=T)
    seen = []

    def after_step(step: int) -> None:
        before = snapshot(model)
        event = sfa.step()
        after = snapshot(model)
        if event is None:
            assert same_bits(before, after)
            return
        seen.append(event)
        assert event.step == step
        assert event.beta == 0.3
        assert event.distance_before == pytest.approx(distance(before, start), rel=1e-6)
        assert event.distance_after == pytest.approx(distance(after, start), rel=1e-6)
        assert event.distance_after == pytest.approx(0.7 * event.distance_before, rel=1e-5)
        assert event.seconds > 0
        for name, weight in after.items():
            average = 0.3 * start[name].double() + 0.7 * before[name].double()
            torch.testing.assert_close(weight.double(), average, rtol=1e-6, atol=1e-7)

    train(model, after_step)
    assert [event.step for event in seen] == expected
    assert sfa.events == seen
    assert sfa.left_alone == []


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float64, 1e-15)])
def test_p_1_and_beta_half_halves_the_distance(dtype: torch.dtype, rounding: float) -> None:
    alone = snapshot(train(mlp(dtype)))
    model = mlp(dtype)
    start = snapshot(model)
    with SFA(p=1, beta=0.5).attach(model, total_steps=T) as sfa:
        train(model, lambda step: sfa.step())
    averaged = snapshot(model)
    whole = distance(alone, start)
    assert whole > 0.5
    assert distance(averaged, start) == pytest.approx(whole / 2, rel=rounding)
    (event,) = sfa.events
    assert event.distance_before == pytest.approx(whole, rel=rounding)
    assert event.distance_after == pytest.approx(whole / 2, rel=rounding)
    for name, weight in averaged.items():  # WiSE-FT
        middle = (alone[name] + start[name]) / 2
        torch.testing.assert_close(weight, middle, rtol=0, atol=rounding)


def test_beta_0_is_sequential_fine_tuning() -> None:
    model = mlp()
    sfa = SFA(every=1, beta=0.0).attach(model, total_steps=T)
    train(model, lambda step: sfa.step())
    assert len(sfa.events) == T
    assert same_bits(snapshot(model), snapshot(train(mlp())))


@pytest.mark.parametrize("p", [1, 0.25])
def test_beta_1_ends_at_the_anchor(p: float) -> None:
    model = mlp()
    start = snapshot(model)
    sfa = SFA(p=p, beta=1.0).attach(model, total_steps=T)
    train(model, lambda step: sfa.step())
    assert same_bits(snapshot(model), start)
    assert sfa.events[-1].distance_before > 0
    assert sfa.events[-1].distance_after == 0.0


# Averaging at every step is L2-regularised SGD (eq. 3 and 7).


def softmax_regression_gradient(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the mean cross-entropy with respect to theta (labels x features), by hand."""
    logits = x @ theta.T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return (p - np.eye(len(theta))[y]).T @ x / len(x)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.01, 0.5), st.floats(0.01, 1.9))
def test_every_step_equals_l2_regularised_sgd_by_hand(eta: float, strength: float) -> None:
    beta, alpha = eta * strength, eta / (1 - eta * strength)
    model = nn.Linear(6, 3, bias=False, dtype=torch.float64)
    theta_o = np.random.default_rng(0).normal(size=(3, 6))
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(theta_o))
    data = [(x.numpy(), y.numpy()) for x, y in batches(torch.float64)]

    regularised = theta_o.copy()
    for x, y in data:
        gradient = softmax_regression_gradient(regularised, x, y)
        regularised = regularised - eta * (gradient + strength * (regularised - theta_o))

    averaged = theta_o.copy()
    for x, y in data:
        averaged = averaged - alpha * softmax_regression_gradient(averaged, x, y)
        averaged = (1 - beta) * averaged + beta * theta_o

    sfa = SFA(every=1, beta=beta).attach(model, total_steps=T)
    train(model, lambda step: sfa.step(), torch.optim.SGD(model.parameters(), lr=alpha))

    ours = model.weight.detach().numpy()
    assert np.abs(regularised - theta_o).max() > 1e-3
    np.testing.assert_allclose(averaged, regularised, rtol=0, atol=1e-13)
    np.testing.assert_allclose(ours, regularised, rtol=0, atol=1e-13)


def test_every_step_equals_l2_regularised_sgd_on_a_network() -> None:
    eta, strength = 0.1, 0.5
    regularised = mlp(torch.float64)
    start = snapshot(regularised)
    optimizer = torch.optim.SGD(regularised.parameters(), lr=eta)
    for x, y in batches(torch.float64):
        optimizer.zero_grad()
        penalty = sum((p - start[n]).square().sum() for n, p in regularised.named_parameters())
        (F.cross_entropy(regularised(x), y) + strength / 2 * penalty).backward()
        optimizer.step()

    model = mlp(torch.float64)
    sfa = SFA(every=1, beta=eta * strength).attach(model, total_steps=T)
    train(
        model,
        lambda step: sfa.step(),
        torch.optim.SGD(model.parameters(), lr=eta / (1 - eta * strength)),
    )
    assert distance(snapshot(model), start) > 0.1
    assert distance(snapshot(model), snapshot(regularised)) < 1e-13


# Resuming.


@pytest.mark.parametrize("stop", [1, 9, 10, 11, 25, 39])
def test_a_run_taken_up_in_the_middle_ends_at_the_same_weights(stop: int, tmp_path: Path) -> None:
    whole = mlp()
    anchor = Anchor.capture(whole)
    anchor.save(tmp_path / "anchor.safetensors")
    sfa = SFA(p=0.25).attach(whole, total_steps=T)
    train(whole, sfa.step)

    model = mlp()
    first = SFA(p=0.25).attach(model, total_steps=T)
    optimizer = adam(model)
    train(model, first.step, optimizer, range(1, stop + 1))

    resumed = mlp(seed=99)
    resumed.load_state_dict(model.state_dict())
    again = adam(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second = SFA(p=0.25, anchor=tmp_path / "anchor.safetensors", store="disk")
    second.attach(resumed, again, total_steps=T)
    train(resumed, second.step, again, range(stop + 1, T + 1))

    assert same_bits(snapshot(resumed), snapshot(whole))
    events = [(e.step, e.distance_before, e.distance_after) for e in first.events + second.events]
    assert events == [(e.step, e.distance_before, e.distance_after) for e in sfa.events]


def test_counting_by_itself_and_being_told_are_one() -> None:
    told, counting = mlp(), mlp()
    by_number = SFA(p=0.17).attach(told, total_steps=T)
    by_itself = SFA(p=0.17).attach(counting, total_steps=T)
    train(told, by_number.step)
    train(counting, lambda step: by_itself.step())
    assert same_bits(snapshot(told), snapshot(counting))


def test_after_being_told_a_step_it_counts_on_from_there() -> None:
    model = mlp()
    sfa = SFA(p=0.5).attach(model, total_steps=4)
    assert sfa.step(global_step=1) is None
    event = sfa.step()
    assert event is not None
    assert event.step == 2


def test_steps_past_the_end_are_no_merge_steps() -> None:
    sfa = SFA(every=2).attach(mlp(), total_steps=3)
    assert [sfa.step(t) is not None for t in range(7)] == [False, False, True, True] + [False] * 3


# Anchors.


def test_a_given_anchor_is_used_instead_of_the_start(tmp_path: Path) -> None:
    other = mlp(seed=5)
    anchor = Anchor.capture(other)
    anchor.save(tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    for given_anchor, store in (
        (anchor, "cpu"),
        (anchor, "device"),
        (path, "cpu"),
        (str(path), "device"),
        (path, "disk"),
    ):
        model = mlp()
        sfa = SFA(every=1, beta=1.0, anchor=given_anchor, store=store)  # type: ignore[arg-type]
        sfa.attach(model, total_steps=1).step()
        assert same_bits(snapshot(model), snapshot(other))


@pytest.mark.parametrize("store", ["cpu", "device"])
def test_the_start_is_copied_when_it_is_taken(store: str) -> None:
    model = mlp()
    start = snapshot(model)
    sfa = SFA(p=1, beta=1.0, store=store).attach(model, total_steps=1)  # type: ignore[arg-type]
    train(model, steps=range(1, 6))
    assert not same_bits(snapshot(model), start)
    sfa.step()
    assert same_bits(snapshot(model), start)


def test_the_next_task_counts_from_1_and_is_anchored_where_the_last_one_ended() -> None:
    model = mlp()
    sfa = SFA(p=1, beta=0.5).attach(model, total_steps=4)
    train(model, lambda step: sfa.step(), steps=range(1, 5))
    middle = snapshot(model)
    sfa.attach(model, total_steps=3)
    alone = mlp()
    alone.load_state_dict(model.state_dict())
    train(model, lambda step: sfa.step(), steps=range(1, 4))
    train(alone, steps=range(1, 4))
    assert [event.step for event in sfa.events] == [4, 3]
    for name, weight in snapshot(model).items():
        halfway = (middle[name] + snapshot(alone)[name]) / 2
        torch.testing.assert_close(weight, halfway, rtol=0, atol=1e-6)


def test_what_the_anchor_lacks_is_left_alone_and_reported() -> None:
    model = mlp()
    body = {n: w for n, w in snapshot(model).items() if n.startswith("0.")}
    sfa = SFA(p=1, beta=1.0, anchor=Anchor(body)).attach(model, total_steps=T)
    alone = snapshot(train(mlp()))
    train(model, lambda step: sfa.step())
    after = snapshot(model)
    assert sfa.left_alone == ["2.weight", "2.bias"]
    for name, weight in after.items():
        assert torch.equal(weight, body[name] if name in body else alone[name])
    # The distance is over what both have.
    both = {name: alone[name] for name in body}
    assert sfa.events[0].distance_before == pytest.approx(distance(both, body), rel=1e-6)


def test_frozen_weights_stay_and_the_optimizer_keeps_its_moments() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    anchor = Anchor({n: torch.zeros_like(w) for n, w in snapshot(model).items()})
    optimizer = torch.optim.Adam(model[2].parameters(), lr=0.01)
    sfa = SFA(p=1, beta=1.0, anchor=anchor).attach(model, optimizer, total_steps=5)
    train(model, optimizer=optimizer, steps=range(1, 6))
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    sfa.step(5)
    assert torch.equal(model[0].weight, frozen)
    assert (model[2].weight == 0).all()
    assert all(
        torch.equal(after[key], moments[i][key])
        for i, after in optimizer.state_dict()["state"].items()
        for key in after
    )


# Wrappers.


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "compile": compiled,
    "DDP of compile": lambda model: DistributedDataParallel(compiled(model)),
    "compile of DDP": lambda model: compiled(DistributedDataParallel(model)),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrapped_models_share_anchors_with_plain_ones(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    model = mlp()
    wrapped = wrap(model)
    assert Anchor.capture(wrapped).fingerprint() == Anchor.capture(model).fingerprint()
    plain = mlp()
    for trained, anchored in ((wrapped, model), (plain, plain)):
        sfa = SFA(p=0.25, anchor=Anchor.capture(anchored)).attach(trained, total_steps=4)
        for step in range(1, 5):
            with torch.no_grad():
                for parameter in trained.parameters():
                    parameter.add_(0.1)
            sfa.step(step)
        assert sfa.left_alone == []
        assert len(sfa.events) == 4
    assert same_bits(snapshot(model), snapshot(plain))


class Branches(nn.Module):
    """A user's own attribute is called ``module``; it is no wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.module = nn.Linear(2, 2)


def test_an_anchor_by_the_names_that_the_model_itself_gives() -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    model.head = nn.Linear(2, 2)
    anchor = Anchor({name: torch.zeros_like(p) for name, p in model.named_parameters()})
    sfa = SFA(p=1, beta=1.0, anchor=anchor).attach(model, total_steps=1)
    sfa.step()
    assert sfa.left_alone == []
    assert all((parameter == 0).all() for parameter in model.parameters())


def test_an_attribute_called_module_hides_no_weight() -> None:
    model = Branches()
    sfa = SFA(p=1, beta=0.5).attach(model, total_steps=1)
    with torch.no_grad():
        model.weight.fill_(3.0)
    sfa.step()
    assert model.weight.tolist() == [2.0, 2.0]


# Misuse.


def test_step_before_attach() -> None:
    with pytest.raises(RuntimeError, match="attach"):
        SFA().step()


def test_leaving_the_context_lets_go_and_keeps_the_events() -> None:
    model = mlp()
    with SFA(every=1).attach(model, total_steps=2) as sfa:
        sfa.step()
    assert len(sfa.events) == 1
    with pytest.raises(RuntimeError, match="attach"):
        sfa.step()


def test_leaving_the_context_lets_errors_through() -> None:
    with (
        pytest.raises(KeyError, match="of the user"),
        SFA().attach(mlp(), total_steps=2),
    ):
        raise KeyError("of the user")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"p": 0}, "p = 0 "),
        ({"p": 1.5}, "p = 1.5"),
        ({"p": math.nan}, "p = nan"),
        ({"beta": -0.1}, "beta = -0.1"),
        ({"beta": 2}, "beta = 2 "),
        ({"beta": math.nan}, "beta = nan"),
        ({"every": 0}, "every = 0 "),
        ({"every": 2.5}, "every = 2.5"),
        ({"store": "disk", "anchor": Anchor({})}, "anchor='path'"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        SFA(**settings)


def test_attach_refuses_no_steps_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="total_steps"):
        SFA().attach(mlp(), total_steps=0)
    with pytest.raises(ValueError, match="total_steps"):
        SFA(every=1).attach(mlp(), total_steps=-1)
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        SFA(anchor=tmp_path / "gone.safetensors").attach(mlp(), total_steps=1)


def test_attach_refuses_a_diverged_model() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        SFA().attach(model, total_steps=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_diverges_is_not_averaged(value: float) -> None:
    model = mlp()
    sfa = SFA(every=1).attach(model, total_steps=2)
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[2].bias[1] = value
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=r"2\.bias"):
        sfa.step()
    assert same_bits(snapshot(model), before)
    assert sfa.events == []


def test_the_anchor_of_another_model_is_refused() -> None:
    model = mlp()
    anchor = Anchor({**snapshot(model), "2.weight": torch.zeros(4, 5)})
    before = snapshot(model)
    sfa = SFA(every=1, anchor=anchor)
    with pytest.raises((StockpotError, RuntimeError)):
        sfa.attach(model, total_steps=1).step()
    assert same_bits(snapshot(model), before)
    assert sfa.events == []


def test_the_anchor_of_another_model_is_refused_by_name() -> None:
    model = mlp()
    anchor = Anchor({**snapshot(model), "2.weight": torch.zeros(4, 5)})
    with pytest.raises(StockpotError, match=r"2\.weight.*another model"):
        SFA(every=1, anchor=anchor).attach(model, total_steps=1).step()


def test_an_anchor_without_a_single_weight_of_the_model_is_refused() -> None:
    anchor = Anchor({"other.weight": torch.zeros(2)})
    with pytest.raises(StockpotError):
        SFA(every=1, anchor=anchor).attach(mlp(), total_steps=1).step()


def test_looking_for_a_name_on_disk_reads_no_tensor(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "anchor.safetensors"
    model = mlp()
    Anchor.capture(model).save(path)
    anchor = Anchor.load(path, store="disk")
    sfa = SFA(p=1, anchor=anchor, store="disk").attach(model, total_steps=1)
    read: list[int] = []
    original = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, views, at: read.append(original(fd, views, at)) or read[-1]
    )
    assert "0.weight" in anchor
    assert "nothing" not in anchor
    assert read == []
    sfa.step()
    assert sum(read) == 4 * sum(p.numel() for p in model.parameters())  # each byte once
