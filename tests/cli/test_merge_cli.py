"""`stockpot merge`, `distance` and `fisher` as a user meets them, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.launch import launch
from support.merging import tensors_of, write_model

SHAPES = {"model.layers.0.w": (64, 32), "model.layers.1.w": (64, 32), "head.w": (10, 32)}


def stockpot(*arguments: object, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    return launch(1, "stockpot", arguments, fresh=fresh)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    base = tensors_of(0, SHAPES, "BF16")
    return [write_model(tmp_path / "base", base)] + [
        write_model(tmp_path / f"t{i}", tensors_of(i, SHAPES, "BF16", base)) for i in (1, 2)
    ]


def test_merge_says_what_it_wrote(folders: list[Path], tmp_path: Path) -> None:
    base, one, two = folders
    words = ("merge", "ties", "--base", base, f"{one}:2", two, "-o", tmp_path / "out")
    done = stockpot(*words, fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "3 tensors" in done.stderr
    assert str(tmp_path / "out") in done.stderr.replace("\n", "")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(SHAPES)


def test_json_is_all_of_stdout(folders: list[Path], tmp_path: Path) -> None:
    done = stockpot("merge", "linear", *folders, "-o", tmp_path / "out", "--json")
    result = json.loads(done.stdout)
    assert result["tensors"] == 3
    assert set(result["hashes"]) == {str(each / "model.safetensors") for each in folders}
    plan = json.loads(stockpot("merge", "linear", *folders, "--dry-run", "--json").stdout)
    assert plan["bytes_to_read"] == result["bytes_read"]


def test_sweep_of_the_command_line(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--base", folders[0], folders[1], "--sweep", "beta=0:1:0.5", "-o", out)
    assert stockpot("merge", "wise-ft", *options).returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["beta=0", "beta=0.5", "beta=1"]


def test_recipe_of_the_command_line(folders: list[Path], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"method: linear\nmodels: [{folders[0]}, '{folders[1]}:3']\n")
    assert stockpot("merge", recipe, "-o", tmp_path / "a").returncode == 0
    again = stockpot("merge", tmp_path / "a" / "merge.yaml", "-o", tmp_path / "b")
    assert again.returncode == 0, again.stderr
    one, two = (load_file(tmp_path / each / "model.safetensors") for each in "ab")
    assert all(torch.equal(one[name], two[name]) for name in SHAPES)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["linaer", "{0}", "-o", "{out}"], 2, "did you mean 'linear'"),
        (["linear", "-o", "{out}"], 2, "name the models"),
        (["linear", "{0}"], 2, "-o"),
        (["linear", "{0}", "-o", "{out}", "--density", "0.3"], 2, "no setting 'density'"),
        (["linear", "{0}", "{0}x", "-o", "{out}"], 1, "does not exist"),
        (["linear", "{0}", "-o", "{0}"], 1, "--overwrite"),
        (["linear", "{0}", "-o", "{out}", "--shard-size", "5XB"], 2, "--shard-size"),
        (["linear", "{0}", "-o", "{out}", "--device", "gpu"], 2, "--device"),
        (["linear", "{0}", "-o", "{out}", "--device", "cuda:99"], 2, "cannot be used here"),
        (["linear", "{0}", "-o", "{out}", "--hash", "md5"], 2, "md5"),
        (["linear", "{0}", "-o", "{out}", "--weights", "x"], 2, "--weights"),
        (["linear", "{0}", "-o", "{out}", "--missing", "sikp"], 2, "did you mean 'skip'"),
        (["none.yaml", "-o", "{out}"], 2, "cannot read none.yaml"),
    ],
)
def test_mistakes(
    arguments: list[str], code: int, message: str, folders: list[Path], tmp_path: Path
) -> None:
    filled = [each.format(*folders, out=tmp_path / "out") for each in arguments]
    done = stockpot("merge", *filled)
    assert done.returncode == code, done.stderr
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_then_the_same_command(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.w": (1024, 1024) for i in range(16)}
    inputs = [write_model(tmp_path / n, tensors_of(i, shapes, "F32")) for i, n in enumerate("ab")]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "stockpot", "merge", "linear", *map(str, inputs)]
    command += ["-o", str(out), "--chunk", "4096"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    while not (tmp_path / ".out.partial" / "model.safetensors").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode:  # it may have been done already
        assert process.returncode == 130
        assert "goes on from there" in errors
        assert not out.exists()
        assert subprocess.run(command).returncode == 0
    one, two = (load_file(each / "model.safetensors") for each in inputs)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, (one[name] + two[name]) / 2)


def test_merging_loads_no_torch(folders: list[Path], tmp_path: Path) -> None:
    program = (
        "import sys; from stockpot.merging import merge; "
        "merge('ties', sys.argv[2:4], sys.argv[4], base=sys.argv[1]); "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    arguments = [*map(str, folders), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)


def test_distance_against_torch(folders: list[Path], tmp_path: Path) -> None:
    figure = tmp_path / "d.png"
    done = stockpot("distance", folders[0], folders[1], "--json", "--figure", figure)
    found = json.loads(done.stdout)
    assert figure.read_bytes().startswith(b"\x89PNG")
    a, b = (load_file(each / "model.safetensors") for each in folders[:2])
    x = torch.cat([a[name].double().flatten() for name in sorted(a)])
    y = torch.cat([b[name].double().flatten() for name in sorted(a)])
    assert found["total"]["l2"] == pytest.approx(float((x - y).norm()), rel=1e-6)
    cosine = float(torch.nn.functional.cosine_similarity(x, y, dim=0))
    assert found["total"]["cosine"] == pytest.approx(cosine, rel=1e-6)
    assert [each["name"] for each in found["layers"]] == [
        "model.layers.0",
        "model.layers.1",
        "head.w",
    ]
    table = stockpot("distance", folders[0], folders[1]).stdout
    assert "model.layers.0" in table
    assert "total" in table
    wrong = stockpot("distance", folders[0], folders[1], "--figure", tmp_path / "d.txt")
    assert wrong.returncode == 2


# A real language model.


@pytest.fixture(scope="module")
def tuned(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The stories model, tuned for some steps on two small sets of text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = (
        "The sum of two and three is five. The sum of four and four is eight.",
        "The court held that the contract was void because it was signed under threat.",
    )
    folders = []
    tokenizer = AutoTokenizer.from_pretrained(stories)
    for number, text in enumerate(texts):
        model = AutoModelForCausalLM.from_pretrained(stories)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for _ in range(20):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folder = tmp_path_factory.mktemp("tuned") / f"tuned{number}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders


@pytest.mark.parametrize("method", ["linear", "ties", "task-arithmetic", "slerp", "dare-ties"])
def test_merged_folder_loads_and_generates(
    method: str, tuned: list[Path], stories: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = () if method in ("linear", "slerp") else ("--base", stories)
    done = stockpot("merge", method, *base, *tuned, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert out.shape[1] > ids.shape[1]
    assert tokenizer.decode(out[0]).strip()


def test_fisher_values_of_a_language_model(
    tuned: list[Path], stories: Path, tmp_path: Path
) -> None:
    """Squares of single gradients by autograd, then a merge weighted by them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["One day a dog ran home.", "Tim saw a big red ball. He was happy.", "The end."]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = []
    for number, folder in enumerate(tuned):
        files.append(tmp_path / f"f{number}.safetensors")
        done = stockpot("fisher", folder, data, "-o", files[-1], "--labels", "true", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["examples"] == 3
    model = AutoModelForCausalLM.from_pretrained(tuned[0])
    tokenizer = AutoTokenizer.from_pretrained(tuned[0])
    expected: dict[str, torch.Tensor] = {}
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        log_p = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        total = sum(log_p[i, ids[0, i + 1]] for i in range(ids.shape[1] - 1))
        model.zero_grad()
        total.backward()  # type: ignore[union-attr]
        for name, parameter in model.named_parameters():
            square = parameter.grad.double().square() / len(texts)
            expected[name] = expected.get(name, torch.zeros(())) + square
    found = load_file(files[0])
    for name, value in expected.items():
        scale = float(value.max())
        assert (found[name].double() - value).abs().max() <= 1e-4 * scale, name
    options = [each for file in files for each in ("--fisher", file)]
    done = stockpot("merge", "fisher", *tuned, *options, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    again = stockpot("fisher", tuned[0], data, "-o", files[0])
    assert again.returncode == 1
    assert "--overwrite" in again.stderr


@pytest.mark.parametrize("labels", ["sampled", "exact", "true"])
def test_fisher_values_of_a_classifier(labels: str, stories: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(stories, num_labels=3)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.save_pretrained(tmp_path / "m")
    text = "The big dog."
    (tmp_path / "d.csv").write_text(f"text,label\n{text},2\n")
    file = tmp_path / "f.safetensors"
    options = ("-o", file, "--labels", labels)
    done = stockpot("fisher", tmp_path / "m", tmp_path / "d.csv", *options)
    assert done.returncode == 0, done.stderr
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    log_p = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    squares = []
    for label in range(3):
        (gradient,) = torch.autograd.grad(log_p[label], model.score.weight, retain_graph=True)
        squares.append(gradient.double().square())
    found = load_file(file)["score.weight"].double()
    if labels == "exact":
        expected = sum(p * square for p, square in zip(log_p.exp(), squares, strict=True))
        assert (found - expected).abs().max() < 1e-5 * float(found.max())
    else:
        errors = [float((found - square).abs().max() / found.max()) for square in squares]
        assert (errors[2] if labels == "true" else min(errors)) < 1e-5


def test_fisher_mistakes(stories: Path, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"body": "x"}\n')
    out = tmp_path / "f.safetensors"
    for arguments, message in (
        ((stories, data, "-o", out), "the data has the columns body"),
        ((stories, tmp_path / "none.jsonl", "-o", out), "cannot load the data"),
        ((stories, data, "-o", tmp_path / "f.bin"), "must end in .safetensors"),
        ((tmp_path, data, "-o", out), "holds no safetensors file"),
        ((stories, data, "-o", out, "--labels", "some"), "--labels"),
    ):
        done = stockpot("fisher", *arguments)
        assert done.returncode in (1, 2)
        assert message in done.stderr.replace("\n", " ")
        assert "Traceback" not in done.stderr
    assert not out.exists()


def test_help_lists_the_verbs() -> None:
    helped = stockpot("--help").stdout
    for verb in ("merge", "distance", "fisher"):
        assert verb in helped


def test_fisher_values_of_an_image_classifier(mirror: Path, tmp_path: Path) -> None:
    """Real digits by their hub id, a small ViT, squares by autograd one image at a time."""
    import datasets
    import numpy as np
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=28,
        patch_size=14,
        num_channels=1,
        num_labels=10,
    )
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    file = tmp_path / "f.safetensors"
    options = ("-o", file, "--samples", "0", "--labels", "true", "--split", "test[:3]")
    done = stockpot("fisher", tmp_path / "vit", "ylecun/mnist", *options)
    assert done.returncode == 0, done.stderr
    rows = datasets.load_dataset(str(mirror / "ylecun" / "mnist"), split="test[:3]")
    expected: dict[str, torch.Tensor] = {}
    for row in rows:
        pixels = torch.tensor(np.array(row["image"]), dtype=torch.float32)[None, None] / 255
        model.zero_grad()
        torch.log_softmax(model(pixel_values=pixels).logits[0], -1)[row["label"]].backward()
        for name, parameter in model.named_parameters():
            square = parameter.grad.double().square() / 3
            expected[name] = expected.get(name, torch.zeros(())) + square
    # The library calls its parameters otherwise than the files that it writes.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(expected[name])
    model.save_pretrained(tmp_path / "expected")
    renamed = load_file(tmp_path / "expected" / "model.safetensors")
    found = load_file(file)
    assert found.keys() == load_file(tmp_path / "vit" / "model.safetensors").keys()
    assert set(found) - set(expected)
    for name, value in renamed.items():
        assert (found[name] - value).abs().max() <= 1e-4 * float(value.max()), name
