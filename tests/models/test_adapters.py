"""Low-rank adapters: the model that base and adapters make, against PEFT and float64."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stockpot.errors import ConfigError
from stockpot.evaluation.language import held_out_loss
from stockpot.experiment import load_experiment
from stockpot.methods import METHODS
from stockpot.models.language import TextLearner, load_language_model
from stockpot.models.settings import HuggingFace, Lora
from stockpot.streams.text import exchange
from support.experiments import lines, record_of, run_and_kill, run_file
from support.text import write_model, write_tasks, write_text_experiment

pytest.importorskip("peft")

EXAMPLES = [exchange("Once upon a time", "there was a boat."), exchange("Lily", "and Tom.")]
LORA = "{r: 2, alpha: 8}"
BETA = 0.3


@pytest.fixture(scope="module")
def folders(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    return {
        "stories": stories,
        "gpt2": write_model(made / "gpt2", "gpt2"),
        "t5": write_model(made / "t5", "t5"),
    }


def load(folder: Path, **options: Any) -> TextLearner:
    torch.manual_seed(0)
    return load_language_model(HuggingFace(id=str(folder), **options))


def disturb(learner: TextLearner) -> None:
    """As if the adapters had been trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in learner.module.named_parameters():
            if ".lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def logits(module: Any, learner: TextLearner) -> Tensor:
    batch = learner.form.data(EXAMPLES)[0].__getitems__([0, 1])
    module.eval()
    with torch.no_grad():
        found: Tensor = module(**batch).logits
    return found


CASES = [
    ("stories", Lora(r=4)),
    ("stories", Lora(r=3, alpha=5, target_modules=("q_proj", "down_proj"))),
    ("gpt2", Lora(r=4)),
    ("t5", Lora(r=4)),
    ("t5", Lora(r=2, target_modules=("q", "v"))),
]


@pytest.mark.parametrize(("family", "lora"), CASES, ids=str)
def test_weights_are_those_that_peft_merges(folders, family, lora):
    learner = load(folders[family], lora=lora)
    plain = load(folders[family])
    start = plain.weights()
    fresh = learner.weights()
    assert fresh.keys() == start.keys()
    assert all(fresh[name].equal(start[name]) for name in start)  # they change nothing yet
    assert learner.parameter_names() == plain.parameter_names()
    disturb(learner)
    ours = learner.weights()
    with warnings.catch_warnings():  # PEFT's, of tied embeddings
        warnings.simplefilter("ignore")
        merged = copy.deepcopy(learner.module).merge_and_unload()
    theirs = dict(merged.named_parameters())
    changed = {name for name in start if not ours[name].equal(start[name])}
    assert changed
    assert {name.rsplit(".", 2)[-2] for name in changed} >= set(lora.target_modules or ())
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight.detach(), rtol=1e-6, atol=1e-6)
    # Loaded anew the model says what it said, through fresh adapters, and as a plain model does.
    before = logits(learner.module, learner)
    learner.load(ours)
    plain.load(ours)
    torch.testing.assert_close(logits(learner.module, learner), logits(plain.module, plain))
    again = learner.weights()
    assert all(again[name].equal(ours[name]) for name in ours)
    torch.testing.assert_close(logits(plain.module, plain), before, rtol=1e-4, atol=1e-4)
    trainable = [n for n, p in learner.module.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".lora_" in name for name in trainable)


@pytest.mark.parametrize(
    ("family", "target"), [("stories", "embed_tokens"), ("stories", "lm_head"), ("t5", "shared")]
)
def test_an_adapter_on_a_tied_weight_is_refused(folders, family, target):
    """Merged into the weight it would change the weight's other use as well."""
    with pytest.raises(ConfigError, match=r"model\.lora"):
        load(folders[family], lora=Lora(r=3, target_modules=(target,)))


def test_weights_in_bfloat16_are_rounded_once(folders):
    learner = load(folders["stories"], lora=Lora(r=2, alpha=8), dtype="bfloat16")
    base = learner.weights()
    disturb(learner)
    parts = {
        name.removeprefix("base_model.model."): weight.detach().double()
        for name, weight in learner.module.named_parameters()
    }
    checked = 0
    for name, weight in learner.weights().items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" not in parts:
            continue
        product = parts[f"{stem}.lora_B.default.weight"] @ parts[f"{stem}.lora_A.default.weight"]
        exact = base[name].double() + 4 * product
        assert weight.dtype == torch.bfloat16
        step = exact.abs().log2().floor().exp2() * 2**-7
        assert bool(((weight.double() - exact).abs() <= 0.501 * step + 1e-6).all())
        checked += 1
    assert checked == 5 * 7


# In an experiment.


def experiment(folder: Path, stories: Path, methods: str, **more: str) -> Path:
    model = f"{{id: {stories}, lora: {LORA}, max_length: 48}}"
    return write_text_experiment(folder, write_tasks(folder), model, methods, **more)


def run(path: Path, output: Path, *overrides: str) -> list[dict[str, Any]]:
    outcome = run_file(path, output, overrides)
    assert not outcome.failures
    return list(outcome.summary)


def final(output: Path) -> dict[str, Tensor]:
    return load_file(next(output.glob("runs/*/model.safetensors")))


def stages(output: Path) -> list[dict[str, Tensor]]:
    return [load_file(path) for path in sorted(output.glob("runs/*/stage-*.safetensors"))]


def largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


@pytest.mark.parametrize("method", ["sfa", "wise-ft"])
def test_an_average_at_the_end_scales_what_a_task_has_added(stories, tmp_path, method):
    """With p = 1 a task trains as without averaging, and its product is then 1 - beta of it."""
    beta = f"{{name: {method}, beta: {BETA}}}"
    if method == "sfa":
        beta = f"{{name: sfa, p: 1.0, beta: {BETA}}}"
    path = experiment(tmp_path, stories, f"[{beta}]", record="{weights: all}")
    run(path, tmp_path / "averaged")
    run(path, tmp_path / "plain", "methods=[sequential]")
    first, averaged = stages(tmp_path / "averaged")
    same, trained = stages(tmp_path / "plain")
    assert largest(first, same) == 0
    assert largest(trained, first) > 1e-3
    expected = {
        name: BETA * first[name].double() + (1 - BETA) * trained[name].double() for name in first
    }
    assert largest(averaged, expected) < 2e-7
    (event,) = lines(tmp_path / "averaged" / "merges.jsonl")
    assert event["beta"] == BETA
    assert event["distance_after"] == pytest.approx((1 - BETA) * event["distance_before"])


def test_what_is_deployed_is_what_is_scored_and_gone_on_from(stories, tmp_path):
    path = experiment(tmp_path, stories, "[{name: sfa, p: 0.5, beta: 0.3}]")
    (summary,) = run(path, tmp_path / "out")
    settings = load_experiment(path)
    stream = settings.load_stream()
    plain = load(stories, max_length=48)
    plain.load(final(tmp_path / "out"))
    losses = [held_out_loss(plain, task.test, 32).value for task in stream.tasks]
    by_task = {s["task"]: s["value"] for s in summary["scores"] if s["metric"] == "loss"}
    assert [by_task[task.name] for task in stream.tasks] == pytest.approx(losses, rel=1e-5)


def test_a_killed_run_goes_on_to_the_same_files(stories, tmp_path):
    path = experiment(tmp_path, stories, "[{name: sfa, p: 0.5, beta: 0.3}]")
    run(path, tmp_path / "whole")
    every_step = ["training.checkpoint_seconds=0"]
    run_and_kill(path, tmp_path / "killed", every_step, stage=1, step=3)
    assert list((tmp_path / "killed").rglob("checkpoint-*/stockpot.json"))
    run(path, tmp_path / "killed", *every_step)
    assert record_of(tmp_path / "killed") == record_of(tmp_path / "whole")


WORK = ["sequential", "multitask", "rehearsal", "sfa", "wise-ft", "task-arithmetic", "ties"]


def test_methods_that_work_with_adapters(stories, tmp_path):
    path = experiment(tmp_path, stories, f"[{', '.join(WORK)}]", training="{steps: 2}")
    summary = run(path, tmp_path / "out")
    assert [one["method"] for one in summary] == WORK
    names = load(stories).weights().keys()
    for model in (tmp_path / "out").glob("runs/*/model.safetensors"):
        assert load_file(model).keys() == names
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(WORK)))
def test_methods_that_need_the_weights_are_refused(stories, tmp_path, method):
    labels = ", labels: sampled" if method in ("ewc", "fisher-merging") else ""
    path = experiment(tmp_path, stories, f"[sequential, {{name: {method}{labels}}}]")
    with pytest.raises(ConfigError, match=r"1 problem in .*\n.*methods: ") as caught:
        load_experiment(path)
    message = str(caught.value)
    assert f"{method} works on the weights that train" in message
    assert "model.lora" in message
    assert f"use one of {', '.join(WORK)}" in message
    assert load_experiment(path, ["model.lora=null"]).methods[1].name == method
