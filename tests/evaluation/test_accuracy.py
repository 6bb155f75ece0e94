"""Accuracy against counts by hand, with models whose logits are written down."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stockpot.evaluation.accuracy import accuracy
from stockpot.evaluation.score import Score
from stockpot.models.learner import ImageLearner, conv
from stockpot.streams.data import ImageData, Mixture, Task

SIZES = [1, 2, 3, 4, 5, 7, 1000]


class Lookup(nn.Module):
    """An image's first pixel, a row number in tens of thousandths, chooses its logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits.float())
        self.calls: list[tuple[bool, bool, int]] = []
        """(training mode, gradients on, batch size) of every call."""

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled(), len(images)))
        return self.table[(images[:, 0, 0, 0] * 10_000).round().long()]


def case(
    logits: list[list[float]], labels: list[int], allowed: list[bool] | None = None
) -> tuple[ImageLearner, ImageData]:
    rows = torch.arange(len(labels)).float() / 10_000
    images = rows.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    mask = None if allowed is None else torch.tensor(allowed)
    data = ImageData(images, torch.tensor(labels), allowed=mask)
    return ImageLearner(Lookup(torch.tensor(logits))), data


FIVE = [[3, 1, 2], [0, 5, 1], [1, 2, 9], [4, 0, 0], [0, 1, 2]]


@pytest.mark.parametrize("size", SIZES)
def test_by_hand_for_any_batch_size(size):
    learner, data = case(FIVE, [0, 1, 0, 0, 1])  # right, right, wrong, right, wrong
    score = accuracy(learner, data, size)
    assert score == Score(0.6, 5, math.sqrt(0.6 * 0.4 / 5), "accuracy")
    assert isinstance(learner.module, Lookup)
    batches = [count for _, _, count in learner.module.calls]
    assert sum(batches) == 5  # every example once
    assert max(batches) == min(size, 5)


@given(data=st.data(), examples=st.integers(1, 40), labels=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_the_count_of_a_plain_loop(data, examples, labels):
    number = st.integers(-3, 3)  # few values: many ties
    row = st.lists(number, min_size=labels, max_size=labels)
    logits = data.draw(st.lists(row, min_size=examples, max_size=examples))
    truth = data.draw(st.lists(st.integers(0, labels - 1), min_size=examples, max_size=examples))
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=labels, max_size=labels))
    if mask is not None:
        for label in truth:
            mask[label] = True
    right = 0
    for values, label in zip(logits, truth, strict=True):
        choices = [i for i in range(labels) if mask is None or mask[i]]
        best = max(values[i] for i in choices)
        right += next(i for i in choices if values[i] == best) == label
    learner, examples_of_it = case(logits, truth, mask)
    score = accuracy(learner, examples_of_it, data.draw(st.integers(1, 45)))
    assert score.value == right / examples
    assert score.n == examples
    share = right / examples
    assert score.stderr == pytest.approx(math.sqrt(share * (1 - share) / examples), abs=1e-15)


def test_the_first_label_wins_a_tie():
    learner, data = case([[2, 2, 1], [2, 2, 1], [0, 0, 0]], [0, 1, 2])
    assert accuracy(learner, data, 2).value == pytest.approx(1 / 3)


def test_only_the_tasks_own_labels_compete():
    """Task-incremental: the largest logit may belong to another task's label."""
    logits = [[9, 1, 2, 0], [9, 8, 1, 3], [0, 9, -5, -4]]
    everywhere, data = case(logits, [2, 3, 3])
    assert accuracy(everywhere, data, 10).value == 0
    masked, data = case(logits, [2, 3, 2], [False, False, True, True])
    assert accuracy(masked, data, 10).value == pytest.approx(2 / 3)
    one_label, data = case(logits, [3, 3, 3], [False, False, False, True])
    assert accuracy(one_label, data, 1) == Score(1.0, 3, 0.0)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_mixtures_choose_among_each_parts_labels(size):
    images = torch.tensor([0.0, 0.0001]).view(2, 1, 1, 1)
    labels = torch.tensor([0, 2])
    first = torch.tensor([True, True, False, False])
    parts = [
        ImageData(images, labels, torch.tensor([0]), first),
        ImageData(images, labels, torch.tensor([1]), ~first),
    ]
    learner = ImageLearner(Lookup(torch.tensor([[5, 1, 9, 0], [9, 1, 5, 0]])))
    assert accuracy(learner, Mixture(parts), size).value == 1


@pytest.mark.parametrize(
    ("right", "n", "stderr"), [(0, 4, 0.0), (4, 4, 0.0), (1, 4, 0.21650635), (30, 120, 0.03952847)]
)
def test_standard_error(right, n, stderr):
    learner, data = case([[1, 0]] * n, [0] * right + [1] * (n - right))
    score = accuracy(learner, data, 50)
    assert (score.value, score.n) == (right / n, n)
    assert score.stderr == pytest.approx(stderr, abs=1e-8)


def test_rows_and_permutations_of_the_data_are_used():
    images = torch.zeros(4, 1, 1, 2)
    images[:, 0, 0, 1] = torch.arange(4) / 10_000  # the row number is in the second pixel
    data = ImageData(
        images, torch.tensor([0, 1, 1, 1]), torch.tensor([3, 1]), permutation=torch.tensor([1, 0])
    )
    learner = ImageLearner(Lookup(torch.tensor([[9, 0], [0, 9], [9, 0], [0, 9]])))
    assert accuracy(learner, data, 1) == Score(1.0, 2, 0.0)


def test_models_that_answer_with_an_object_and_see_preprocessed_images():
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(Lookup):
        def forward(self, images: Tensor) -> Output:
            return Output(super().forward(images - 0.5))

    _, data = case(FIVE, [0, 1, 0, 0, 1])
    learner = ImageLearner(Wrapped(torch.tensor(FIVE)), preprocess=lambda images: images + 0.5)
    assert accuracy(learner, data, 2).value == 0.6


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_is_used_and_the_mode_restored(training):
    learner, data = case(FIVE, [0, 1, 0, 0, 1])
    learner.module.train(training)
    accuracy(learner, data, 2)
    assert isinstance(learner.module, Lookup)
    assert [mode for mode, _, _ in learner.module.calls] == [False] * 3
    assert learner.module.training is training


def test_the_mode_of_every_part_is_restored():
    """Fine-tuning with frozen BatchNorm keeps these layers in eval mode while the rest trains."""
    model = conv((1, 4, 4), (3,), 4, norm="batch")
    model.train()
    model[1].eval()
    modes = [part.training for part in model.modules()]
    accuracy(ImageLearner(model), ImageData(torch.rand(6, 1, 4, 4), torch.zeros(6).long()), 4)
    assert [part.training for part in model.modules()] == modes


def test_batch_norm_and_dropout_rest():
    torch.manual_seed(0)
    model = nn.Sequential(conv((1, 4, 4), (3,), 4, norm="batch"), nn.Dropout(0.5))
    norm = model[0][1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = ImageData(torch.rand(30, 1, 4, 4), torch.randint(4, (30,)))
    state = torch.get_rng_state()
    scores = {size: accuracy(ImageLearner(model.train()), data, size).value for size in SIZES}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    # BatchNorm by its formula with the stored statistics, the rest by functions.
    block, head = model[0], model[0][-1]
    hidden = nn.functional.conv2d(data.images, block[0].weight, block[0].bias, padding=1)
    mean, var = (norm.running_mean.view(-1, 1, 1), norm.running_var.view(-1, 1, 1))
    hidden = (hidden - mean) / (var + norm.eps).sqrt()
    hidden = hidden * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    hidden = nn.functional.max_pool2d(hidden.relu(), 2).flatten(1)
    answers = (hidden @ head.weight.T + head.bias).argmax(dim=1)
    expected = int((answers == data.labels).sum()) / 30
    assert scores == dict.fromkeys(SIZES, expected)


def test_gradients_are_not_tracked_and_can_be_afterwards():
    learner, data = case(FIVE, [0, 1, 0, 0, 1])
    accuracy(learner, data, 2)
    assert isinstance(learner.module, Lookup)
    assert [tracked for _, tracked, _ in learner.module.calls] == [False] * 3
    assert learner.module.table.grad is None
    assert torch.is_grad_enabled()
    learner.logits(data.images).sum().backward()
    assert learner.module.table.grad is not None


def test_the_data_is_not_changed():
    learner, data = case(FIVE, [0, 1, 0, 0, 1], [True, True, True])
    task = Task("task", data, data)
    before = data.fingerprint()
    accuracy(learner, task.test, 3)
    assert data.fingerprint() == before


@pytest.mark.parametrize("size", [1, 4])
def test_whole_bytes_and_floats_score_the_same(size):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    whole = torch.randint(0, 256, (20, 1, 2, 2), dtype=torch.uint8)
    labels = torch.randint(3, (20,))
    one = accuracy(ImageLearner(model), ImageData(whole, labels), size)
    other = accuracy(ImageLearner(model), ImageData(whole / 255, labels), size)
    assert one == other
