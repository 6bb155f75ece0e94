"""Rehearsal: how many examples, of which tasks, drawn how."""

from collections import Counter
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from stockpot.methods import Memory, Rehearsal, TaskRun
from stockpot.models.learner import ImageLearner
from stockpot.streams.data import ImageData, Task, TaskData

FRACTIONS = ("0.05", "0.10")
TASK = 10_000
"""Image and label are TASK * (number of the task) + (number of the example)."""

quick = settings(max_examples=80, deadline=None)
sizes = st.integers(1, 400)


def task(number: int, size: int, masked: bool = False) -> Task:
    identity = TASK * number + torch.arange(size)
    mask = torch.arange(8) == number if masked else None
    # The images hold more examples than the task, in another order.
    rows = torch.arange(size).flip(0) + 1
    images = torch.cat([torch.tensor([-1]), identity.flip(0)]).double().reshape(-1, 1, 1, 1)
    labels = torch.cat([torch.tensor([-1]), identity.flip(0)])
    data = ImageData(images, labels, rows=rows, allowed=mask)
    return Task(f"task {number}", data, data)


def task_run(past: list[int], current: int, seed: int = 0, masked: bool = False) -> TaskRun:
    """A task of ``current`` examples after tasks of so many; tasks are numbered from 0."""
    tasks = [task(number, size, masked) for number, size in enumerate([*past, current])]
    return TaskRun(
        stage=len(past),
        last=False,
        tasks=(tasks[-1],),
        past=tuple(tasks[:-1]),
        learner=ImageLearner(nn.Flatten()),
        start={},
        previous={},
        memory=Memory(Path("unused"), len(past)),
        seed=seed,
        total_steps=1,
        device=torch.device("cpu"),
    )


def identities(data: TaskData) -> list[int]:
    return data.__getitems__(torch.arange(len(data)))["labels"].tolist()


def draw(run: TaskRun, fraction: str = "0.05") -> list[int]:
    return identities(Rehearsal(fraction=float(fraction)).training_data(run))


# How many.


@quick
@given(
    sizes, st.lists(sizes, min_size=1, max_size=4), st.sampled_from(FRACTIONS), st.integers(0, 9)
)
@example(10, [400], "0.05", 0)  # 0.5 rounds to 0
@example(30, [400], "0.05", 0)  # 1.5 rounds to 2
@example(400, [1], "0.10", 0)  # more are asked for than there are
def test_counts_are_exact_and_the_total_stays(
    current: int, past: list[int], fraction: str, seed: int
) -> None:
    drawn = draw(task_run(past, current, seed), fraction)
    wanted = int((Decimal(fraction) * current).to_integral_value(ROUND_HALF_EVEN))
    replayed = [identity for identity in drawn if identity < TASK * len(past)]
    assert len(drawn) == current
    assert len(replayed) == min(wanted, sum(past))
    assert len(set(drawn)) == current  # without replacement
    everything = {TASK * k + i for k, size in enumerate([*past, current]) for i in range(size)}
    assert set(drawn) <= everything


@pytest.mark.parametrize(
    ("current", "fraction", "count"),
    [(1000, "0.05", 50), (1000, "0.10", 100), (9, "0.05", 0), (6, "0.10", 1), (1437, "0.05", 72)],
)
def test_counts_by_hand(current: int, fraction: str, count: int) -> None:
    drawn = draw(task_run([500, 500], current), fraction)
    assert sum(identity < 2 * TASK for identity in drawn) == count


def test_other_fractions() -> None:
    drawn = draw(task_run([300], 200), "0.5")
    assert sum(identity < TASK for identity in drawn) == 100


def test_where_the_past_is_small_all_of_it_is_replayed() -> None:
    drawn = draw(task_run([2, 0, 3], 100), "0.10")
    assert sorted(identity for identity in drawn if identity < 3 * TASK) == [
        0,
        1,
        2 * TASK,
        2 * TASK + 1,
        2 * TASK + 2,
    ]
    assert len(drawn) == 100


# Of which tasks.


def test_every_past_example_is_equally_likely_whatever_its_task() -> None:
    past, current, seeds = [30, 90, 60], 200, 400
    counts: Counter[int] = Counter()
    for seed in range(seeds):
        counts.update(draw(task_run(past, current, seed), "0.10"))
    replayed = 20 * seeds
    for number, size in enumerate(past):
        share = size / sum(past)
        of_task = sum(counts[TASK * number + i] for i in range(size))
        # Without replacement the spread is less than the binomial one.
        assert abs(of_task - replayed * share) < 4 * (replayed * share * (1 - share)) ** 0.5
        for i in range(size):
            p = 20 / 180
            assert abs(counts[TASK * number + i] - seeds * p) < 5 * (seeds * p * (1 - p)) ** 0.5
    for i in range(current):  # and so is every example of the task itself
        assert abs(counts[TASK * 3 + i] - 0.9 * seeds) < 5 * (seeds * 0.9 * 0.1) ** 0.5


# Determinism.


@quick
@given(st.integers(0, 2**40))
def test_the_seed_decides_and_nothing_else(seed: int) -> None:
    first = draw(task_run([100, 50], 80, seed))
    torch.manual_seed(seed % 97)
    state = torch.get_rng_state()
    assert draw(task_run([100, 50], 80, seed)) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_draws_others() -> None:
    drawn = {frozenset(draw(task_run([100, 50], 80, seed), "0.10")) for seed in range(10)}
    assert len(drawn) == 10


# The data itself.


def test_the_first_task_is_what_it_is() -> None:
    run = task_run([], 50)
    assert Rehearsal().training_data(run) is run.tasks[0].train
    assert Rehearsal().training_identity(0) == {}
    assert Rehearsal().training_identity(1) != Rehearsal(fraction=0.1).training_identity(1)


def test_past_and_present_data_are_not_changed() -> None:
    run = task_run([40, 30], 60)
    before = [identities(t.train) for t in (*run.past, *run.tasks)]
    draw(run, "0.10")
    assert [identities(t.train) for t in (*run.past, *run.tasks)] == before
    assert before[0] == list(range(40))


def test_images_labels_and_masks_stay_together() -> None:
    run = task_run([20, 30], 40, masked=True)
    data = Rehearsal(fraction=0.5).training_data(run)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    seen = []
    for rows in order.split(7):
        batch = data.__getitems__(rows)
        assert batch["pixel_values"].shape == (len(rows), 1, 1, 1)
        assert batch["pixel_values"].flatten().tolist() == batch["labels"].tolist()
        assert batch["allowed"] is not None
        assert batch["allowed"].shape == (len(rows), 8)
        assert (batch["allowed"].sum(dim=1) == 1).all()
        assert torch.equal(batch["allowed"].int().argmax(dim=1), batch["labels"] // TASK)
        seen += batch["labels"].tolist()
    assert sorted(seen) == sorted(identities(data))
    assert len(set(seen)) == 40
    assert {identity // TASK for identity in seen} == {0, 1, 2}


@pytest.mark.parametrize("fraction", [0, 1, -0.05, 5, float("nan"), float("inf")])
def test_a_share_is_between_0_and_1(fraction: float) -> None:
    with pytest.raises(ValidationError, match="fraction"):
        Rehearsal(fraction=fraction)
