"""L1, L2 and EWC against autograd of the loss written out, in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stockpot.merging.rules import fisher as fisher_merge
from stockpot.methods import EWC, L1, L2, Memory, TaskRun
from stockpot.methods._penalty import Penalty
from stockpot.methods.ewc import consolidate
from stockpot.models.learner import ImageLearner, copy_weights, load_weights_
from stockpot.streams.data import ImageData, Task

Weights = dict[str, Tensor]
Energy = Callable[[Weights], Tensor]
"""The penalty, written out, of named weights."""

quick = settings(max_examples=60, deadline=None)
strengths = pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 250.0])


class Model(nn.Module):
    """Two layers, a scalar, a tied and a frozen weight, and one that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.first.weight
        self.last = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor([1.2]))
        self.unused = nn.Parameter(torch.randn(2, 3))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.again(torch.tanh(self.first(images.flatten(1)))))
        return self.scale * self.last(hidden + self.frozen)


TRAINABLE = ["first.weight", "first.bias", "again.bias", "last.weight", "last.bias"]
TRAINABLE += ["scale", "unused"]


def model(seed: int = 0, dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(seed)
    return Model().to(dtype)


def task(seed: int = 0, examples: int = 12, dtype: torch.dtype = torch.float64) -> Task:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(examples, 1, 2, 2, generator=generator, dtype=torch.float64).to(dtype)
    data = ImageData(images, torch.randint(3, (examples,), generator=generator))
    return Task(f"task {seed}", data, data)


def task_run(
    module: nn.Module,
    folder: Path,
    stage: int = 1,
    previous: Weights | None = None,
    loss_scale: float = 1.0,
    last: bool = False,
) -> TaskRun:
    weights = copy_weights(module) if previous is None else previous
    return TaskRun(
        stage=stage,
        last=last,
        tasks=(task(stage),),
        past=tuple(task(number) for number in range(stage)),
        learner=ImageLearner(module),
        start=weights,
        previous=weights,
        memory=Memory(folder, stage),
        seed=stage,
        total_steps=10,
        device=torch.device("cpu"),
        loss_scale=loss_scale,
    )


def named(module: nn.Module) -> Weights:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def task_loss(module: nn.Module, data: Task) -> Tensor:
    return F.cross_entropy(module(data.train.images), data.train.labels)


def written_out(module: nn.Module, energy: Energy) -> tuple[float, Weights]:
    """The penalty and the gradient of loss plus penalty by autograd."""
    weights = named(module)
    penalty = energy(weights)
    total = task_loss(module, task(1)) + penalty
    gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    filled = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(weights.values(), gradients, strict=True)
    ]
    return penalty.item(), dict(zip(weights, filled, strict=True))


def through_the_hook(method: Penalty, run: TaskRun) -> tuple[float, Weights]:
    """The same through backward of the (scaled) loss alone, and ``before_step``."""
    run.model.zero_grad()
    (run.loss_scale * task_loss(run.model, task(1))).backward()
    value = method.before_step(run)
    assert value is not None
    assert not value.requires_grad
    return float(value), {name: p.grad for name, p in named(run.model).items()}


def move(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.dtype))


def assert_agree(
    ours: tuple[float, Weights], oracle: tuple[float, Weights], rtol: float = 1e-12
) -> None:
    assert ours[0] == pytest.approx(oracle[0], rel=rtol, abs=1e-14)
    assert ours[1].keys() == oracle[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in oracle[1].values())
    for name, gradient in ours[1].items():
        atol = rtol * max(largest, 1e-3)
        torch.testing.assert_close(gradient, oracle[1][name], rtol=rtol, atol=atol, msg=name)


# L1 and L2.


def l1_energy(strength: float, anchor: Weights) -> Energy:
    return lambda theta: strength * sum((theta[n] - anchor[n]).abs().sum() for n in theta)


def l2_energy(strength: float, anchor: Weights) -> Energy:
    return lambda theta: strength / 2 * sum(((theta[n] - anchor[n]) ** 2).sum() for n in theta)


ENERGIES = {L1: l1_energy, L2: l2_energy}
both = pytest.mark.parametrize("kind", [L1, L2])


@both
@strengths
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient(
    kind: type[Penalty], strength: float, seed: int, tmp_path: Path
) -> None:
    anchor = copy_weights(model(seed=10 + seed))
    run = task_run(model(seed), tmp_path, previous=anchor)
    method = kind(strength=strength)
    method.start_task(run)
    assert all(torch.equal(p, anchor[name]) for name, p in run.model.named_parameters())
    energy = ENERGIES[kind](strength, anchor)
    for step in range(3):
        move(run.model, seed=step)
        assert_agree(through_the_hook(method, run), written_out(run.model, energy))


@both
def test_at_the_anchor_nothing_pulls(kind: type[Penalty], tmp_path: Path) -> None:
    run = task_run(model(), tmp_path)
    method = kind(strength=5.0)
    method.start_task(run)
    value, gradients = through_the_hook(method, run)
    assert value == 0.0
    assert_agree((0.0, gradients), written_out(run.model, lambda theta: torch.tensor(0.0)), 1e-15)


def test_l1_does_not_pull_a_weight_that_is_where_it_was(tmp_path: Path) -> None:
    run = task_run(model(), tmp_path)
    method = L1(strength=2.0)
    method.start_task(run)
    with torch.no_grad():
        run.model.unused[0] += torch.tensor([0.5, 0.0, -1e-9])
    value, gradients = through_the_hook(method, run)
    assert value == pytest.approx(2 * (0.5 + 1e-9), abs=1e-15)
    assert gradients["unused"].tolist() == [[2.0, 0.0, -2.0], [0.0, 0.0, 0.0]]


@both
def test_the_anchor_is_a_copy(kind: type[Penalty], tmp_path: Path) -> None:
    module = model()
    before = copy_weights(module)
    method = kind(strength=1.0)
    run = task_run(module, tmp_path, previous=before)
    method.start_task(run)
    move(module, 1)
    for tensor in before.values():
        tensor.fill_(0.0)  # the caller's own dictionary is not held on to either
    value, _ = through_the_hook(method, run)
    oracle, _ = written_out(module, ENERGIES[kind](1.0, copy_weights(model())))
    assert value == pytest.approx(oracle, rel=1e-12)


@both
def test_a_new_task_has_a_new_anchor(kind: type[Penalty], tmp_path: Path) -> None:
    module, method = model(), kind(strength=0.5)
    method.start_task(task_run(module, tmp_path, stage=1))
    move(module, 1)
    second = copy_weights(module)
    run = task_run(module, tmp_path, stage=2)
    method.start_task(run)
    move(module, 2)
    oracle = written_out(module, ENERGIES[kind](0.5, second))
    assert_agree(through_the_hook(method, run), oracle)


@pytest.mark.parametrize("kind", [L1, L2, EWC])
def test_the_first_task_is_not_penalised(kind: type[Penalty], tmp_path: Path) -> None:
    run = task_run(model(), tmp_path, stage=0)
    method = kind(strength=3.0)
    method.start_task(run)
    move(run.model, 1)
    run.model.zero_grad()
    assert method.before_step(run) is None
    assert all(p.grad is None for p in run.model.parameters())
    assert method.training_identity(0) == {}
    assert method.training_identity(1) != {}


@both
def test_float32_is_float64_up_to_rounding(kind: type[Penalty], tmp_path: Path) -> None:
    single, double = model(dtype=torch.float32), model()
    results = []
    for module in (single, double):
        load_weights_(double, copy_weights(single))
        run = task_run(module, tmp_path)
        run.tasks = (task(1, dtype=next(module.parameters()).dtype),)
        method = kind(strength=1.5)
        method.start_task(run)
        with torch.no_grad():
            for parameter in named(module).values():
                parameter.add_(0.125)
        module.zero_grad()
        value = method.before_step(run)
        results.append((float(value), {n: p.grad.double() for n, p in named(module).items()}))
    assert_agree(results[0], results[1], rtol=1e-5)


# What holds for all three.


def ready(kind: type[Penalty], folder: Path, strength: float = 0.7) -> tuple[Penalty, TaskRun]:
    """A method in its second task, away from its anchor."""
    module = model()
    if kind is EWC:
        values = {n: torch.rand_like(p.detach()) + 0.1 for n, p in named(module).items()}
        Memory(folder, 0).save("ewc", consolidate(None, values, copy_weights(module)))
    run = task_run(module, folder)
    method = kind(strength=strength)
    method.start_task(run)
    move(module, 3)
    return method, run


every = pytest.mark.parametrize("kind", [L1, L2, EWC])


@every
@pytest.mark.parametrize("scale", [1.0, 2.0**16, 2.0**-3])
def test_the_gradient_has_the_scale_of_the_loss_and_the_value_has_not(
    kind: type[Penalty], scale: float, tmp_path: Path
) -> None:
    method, run = ready(kind, tmp_path)
    plain_value, plain = through_the_hook(method, run)
    run.loss_scale = scale
    value, scaled = through_the_hook(method, run)
    assert value == plain_value
    for name, gradient in scaled.items():
        torch.testing.assert_close(gradient / scale, plain[name], rtol=1e-12, atol=1e-12)


@every
def test_a_parameter_that_the_loss_does_not_reach_is_pulled_all_the_same(
    kind: type[Penalty], tmp_path: Path
) -> None:
    method, run = ready(kind, tmp_path)
    task_loss(run.model, task(1)).backward()
    assert run.model.unused.grad is None
    method.before_step(run)
    assert (run.model.unused.grad != 0).all()
    moved_by = run.model.unused.detach() - model().unused.detach()
    assert torch.equal(run.model.unused.grad.sign(), moved_by.sign())


@every
def test_nothing_but_trainable_gradients_changes(kind: type[Penalty], tmp_path: Path) -> None:
    method, run = ready(kind, tmp_path)
    before = copy_weights(run.model)
    _, gradients = through_the_hook(method, run)
    assert sorted(gradients) == sorted(TRAINABLE)
    assert run.model.frozen.grad is None
    after = copy_weights(run.model)
    assert all(torch.equal(after[name], before[name]) for name in before)


@every
def test_gradients_are_added_to_not_replaced(kind: type[Penalty], tmp_path: Path) -> None:
    method, run = ready(kind, tmp_path)
    run.model.zero_grad()
    method.before_step(run)
    alone = {name: p.grad.clone() for name, p in named(run.model).items()}
    method.before_step(run)
    for name, parameter in named(run.model).items():
        torch.testing.assert_close(parameter.grad, 2 * alone[name], rtol=1e-15, atol=0)


# EWC.


def slow_fisher(module: nn.Module, data: Task) -> Weights:
    """The mean of squared gradients for the true labels, one example at a time."""
    weights = named(module)
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        loss = F.cross_entropy(module(image.unsqueeze(0)), label.unsqueeze(0))
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient**2
    return {name: values / len(data.train) for name, values in total.items()}


def ewc_energy(strength: float, past: list[tuple[Weights, Weights]]) -> Energy:
    def energy(theta: Weights) -> Tensor:
        parts = [
            (values[name] * (theta[name] - anchor[name]) ** 2).sum()
            for values, anchor in past
            for name in theta
        ]
        return strength / 2 * torch.stack(parts).sum()

    return energy


@strengths
def test_ewc_over_a_stream_of_tasks(strength: float, tmp_path: Path) -> None:
    module = model()
    method = EWC(strength=strength, labels="true", samples=None)
    past: list[tuple[Weights, Weights]] = []
    for stage in range(4):
        run = task_run(module, tmp_path, stage=stage, last=stage == 3)
        method.start_task(run)
        move(module, seed=stage)
        if past:
            # Fisher values are kept in float32.
            oracle = written_out(module, ewc_energy(strength, past))
            assert_agree(through_the_hook(method, run), oracle, rtol=2e-6)
        past.append((slow_fisher(module, run.tasks[0]), copy_weights(module)))
        method.end_task(run)
    # The last two: one to go on from, one in case stage 2 was killed and is done again.
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["ewc-0001.safetensors", "ewc-0002.safetensors"]


@quick
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([0.01, 1.0, 40.0]))
def test_ewc_gradient_in_float64(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, strength: float
) -> None:
    folder = tmp_path_factory.mktemp("memory")
    generator = torch.Generator().manual_seed(seed)
    module, kept, past = model(), None, []
    for _ in range(count):
        move(module, seed=int(torch.randint(2**31, (), generator=generator)))
        values = {
            name: torch.rand(p.shape, generator=generator, dtype=torch.float64)
            * torch.randint(2, p.shape, generator=generator)  # half of them are 0
            for name, p in named(module).items()
        }
        past.append((values, copy_weights(module)))
        kept = consolidate(kept, *past[-1])
    assert kept is not None
    Memory(folder, 0).save("ewc", kept)
    run = task_run(module, folder)
    method = EWC(strength=strength)
    method.start_task(run)
    move(module, seed=1)
    oracle = written_out(module, ewc_energy(strength, past))
    assert_agree(through_the_hook(method, run), oracle, rtol=1e-11)


numbers = st.floats(-10, 10)
fishers = st.one_of(st.just(0.0), st.floats(1e-6, 1e3))


@quick
@given(
    st.lists(st.lists(st.tuples(fishers, numbers), min_size=3, max_size=3), min_size=1, max_size=6),
    st.lists(numbers, min_size=3, max_size=3),
)
def test_consolidate_is_the_explicit_sum_over_tasks(
    tasks: list[list[tuple[float, float]]], theta: list[float]
) -> None:
    kept = None
    for one in tasks:
        values, weights = torch.tensor(one, dtype=torch.float64).unbind(dim=1)
        before = None if kept is None else {name: t.clone() for name, t in kept.items()}
        result = consolidate(
            kept,
            {"a": values[:2].reshape(2, 1), "b": values[2]},
            {"a": weights[:2].reshape(2, 1), "b": weights[2]},
        )
        if kept is not None and before is not None:
            assert all(torch.equal(kept[name], before[name]) for name in before)
        kept = result
    assert kept is not None
    assert set(kept) == {"precision.a", "precision.b", "centre.a", "centre.b", "offset"}
    energy = float(kept["offset"])
    for name, at in (("a", theta[:2]), ("b", theta[2])):
        here = torch.tensor(at, dtype=torch.float64).reshape(kept[f"centre.{name}"].shape)
        energy += float((kept[f"precision.{name}"] * (here - kept[f"centre.{name}"]) ** 2).sum())
    explicit = sum(f * (theta[j] - w) ** 2 for one in tasks for j, (f, w) in enumerate(one))
    # The centre is as exact as the largest weight that went into it.
    widest = [abs(theta[j]) + max(abs(one[j][1]) for one in tasks) for j in range(3)]
    size = sum(f * widest[j] ** 2 for one in tasks for j, (f, _) in enumerate(one))
    assert energy == pytest.approx(explicit, rel=1e-12, abs=1e-13 * size)
    precision = torch.cat([kept["precision.a"].flatten(), kept["precision.b"].reshape(1)])
    for j in range(3):
        assert precision[j].item() == pytest.approx(sum(one[j][0] for one in tasks), rel=1e-14)


def test_consolidate_by_hand() -> None:
    def single(value: float) -> Weights:
        return {"w": torch.tensor([value], dtype=torch.float64)}

    kept = consolidate(None, single(1.0), single(0.0))
    kept = consolidate(kept, single(3.0), single(4.0))
    # 1 t^2 + 3 (t - 4)^2 = 4 (t - 3)^2 + 12
    assert kept["precision.w"].item() == 4.0
    assert kept["centre.w"].item() == 3.0
    assert kept["offset"].item() == 12.0


def test_a_task_that_ends_twice_counts_once(tmp_path: Path) -> None:
    """Killed after its memory was written, before the stage was recorded; then done again."""
    module, method = model(), EWC(labels="true")
    for stage in range(2):
        move(module, stage)
        method.end_task(task_run(module, tmp_path, stage=stage))
    once = Memory(tmp_path, 2).load("ewc")
    method.end_task(task_run(module, tmp_path, stage=1))
    twice = Memory(tmp_path, 2).load("ewc")
    assert once is not None
    assert twice is not None
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_after_the_last_task_nothing_is_kept(tmp_path: Path) -> None:
    EWC().end_task(task_run(model(), tmp_path, stage=0, last=True))
    assert list(tmp_path.iterdir()) == []


# EWC as merging (paper, A.3).


def test_one_ewc_step_after_the_task_step_is_eq_14(tmp_path: Path) -> None:
    eta = 0.2
    module = model()
    theta_o = copy_weights(module)
    f_o = {n: torch.rand_like(p.detach()) * 2 for n, p in named(module).items()}
    Memory(tmp_path, 0).save("ewc", consolidate(None, f_o, theta_o))
    run = task_run(module, tmp_path)
    method = EWC(strength=1.0)
    method.start_task(run)
    move(module, 5)
    optimizer = torch.optim.SGD(module.parameters(), lr=eta)

    task_loss(module, task(1)).backward()
    optimizer.step()  # eq. 13
    star = copy_weights(module)
    optimizer.zero_grad()
    method.before_step(run)
    optimizer.step()  # the penalty's own step

    shares = {name: eta * values for name, values in f_o.items()}
    merged = fisher_merge(
        [{name: theta_o[name] for name in f_o}, {name: star[name] for name in f_o}],
        [shares, {name: 1 - share for name, share in shares.items()}],
        floor=0.0,
    )
    for name, parameter in named(module).items():
        eq_14 = (1 - shares[name]) * star[name] + shares[name] * theta_o[name]
        assert (parameter - star[name]).abs().max() > 1e-3
        torch.testing.assert_close(parameter.detach(), eq_14, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(parameter.detach(), merged[name], rtol=1e-13, atol=1e-13)


@quick
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 20), st.floats(0.05, 20))
def test_eq_15_is_eq_16_is_the_merging_rule(seed: int, lambda_o: float, lambda_t: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    theta_o, theta_t = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    f_o, f_t = torch.rand(2, 7, 3, generator=generator, dtype=torch.float64) + 1e-3
    mass = lambda_o * f_o + lambda_t * f_t
    eq_15 = (lambda_o * f_o * theta_o + lambda_t * f_t * theta_t) / mass
    share = lambda_o * f_o / mass
    eq_16 = (1 - share) * theta_t + share * theta_o
    merged = fisher_merge(
        [{"w": theta_o}, {"w": theta_t}],
        [{"w": f_o}, {"w": f_t}],
        weights=[lambda_o, lambda_t],
        floor=0.0,
    )["w"]
    torch.testing.assert_close(eq_15, eq_16, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(merged, eq_15, rtol=1e-12, atol=1e-13)
