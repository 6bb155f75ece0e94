"""Two models scored on the same tasks: real tiny models, real files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from stockpot.comparison.models import Options, plan_models, score_models
from stockpot.errors import ConfigError, StockpotError
from support.text import write_model, write_tasks, write_text_experiment


def silent(what, done, total):
    """Progress that nobody watches."""


def compared(before, after, tasks=(), experiment=None, progress=silent, **options):
    plan = plan_models(
        str(before), str(after), [str(t) for t in tasks], experiment, Options(**options)
    )
    pairing, notes = score_models(plan, progress)
    return {(row.task, row.score): row for row in pairing.rows}, pairing.left, notes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two GPT-2 of one tokenizer, a T5 and three tasks."""
    import transformers

    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "a", "gpt2")
    write_model(folder / "t5", "t5")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "a")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder / "b")
    transformers.AutoTokenizer.from_pretrained(folder / "a").save_pretrained(folder / "b")
    write_tasks(folder, ("tea", "sky"))
    write_tasks(folder, ("qa",), columns=("prompt", "response"))
    return folder


def by_hand(folder, file):
    """The loss per learned token of every row, one at a time, with nothing of ours."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    losses = []
    for line in file.read_text().splitlines():
        prompt, response = json.loads(line).values()
        text, start = f"{prompt} {response}", len(tokenizer(prompt)["input_ids"])
        tokens = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.inference_mode():
            logp = model(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])
        losses.append(-float(logp[start - 1 :].mean()))
    return np.array(losses)


def test_losses_are_those_of_every_row_by_hand(place):
    found, left, _ = compared(place / "a", place / "b", [place / "qa.jsonl"])
    (row,) = found.values()
    one, other = (by_hand(place / name, place / "qa.jsonl") for name in "ab")
    assert (row.n, row.better, row.headline, left) == (14, "lower", True, ())
    assert (row.before, row.after) == pytest.approx((one.mean(), other.mean()), abs=2e-3)
    assert row.d == pytest.approx(other - one, abs=5e-3)


def test_labelled_texts_are_scored_by_accuracy(place):
    seen = []
    found, _, _ = compared(
        place / "a",
        place / "b",
        [place / "tea.jsonl", place / "sky.jsonl"],
        progress=lambda *what: seen.append(what),
    )
    assert found["tea", "labels accuracy"].headline
    assert not found["tea", "loss"].headline
    assert {row.n for row in found.values()} == {14}
    example = found["tea", "loss"].examples[0]
    assert example["prompt"].startswith(f"tea {example['item']} ")
    assert {what.split()[0] for what, _, _ in seen} == {"BEFORE", "AFTER"}
    assert all(0 <= done <= total for _, done, total in seen)


def test_the_stream_of_an_experiment_is_scored_on_its_test_items(place, tmp_path):
    files = [place / "tea.jsonl", place / "qa.jsonl"]
    path = write_text_experiment(tmp_path, files, str(place / "a"), "[sequential]")
    found, _, _ = compared(place / "a", place / "b", experiment=path)
    assert {task for task, _ in found} == {"tea", "qa"}
    assert {row.n for row in found.values()} == {4}  # three in ten of 14
    found, _, _ = compared(place / "a", place / "b", experiment=path, limit=3)
    assert {row.n for row in found.values()} == {3}


def test_a_run_is_compared_as_a_model_and_agrees_with_its_record(place, tmp_path):
    """What `stockpot run` recorded of its start and its end is what scoring the models gives."""
    from safetensors.numpy import load_file

    from support.experiments import run_file

    files = [place / "tea.jsonl", place / "qa.jsonl"]
    path = write_text_experiment(tmp_path, files, str(place / "a"), "[sequential]")
    run_file(path, tmp_path / "out")
    run = tmp_path / "out" / "runs" / "sequential-seed0"
    found, _, _ = compared(place / "a", run, experiment=path)
    items = [load_file(run / "items" / f"{n}.safetensors") for n in ("start", "stage-0001")]
    for (task, score), row in found.items():
        before, after = (kept[f"{task}/{score}"] for kept in items)
        assert row.before == pytest.approx(before.mean(), abs=1e-5)
        assert row.after == pytest.approx(after.mean(), abs=1e-5)


def test_losses_of_different_tokens_are_not_compared(place):
    found, left, _ = compared(place / "a", place / "t5", [place / "tea.jsonl", place / "qa.jsonl"])
    assert found["tea", "labels accuracy"].headline  # in the place of the loss
    assert {(one.task, one.score, one.judged) for one in left} == {
        ("tea", "loss", False),
        ("qa", "loss", True),
    }
    assert "different tokens" in left[0].reason


# Images.


def write_classifier(folder, labels, seed, names=None):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=labels,
    )
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    torch.manual_seed(seed)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def write_images(folder, labels=("cat", "dog"), each=6, splits=("",)):
    rng = np.random.default_rng(len(folder.name))
    for split in splits:
        for label in labels:
            (folder / split / label).mkdir(parents=True)
            for n in range(each):
                image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
                image.save(folder / split / label / f"{n}.png")
    return folder


def test_image_classifiers_are_scored_on_folders(tmp_path):
    models = [write_classifier(tmp_path / name, 2, seed) for seed, name in enumerate("ab")]
    day = write_images(tmp_path / "day")
    night = write_images(tmp_path / "night", each=4, splits=("train", "test"))
    found, _, _ = compared(*models, [day, night])
    assert {key: row.n for key, row in found.items()} == {
        ("day", "accuracy"): 12,  # all, where there is no test split
        ("night", "accuracy"): 8,
    }
    assert {row.kind for row in found.values()} == {"right or wrong"}
    found, _, _ = compared(*models, [day], limit=4)
    assert [row.n for row in found.values()] == [4]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (3, None, "has a head for 3 labels and the tasks have 2"),
        (2, ("dog", "cat"), "which folder is which label cannot be told"),
    ],
)
def test_classifiers_of_other_labels_are_refused(tmp_path, labels, names, message):
    one = write_classifier(tmp_path / "a", 2, 0, ("cat", "dog"))
    other = write_classifier(tmp_path / "b", labels, 1, names)
    with pytest.raises(ConfigError, match=message):
        compared(one, other, [write_images(tmp_path / "day")])


# What goes wrong.


def test_models_of_different_kinds_are_refused(place, tmp_path):
    vit = write_classifier(tmp_path / "vit", 2, 0)
    with pytest.raises(
        ConfigError, match=r"is a language model and AFTER .* is an image classifier"
    ):
        compared(place / "a", vit, [place / "qa.jsonl"])
    with pytest.raises(ConfigError, match="holds images, and the models are language models"):
        compared(place / "a", place / "b", [write_images(tmp_path / "day")])
    with pytest.raises(ConfigError, match="no folder with images"):
        compared(vit, write_classifier(tmp_path / "v", 2, 1), [place / "qa.jsonl"])


def test_files_and_folders_that_are_wrong(place, tmp_path):
    a, b = place / "a", place / "b"
    with pytest.raises(ConfigError, match="there is no such file"):
        compared(a, b, ["no.jsonl"])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(StockpotError, match=r"bad\.jsonl:2: there is no 'response'"):
        compared(a, b, [bad])
    with pytest.raises(ConfigError, match="two tasks are named 'qa'"):
        compared(a, b, [place / "qa.jsonl"] * 2)
    with pytest.raises(ConfigError, match=r"BEFORE: .* holds no config\.json"):
        compared(tmp_path, b, [place / "qa.jsonl"])
    with pytest.raises(ConfigError, match="AFTER: unknown model 'nothing'"):
        compared(a, "nothing", [place / "qa.jsonl"])
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"--device {device} is not to be had"):
            compared(a, b, [place / "qa.jsonl"], device=device)
    with pytest.raises(ConfigError, match="are the same model"):
        compared(a, a, [place / "qa.jsonl"])


def test_a_model_that_answers_nan_is_named(place, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(place / "a")
    with torch.no_grad():
        model.transformer.wte.weight[5:] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    transformers.AutoTokenizer.from_pretrained(place / "a").save_pretrained(tmp_path / "nan")
    with pytest.raises(StockpotError, match=r"AFTER .*nan: .*not finite"):
        compared(place / "a", tmp_path / "nan", [place / "qa.jsonl"])
