"""One task's training against plain PyTorch loops that know nothing of ``transformers``."""

import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import PrivateAttr, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import set_seed

from stockpot.errors import NonFiniteError
from stockpot.experiment import load_experiment, run_experiment
from stockpot.methods import Memory, Method, TaskRun
from stockpot.methods.l2 import L2
from stockpot.methods.sfa import SFA
from stockpot.models.learner import ImageLearner, copy_weights, load_weights_
from stockpot.streams.data import ImageData, Task
from stockpot.training import TrainingSettings
from stockpot.training.trainer import Trained, train_task
from support.experiments import lines, run_file, write_experiment

Weights = dict[str, Tensor]
LABELS = 4
SEED = 11


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> Iterator[None]:
    """The Trainer collects garbage at every call; what is alive now need not be searched."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# What is trained.


def images(examples: int, seed: int = 0) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(examples, 1, 3, 3, generator=generator)
    return ImageData(pixels, torch.randint(LABELS, (examples,), generator=generator))


def network(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, LABELS))


def with_dropout() -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Linear(9, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, LABELS))
    return nn.Sequential(nn.Flatten(), *layers)


def settings(**given: Any) -> TrainingSettings:
    return TrainingSettings(**{"device": "cpu", "checkpoint_seconds": None, **given})


class Watched(Method):
    """Plain fine-tuning that writes down when it is called and what the weights are."""

    name: ClassVar[str] = "watched"
    _calls: list[str] = PrivateAttr(default_factory=list)
    _steps: list[int] = PrivateAttr(default_factory=list)
    _weights: list[Weights] = PrivateAttr(default_factory=list)

    def before_step(self, run: TaskRun) -> Tensor | None:
        self._calls.append("before")
        return None

    def after_step(self, run: TaskRun, step: int) -> None:
        self._calls.append("after")
        self._steps.append(step)
        self._weights.append(run.weights())


class Pull(Watched):
    """A penalty ``strength * sum(theta)``: the same gradient everywhere, and a value to log."""

    name: ClassVar[str] = "pull"
    strength: float = 1.0

    def before_step(self, run: TaskRun) -> Tensor | None:
        super().before_step(run)
        total = torch.zeros(())
        for parameter in run.model.parameters():
            assert parameter.grad is not None
            parameter.grad += self.strength
            total = total + parameter.detach().sum()
        return self.strength * total


class FetchLog(ImageData):
    """Labelled images that remember which rows were asked for, batch by batch."""

    def __init__(self, examples: int) -> None:
        super().__init__(images(examples).images, images(examples).labels)
        self.batches: list[list[int]] = []

    def __getitems__(self, indices: Any) -> Any:
        self.batches.append(torch.as_tensor(indices).tolist())
        return super().__getitems__(indices)


def train(
    folder: Path,
    using: TrainingSettings,
    method: Method | None = None,
    data: ImageData | None = None,
    model: nn.Module | None = None,
    seed: int = SEED,
    stage: int = 0,
    **options: Any,
) -> tuple[Weights, Trained]:
    """Call the code under test; gives the trained weights and what it says about them."""
    model = network() if model is None else model
    data = images(40) if data is None else data
    method = Watched() if method is None else method
    start = copy_weights(model)
    run = TaskRun(
        stage=stage,
        last=True,
        tasks=(Task("task", data, data),),
        past=(),
        learner=ImageLearner(model),
        start=start,
        previous=start,
        memory=Memory(folder / "memory", stage),
        seed=seed,
        total_steps=using.steps_for(len(data)),
        device=torch.device("cpu"),
    )
    method.start_task(run)
    trained = train_task(method, run, data, using, folder / "scratch", **options)
    return run.weights(), trained


# The same training, written down again.


def order(examples: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The documented rule: a permutation from ``seed * 1_000_003 + epoch``, cut into batches."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    rows = torch.randperm(examples, generator=generator)
    return [rows[i : i + batch_size] for i in range(0, examples, batch_size)]


def rate_at(step: int, total: int, schedule: str, warmup: float) -> float:
    """The factor of the learning rate at a 1-based step: up from 0, then as the schedule says."""
    before, rising = step - 1, round(warmup * total)
    if before < rising:
        return before / rising
    if schedule == "constant":
        return 1.0
    share = (before - rising) / (total - rising)
    return 1 - share if schedule == "linear" else (1 + math.cos(math.pi * share)) / 2


def plain_loop(
    using: TrainingSettings,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    data: ImageData | tuple[Tensor, Tensor],
    steps: int | None = None,
    seed: int = SEED,
    pull: float = 0.0,
) -> tuple[list[Weights], list[float]]:
    """Weights and loss after every step."""
    pixels, labels = (data.images, data.labels) if isinstance(data, ImageData) else data
    total = using.steps_for(len(labels))
    accumulate, batch_size = using.gradient_accumulation, using.batch_size
    history: list[Weights] = []
    losses: list[float] = []
    epoch = 0
    while len(history) < (total if steps is None else steps):
        batches = order(len(labels), batch_size, seed, epoch)
        epoch += 1
        for begin in range(0, len(batches), accumulate):
            window = batches[begin : begin + accumulate]
            optimizer.zero_grad()
            loss_of_step = 0.0
            for rows in window:
                loss = F.cross_entropy(model(pixels[rows]), labels[rows], reduction="sum")
                loss = loss / sum(len(rows) for rows in window)
                loss.backward()
                loss_of_step += float(loss.detach())
            gradients = [p.grad for p in model.parameters()]
            if pull:
                loss_of_step += pull * sum(float(p.detach().sum()) for p in model.parameters())
                for gradient in gradients:
                    gradient += pull
            if using.max_grad_norm is not None:
                norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
                for gradient in gradients:
                    gradient *= min(1.0, using.max_grad_norm / (norm + 1e-6))
            factor = rate_at(len(history) + 1, total, using.schedule, using.warmup)
            optimizer.param_groups[0]["lr"] = using.learning_rate * factor
            optimizer.step()
            losses.append(loss_of_step)
            history.append({n: p.detach().clone() for n, p in model.named_parameters()})
            if len(history) == (total if steps is None else steps):
                break
    return history, losses


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0, fused=False, foreach=False, **options)


def assert_close(one: Weights, other: Weights, tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


def distance(one: Weights, other: Weights) -> float:
    return math.sqrt(sum(float((one[n] - other[n]).double().square().sum()) for n in one))


# Optimizers.


OPTIMIZERS: dict[str, tuple[dict[str, Any], Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "adam": (
        {"optimizer": "adam", "learning_rate": 0.01},
        lambda m: torch.optim.Adam(m.parameters(), foreach=False),
    ),
    "adamw": (
        {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.3},
        lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.3, foreach=False),
    ),
    "sgd": ({"optimizer": "sgd", "learning_rate": 0.3}, sgd),
    "sgd with momentum": (
        {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.05},
        lambda m: sgd(m, momentum=0.9, weight_decay=0.05),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_follow_a_plain_loop_at_every_step(name, tmp_path):
    given, build = OPTIMIZERS[name]
    using = settings(batch_size=16, epochs=4, **given)
    method, model = Watched(), network()
    trained, _ = train(tmp_path, using, method)
    history, _ = plain_loop(using, build(model), model, images(40))
    assert len(history) == len(method._weights) == 12
    for ours, theirs in zip(method._weights, history, strict=True):
        assert_close(ours, theirs)
    assert_close(trained, history[-1])
    assert distance(trained, copy_weights(network())) > 0.1  # it did move


def test_decay_and_momentum_change_the_weights(tmp_path):
    """So that the comparison above is one of these settings and not of plain steps."""
    for name, key in (("adamw", "weight_decay"), ("sgd with momentum", "momentum")):
        given = {**OPTIMIZERS[name][0], "batch_size": 16, "epochs": 4}
        with_it, _ = train(tmp_path, settings(**given))
        without, _ = train(tmp_path, settings(**{**given, key: 0.0}))
        assert distance(with_it, without) > 1e-2


def test_frozen_weights_stay(tmp_path):
    model = network()
    model[1].weight.requires_grad_(False)
    before = copy_weights(model)
    after, _ = train(
        tmp_path, settings(optimizer="adamw", weight_decay=0.5, learning_rate=0.1), model=model
    )
    assert torch.equal(before["1.weight"], after["1.weight"])
    assert not torch.equal(before["1.bias"], after["1.bias"])


# Steps, accumulation, data.


@pytest.mark.parametrize("examples", [48, 40, 44, 33, 8, 3])
def test_accumulation_of_two_is_a_batch_twice_as_big(examples, tmp_path):
    """In an epoch's last window, 40: one micro-batch; 44: 8 and 4 examples; 33 and 3: a few."""
    common = {"optimizer": "sgd", "learning_rate": 0.5, "momentum": 0.5, "epochs": 3}
    small, large = Watched(), Watched()
    data = images(examples)
    train(tmp_path, settings(batch_size=8, gradient_accumulation=2, **common), small, data)
    train(tmp_path, settings(batch_size=16, **common), large, data)
    steps = 3 * math.ceil(examples / 16)
    assert small._steps == large._steps == list(range(1, steps + 1))
    assert small._calls == ["before", "after"] * steps
    for one, other in zip(small._weights, large._weights, strict=True):
        assert_close(one, other)


def test_accumulation_follows_a_plain_loop_and_adds_the_penalty_once(tmp_path):
    using = settings(
        batch_size=6, gradient_accumulation=3, epochs=4, optimizer="sgd", learning_rate=0.1
    )
    method, model = Pull(strength=0.02), network()
    trained, about = train(tmp_path, using, method)
    history, losses = plain_loop(using, sgd(model), model, images(40), pull=0.02)
    assert method._steps == list(range(1, 13))
    assert_close(trained, history[-1])
    assert about.losses == [(n, pytest.approx(v, abs=1e-5)) for n, v in enumerate(losses, 1)]


@given(
    examples=st.integers(1, 23),
    batch_size=st.integers(1, 9),
    accumulate=st.integers(1, 4),
    epochs=st.integers(1, 3),
)
@hypothesis_settings(max_examples=25, deadline=None)
def test_steps_are_those_that_show_every_example_once_an_epoch(
    tmp_path_factory, examples, batch_size, accumulate, epochs
):
    using = settings(batch_size=batch_size, gradient_accumulation=accumulate, epochs=epochs)
    data, method, told = FetchLog(examples), Watched(), []
    _, about = train(
        tmp_path_factory.mktemp("steps"), using, method, data, on_step=lambda s, _: told.append(s)
    )
    steps = using.steps_for(examples)
    assert about.steps == steps
    assert told == method._steps == list(range(1, steps + 1))
    assert method._calls == ["before", "after"] * steps
    shown = [row for batch in data.batches for row in batch]
    assert len(shown) == epochs * examples
    for epoch in range(epochs):
        assert sorted(shown[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


@given(
    examples=st.integers(1, 500),
    batch_size=st.integers(1, 64),
    accumulate=st.integers(1, 9),
    epochs=st.integers(1, 9),
)
def test_steps_for_counts_windows(examples, batch_size, accumulate, epochs):
    using = settings(batch_size=batch_size, gradient_accumulation=accumulate, epochs=epochs)
    batches = range(0, examples, batch_size)
    windows = len(batches[::accumulate])
    assert using.steps_for(examples) == epochs * windows


@pytest.mark.parametrize("steps", [1, 4, 13])
def test_steps_override_epochs(steps, tmp_path):
    """Fewer than an epoch, and more than the epochs given; the data goes round."""
    using = settings(batch_size=8, epochs=2, steps=steps, optimizer="sgd", learning_rate=0.2)
    method, model = Watched(), network()
    trained, about = train(tmp_path, using, method)
    assert about.steps == steps
    assert method._steps == list(range(1, steps + 1))
    history, _ = plain_loop(using, sgd(model), model, images(40), steps=steps)
    assert_close(trained, history[-1])


def test_data_order_is_the_seeds_and_the_epochs_own(tmp_path):
    def shown(seed: int) -> list[list[int]]:
        data = FetchLog(40)
        train(tmp_path, settings(batch_size=16, epochs=3), None, data, seed=seed)
        return data.batches

    one, again, other = shown(3), shown(3), shown(4)
    assert one == again
    assert one != other
    epochs = [one[0:3], one[3:6], one[6:9]]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    written = [rows.tolist() for epoch in range(3) for rows in order(40, 16, 3, epoch)]
    assert one == written


def test_data_order_does_not_depend_on_the_global_generator(tmp_path):
    torch.manual_seed(5)
    one, _ = train(tmp_path, settings(), model=network())
    torch.manual_seed(6)
    torch.rand(100)
    other, _ = train(tmp_path, settings(), model=network())
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("seed", [0, 2**31, 2**40 + 7])
def test_any_seed_trains(seed, tmp_path):
    using = settings(batch_size=16, epochs=2, optimizer="sgd", learning_rate=0.2)
    model = network()
    trained, _ = train(tmp_path, using, seed=seed)
    history, _ = plain_loop(using, sgd(model), model, images(40), seed=seed)
    assert_close(trained, history[-1])


# Schedules.


@pytest.mark.parametrize("warmup", [0.0, 0.3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_follow_the_formula_at_every_step(schedule, warmup, tmp_path):
    using = settings(
        batch_size=16,
        epochs=4,
        optimizer="sgd",
        learning_rate=0.4,
        schedule=schedule,
        warmup=warmup,
    )
    method, model = Watched(), network()
    train(tmp_path, using, method)
    history, _ = plain_loop(using, sgd(model), model, images(40))
    for ours, theirs in zip(method._weights, history, strict=True):
        assert_close(ours, theirs)
    start = copy_weights(network())
    assert (distance(method._weights[0], start) == 0) == (warmup > 0)  # rises from 0


def test_warmup_that_rounds_to_no_step_is_no_warmup(tmp_path):
    common = {"batch_size": 16, "optimizer": "sgd", "learning_rate": 0.4}  # T = 3
    for schedule in ("constant", "linear"):
        with_it, _ = train(tmp_path, settings(warmup=0.1, schedule=schedule, **common))
        without, _ = train(tmp_path, settings(schedule=schedule, **common))
        assert all(torch.equal(with_it[name], without[name]) for name in without)


# Penalties and clipping.


@pytest.mark.parametrize("strength", [0.01, 1e6])
def test_penalties_are_added_before_clipping(strength, tmp_path):
    using = settings(batch_size=16, epochs=2, optimizer="sgd", learning_rate=0.5, max_grad_norm=0.1)
    method, model = Pull(strength=strength), network()
    start = copy_weights(network())
    trained, _ = train(tmp_path, using, method)
    history, _ = plain_loop(using, sgd(model), model, images(40), pull=strength)
    assert_close(trained, history[-1], 1e-4 if strength > 1 else 1e-5)
    # Whatever the penalty, a step is no longer than the clipped sum: 0.5 * 0.1.
    before = start
    for after in method._weights:
        assert distance(before, after) == pytest.approx(0.05, rel=1e-3)
        before = after


def test_a_large_max_grad_norm_and_none_are_the_same(tmp_path):
    common = {"batch_size": 16, "optimizer": "sgd", "learning_rate": 0.5}
    one, _ = train(tmp_path, settings(max_grad_norm=1e9, **common))
    other, _ = train(tmp_path, settings(**common))
    assert_close(one, other, 1e-7)


def test_l2_trains_on_its_written_loss(tmp_path):
    """Loss + strength / 2 * distance squared, by autograd."""
    using = settings(batch_size=16, epochs=3, optimizer="sgd", learning_rate=0.2)
    trained, about = train(tmp_path, using, L2(strength=0.7), stage=1)
    model, data = network(), images(40)
    anchor = [p.detach().clone() for p in model.parameters()]
    optimizer, losses = sgd(model), []
    optimizer.param_groups[0]["lr"] = 0.2
    for epoch in range(3):
        for rows in order(40, 16, SEED, epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.images[rows]), data.labels[rows])
            for p, a in zip(model.parameters(), anchor, strict=True):
                loss = loss + 0.35 * (p - a).square().sum()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert_close(trained, {n: p.detach() for n, p in model.named_parameters()})
    assert about.losses == [(n, pytest.approx(v, abs=1e-5)) for n, v in enumerate(losses, 1)]


# The log of losses.


def window_means(losses: list[float], window: int) -> list[tuple[int, float]]:
    cut = [losses[i : i + window] for i in range(0, len(losses), window)]
    ends = [min(i + window, len(losses)) for i in range(0, len(losses), window)]
    return [(end, sum(part) / len(part)) for end, part in zip(ends, cut, strict=True)]


LOGGED = settings(batch_size=8, steps=103, optimizer="sgd", learning_rate=0.05)  # windows of 3


def test_logged_losses_are_means_over_windows_with_their_penalty(tmp_path):
    told: list[tuple[int, float | None]] = []
    _, about = train(
        tmp_path, LOGGED, Pull(strength=0.01), on_step=lambda *event: told.append(event)
    )
    model = network()
    _, losses = plain_loop(LOGGED, sgd(model), model, images(40), pull=0.01)
    expected = window_means(losses, 3)
    assert len(about.losses) == 35
    assert about.losses == [(step, pytest.approx(mean, abs=1e-5)) for step, mean in expected]
    assert about.losses[-1][0] == 103  # the last window, of a single step
    assert [event for event in told if event[1] is not None] == about.losses
    assert [step for step, _ in told] == list(range(1, 104))


@pytest.mark.parametrize("stop", [31, 32, 33])
def test_windows_are_the_same_across_a_resume(stop, tmp_path):
    """Stopped so that the checkpoint lies before, at and after the end of a window."""
    using = LOGGED.model_copy(update={"checkpoint_seconds": 0.0})
    _, whole = train(tmp_path / "whole", LOGGED, Pull(strength=0.01))
    interrupt(tmp_path / "cut", using, stop, network, lambda: Pull(strength=0.01))
    _, resumed = train(tmp_path / "cut", using, Pull(strength=0.01))
    assert resumed.losses == whole.losses


# Errors.


def poisoned(bad: float) -> tuple[ImageData, int]:
    """Data with one bad pixel, and the 1-based step of LOOP whose batch has it."""
    data = images(40)
    data.images[order(40, 8, SEED, 0)[3][5], 0, 1, 1] = bad
    return data, 4


LOOP = settings(batch_size=8, epochs=2, optimizer="sgd", learning_rate=0.3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_loss_stops_before_the_weights_change(bad, tmp_path):
    data, step = poisoned(bad)
    model, method = network(), Watched()
    with pytest.raises(NonFiniteError) as caught:
        train(tmp_path, LOOP, method, data, model, where="run sfa-seed0, task 'even'")
    assert "run sfa-seed0, task 'even'" in str(caught.value)
    assert f"step {step} of 10" in str(caught.value)
    assert method._steps == list(range(1, step))
    clean = network()
    history, _ = plain_loop(LOOP, sgd(clean), clean, images(40), steps=step - 1)
    assert_close(copy_weights(model), history[-1])


def test_non_finite_loss_names_the_optimizer_step_and_not_the_micro_batch(tmp_path):
    data, micro = poisoned(math.nan)
    using = LOOP.model_copy(update={"gradient_accumulation": 2})
    with pytest.raises(NonFiniteError, match=rf"step {math.ceil(micro / 2)} of 6"):
        train(tmp_path, using, None, data)


def test_non_finite_penalty_stops_before_the_weights_change(tmp_path):
    model = network()
    before = copy_weights(model)
    with pytest.raises(NonFiniteError, match="step 1 of 10"):
        train(tmp_path, LOOP, Pull(strength=math.inf), model=model)
    after = copy_weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_that_overflow_in_the_last_step_are_refused(tmp_path):
    using = settings(steps=1, optimizer="sgd", learning_rate=1e38, batch_size=40)
    data = images(40)
    data.images *= 1e3  # a finite loss with large gradients
    with pytest.raises(NonFiniteError, match=r"task 'last': weight '\d\.(weight|bias)'"):
        train(tmp_path, using, None, data, where="task 'last'")


def test_weights_that_overflow_earlier_stop_at_the_next_loss(tmp_path):
    using = settings(steps=5, optimizer="sgd", learning_rate=1e38, batch_size=40)
    data, method = images(40), Watched()
    data.images *= 1e3
    with pytest.raises(NonFiniteError, match="step 2 of 5"):
        train(tmp_path, using, method, data)
    assert method._steps == [1]


# Resume.


class Stop(KeyboardInterrupt):
    pass


def interrupt(
    folder: Path,
    using: TrainingSettings,
    at: int,
    model: Callable[[], nn.Module],
    method: Callable[[], Method],
    **options: Any,
) -> None:
    """Train and stop in step ``at``, so that the checkpoint left is that of the step before."""

    def on_step(step: int, _: float | None) -> None:
        if step == at:
            raise Stop

    with pytest.raises(Stop):
        train(folder, using, method(), model=model(), on_step=on_step, **options)
    if at > 1:
        assert [p.name for p in (folder / "scratch").glob("checkpoint-*")] == [
            f"checkpoint-{at - 1}"
        ]


RESUMED = settings(
    batch_size=4,
    gradient_accumulation=2,
    epochs=3,
    optimizer="adamw",
    learning_rate=0.02,
    weight_decay=0.1,
    schedule="cosine",
    warmup=0.2,
    max_grad_norm=0.5,
    checkpoint_seconds=0.0,
)
"""T = 15: five steps an epoch."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    using = RESUMED.model_copy(update={"checkpoint_seconds": None})
    return train(
        tmp_path_factory.mktemp("whole"), using, SFA(p=0.25), model=with_dropout(), stage=1
    )


def assert_same(one: tuple[Weights, Trained], other: tuple[Weights, Trained]) -> None:
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1].losses == other[1].losses
    assert one[1].steps == other[1].steps


@pytest.mark.parametrize("stop", [1, 2, 3, 6, 7, 11, 15])
def test_resumes_with_dropout_to_the_same_weights(uninterrupted, stop, tmp_path):
    """6 and 11: the checkpoint lies at the end of an epoch."""
    interrupt(tmp_path, RESUMED, stop, with_dropout, lambda: SFA(p=0.25), stage=1)
    fetched = FetchLog(40)
    torch.manual_seed(stop)  # the generator is elsewhere now
    resumed = train(tmp_path, RESUMED, SFA(p=0.25), fetched, model=with_dropout(), stage=1)
    assert_same(resumed, uninterrupted)
    # It did go on, and did not start again: of 30 batches those after the checkpoint.
    assert len(fetched.batches) == 30 - 2 * (stop - 1)
    assert not (tmp_path / "scratch").exists()


def test_dropout_is_active_and_the_seeds(uninterrupted, tmp_path):
    given = {"model": with_dropout(), "stage": 1}
    again = train(tmp_path, RESUMED, SFA(p=0.25), **given)
    assert_same(again, uninterrupted)
    rate_zero = with_dropout()
    rate_zero[3].p = 0.0
    other, _ = train(tmp_path, RESUMED, SFA(p=0.25), model=rate_zero, stage=1)
    assert distance(other, uninterrupted[0]) > 1e-2


def test_dropout_follows_from_the_seed(tmp_path):
    """With forty copies of one example the order of the data does not matter."""
    one = images(1)
    data = ImageData(one.images.expand(40, -1, -1, -1), one.labels.expand(40))
    using = settings(batch_size=10, optimizer="sgd", learning_rate=0.3)
    weights = [
        train(tmp_path, using, None, data, with_dropout(), seed=seed)[0] for seed in (3, 3, 4)
    ]
    assert distance(weights[0], weights[1]) == 0
    assert distance(weights[0], weights[2]) > 1e-3


def test_resumes_twice(uninterrupted, tmp_path):
    for stop in (4, 9):
        interrupt(tmp_path, RESUMED, stop, with_dropout, lambda: SFA(p=0.25), stage=1)
    resumed = train(tmp_path, RESUMED, SFA(p=0.25), model=with_dropout(), stage=1)
    assert_same(resumed, uninterrupted)


@pytest.mark.parametrize("damage", ["model.safetensors", "optimizer.pt", "stockpot.json", "marker"])
def test_a_damaged_checkpoint_is_not_used(uninterrupted, damage, tmp_path):
    interrupt(tmp_path, RESUMED, 8, with_dropout, lambda: SFA(p=0.25), stage=1)
    (checkpoint,) = (tmp_path / "scratch").glob("checkpoint-*")
    if damage == "marker":
        (checkpoint / "stockpot.json").unlink()
    else:
        file = checkpoint / damage
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    resumed = train(tmp_path, RESUMED, SFA(p=0.25), model=with_dropout(), stage=1)
    assert_same(resumed, uninterrupted)


def test_time_before_a_kill_counts(tmp_path):
    def slow(step: int, _: float | None) -> None:
        if step == 1:
            time.sleep(0.3)
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        train(tmp_path, RESUMED, on_step=slow)
    _, about = train(tmp_path, RESUMED)
    assert about.seconds > 0.3


def test_no_checkpoints_where_none_are_wanted(tmp_path):
    seen: list[list[Path]] = []
    using = settings(batch_size=8, checkpoint_seconds=None)
    train(tmp_path, using, on_step=lambda *_: seen.append(list(tmp_path.rglob("checkpoint-*"))))
    assert seen == [[]] * 5
    using = settings(batch_size=8, checkpoint_seconds=3600.0)
    train(tmp_path, using, on_step=lambda *_: seen.append(list(tmp_path.rglob("checkpoint-*"))))
    assert seen == [[]] * 10


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two = nn.Linear(9, 9), nn.Linear(9, 9)
        self.two.weight = self.one.weight
        self.head = nn.Linear(9, LABELS)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.two(self.one(pixels.flatten(1)).relu()).relu())


def channels_last() -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, LABELS, 2), nn.Flatten())
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("model", [Tied, channels_last])
def test_tied_and_channels_last_weights_are_checkpointed(model, tmp_path):
    using = settings(batch_size=8, epochs=2, checkpoint_seconds=0.0)
    plain = using.model_copy(update={"checkpoint_seconds": None})
    whole, _ = train(tmp_path / "whole", plain, model=model())
    interrupt(tmp_path / "cut", using, 7, model, Watched)
    resumed, _ = train(tmp_path / "cut", using, model=model())
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_merge_events_are_kept_across_a_resume(tmp_path):
    def events(folder: Path, using: TrainingSettings) -> list[dict[str, float]]:
        seen: list[TaskRun] = []

        class Keep(SFA):
            def after_step(self, run: TaskRun, step: int) -> None:
                seen[:] = [run]
                super().after_step(run, step)

        train(folder, using, Keep(p=0.25), model=with_dropout(), stage=1)
        return [{k: v for k, v in event.items() if k != "seconds"} for event in seen[0].merges]

    interrupt(tmp_path / "cut", RESUMED, 9, with_dropout, lambda: SFA(p=0.25), stage=1)
    expected = events(tmp_path / "whole", RESUMED)
    assert [event["step"] for event in expected] == [4, 8, 11, 15]
    assert events(tmp_path / "cut", RESUMED) == expected


# Precision.


def learnable() -> ImageData:
    """The label is the brightest of four pixels."""
    data = images(64)
    labels = data.images[:, 0].flatten(1)[:, :LABELS].argmax(dim=1)
    return ImageData(data.images, labels)


def layer_types(model: nn.Module) -> list[torch.dtype]:
    """Fills with the type of the first layer's output at every call."""
    seen: list[torch.dtype] = []
    model[1].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    return seen


def test_bfloat16_autocast_trains_float32_weights(tmp_path):
    common = {"batch_size": 16, "epochs": 30, "learning_rate": 0.02}
    model = network()
    seen = layer_types(model)
    weights, about = train(
        tmp_path, settings(precision="bfloat16", **common), None, learnable(), model
    )
    assert set(seen) == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    losses = [loss for _, loss in about.losses]
    assert losses[-1] < 0.5 * losses[0]
    exact, reference = train(tmp_path, settings(**common), None, learnable())
    assert losses[-1] == pytest.approx(reference.losses[-1][1], rel=0.2)
    assert distance(weights, exact) > 0


def test_precision_does_not_leak_into_the_next_model(tmp_path):
    train(tmp_path, settings(precision="bfloat16"))
    model = network()
    seen = layer_types(model)
    train(tmp_path, settings(), model=model)
    assert set(seen) == {torch.float32}


def test_precision_is_the_settings_and_not_the_environments(tmp_path, monkeypatch):
    """``accelerate launch`` sets this from the user's accelerate configuration."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    model = network()
    seen = layer_types(model)
    train(tmp_path, settings(precision="float32"), model=model)
    assert set(seen) == {torch.float32}


def test_autocast_ends_with_training(tmp_path):
    """The weights are float32; scores and Fisher values of them must not depend on who trained."""
    model = network()
    train(tmp_path, settings(precision="bfloat16"), model=model)
    fresh = network()
    load_weights_(fresh, copy_weights(model))
    data = images(40)
    with torch.no_grad():
        assert torch.equal(model.eval()(data.images), fresh.eval()(data.images))


def test_precision_is_that_of_the_call_and_not_of_the_models_first(tmp_path):
    model = network()
    train(tmp_path, settings(), model=model)
    seen = layer_types(model)
    train(tmp_path, settings(precision="bfloat16"), model=model)
    assert set(seen) == {torch.bfloat16}


# Multitask, through the whole runner.


def test_multitask_trains_on_everything_for_the_steps_of_all_tasks(tmp_path):
    """40 + 40 + 40 examples in batches of 16: T = 3 * 6, two steps into a third epoch."""
    path = write_experiment(tmp_path, "[multitask, sequential]")
    changes = ["stream.train_limit=40", "training.learning_rate=0.01", "seeds=[5]"]
    outcome = run_file(path, tmp_path / "out", changes)
    steps = {run["method"]: run["metrics"]["steps"] for run in outcome.summary}
    assert steps == {"multitask": 18, "sequential": 18}

    experiment = load_experiment(path, changes)
    stream = experiment.stream.load()
    parts = [task.train for task in stream.tasks]
    everything = (
        torch.cat([part.images[part.rows] for part in parts]),
        torch.cat([part.labels[part.rows] for part in parts]),
    )
    assert len(everything[1]) == 120
    set_seed(5)
    model = experiment.model.build(stream).module
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    history, losses = plain_loop(
        experiment.training, optimizer, model, everything, steps=18, seed=5 * 1_000_003
    )
    saved = load_file(tmp_path / "out/runs/multitask-seed5/model.safetensors")
    assert_close(saved, history[-1])
    (logged,) = [
        line["losses"]
        for line in lines(tmp_path / "out/stages.jsonl")
        if line["run"] == "multitask-seed5"
    ]
    assert logged == [[n, pytest.approx(v, abs=1e-5)] for n, v in enumerate(losses, 1)]


def test_a_run_that_diverges_leaves_the_others_and_says_where(tmp_path):
    path = write_experiment(tmp_path, "[{name: l2, strength: 1e30}, sequential]")
    # Adam would divide the penalty's gradient by itself.
    outcome = run_experiment(
        load_experiment(path, ["training.optimizer=sgd"], output=tmp_path / "out")
    )
    (failure,) = outcome.failures.values()
    assert "l2-strength1e+30-seed0" in failure
    assert "task '2-3'" in failure  # the first task has no penalty
    assert [run["method"] for run in outcome.summary] == ["sequential"]
    finished = lines(tmp_path / "out/stages.jsonl")
    assert [line["stage"] for line in finished if line["run"].startswith("l2")] == [0]


# Settings.


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"optimizer": "adam", "momentum": 0.9}, "momentum"),
        ({"optimizer": "adamw", "momentum": 0.9}, "momentum"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "adamw"),
        ({"precision": "float16", "device": "cpu"}, "float16"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"warmup": 1.0}, "warmup"),
        ({"warmup": math.nan}, "warmup"),
        ({"max_grad_norm": 0}, "max_grad_norm"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
        ({"checkpoint_seconds": -1}, "checkpoint_seconds"),
        ({"checkpoint_seconds": math.nan}, "checkpoint_seconds"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"gradient_accumulation": 0}, "gradient_accumulation"),
        ({"optimiser": "adam"}, "optimiser"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, says):
    with pytest.raises(ValidationError, match=says):
        TrainingSettings(**given)


def test_identity_is_what_decides_the_weights():
    one = TrainingSettings()
    for free in ({"device": "cpu"}, {"threads": 3}, {"checkpoint_seconds": None}):
        assert TrainingSettings(**free).identity() == one.identity()
    changes: dict[str, Any] = {
        "epochs": 2,
        "steps": 9,
        "batch_size": 31,
        "gradient_accumulation": 2,
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "schedule": "linear",
        "warmup": 0.1,
        "max_grad_norm": 1.0,
        "precision": "bfloat16",
    }
    for key, value in changes.items():
        assert TrainingSettings(**{key: value}).identity() != one.identity()
    adamw, slow = TrainingSettings(optimizer="adamw"), TrainingSettings(optimizer="sgd")
    decayed = TrainingSettings(optimizer="adamw", weight_decay=0.1)
    assert adamw.identity() != decayed.identity()
    assert slow.identity() != TrainingSettings(optimizer="sgd", momentum=0.5).identity()
    json.dumps(one.identity())
