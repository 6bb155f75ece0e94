"""Fisher values against a slow loop over examples, one backward each, in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stockpot.methods import fisher_information
from stockpot.methods.fisher_information import fisher_diagonal
from stockpot.models.learner import ImageLearner, conv, mlp
from stockpot.streams.data import ImageData, Mixture, TaskData

Weights = dict[str, Tensor]

KINDS = ("true", "exact", "sampled")


def images(
    examples: int = 7,
    labels: int = 3,
    shape: tuple[int, int, int] = (1, 2, 2),
    seed: int = 0,
    allowed: Tensor | None = None,
) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(examples, *shape, generator=generator)
    choices = torch.arange(labels) if allowed is None else allowed.nonzero().flatten()
    drawn = choices[torch.randint(len(choices), (examples,), generator=generator)]
    return ImageData(pixels, drawn, allowed=allowed)


def network(labels: int = 3, pixels: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 5), nn.Tanh(), nn.Linear(5, labels))


def log_likelihoods(module: nn.Module, learner: ImageLearner, data: TaskData, row: int) -> Tensor:
    """log p(y | x) of one example for every y, by the double-precision ``module``."""
    batch = data[row]
    output = module(learner.preprocess(batch["pixel_values"]).double())
    logits = output if isinstance(output, Tensor) else output.logits
    if batch["allowed"] is not None:
        logits = logits.masked_fill(~batch["allowed"], -math.inf)
    return logits.log_softmax(dim=1)[0]


def squares(module: nn.Module, log_likelihood: Tensor) -> Weights:
    weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(
        log_likelihood, list(weights.values()), retain_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros_like(p) if g is None else g**2
        for (name, p), g in zip(weights.items(), gradients, strict=True)
    }


def slow_fisher(learner: ImageLearner, data: TaskData, kind: str) -> Weights:
    module = copy.deepcopy(learner.module).double().eval()
    total: Weights = {}
    for row in range(len(data)):
        ways = log_likelihoods(module, learner, data, row)
        if kind == "true":
            weighted = {int(data[row]["labels"]): 1.0}
        else:
            weighted = {y: float(p) for y, p in enumerate(ways.detach().exp()) if p > 0}
        for label, weight in weighted.items():
            for name, square in squares(module, ways[label]).items():
                total[name] = total.get(name, 0.0) + weight * square / len(data)
    return total


def assert_agree(ours: Weights, oracle: Weights, rtol: float = 1e-4) -> None:
    assert ours.keys() == oracle.keys()
    for name, values in ours.items():
        assert values.dtype == torch.float32
        assert values.shape == oracle[name].shape
        # A gradient that is 0 but for rounding squares to next to nothing; the rest is relative.
        atol = 1e-6 * float(oracle[name].max()) + 1e-14
        torch.testing.assert_close(values.double(), oracle[name], rtol=rtol, atol=atol, msg=name)


# The values.


@pytest.mark.parametrize("kind", ["true", "exact"])
@pytest.mark.parametrize("examples", [1, 7, 300])  # more than one chunk
def test_fully_connected(kind: str, examples: int) -> None:
    learner, data = ImageLearner(network()), images(examples)
    ours = fisher_diagonal(learner, data, None, kind, seed=0)  # type: ignore[arg-type]
    assert_agree(ours, slow_fisher(learner, data, kind))
    assert all((values > 0).any() for values in ours.values())


@pytest.mark.parametrize("kind", ["true", "exact"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_convolutions(kind: str, norm: str) -> None:
    torch.manual_seed(0)
    module = conv((3, 8, 8), (4, 6), 5, norm=norm)  # type: ignore[arg-type]
    data = images(6, labels=5, shape=(3, 8, 8))
    if norm == "batch":
        module.train()
        for _ in range(3):
            module(data.images * 3)  # statistics that are not the fresh ones
    learner = ImageLearner(module)
    ours = fisher_diagonal(learner, data, None, kind, seed=0)  # type: ignore[arg-type]
    assert_agree(ours, slow_fisher(learner, data, kind))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ["true", "exact"])
def test_a_vision_transformer(kind: str) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=3,
        num_labels=4,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
        initializer_range=0.3,
    )
    learner = ImageLearner(ViTForImageClassification(config).train())
    data = images(5, labels=4, shape=(3, 8, 8))
    ours = fisher_diagonal(learner, data, None, kind, seed=0)  # type: ignore[arg-type]
    oracle = slow_fisher(learner, data, kind)
    # A key's bias moves all scores of a query alike: no gradient but rounding.
    for name in [name for name in ours if "k_proj.bias" in name or "key.bias" in name]:
        assert ours.pop(name).max() < 1e-12
        assert oracle.pop(name).max() < 1e-12
    assert_agree(ours, oracle, rtol=1e-3)
    assert learner.module.training


def test_images_in_bytes_go_through_the_preprocessing() -> None:
    data = images(5)
    in_bytes = ImageData((data.images * 255).byte(), data.labels)
    in_floats = ImageData(in_bytes.images.float() / 255, data.labels)
    learner = ImageLearner(network())
    ours = fisher_diagonal(learner, in_bytes, None, "true", seed=0)
    assert_agree(ours, slow_fisher(learner, in_floats, "true"))
    shifted = ImageLearner(learner.module, lambda pixels: 1.0 - pixels)
    assert_agree(
        fisher_diagonal(shifted, data, None, "exact", seed=0), slow_fisher(shifted, data, "exact")
    )


def test_by_hand() -> None:
    # Two labels, all weights 0: p = 1/2, and d log p_y / d bias_j is +1/2 or -1/2.
    module = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    nn.init.zeros_(module[1].weight)
    nn.init.zeros_(module[1].bias)
    pixels = torch.tensor([[0.2, 0.6], [1.0, 0.0]]).reshape(2, 1, 1, 2)
    data = ImageData(pixels, torch.tensor([0, 1]))
    for kind in KINDS:
        ours = fisher_diagonal(ImageLearner(module), data, None, kind, seed=0)  # type: ignore[arg-type]
        assert ours["1.bias"].tolist() == pytest.approx([0.25, 0.25])
        # (.2^2 + 1^2) / 2 / 4 and (.6^2 + 0) / 2 / 4
        assert ours["1.weight"].flatten().tolist() == pytest.approx([0.13, 0.045] * 2)


def test_squares_are_taken_per_example_not_of_the_batch() -> None:
    # The same image with both labels: the batch's gradient is 0, the examples' are not.
    module = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    nn.init.zeros_(module[1].weight)
    nn.init.zeros_(module[1].bias)
    data = ImageData(torch.ones(2, 1, 1, 2), torch.tensor([0, 1]))
    F.cross_entropy(module(data.images), data.labels).backward()
    of_the_batch = module[1].weight.grad.square()
    assert (of_the_batch == 0).all()
    ours = fisher_diagonal(ImageLearner(module), data, None, "true", seed=0)
    assert torch.allclose(ours["1.weight"], torch.full((2, 2), 0.25))


@pytest.mark.parametrize("kind", ["true", "exact"])
def test_the_size_of_a_chunk_does_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, data = ImageLearner(network()), images(20)
    at_once = fisher_diagonal(learner, data, None, kind, seed=3)  # type: ignore[arg-type]
    monkeypatch.setattr(fisher_information, "_CHUNK_ELEMENTS", 1)
    one_by_one = fisher_diagonal(learner, data, None, kind, seed=3)  # type: ignore[arg-type]
    assert_agree(one_by_one, {name: values.double() for name, values in at_once.items()}, 1e-5)


# Sampled labels.


def test_a_seed_repeats_its_draws_and_leaves_other_generators_alone() -> None:
    learner, data = ImageLearner(network()), images(30)
    state = torch.get_rng_state()
    first = fisher_diagonal(learner, data, 20, "sampled", seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again = fisher_diagonal(learner, data, 20, "sampled", seed=5)
    other = fisher_diagonal(learner, data, 20, "sampled", seed=6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["1.weight"], other["1.weight"])


def test_of_one_example_it_is_the_square_for_one_label_as_often_as_the_model_says() -> None:
    learner, data = ImageLearner(network()), images(1)
    with torch.no_grad():
        learner.module[3].bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    module = copy.deepcopy(learner.module).double()
    ways = log_likelihoods(module, learner, data, 0)
    of_label = [squares(module, way)["1.weight"].float() for way in ways]
    draws = 500
    counts = [0, 0, 0]
    for seed in range(draws):
        ours = fisher_diagonal(learner, data, None, "sampled", seed)["1.weight"]
        (label,) = [y for y in range(3) if torch.allclose(ours, of_label[y], rtol=1e-4)]
        counts[label] += 1
    for count, p in zip(counts, ways.exp().tolist(), strict=True):
        assert abs(count - draws * p) < 4 * math.sqrt(draws * p * (1 - p))


def test_on_average_over_seeds_it_is_the_exact_expectation() -> None:
    learner, data = ImageLearner(network()), images(6)
    exact = slow_fisher(learner, data, "exact")
    draws = 300
    drawn = [fisher_diagonal(learner, data, None, "sampled", seed) for seed in range(draws)]
    true = slow_fisher(learner, data, "true")
    for name, expected in exact.items():
        values = torch.stack([fisher[name].double() for fisher in drawn])
        error = values.std(dim=0) / math.sqrt(draws)
        off = (values.mean(dim=0) - expected).abs()
        assert (off <= 4.5 * error + 1e-6 * expected.max()).all(), name
        assert (off < (values - expected).abs().mean(dim=0)).all(), name
    # The bound is not so wide that the empirical Fisher would pass.
    values = torch.stack([fisher["3.bias"].double() for fisher in drawn])
    error = values.std(dim=0) / math.sqrt(draws)
    assert ((true["3.bias"] - exact["3.bias"]).abs() > 4.5 * error).any()


# The task-incremental scenario.

ALLOWED = torch.tensor([False, True, False, True])


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_other_tasks_have_no_part(kind: str) -> None:
    learner, data = ImageLearner(network(labels=4)), images(8, labels=4, allowed=ALLOWED)
    ours = fisher_diagonal(learner, data, None, kind, seed=0)  # type: ignore[arg-type]
    assert all(torch.isfinite(values).all() for values in ours.values())
    assert (ours["3.bias"][~ALLOWED] == 0).all()
    assert (ours["3.weight"][~ALLOWED] == 0).all()
    assert (ours["3.bias"][ALLOWED] > 0).all()
    if kind != "sampled":
        assert_agree(ours, slow_fisher(learner, data, kind))
    unmasked = ImageData(data.images, data.labels)
    without = fisher_diagonal(learner, unmasked, None, kind, seed=0)  # type: ignore[arg-type]
    assert (without["3.bias"] > 0).all()


def test_a_task_with_one_label_has_nothing_to_tell() -> None:
    only = torch.tensor([False, False, True])
    data = images(4, allowed=only)
    for kind in KINDS:
        ours = fisher_diagonal(ImageLearner(network()), data, None, kind, seed=0)  # type: ignore[arg-type]
        assert all((values == 0).all() for values in ours.values())


@pytest.mark.parametrize("kind", ["true", "exact"])
def test_a_mixture_of_tasks_keeps_each_example_with_its_own_mask(kind: str) -> None:
    other = torch.tensor([True, False, True, False])
    data = Mixture(
        [images(5, 4, allowed=ALLOWED), images(4, 4, seed=1, allowed=other), images(0, 4)]
    )
    learner = ImageLearner(network(labels=4))
    ours = fisher_diagonal(learner, data, None, kind, seed=0)  # type: ignore[arg-type]
    assert_agree(ours, slow_fisher(learner, data, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_are_next_to_impossible_do_no_harm(kind: str) -> None:
    learner, data = ImageLearner(network()), images(6)
    with torch.no_grad():
        learner.module[3].bias.copy_(torch.tensor([0.0, 200.0, -200.0]))
    ours = fisher_diagonal(learner, data, None, kind, seed=0)  # type: ignore[arg-type]
    assert all(torch.isfinite(values).all() for values in ours.values())
    if kind != "sampled":
        assert_agree(ours, slow_fisher(learner, data, kind))


# Which examples.


def one_pixel_each(examples: int) -> tuple[ImageLearner, ImageData]:
    """Example n lights pixel n alone, so that column n of the Fisher values tells of it."""
    data = ImageData(torch.eye(examples).reshape(examples, 1, 1, examples), torch.arange(examples))
    data.labels.fmod_(2)
    module = nn.Sequential(nn.Flatten(), nn.Linear(examples, 2, bias=False))
    nn.init.zeros_(module[1].weight)
    return ImageLearner(module), data


@pytest.mark.parametrize(
    ("samples", "used"), [(1, 1), (3, 3), (8, 8), (9, 8), (2000, 8), (None, 8)]
)
def test_samples_are_drawn_without_replacement(samples: int | None, used: int) -> None:
    learner, data = one_pixel_each(8)
    for kind in KINDS:
        ours = fisher_diagonal(learner, data, samples, kind, seed=0)["1.weight"]  # type: ignore[arg-type]
        assert int((ours[0] > 0).sum()) == used
        # Of each used example 1/4, whatever the label, in a mean over those that are used.
        assert ours[ours > 0].tolist() == pytest.approx([0.25 / used] * 2 * used)


def test_every_example_can_be_drawn_and_the_seed_decides() -> None:
    learner, data = one_pixel_each(8)
    seen = [
        frozenset(
            fisher_diagonal(learner, data, 3, "true", seed)["1.weight"][0]
            .nonzero()
            .flatten()
            .tolist()
        )
        for seed in range(30)
    ]
    assert frozenset.union(*seen) == set(range(8))
    assert len(set(seen)) > 10
    assert seen[0] == frozenset(
        fisher_diagonal(learner, data, 3, "true", 0)["1.weight"][0].nonzero().flatten().tolist()
    )


# The model is left as it was.


class Everything(nn.Module):
    """BatchNorm and Dropout between two layers, one of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.last = nn.Linear(6, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.last(self.frozen(self.drop(self.norm(self.first(pixels.flatten(1))))))


def everything() -> Everything:
    torch.manual_seed(2)
    module = Everything().train()
    module(torch.rand(16, 1, 2, 2) * 4 - 1)
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_and_nothing_moves(kind: str, training: bool) -> None:
    module = everything().train(training)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    learner, data = ImageLearner(module), images(9)
    ours = fisher_diagonal(learner, data, None, kind, seed=0)  # type: ignore[arg-type]
    assert all(part.training is training for part in module.modules())
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert int(module.norm.num_batches_tracked) == 1
    assert all(p.grad is None for p in module.parameters())
    assert not any(name.startswith("frozen") for name in ours)
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == [
        "frozen.weight",
        "frozen.bias",
    ]
    if kind != "sampled":
        assert_agree(ours, slow_fisher(learner, data, kind))


def test_gradients_of_the_training_stay() -> None:
    module, data = network(), images(5)
    F.cross_entropy(module(data.images), data.labels).backward()
    before = {name: p.grad.clone() for name, p in module.named_parameters()}
    fisher_diagonal(ImageLearner(module), data, None, "exact", seed=0)
    assert all(torch.equal(p.grad, before[name]) for name, p in module.named_parameters())


def test_the_mode_is_restored_after_an_error() -> None:
    module = network().train()
    with pytest.raises(RuntimeError, match="shapes"):
        fisher_diagonal(ImageLearner(module), images(3, shape=(1, 3, 3)), None, "true", seed=0)
    assert module.training


def test_a_part_that_was_in_eval_mode_stays_in_eval_mode() -> None:
    module = everything()
    module.norm.eval()
    fisher_diagonal(ImageLearner(module), images(4), None, "true", seed=0)
    assert not module.norm.training


# Unusual models.


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, pixels: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(pixels.flatten(1))))


def test_a_tied_weight_has_the_gradient_of_all_its_uses() -> None:
    torch.manual_seed(0)
    learner, data = ImageLearner(Tied()), images(6, labels=4)
    ours = fisher_diagonal(learner, data, None, "true", seed=0)
    assert list(ours) == ["first.weight"]
    assert_agree(ours, slow_fisher(learner, data, "true"))


class Scaled(nn.Module):
    """A learned temperature: a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.scale * self.layer(pixels.flatten(1))


def test_a_parameter_without_dimensions() -> None:
    torch.manual_seed(0)
    learner, data = ImageLearner(Scaled()), images(6)
    ours = fisher_diagonal(learner, data, None, "true", seed=0)
    assert_agree(ours, slow_fisher(learner, data, "true"))


class Backbone(nn.Module):
    """A user's own attribute is called ``module``; it is no wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(torch.tanh(self.module(pixels.flatten(1))))


def test_an_attribute_called_module_has_fisher_values() -> None:
    torch.manual_seed(0)
    learner, data = ImageLearner(Backbone()), images(6)
    ours = fisher_diagonal(learner, data, None, "true", seed=0)
    oracle = slow_fisher(learner, data, "true")
    assert torch.allclose(ours["head.weight"].double(), oracle["head.weight"], rtol=1e-4)
    weight = next(values for values in ours.values() if values.shape == (5, 4))
    assert torch.allclose(weight.double(), oracle["module.weight"], rtol=1e-4)


def test_under_no_grad_it_is_the_same() -> None:
    learner, data = ImageLearner(mlp((1, 2, 2), (5,), 3)), images(6)
    outside = fisher_diagonal(learner, data, None, "true", seed=0)
    with torch.no_grad():
        inside = fisher_diagonal(learner, data, None, "true", seed=0)
    assert all(torch.equal(inside[name], outside[name]) for name in outside)
