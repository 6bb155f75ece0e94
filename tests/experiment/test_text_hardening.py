"""What a reviewer found by trying to break it: each was wrong once."""

import json
import re
from pathlib import Path

import pytest

from stockpot.errors import ConfigError
from stockpot.evaluation.generation import generate
from stockpot.evaluation.settings import Programs
from stockpot.evaluation.tasks import Evaluator
from stockpot.experiment import load_experiment, run_experiment
from stockpot.experiment.smoke import with_tiny_model
from stockpot.models.language import load_language_model
from stockpot.models.settings import HuggingFace
from stockpot.streams.text import Message, Question
from stockpot.training.trainer import train_task
from support.experiments import record_of, run_file, write_experiment
from support.text import CHATML, byte_tokenizer, write_model, write_tasks, write_text_experiment


class KilledError(BaseException):
    """Stands for a kill: nothing catches it."""


def write(folder: Path, model: object, methods: str = "[sequential]", **more: str) -> Path:
    tasks = write_tasks(folder, columns=("prompt", "response"))
    return write_text_experiment(folder, tasks, f"{{id: {model}, max_length: 48}}", methods, **more)


def test_a_kill_while_scoring_does_not_train_again(stories, tmp_path, monkeypatch):
    path = write(tmp_path, stories, "[sequential, {name: sfa, p: 0.5}]")
    run_file(path, tmp_path / "calm")
    scored = Evaluator.scores
    left = [5]  # b of two tasks, then the first task's two scores, then the kill

    def dying(self, learner, task):
        left[0] -= 1
        if left[0] < 0:
            raise KilledError
        return scored(self, learner, task)

    monkeypatch.setattr(Evaluator, "scores", dying)
    with pytest.raises(KilledError):
        run_file(path, tmp_path / "killed")
    monkeypatch.setattr(Evaluator, "scores", scored)

    trained = []

    def counting(*arguments, **options):
        trained.append(arguments[1].stage)
        return train_task(*arguments, **options)

    monkeypatch.setattr("stockpot.experiment.stages.train_task", counting)
    run_file(path, tmp_path / "killed")
    assert trained == [1]  # SFA's second task; sequential's was there
    assert record_of(tmp_path / "killed") == record_of(tmp_path / "calm")


def test_greedy_is_greedy_whatever_the_model_ships(stories, tmp_path):
    import shutil

    for name in ("plain", "shipped"):
        shutil.copytree(stories, tmp_path / name)
    shipped = tmp_path / "shipped" / "generation_config.json"
    about = json.loads(shipped.read_text())
    shipped.chmod(0o644)
    shipped.write_text(json.dumps({**about, "repetition_penalty": 1.8, "num_beams": 3}))
    prompts = ["Once upon a time", "The dog and the cat"]
    texts = []
    for name in ("plain", "shipped"):
        learner = load_language_model(HuggingFace(id=str(tmp_path / name)))
        held = learner.module.generation_config
        texts.append(generate(learner, prompts, max_new_tokens=24, batch_size=2))
        assert learner.module.generation_config is held
    assert texts[0] == texts[1]


def test_a_tokenizer_that_ends_every_text_ends_no_prompt(tmp_path):
    folder = write_model(tmp_path / "model", "gpt2")
    byte_tokenizer(ends=True).save_pretrained(folder)
    form = load_language_model(HuggingFace(id=str(folder))).form
    data = form.choices([Question("What is it?", ("a boat", "the sea"), 0)])
    for row in range(2):
        tokens = data.__getitems__([row])["input_ids"][0].tolist()
        assert form.tokenizer.eos_token_id not in tokens
    ended = form.tokenizer("So").input_ids
    assert form.unended(ended) == ended[:-1]


def test_examples_are_the_same_tomorrow(tmp_path):
    dated = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
    folder = write_model(tmp_path / "model", "gpt2", template=dated)
    form = load_language_model(HuggingFace(id=str(folder))).form
    assert form._asked((Message("user", "hi"),)).startswith("2025-01-01")


@pytest.mark.parametrize("weights", ["[[0.5]]", "[[0.5, 0.5, 0.9]]"])
def test_weights_of_task_arithmetic_are_one_for_each_task(stories, tmp_path, weights):
    path = write(tmp_path, stories, f"[{{name: task-arithmetic, weights: {weights}}}]")
    with pytest.raises(ConfigError, match=r"factors and the stream has 2 tasks"):
        run_file(path, tmp_path / "out")
    assert not (tmp_path / "out" / "stages.jsonl").exists()


def test_a_task_left_out_must_be_there(stories, tmp_path):
    path = write(tmp_path, stories, "[{name: multitask, without: nothing}]")
    with pytest.raises(ConfigError, match="no task 'nothing'"):
        run_file(path, tmp_path / "out")


def test_a_runs_folder_is_a_model(stories, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write(tmp_path, stories)
    outcome = run_file(path, tmp_path / "out")
    folder = tmp_path / "out" / "runs" / "sequential-seed0"
    _, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loaded.values())
    assert AutoTokenizer.from_pretrained(folder).is_fast
    again = tmp_path / "again"
    again.mkdir()
    (follow,) = run_file(write(again, folder), tmp_path / "next").summary
    assert follow["b"] == outcome.summary[0]["R"][-1]


def test_a_folder_of_an_image_run_prepares_images_alike(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, num_labels=2, num_channels=1,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True,
        "size": {"height": 8, "width": 8}, "do_normalize": True, "image_mean": [0.2],
        "image_std": [0.7], "rescale_factor": 1 / 255, "resample": 2,
    }  # fmt: skip
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    path = write_experiment(tmp_path, "[sequential]")
    model = ["model={id: " + str(tmp_path / "vit") + "}"]
    (first,) = run_file(path, tmp_path / "out", model).summary
    folder = tmp_path / "out" / "runs" / "sequential-seed0"
    (second,) = run_file(path, tmp_path / "next", ["model={id: " + str(folder) + "}"]).summary
    assert second["b"] == first["R"][-1]


# --smoke.


def test_smoke_takes_templates_and_gpu_kernels(stories, tmp_path):
    path = write(tmp_path, stories)
    overrides = ["model.family=llama"]
    text = path.read_text().replace(
        "max_length: 48", "max_length: 48, chat_template: true, attention: flash_attention_2"
    )
    path.write_text(text)
    experiment = load_experiment(path, overrides, tmp_path / "out", smoke=True)
    experiment, stream = with_tiny_model(experiment)
    assert not run_experiment(experiment, stream=stream).failures


@pytest.mark.parametrize("family", ["vit", "whisper", "nothing"])
def test_smoke_names_a_family_that_does_not_fit(stories, tmp_path, family):
    path = write(tmp_path, stories)
    experiment = load_experiment(path, [f"model.family={family}"], tmp_path / "out", smoke=True)
    with pytest.raises(ConfigError, match=f"model.family = '?{family}"):
        with_tiny_model(experiment)


def test_smoke_keeps_four_tasks_of_a_long_stream_of_images(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text("stream: cifar100\nmodel: conv\nmethods: [sequential]\n")
    assert load_experiment(path, smoke=True).stream.order == (0, 1, 2, 3)
    path.write_text("stream: {name: cifar100, order: [7, 5]}\nmodel: conv\nmethods: [sequential]\n")
    assert load_experiment(path, smoke=True).stream.order == (7, 5)


def test_a_folder_without_humaneval_is_not_taken_up_with_it(mirror, stories, tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text(
        "stream: {name: domains, tasks: [code], train_limit: 8, test_limit: 4, "
        f"benchmark_limit: 2}}\nmodel: {{id: {stories}, max_length: 48}}\n"
        "training: {steps: 1, batch_size: 2, threads: 1, device: cpu}\n"
        "evaluation: {max_new_tokens: 2, kl: 0}\nmethods: [sequential]\n"
    )
    experiment = load_experiment(path, output=tmp_path / "out")
    run_experiment(experiment, programs=Programs(skip=True))
    with pytest.raises(ConfigError, match="code: humaneval is left out, and now nothing"):
        run_experiment(experiment, programs=Programs(run=True, allow_weak=True))


def test_names_are_shown_as_they_are(capsys):
    from stockpot.cli.table import print_results

    numbers = dict.fromkeys(
        ("forgetting", "forgetting_vs_best", "bwt", "fwt", "l2_to_anchor", "seconds"), 0.0
    )
    run = {
        "run": "x", "method": "sequential", "settings": {}, "label": "sequential", "seed": 0,
        "stream": "[red]s", "scenario": "x", "tasks": ["[/b]x", "[bold]y"], "b": [0.0, 0.0],
        "R": [[0.5, 0.5], [0.5, 0.5]], "metrics": {**numbers, "average": 0.5, "peak_memory": 1},
    }  # fmt: skip
    print_results([run])
    shown = capsys.readouterr().out
    assert all(re.search(re.escape(name), shown) for name in ("[red]s", "[/b]x", "[bold]y"))


def test_length_beyond_the_models_positions(stories):
    with pytest.raises(ConfigError, match=r"model.max_length = 100000: .* has 512 positions"):
        load_language_model(HuggingFace(id=str(stories), max_length=100_000))
