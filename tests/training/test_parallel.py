"""Two processes against one: the same weights, whatever way they share a training.

One group of real processes a way trains all its cases; each case is then trained by one process.
"""

import functools
import gc
import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stockpot.errors import ConfigError
from stockpot.methods import METHODS, Method, TaskRun
from stockpot.processes import Processes
from stockpot.training import TrainingSettings
from stockpot.training.parallel import check_parallel
from stockpot.training.parallel.shares import Shares
from support.experiments import SETTINGS
from support.parallel import (
    LABELS,
    Case,
    Outcome,
    images,
    learner_of,
    texts,
    train,
    train_in_processes,
)

MODES = ["ddp", "fsdp2", "zero2", "zero3"]
ROUNDING = 2e-6
"""Weights are about 0.1 to 1, and Adam divides rounding by rounding now and then."""
METHODS_OF_ONE_TASK = [name for name in SETTINGS if name != "multitask"]

CASES = [
    *(Case(name, name) for name in METHODS_OF_ONE_TASK),
    # 23 examples: the last batch of an epoch is short, and the last step has fewer batches.
    Case("accumulation", "l2", settings={"gradient_accumulation": 2, "batch_size": 5}),
    Case("one row a batch", "sfa", examples=3, settings={"batch_size": 1}),
    Case(
        "clipped momentum",
        "l2",
        settings={
            "max_grad_norm": 0.01, "optimizer": "sgd", "momentum": 0.9, "learning_rate": 1.0,
        },
    ),
    Case(
        "decay",
        "sfa",
        model="odd",
        settings={"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "warmup": 0.2},
    ),
    Case("text", "sfa", model="language"),
    Case(
        "text in shares",
        "{name: ewc, strength: 100, samples: 20, labels: sampled}",
        model="language",
        settings={
            "gradient_accumulation": 3, "batch_size": 3, "optimizer": "sgd", "learning_rate": 0.1,
        },
    ),
    Case("adapters", "sfa", model="lora"),
    Case("looked at", "sfa", probe=2),
]  # fmt: skip
WHOLE = {"optimizer": "sgd", "learning_rate": 0.5, "steps": 3, "schedule": "linear"}
BY_HAND = [
    # Every step has all examples, in one batch or in two of different size.
    Case("by hand", model="language", stages=1, settings={**WHOLE, "batch_size": 23}),
    Case(
        "by hand, clipped",
        model="language",
        stages=1,
        settings={**WHOLE, "batch_size": 12, "gradient_accumulation": 2, "max_grad_norm": 0.1},
    ),
]
CHECKPOINTED = {"checkpoint_seconds": 0, "optimizer": "adamw", "weight_decay": 0.01}
WHERE_IT_STOPS = 4
RESUMED = Case("from one process", "ewc", settings=CHECKPOINTED)
RESUMED_DDP = Case("from ddp", "sfa", settings=CHECKPOINTED)
STOPPED = Case("stopped", "ewc", settings=CHECKPOINTED, stop_at=WHERE_IT_STOPS)
WEIGHED = Case(
    "weighed",
    model="wide",
    settings={"optimizer": "sgd", "momentum": 0.9, "checkpoint_seconds": 0},
    weigh=True,
)
REFUSED = [
    Case("not a number", poison=4),
    Case("statistics", model="batchnorm"),
    Case("not a number, seen late", poison=4, as_on_a_gpu=True),  # all that follow would see so
]


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> Iterator[None]:
    """The Trainer collects garbage at every call; what is alive now need not be searched."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@functools.cache
def _alone(folder: Path, name: str) -> Outcome:
    cases = [*CASES, *BY_HAND, RESUMED, RESUMED_DDP, STOPPED]
    case = next(case for case in cases if case.name == name)
    return train(replace(case, stop_at=None), folder / "alone")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def killed(place: Path) -> Path:
    """The checkpoint of two processes that were killed by SIGKILL."""
    case = replace(RESUMED_DDP, die_at=WHERE_IT_STOPS)
    folder = place / "killed"
    assert train_in_processes([case], folder) == {}
    (checkpoint,) = (folder / f"{case.name}-scratch-1").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{WHERE_IT_STOPS - 1}"
    return folder / f"{case.name}-scratch-1"


@pytest.fixture(scope="module")
def stopped_alone(place: Path) -> Path:
    """The checkpoint of one process."""
    folder = place / "stopped alone"
    with pytest.raises(RuntimeError, match="stopped"):
        train(replace(RESUMED, stop_at=WHERE_IT_STOPS), folder)
    return folder / f"{RESUMED.name}-scratch-1"


class Group:
    """What two processes gave."""

    def __init__(self, mode: str, place: Path, killed: Path, stopped_alone: Path) -> None:
        self.place, self.folder = place, place / mode
        shutil.copytree(killed, self.folder / f"{RESUMED_DDP.name}-scratch-1")
        shutil.copytree(stopped_alone, self.folder / f"{RESUMED.name}-scratch-1")
        cases = [*CASES, *BY_HAND, RESUMED, RESUMED_DDP, STOPPED, WEIGHED, *REFUSED]
        with_mode = [replace(c, settings={**c.settings, "parallel": mode}) for c in cases]
        self.outcomes = train_in_processes(with_mode, self.folder)

    def compare(self, name: str) -> None:
        """The same weights, losses, merge events and looks as one process."""
        two, one = self.outcomes[name], _alone(self.place, name)
        assert not two.error, two.error
        close(two.weights, one.weights)
        assert [step for step, _ in two.losses] == [step for step, _ in one.losses]
        for (_, ours), (_, expected) in zip(two.losses, one.losses, strict=True):
            assert ours == pytest.approx(expected, rel=1e-5)
        assert len(two.merges) == len(one.merges)
        for merge, expected_merge in zip(two.merges, one.merges, strict=True):
            for key in ("step", "beta", "distance_before", "distance_after"):
                assert merge[key] == pytest.approx(expected_merge[key], rel=1e-5)
        assert two.probed == pytest.approx(one.probed, abs=1e-4)


def close(ours: dict[str, Tensor], expected: dict[str, Tensor], atol: float = ROUNDING) -> None:
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=atol, msg=lambda m: m)


@pytest.fixture(scope="module", params=MODES)
def group(request: pytest.FixtureRequest, place: Path, killed: Path, stopped_alone: Path) -> Group:
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed")
    return Group(request.param, place, killed, stopped_alone)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_two_processes_give_the_weights_of_one(group: Group, name: str) -> None:
    group.compare(name)


def test_the_cases_train(place: Path) -> None:
    for case in CASES:
        start, end = learner_of(case.model).weights(), _alone(place, case.name).weights
        moved = max(float((end[name] - weight).abs().max()) for name, weight in start.items())
        assert moved > 1000 * ROUNDING


@pytest.mark.parametrize("case", BY_HAND, ids=lambda case: case.name)
def test_the_step_is_that_of_the_mean_over_all_learned_tokens(group: Group, case: Case) -> None:
    """Gradient descent in float64 on all examples, one by one, without padding."""
    module: Any = learner_of("language").module.double()
    data = texts(case.examples, 100)
    using = {**case.settings}
    for step in range(using["steps"]):
        module.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        places = 0
        for row in range(case.examples):
            batch = data.__getitems__([row])
            logits = module(input_ids=batch["input_ids"]).logits[0, :-1]
            labels = batch["labels"][0, 1:]
            total = total + F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
            places += int((labels != -100).sum())
        (total / places).backward()
        gradients = [p.grad for p in module.parameters()]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        most = using.get("max_grad_norm")
        assert most is None or norm > most
        rate = using["learning_rate"] * (1 - step / using["steps"])
        factor = rate * (1.0 if most is None else float(most / norm))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= factor * gradient
    expected = {name: p.detach().float() for name, p in module.named_parameters()}
    close(group.outcomes[case.name].weights, expected)


def test_a_training_of_one_process_goes_on_in_two(group: Group) -> None:
    group.compare(RESUMED.name)


def test_two_killed_processes_are_taken_over_by_two_that_share_in_another_way(
    group: Group,
) -> None:
    group.compare(RESUMED_DDP.name)


def test_two_processes_are_taken_over_by_one(group: Group) -> None:
    assert group.outcomes[STOPPED.name].error == "RuntimeError: stopped"
    scratch = group.folder / f"{STOPPED.name}-scratch-1"
    (checkpoint,) = scratch.glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{WHERE_IT_STOPS - 1}"
    resumed = train(replace(STOPPED, stop_at=None), group.folder)
    close(resumed.weights, _alone(group.place, STOPPED.name).weights)
    assert not scratch.exists()


def test_one_process_takes_over_two_that_were_killed(place: Path, killed: Path) -> None:
    folder = place / "taken over"
    shutil.copytree(killed, folder / f"{RESUMED_DDP.name}-scratch-1")
    close(train(RESUMED_DDP, folder).weights, _alone(place, RESUMED_DDP.name).weights)


def test_a_loss_that_is_no_number_stops_all_processes_at_its_step(group: Group) -> None:
    with pytest.raises(Exception, match=r"the loss is nan at step \d") as alone:
        train(REFUSED[0], group.folder / "alone")
    # Read of both processes: they say the same.
    assert group.outcomes["not a number"].error == f"NonFiniteError: {alone.value}"


def test_processes_that_look_at_their_loss_at_other_times_stop_at_the_same_step(
    group: Group,
) -> None:
    error = group.outcomes["not a number, seen late"].error  # which is that of all processes
    assert error.startswith("NonFiniteError")
    assert "the loss is nan at step" in error


def test_shares_are_all_that_is_held_between_scores_and_nothing_stays(group: Group) -> None:
    model = 4 * sum(w.numel() for w in group.outcomes["weighed"].weights.values())
    outcome = group.outcomes["weighed"]
    # Whole weights and momentum, what a step leaves of gradients; or half of each. DeepSpeed has
    # buffers for gradients, and whole weights at stage 2.
    most = {"ddp": 1.1, "fsdp2": 0.1, "zero2": 3.1, "zero3": 2.6}
    assert outcome.held < most[group.folder.name] * model
    assert abs(outcome.left) < 0.05 * model


def test_statistics_of_a_batch_are_refused(group: Group) -> None:
    error = group.outcomes["statistics"].error
    assert error.startswith("ConfigError: 2 processes cannot train '2' (BatchNorm1d)")


def test_there_is_a_case_for_every_method() -> None:
    assert {*METHODS_OF_ONE_TASK, "multitask"} == set(METHODS)


# What is refused, and shares.


def mlp() -> nn.Module:
    return learner_of("mlp").module


def settings(**given: Any) -> TrainingSettings:
    return TrainingSettings(device="cpu", **given)


def test_parallel_is_no_part_of_what_is_trained() -> None:
    assert settings(parallel="zero3").identity() == settings().identity()


class Nudges(Method):
    """Changes weights, and does not say what it does to parts of them."""

    name = "nudges"  # type: ignore[misc]

    def after_step(self, run: TaskRun, step: int) -> None:
        next(iter(run.model.parameters())).data.zero_()


def test_a_method_that_knows_nothing_of_parts_trains_by_ddp_alone() -> None:
    check_parallel(Nudges(), mlp(), settings(), 2)
    check_parallel(Nudges(), mlp(), settings(parallel="fsdp2"), 1)
    with pytest.raises(ConfigError, match=r"nudges has after_step but no take_parts.*ddp"):
        check_parallel(Nudges(), mlp(), settings(parallel="fsdp2"), 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_is_accepted(mode: str, name: str) -> None:
    if mode.startswith("zero"):
        pytest.importorskip("deepspeed")
    check_parallel(METHODS[name](), mlp(), settings(parallel=mode), 2)


def test_zero_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "deepspeed" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(ConfigError, match=r"pip install 'stockpot\[deepspeed\]'"):
        check_parallel(METHODS["sfa"](), mlp(), settings(parallel="zero2"), 2)


def test_zero_refuses_weights_that_it_would_widen() -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(ConfigError, match=r"'1\.weight' is torch\.bfloat16.*model\.dtype"):
        check_parallel(METHODS["sfa"](), mlp().bfloat16(), settings(parallel="zero3"), 2)


def test_fsdp2_refuses_a_weight_that_is_one_number() -> None:
    module = mlp()
    module.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ConfigError, match=r"'scale', which is a single number"):
        check_parallel(METHODS["sfa"](), module, settings(parallel="fsdp2"), 2)


@pytest.mark.parametrize(
    ("variable", "mode", "wanted"),
    [
        ("ACCELERATE_USE_FSDP", "ddp", "training.parallel to fsdp2"),
        ("ACCELERATE_USE_DEEPSPEED", "fsdp2", "training.parallel to zero2 or zero3"),
        ("ACCELERATE_USE_MEGATRON_LM", "ddp", "Megatron-LM"),
    ],
)
def test_a_launcher_that_asks_for_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, mode: Any, wanted: str
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=wanted):
        check_parallel(METHODS["sfa"](), mlp(), settings(parallel=mode), 2)
    if variable == "ACCELERATE_USE_FSDP":
        check_parallel(METHODS["sfa"](), mlp(), settings(parallel="fsdp2"), 2)


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 4, 7])
def test_the_shares_of_a_batch_are_the_batch(world: int, rows: int) -> None:
    data = images(9, 0)
    asked = torch.randperm(9)[:rows]
    shares = [Shares(data, Processes(rank, world)).__getitems__(asked) for rank in range(world)]
    counted = [Shares.examples(share) for share in shares if Shares.counts(share)]
    seen = torch.cat([share["pixel_values"] for share in counted])
    whole = data.__getitems__(asked)["pixel_values"]
    assert sorted(seen.flatten(1).tolist()) == sorted(whole.flatten(1).tolist())
    assert all(len(Shares.examples(share)["labels"]) > 0 for share in shares)  # all have work
    assert LABELS > 1
