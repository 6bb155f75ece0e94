"""Language models against Transformers' losses and texts, lm-evaluation-harness, and float64."""

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from stockpot.errors import ConfigError, NonFiniteError
from stockpot.evaluation.divergence import kl_from
from stockpot.evaluation.generation import generate
from stockpot.evaluation.language import choices, held_out_loss, negative_log_likelihoods
from stockpot.methods import Memory, TaskRun
from stockpot.methods.sequential import Sequential
from stockpot.models.language import TextLearner, load_language_model
from stockpot.models.learner import copy_weights, load_weights_
from stockpot.models.settings import HuggingFace, Lora
from stockpot.streams.data import Task
from stockpot.streams.text import Choices, Question, exchange
from stockpot.streams.tokens import TextData
from stockpot.training import TrainingSettings
from stockpot.training.trainer import train_task
from support.text import CHATML, WORDS, write_model

EXAMPLES = [
    exchange("Once upon a time", "there was a boat."),
    exchange("Lily", "and Tom play with a big red ball in the park, and then they go home. " * 2),
    exchange("The 😀 sun is", "hot"),
    exchange("", "Yes"),
    exchange("One day a small bird flew over the sea. It saw", "é 漢字 and a fish"),
]
FAMILIES = ["stories", "gpt2", "t5"]


@pytest.fixture(scope="session")
def folders(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    return {
        "stories": stories,
        "gpt2": write_model(made / "gpt2", "gpt2"),
        "chat": write_model(made / "chat", "gpt2", CHATML),
        "t5": write_model(made / "t5", "t5"),
    }


def load(folder: Path, **options: Any) -> TextLearner:
    return load_language_model(HuggingFace(id=str(folder), **options))


def moved(learner: TextLearner, size: float = 0.02, seed: int = 3) -> dict[str, Tensor]:
    """The learner's weights with noise."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: weight + size * torch.randn(weight.shape, generator=generator)
        for name, weight in learner.weights().items()
    }


families = pytest.mark.parametrize("family", FAMILIES)


# Losses.


@families
def test_losses_are_those_of_transformers(folders, family):
    learner = load(folders[family])
    learner.module.eval()
    data, _ = learner.form.data(EXAMPLES)
    for rows in ([0], [1, 2], list(range(len(data)))):
        batch = data.__getitems__(rows)
        with torch.no_grad():
            theirs = learner.module(**batch).loss
            ours = learner.loss(batch)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        predictions = learner.predictions(batch)
        assert learner.count(batch) == len(predictions.targets) == len(predictions.losses())
        torch.testing.assert_close(predictions.losses().mean(), theirs, rtol=1e-6, atol=1e-6)
        counts = predictions.example.bincount(minlength=len(rows)).tolist()
        assert counts == [learner.count(data.__getitems__([row])) for row in rows]


@families
def test_padding_changes_no_loss(folders, family):
    learner = load(folders[family])
    data, _ = learner.form.data(EXAMPLES)
    together = negative_log_likelihoods(learner, data, 5, "cpu")
    alone = negative_log_likelihoods(learner, data, 1, "cpu")
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = negative_log_likelihoods(learner, data.subset(order), 2, "cpu")
    torch.testing.assert_close(shuffled[0], alone[0][order], rtol=1e-5, atol=1e-5)
    assert shuffled[1].equal(alone[1][order])


@families
def test_held_out_loss_is_the_mean_over_tokens(folders, family):
    learner = load(folders[family])
    data, _ = learner.form.data(EXAMPLES * 6)
    score = held_out_loss(learner, data, 4)
    learner.module.eval()
    with torch.no_grad():
        whole = float(learner.module(**data.__getitems__(range(len(data)))).loss)
        each = torch.stack(
            [learner.module(**data.__getitems__([n])).loss for n in range(len(data))]
        )
    assert score.value == pytest.approx(whole, rel=1e-5)
    assert (score.n, score.metric, score.better) == (30, "loss", "lower")
    torch.testing.assert_close(score.items, each, rtol=1e-4, atol=1e-5)


def test_its_standard_error_is_that_of_a_bootstrap(folders):
    learner = load(folders["stories"])
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(120):
        size = int(torch.randint(1, 12, (1,), generator=generator))
        picked = torch.randint(len(WORDS), (size,), generator=generator).tolist()
        texts.append(exchange("Once", " ".join(WORDS[n] for n in picked)))
    data, _ = learner.form.data(texts)
    score = held_out_loss(learner, data, 60)
    losses, tokens = negative_log_likelihoods(learner, data, 60, "cpu")
    drawn = torch.randint(120, (20000, 120), generator=generator)
    values = losses[drawn].sum(1) / tokens[drawn].sum(1)
    assert score.stderr == pytest.approx(float(values.std()), rel=0.04)
    # It is not that of a mean over examples, nor of independent tokens.
    assert abs(float(score.items.std()) / math.sqrt(120) / score.stderr - 1) > 0.06


def test_losses_that_overflow_are_refused(folders):
    learner = load(folders["gpt2"])
    data, _ = learner.form.data(EXAMPLES)
    with torch.no_grad():
        learner.module.transformer.ln_f.weight.fill_(3e38)
        learner.module.transformer.wte.weight.mul_(1e3)
    with pytest.raises(NonFiniteError, match="not finite"):
        held_out_loss(learner, data, 5)


# Choices.

QUESTIONS = [
    Question("Once upon a", ("time", "table", "time ago"), 0),
    Question("The sun is ", ("hot", "very cold and wet"), 1),
    Question("Lily said:\n", ("Yes", "no 😀", "maybe, Tom, but not now"), 2),
    Question("A bird can", ("fly", "swim over the sea"), 0),
]


@families
def test_choices_are_likely_as_in_lm_evaluation_harness(folders, family):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    learner = load(folders[family])
    data = learner.form.choices(QUESTIONS)
    losses, _ = negative_log_likelihoods(learner, data, 4, "cpu")
    harness = HFLM(
        pretrained=copy.deepcopy(learner.module), tokenizer=learner.form.tokenizer, batch_size=1
    )
    asked = [
        # The decoder's text begins with the choice, that of a causal model with the space before.
        (q.prompt.rstrip(), choice)
        if family == "t5"
        else (q.prompt, ("" if q.prompt[-1].isspace() else " ") + choice)
        for q in QUESTIONS
        for choice in q.choices
    ]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=n)
        for n, pair in enumerate(asked)
    ]
    theirs = torch.tensor([value for value, _ in harness.loglikelihood(requests, True)])
    torch.testing.assert_close(-losses, theirs.double(), rtol=1e-5, atol=1e-4)
    best, normalised, place = [], [], 0
    for question in QUESTIONS:
        own = theirs[place : place + len(question.choices)].tolist()
        place += len(own)
        best.append(float(own.index(max(own)) == question.answer))
        per_letter = [value / len(c) for value, c in zip(own, question.choices, strict=True)]
        normalised.append(float(per_letter.index(max(per_letter)) == question.answer))
    accuracy, accuracy_norm = choices(learner, "law", Choices(QUESTIONS), 3)
    assert accuracy.items.tolist() == best
    assert accuracy_norm.items.tolist() == normalised
    assert accuracy.value == pytest.approx(sum(best) / 4)
    assert (accuracy.headline, accuracy_norm.headline) == (True, False)
    assert accuracy.stderr == pytest.approx(math.sqrt(accuracy.value * (1 - accuracy.value) / 4))


# Texts.

PROMPTS = ["Once upon a time", "Lily", "The big red dog ran to the park. It", "😀", "Tom and Lily "]


def alone(learner: TextLearner, prompt: str, **options: Any) -> str:
    """What Transformers generates after one prompt, without padding."""
    tokenizer = learner.form.tokenizer
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    learner.module.eval()
    out = learner.module.generate(input_ids=ids, do_sample=False, **options)
    whole = tokenizer.decode(out[0], skip_special_tokens=True)
    if learner.form.encoder_decoder:
        return str(whole)
    return str(whole[len(tokenizer.decode(ids[0], skip_special_tokens=True)) :])


@families
def test_texts_are_those_of_transformers_one_by_one(folders, family):
    learner = load(folders[family])
    learner.module.train()
    expected = [alone(learner, p.rstrip(), max_new_tokens=12, pad_token_id=0) for p in PROMPTS]
    learner.module.train()
    for size in (1, 2, 5):
        assert generate(learner, PROMPTS, max_new_tokens=12, batch_size=size) == expected
    assert len(set(expected)) >= 2
    assert learner.module.training


def test_templates_and_raw_prompts(folders):
    learner = load(folders["chat"])
    tokenizer = learner.form.tokenizer
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Lily"}], tokenize=False, add_generation_prompt=True
    )
    options: Any = {"max_new_tokens": 6, "batch_size": 2}
    assert generate(learner, ["Lily"], **options) == [
        alone(learner, chat, max_new_tokens=6, pad_token_id=0)
    ]
    assert generate(learner, ["Lily\n"], raw=True, **options) == [
        alone(learner, "Lily\n", max_new_tokens=6, pad_token_id=0)
    ]


def test_texts_end_before_the_first_stop_string(folders):
    learner = load(folders["stories"])
    whole = generate(learner, PROMPTS, max_new_tokens=40, batch_size=5)
    assert whole[1].startswith(" ")  # which decoding the new tokens alone would lose
    stops = ["She", ".", " a"]
    cut = generate(learner, PROMPTS, max_new_tokens=40, batch_size=5, stop=stops)
    assert cut == [text[: min(text.find(s) for s in stops if s in text)] for text in whole]
    assert len(set(map(len, cut))) > 2


def test_draws_follow_from_their_seed_and_leave_no_trace(folders):
    learner = load(folders["stories"])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    options: Any = {"max_new_tokens": 10, "batch_size": 5, "temperature": 1.0}
    one = generate(learner, PROMPTS, seed=1, **options)
    assert torch.get_rng_state().equal(before)
    torch.rand(3)
    assert generate(learner, PROMPTS, seed=1, **options) == one
    assert generate(learner, PROMPTS, seed=2, **options) != one
    greedy = generate(learner, PROMPTS, max_new_tokens=10, batch_size=5)
    cold = generate(learner, PROMPTS, seed=1, **{**options, "temperature": 1e-4})
    assert cold == greedy


def test_a_long_prompt_keeps_its_end_and_its_first_token(folders):
    words = [WORDS[n % len(WORDS)] for n in range(700)]
    long = " ".join(words)
    for max_length in (None, 16):  # the longest training example is no limit here
        learner = load(folders["stories"], max_length=max_length)
        tokenizer = learner.form.tokenizer
        seen: list[Tensor] = []
        hook = learner.module.register_forward_pre_hook(
            lambda module, args, given, seen=seen: seen.append(given["input_ids"]),
            with_kwargs=True,
        )
        for asked, prompt, answer in ((20, 492, 20), (511, 256, 256), (100000, 256, 256)):
            seen.clear()
            generate(learner, [long], max_new_tokens=asked, batch_size=1, stop=["."])
            ids = tokenizer(long)["input_ids"]
            assert seen[0][0].tolist() == [ids[0], *ids[-(prompt - 1) :]]
            assert len(seen) <= answer
        hook.remove()


# Divergence.


@families
def test_divergence_is_that_of_float64(folders, family):
    learner = load(folders[family])
    anchor, after = learner.weights(), moved(learner)
    data, _ = learner.form.data(EXAMPLES)
    found = kl_from(anchor, after, learner, data, 4, 3, "cpu")
    held = learner.weights()
    assert all(held[name].equal(after[name]) for name in after)
    module = copy.deepcopy(learner.module).double().eval()
    parts, places = [], 0
    for row in range(4):
        batch = data.__getitems__([row])
        logs = []
        for weights in (anchor, after):
            load_weights_(module, weights)
            with torch.no_grad():
                logits = module(**batch).logits
            kept = batch["labels"][0] != -100
            logits = logits[0][kept] if family == "t5" else logits[0, :-1][kept[1:]]
            logs.append(F.log_softmax(logits, dim=-1))
        parts.append(float((logs[0].exp() * (logs[0] - logs[1])).sum()))
        places += len(logs[0])
    assert found.value == pytest.approx(sum(parts) / places, rel=1e-3)
    assert found.value > 1e-4
    assert found.examples == 4
    assert kl_from(after, after, learner, data, 99, 3, "cpu").value < 1e-9


def test_divergence_keeps_to_its_memory(folders, monkeypatch):
    learner = load(folders["stories"])
    data, _ = learner.form.data(EXAMPLES)
    weights = learner.weights()
    monkeypatch.setattr("stockpot.evaluation.divergence._ELEMENTS", 1)
    assert kl_from(weights, weights, learner, data, 5, 2, "cpu").examples == 2


# Training.


def train(learner: TextLearner, data: TextData, folder: Path, **settings: Any) -> dict[str, Tensor]:
    using = TrainingSettings(device="cpu", checkpoint_seconds=None, **settings)
    start = learner.weights()
    run = TaskRun(
        stage=0,
        last=True,
        tasks=(Task("task", data, data),),
        past=(),
        learner=learner,
        start=start,
        previous=start,
        memory=Memory(folder, 0),
        seed=4,
        total_steps=using.steps_for(len(data)),
        device=torch.device("cpu"),
    )
    train_task(Sequential(), run, data, using, folder / "scratch")
    return learner.weights()


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("family", ["stories", "t5"])
def test_accumulated_batches_count_every_token_alike(folders, family, tmp_path):
    options: Any = {
        "epochs": 2, "optimizer": "sgd", "learning_rate": 0.1, "group_by_length": False
    }  # fmt: skip
    made = []
    for size, accumulate in ((5, 1), (2, 3), (1, 5)):
        learner = load(folders[family])
        data, _ = learner.form.data(EXAMPLES)
        start = learner.weights()
        made.append(
            train(
                learner,
                data,
                tmp_path,
                batch_size=size,
                gradient_accumulation=accumulate,
                **options,
            )
        )
        assert largest_difference(made[-1], start) > 1e-2
    assert largest_difference(made[0], made[1]) < 2e-6
    assert largest_difference(made[0], made[2]) < 2e-6


class Watched(TextData):
    """Remembers which rows made up each batch."""

    def __getitems__(self, indices: Any) -> Any:
        self.__dict__.setdefault("batches", []).append(torch.as_tensor(indices).tolist())
        return super().__getitems__(indices)


def test_batches_of_similar_length_hold_every_example_once(folders, tmp_path):
    learner = load(folders["stories"])
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 40, (101,), generator=generator).tolist()
    plain, _ = learner.form.data([exchange("Once", "a " * size) for size in sizes])

    def batches(**options: Any) -> list[list[int]]:
        data = Watched(plain.inputs, plain.learned, None, plain.pad)
        train(learner, data, tmp_path, epochs=2, batch_size=4, learning_rate=1e-9, **options)
        return data.batches

    grouped, again, free = batches(), batches(), batches(group_by_length=False)
    assert grouped == again
    half = len(grouped) // 2
    assert half == 26
    for made in (grouped, free):
        for epoch in (made[:half], made[half:]):
            assert sorted(n for batch in epoch for n in batch) == list(range(101))
            assert sorted(map(len, epoch)) == [1] + [4] * 25
    assert grouped[:half] != grouped[half:]

    def padding(made: list[list[int]]) -> int:
        return sum(max(sizes[n] for n in b) * len(b) - sum(sizes[n] for n in b) for b in made)

    assert padding(grouped) < padding(free) / 5
    longest = [max(sizes[n] for n in batch) for batch in grouped[:half]]
    assert longest != sorted(longest)  # batches are not in the order of their length


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
@pytest.mark.parametrize("family", ["stories", "t5"])
def test_checkpointed_activations_give_the_same_gradients(folders, family, lora):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        learner = load(folders[family], gradient_checkpointing=checkpointing, lora=lora)
        learner.module.train()
        for module in learner.module.modules():
            if "lora_B" in dict(module.named_children()):
                torch.nn.init.constant_(module.lora_B["default"].weight, 0.05)
        data, _ = learner.form.data(EXAMPLES)
        learner.loss(data.__getitems__(range(5))).backward()
        found.append(
            {n: p.grad for n, p in learner.module.named_parameters() if p.grad is not None}
        )
        parts = [getattr(m, "gradient_checkpointing", False) for m in learner.module.modules()]
        assert any(parts) == checkpointing
    assert found[0].keys() == found[1].keys() != set()
    for name, gradient in found[0].items():
        assert float((found[1][name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-7


@families
def test_bfloat16_weights_train(folders, family, tmp_path):
    learner = load(folders[family], dtype="bfloat16")
    exact = load(folders[family])
    data, _ = learner.form.data(EXAMPLES)
    assert {w.dtype for w in learner.weights().values()} == {torch.bfloat16}
    loss, expected = (held_out_loss(each, data, 5).value for each in (learner, exact))
    assert loss == pytest.approx(expected, rel=0.03)
    trained = train(learner, data, tmp_path, epochs=15, batch_size=5, learning_rate=2e-3)
    assert {w.dtype for w in trained.values()} == {torch.bfloat16}
    assert held_out_loss(learner, data, 5).value < loss - 0.1


# What is refused.


def test_a_tokenizer_of_another_model(folders, tmp_path):
    shutil.copytree(folders["stories"], tmp_path / "mixed")
    small = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1))
    small.save_pretrained(tmp_path / "mixed")
    with pytest.raises(ConfigError, match="has 512 tokens and its model only 100"):
        load(tmp_path / "mixed")


def test_a_template_that_is_not_there(folders):
    with pytest.raises(ConfigError, match=r"model\.chat_template"):
        load(folders["stories"], chat_template=True)


def test_weights_that_are_missing(folders, tmp_path):
    shutil.copytree(folders["gpt2"], tmp_path / "part")
    weights = load_file(tmp_path / "part/model.safetensors")
    del weights["transformer.ln_f.weight"]
    save_file(weights, tmp_path / "part/model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="lacks weights"):
        load(tmp_path / "part")


def test_fresh_weights_follow_from_torchs_seed(folders):
    def fresh(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return copy_weights(load(folders["gpt2"], pretrained=False).module)

    one, same, other = fresh(0), fresh(0), fresh(1)
    assert all(one[name].equal(same[name]) for name in one)
    assert largest_difference(one, other) > 1e-3
