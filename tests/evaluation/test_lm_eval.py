"""Scores on the harness's tasks against its own command line, and what a run leaves behind."""

import copy
import json
import logging
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import yaml

from stockpot.errors import ConfigError, NonFiniteError, StockpotError
from stockpot.evaluation.lm_eval import TaskResult, check_lm_eval_tasks, run_lm_eval

pytest.importorskip("lm_eval")

from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

ROWS = 20


def rows(mirror: Path, name: str, split: str, longest: int, count: int) -> list[dict[str, Any]]:
    """The first rows of a data set that are no longer than so many characters."""
    table = parquet.read_table(mirror / name / "data" / f"{split}-00000-of-00001.parquet")
    short = [row for row in table.to_pylist() if len(" ".join(map(str, row.values()))) <= longest]
    return short[:count]


def write_task(folder: Path, name: str, data: dict[str, list[dict[str, Any]]], **options) -> None:
    files = {}
    for split, examples in data.items():
        files[split] = str(folder / f"{name}_{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(each) + "\n" for each in examples))
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "metadata": {"version": 1.5},
        **options,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))


def mean_of(*metrics: str, **options: Any) -> list[dict[str, Any]]:
    return [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True, **options}
        for metric in metrics
    ]


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{citing_prompt[-200:]}}",
    "doc_to_target": "{{label}}",
    "doc_to_choice": "{{[holding_0, holding_1, holding_2, holding_3, holding_4]}}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two halves of a set of CaseHOLD as a group, and a generation task of GSM8K."""
    data = os.environ.get("STOCKPOT_DATA")
    if not data or not Path(data).is_dir():
        pytest.skip("needs STOCKPOT_DATA, a folder with the hub's data sets")
    folder = tmp_path_factory.mktemp("tasks")
    cases = rows(Path(data), "casehold/casehold", "train", 1400, ROWS)
    half = ROWS // 2 - 2
    for name, part in (("law_early", cases[:half]), ("law_late", cases[half:])):
        write_task(folder, name, {"test": part}, **CHOICE, metric_list=mean_of("acc", "acc_norm"))
    group = {
        "group": "law",
        "task": ["law_early", "law_late"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 3},
    }
    (folder / "law.yaml").write_text(yaml.safe_dump(group))
    sums = rows(Path(data), "openai/gsm8k", "test", 350, ROWS)
    shots = rows(Path(data), "openai/gsm8k", "train", 220, 12)
    write_task(
        folder,
        "sums",
        {"train": shots, "test": sums},
        output_type="generate_until",
        training_split="train",
        fewshot_split="train",
        num_fewshot=1,
        doc_to_text="{{question}}\n",
        doc_to_target="{{question[0]}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        filter_list=[
            {"name": "first-letter", "filter": [{"function": "regex", "regex_pattern": "(\\w)"}]},
            {"name": "number", "filter": [{"function": "regex", "regex_pattern": "([0-9]+)"}]},
        ],
        metric_list=mean_of("exact_match"),
    )
    for task in folder.glob("*.yaml"):  # filters end with the choice of the one answer
        definition = yaml.safe_load(task.read_text())
        for each in definition.get("filter_list", []):
            each["filter"].append({"function": "take_first"})
        task.write_text(yaml.safe_dump(definition))
    return folder


@pytest.fixture(scope="module")
def model(stories: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(stories)


@pytest.fixture
def tokenizer(stories: Path) -> Any:
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="module")
def command_line(folder: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``lm_eval run`` writes about the group and the generation task."""
    out = tmp_path_factory.mktemp("cli")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={stories}", "--tasks", "law,sums", "--seed", "3"]
    command += ["--include_path", str(folder), "--output_path", str(out), "--log_samples"]
    command += ["--batch_size", "4"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def by_metric(results: list[TaskResult]) -> dict[tuple[str, str], TaskResult]:
    found = {(each.task, each.metric): each for each in results}
    assert len(found) == len(results)
    return found


def test_the_command_line_gives_the_same_numbers(
    folder: Path, model: Any, tokenizer: Any, command_line: Path
) -> None:
    ours = by_metric(
        run_lm_eval(model, tokenizer, ["law", "sums"], include_path=folder, batch_size=4, seed=3)
    )
    (file,) = command_line.glob("*/results_*.json")
    theirs = json.loads(file.read_text())
    assert set(ours) == {
        ("law", "acc"),
        *((half, metric) for half in ("law_early", "law_late") for metric in ("acc", "acc_norm")),
        ("sums", "exact_match,first-letter"),
        ("sums", "exact_match,number"),
    }
    for (task, metric), result in ours.items():
        name, _, kind = metric.partition(",")
        kind = kind or "none"
        assert result.value == theirs["results"][task][f"{name},{kind}"]
        assert result.stderr == theirs["results"][task][f"{name}_stderr,{kind}"]
        assert result.version == str(theirs["versions"][task])
        assert result.better == "higher"
        if task == "law":
            assert (result.n, result.items) == (ROWS, ())
            continue
        assert result.n == theirs["n-samples"][task]["effective"]
        (file,) = command_line.glob(f"*/samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        samples = sorted(
            (each for each in samples if each["filter"] == kind), key=lambda each: each["doc_id"]
        )
        assert result.items == tuple(each[name] for each in samples)
    # The comparison says something: answers differ between documents and between tasks.
    spread = [result for result in ours.values() if len(set(result.items)) == 2]
    assert {result.task for result in spread} == {"law_early", "law_late", "sums"}


def states() -> tuple[Any, ...]:
    numpy = np.random.get_state()
    return (
        random.getstate(),
        (numpy[0], numpy[1].tolist(), *numpy[2:]),
        torch.get_rng_state().tolist(),
        dict(os.environ),
        {
            name: (logger.level, logger.propagate, list(logger.handlers))
            for name in ("root", "lm_eval", "transformers", "datasets", "evaluate")
            for logger in [logging.getLogger(None if name == "root" else name)]
        },
        tqdm.__init__,
        sys.stdout,
    )


def attributes(model: torch.nn.Module) -> dict[str, Any]:
    own = {name: dict(vars(part)) for name, part in model.named_modules()}
    tensors = {name: (each, each.device) for name, each in model.named_buffers()}
    return {"attributes": own, "buffers": tensors}


def test_everything_is_left_as_it_was(
    folder: Path,
    stories: Path,
    tokenizer: Any,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TOKENIZERS_PARALLELISM", "HF_XET_HIGH_PERFORMANCE"):
        monkeypatch.delenv(name, raising=False)
    model = AutoModelForCausalLM.from_pretrained(stories)
    model.train()
    model.model.layers[1].eval()
    head = torch.nn.Parameter(model.lm_head.weight.detach() + 1)  # untied although configured so
    model.lm_head.weight = head
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.generation_config.max_length = 77
    tokenizer.padding_side = "right"
    torch.manual_seed(5)
    before = states(), attributes(model), copy.deepcopy(model.state_dict())
    settings = model.generation_config.to_dict(), model.config.to_dict()
    learning = {name: each.requires_grad for name, each in model.named_parameters()}
    words = tokenizer.pad_token, len(tokenizer), tokenizer.padding_side, tokenizer("a").input_ids
    capfd.readouterr()

    run_lm_eval(model, tokenizer, ["law", "sums"], include_path=folder, limit=3, seed=8)

    assert capfd.readouterr() == ("", "")
    assert states() == before[0]
    assert attributes(model) == before[1]
    assert all(torch.equal(each, before[2][name]) for name, each in model.state_dict().items())
    assert model.lm_head.weight is head
    assert (model.generation_config.to_dict(), model.config.to_dict()) == settings
    assert {name: each.requires_grad for name, each in model.named_parameters()} == learning
    assert words == (
        tokenizer.pad_token,
        len(tokenizer),
        tokenizer.padding_side,
        tokenizer("a").input_ids,
    )


def test_everything_is_left_as_it_was_after_an_error_too(
    folder: Path, model: Any, tokenizer: Any
) -> None:
    model.train()
    before = states(), attributes(model)
    write_task(folder, "no_data", {"test": []}, **CHOICE, metric_list=mean_of("acc"))
    with pytest.raises(StockpotError, match="no_data"):
        run_lm_eval(model, tokenizer, ["no_data"], include_path=folder)
    assert (states(), attributes(model)) == before
    assert model.training


def test_what_a_model_writes_down_while_it_generates_goes(
    folder: Path, stories: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories)
    model.register_buffer("seen", torch.zeros(1))
    usual, seen = model.generate, model.seen

    def generate(**options: Any) -> Any:
        model.generation_config.max_length = 9
        model.config.scale = 2
        model.model.cached = options["input_ids"]
        model.seen = model.seen + 1
        model.used = True
        return usual(**options)

    model.generate = generate
    settings = model.generation_config.to_dict(), model.config.to_dict()
    run_lm_eval(model, tokenizer, ["sums"], include_path=folder, limit=2)
    assert (model.generation_config.to_dict(), model.config.to_dict()) == settings
    assert model.seen is seen
    assert not hasattr(model, "used")
    assert not hasattr(model.model, "cached")


def test_dropout_of_a_model_in_training_does_not_reach_the_scores(
    folder: Path, model: Any, tokenizer: Any
) -> None:
    model.eval()
    calm = run_lm_eval(model, tokenizer, ["law_early"], include_path=folder)
    model.train()
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    try:
        assert run_lm_eval(model, tokenizer, ["law_early"], include_path=folder) == calm
    finally:
        model.config.attention_dropout = 0.0
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0


def test_limit_takes_the_first_documents_and_examples_can_be_chosen(
    folder: Path, model: Any, tokenizer: Any
) -> None:
    whole = by_metric(run_lm_eval(model, tokenizer, "law_late", include_path=folder))
    part = by_metric(run_lm_eval(model, tokenizer, ["law_late"], include_path=folder, limit=5))
    for key, result in part.items():
        assert result.n == 5
        assert result.items == whole[key].items[:5]
        assert result.value == pytest.approx(sum(result.items) / 5)
        share = result.value  # the harness's standard error divides by n - 1
        assert result.stderr == pytest.approx(math.sqrt(share * (1 - share) / 4))
    (one, _) = run_lm_eval(model, tokenizer, ["law_late"], include_path=folder, limit=1)
    assert one.stderr is None
    none = by_metric(
        run_lm_eval(model, tokenizer, ["sums"], include_path=folder, num_fewshot=0, limit=5)
    )
    assert none["sums", "exact_match,first-letter"].n == 5


def test_a_tokenizer_without_a_pad_token(folder: Path, model: Any, tokenizer: Any) -> None:
    with_pad = run_lm_eval(model, tokenizer, ["law_early", "sums"], include_path=folder)
    tokenizer.pad_token = None
    without = run_lm_eval(model, tokenizer, ["law_early", "sums"], include_path=folder)
    assert without == with_pad
    assert tokenizer.pad_token is None
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="eos_token"):
        run_lm_eval(model, tokenizer, ["law_early"], include_path=folder)


def test_a_model_with_an_adapter(folder: Path, stories: Path, tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(stories)
    plain = run_lm_eval(base, tokenizer, ["law_early", "sums"], include_path=folder)
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    before = attributes(adapted)
    assert run_lm_eval(adapted, tokenizer, ["law_early", "sums"], include_path=folder) == plain
    assert attributes(adapted) == before


def test_a_chat_template_makes_the_prompt(folder: Path, model: Any, tokenizer: Any) -> None:
    data = [json.loads(line) for line in (folder / "law_early_test.jsonl").open()]
    options = {**CHOICE, "doc_to_text": "The court", "target_delimiter": ""}
    write_task(folder, "court", {"test": data}, **options, metric_list=mean_of("acc", "acc_norm"))
    plain = run_lm_eval(model, tokenizer, ["court"], include_path=folder)
    tokenizer.chat_template = "The court"
    chat = run_lm_eval(
        model, tokenizer, ["law_early"], include_path=folder, apply_chat_template=True
    )
    assert [each.items for each in chat] == [each.items for each in plain]


@pytest.fixture
def translator() -> T5ForConditionalGeneration:
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=512,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        initializer_factor=4.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        n_positions=512,
    )
    return T5ForConditionalGeneration(config)


def test_an_encoder_decoder_model(
    folder: Path, translator: T5ForConditionalGeneration, tokenizer: Any
) -> None:
    before = attributes(translator)
    results = by_metric(
        run_lm_eval(translator, tokenizer, ["law_early", "sums"], include_path=folder)
    )
    assert attributes(translator) == before
    assert results["sums", "exact_match,number"].n == ROWS

    # The likeliest ending by the model's own loss, one at a time and without padding.
    translator.eval()
    right = []
    for line in (folder / "law_early_test.jsonl").read_text().splitlines():
        case = json.loads(line)
        context = tokenizer(case["citing_prompt"][-200:], return_tensors="pt").input_ids
        costs = []
        for choice in range(5):
            ending = tokenizer(
                " " + case[f"holding_{choice}"], add_special_tokens=False, return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                loss = translator(input_ids=context, labels=ending).loss
            costs.append(float(loss) * ending.shape[1])
        right.append(float(int(np.argmin(costs)) == int(case["label"])))
    assert results["law_early", "acc"].items == tuple(right)


def test_a_metric_of_the_corpus_has_no_items_and_lower_may_be_better(
    folder: Path, model: Any, tokenizer: Any
) -> None:
    texts = [
        {"text": "Once upon a time there was a little girl."},
        {"text": "The cat sat on the mat and it was happy."},
    ]
    write_task(
        folder,
        "text",
        {"test": texts},
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[
            {
                "metric": "word_perplexity",
                "aggregation": "weighted_perplexity",
                "higher_is_better": False,
            }
        ],
    )
    (result,) = run_lm_eval(model, tokenizer, ["text"], include_path=folder)
    assert (result.metric, result.better, result.items, result.n) == (
        "word_perplexity",
        "lower",
        (),
        2,
    )
    assert result.stderr is None
    model.eval()
    nats = words = 0
    for each in texts:
        ids = tokenizer(each["text"], return_tensors="pt").input_ids  # with a start of its own
        whole = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
        with torch.no_grad():
            nats += float(model(whole, labels=whole).loss) * ids.shape[1]
        words += len(each["text"].split())
    assert result.value == pytest.approx(math.exp(nats / words), rel=1e-4)


def test_log_likelihoods_are_no_items_of_perplexity(
    folder: Path, model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = ["a time", "a cat and a", "a little"]
    write_task(
        folder,
        "endings",
        {"test": [{"start": "Once upon", "end": line} for line in lines]},
        output_type="loglikelihood",
        doc_to_text="{{start}}",
        doc_to_target="{{end}}",
        metric_list=[
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    )
    perplexity, greedy = run_lm_eval(model, tokenizer, ["endings"], include_path=folder)
    assert (perplexity.metric, perplexity.items, perplexity.n) == ("perplexity", (), 3)
    assert perplexity.stderr is not None  # by bootstrap, of which the harness prints
    assert perplexity.stderr > 0
    assert set(greedy.items) <= {0.0, 1.0}
    assert greedy.n == 3
    assert capfd.readouterr().out == ""


def test_names_are_checked(folder: Path) -> None:
    check_lm_eval_tasks(["law", "sums", "hellaswag"], folder)
    with pytest.raises(ConfigError, match=r"no task 'hellaswagg' \(did you mean .*'hellaswag'"):
        check_lm_eval_tasks(["hellaswagg"])
    with pytest.raises(ConfigError, match="as include_path"):
        check_lm_eval_tasks(["law_early"])
    with pytest.raises(ConfigError, match=r"did you mean 'law_early'.* in .*tasks"):
        check_lm_eval_tasks(["law_erly"], folder)
    with pytest.raises(ConfigError, match=r"lm-eval ls tasks"):
        check_lm_eval_tasks(["@@@@@@@@@@@@@@@@@@@@"], folder)
    with pytest.raises(ConfigError, match="no such folder"):
        check_lm_eval_tasks(["law"], folder / "nowhere")
    with pytest.raises(ConfigError, match="there are no tasks"):
        check_lm_eval_tasks([])


def test_wrong_arguments(folder: Path, model: Any, tokenizer: Any) -> None:
    def run(*tasks: str, **options: Any) -> None:
        run_lm_eval(model, tokenizer, tasks, include_path=folder, **options)

    for option, number in (("limit", 0), ("num_fewshot", -1), ("batch_size", 0)):
        with pytest.raises(ConfigError, match=f"{option} is {number}"):
            run("law", **{option: number})
    with pytest.raises(ConfigError, match="no task 'lawx'"):
        run("lawx")
    with pytest.raises(ConfigError, match="Duplicate task 'law_early'"):
        run("law", "law_early")
    with pytest.raises(ConfigError, match="chat template"):
        run("law", apply_chat_template=True)
    small = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ConfigError, match="ViTForImageClassification is none"):
        run_lm_eval(ViTForImageClassification(small), tokenizer, ["law"], include_path=folder)


def test_data_that_is_not_there(folder: Path, model: Any, tokenizer: Any) -> None:
    definition = yaml.safe_load((folder / "law_early.yaml").read_text())
    definition |= {"task": "away", "dataset_path": "nobody/nothing"}
    del definition["dataset_kwargs"]
    (folder / "away.yaml").write_text(yaml.safe_dump(definition))
    with pytest.raises(StockpotError, match=r"'away' .* cannot be loaded .*local files") as caught:
        run_lm_eval(model, tokenizer, ["away"], include_path=folder)
    assert "\n" not in str(caught.value)


def test_code_is_run_only_on_demand(folder: Path, model: Any, tokenizer: Any) -> None:
    definition = yaml.safe_load((folder / "law_early.yaml").read_text())
    definition |= {"task": "law_code", "unsafe_code": True, "tag": "law_tag"}
    (folder / "law_code.yaml").write_text(yaml.safe_dump(definition))
    group = {"group": "law_codes", "task": ["law_late", {"group": "in", "task": ["law_code"]}]}
    (folder / "law_codes.yaml").write_text(yaml.safe_dump(group))
    for name in ("law_code", "law_codes", "law_tag", "humaneval"):
        with pytest.raises(ConfigError, match="confirm_run_unsafe_code"):
            check_lm_eval_tasks([name], folder)
        check_lm_eval_tasks([name], folder, confirm_run_unsafe_code=True)
    with pytest.raises(ConfigError, match="confirm_run_unsafe_code"):
        run_lm_eval(model, tokenizer, ["law_codes"], include_path=folder)
    results = run_lm_eval(
        model, tokenizer, ["law_tag"], include_path=folder, confirm_run_unsafe_code=True, limit=2
    )
    assert {each.task for each in results} == {"law_code"}


def test_prompts_that_are_cut_are_told_of_once(
    folder: Path, mirror: Path, model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cases = rows(mirror, "casehold/casehold", "train", 10_000, 3)
    options = {**CHOICE, "doc_to_text": "{{citing_prompt * 3}}"}
    write_task(folder, "long", {"test": cases}, **options, metric_list=mean_of("acc"))
    with caplog.at_level(logging.WARNING, logger="stockpot"):
        run_lm_eval(model, tokenizer, ["long"], include_path=folder)
    (message,) = [each.getMessage() for each in caplog.records if each.name == "stockpot"]
    assert "exceeds model's maximum length (512)" in message
    assert message.endswith("(and 14 times more)")


def test_a_model_of_nan_is_not_scored(folder: Path, stories: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="'law_early'"):
        run_lm_eval(model, tokenizer, ["law_early"], include_path=folder, limit=2)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None in sys.modules is what Python refuses to import."""
    for name in [*sys.modules, "lm_eval"]:
        if name.partition(".")[0] == "lm_eval":
            monkeypatch.setitem(sys.modules, name, None)
    return


@pytest.mark.usefixtures("not_installed")
def test_without_the_package(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'stockpot\[lm-eval\]'"):
        check_lm_eval_tasks(["hellaswag"])
    with pytest.raises(ConfigError, match=r"pip install 'stockpot\[lm-eval\]'"):
        run_lm_eval(model, tokenizer, ["hellaswag"])
