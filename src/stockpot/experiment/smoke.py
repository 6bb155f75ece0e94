"""``--smoke``: the same recipe in seconds, on a CPU, with a tiny model of the same family.

What is tried is everything but the size: the data sets are read, the model is loaded from a folder
with its tokenizer or image processor, every method trains, every evaluation runs, the record and
the report are written. The numbers mean nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockpot.errors import ConfigError, StockpotError, first_line, nearest
from stockpot.models import expand_model
from stockpot.models.settings import HuggingFace
from stockpot.streams import STREAMS
from stockpot.streams.base import TasksByLabel

if TYPE_CHECKING:
    from stockpot.experiment.config import Experiment
    from stockpot.streams.data import Stream
    from stockpot.streams.text import TextStream

__all__ = ["shrink_values", "with_tiny_model"]

_STREAM = {"train_limit": 16, "test_limit": 6, "benchmark_limit": 3}
_TRAINING: dict[str, Any] = {
    "steps": 2,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "precision": "float32",
    "device": "cpu",
    "threads": 1,
    "report_to": [],
}
_EVALUATION = {
    "precision": "float32",
    "max_new_tokens": 4,
    "during_limit": 4,
    "kl": 4,
    "line_limit": 4,
    "batch_size": 16,
    "lm_eval_limit": 3,
}
_MODEL: dict[str, Any] = {"max_length": 96, "dtype": "float32"}

_TASKS = 4
"""Of a long stream of images: twenty tasks by twenty methods would take minutes."""

_SIZES = {
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 64,
    "d_ff": 64,
    "d_kv": 16,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "image_size": 32,
    "patch_size": 16,
}
_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_VOCABULARY = 512
_TEXTS = 2000


def shrink_values(values: dict[str, Any], stem: str) -> None:
    """Cut an experiment, as its file says it, down to a few steps on a few examples of each task.

    One seed is left, and four tasks of a long stream of images; every method and setting stays.
    """
    stream = values.get("stream")
    if isinstance(stream, str):
        stream = values["stream"] = {"name": stream}
    if isinstance(stream, dict) and stream.get("name") in STREAMS:
        known = STREAMS[stream["name"]].model_fields
        stream.update({key: value for key, value in _STREAM.items() if key in known})
        _shorten(stream)
    for section, changes in (("training", _TRAINING), ("evaluation", _EVALUATION)):
        if not isinstance(values.get(section, {}), dict | None):
            continue  # the check says what is wrong with it
        values[section] = {**(values.get(section) or {}), **changes}
    model = expand_model(values.get("model"))
    if isinstance(model, dict) and model.get("name") == "huggingface":
        kind = STREAMS.get(stream.get("name", "")) if isinstance(stream, dict) else None
        of_text = kind is not None and kind.of_text
        values["model"] = {**model, **(_MODEL if of_text else {})}
        values["model"].pop("attention", None)  # kernels of a GPU, mostly
    seeds = values.get("seeds")
    if isinstance(seeds, list):
        values["seeds"] = seeds[:1]
    values["name"] = f"{values.get('name', stem)} (smoke test: the numbers mean nothing)"
    values["output"] = f"{values.get('output', f'runs/{stem}')}-smoke"


def _shorten(stream: dict[str, Any]) -> None:
    """Only the first tasks of a long stream of images."""
    try:
        settings = STREAMS[stream["name"]].model_validate(stream)
    except ValueError:
        return  # the check says what is wrong with it
    if isinstance(settings, TasksByLabel) and not settings.of_text:
        order = settings.order or range(settings._task_count() or 0)
        if len(order) > _TASKS:
            stream["order"] = list(order)[:_TASKS]


def with_tiny_model(experiment: Experiment, write: bool = True) -> tuple[Experiment, Stream]:
    """The experiment with a tiny model of its model's family, written beside the run folder.

    Of several processes one writes it, before the others.
    """
    stream = experiment.stream.load()
    model = experiment.model
    if isinstance(model, HuggingFace):
        folder = experiment.output.parent / f".{experiment.output.name}-model"
        if write:
            _write_anew(model, stream, folder)
        tiny = model.model_copy(update={"id": str(folder), "revision": None, "pretrained": True})
        experiment = replace(experiment, model=tiny)
    return experiment, experiment.model.encode(stream)


def _write_anew(model: HuggingFace, stream: Stream | TextStream, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    family = model.known_family()
    try:
        _write_model(family, stream, folder, bool(model.chat_template))
    except StockpotError:
        raise
    except Exception as error:  # a family's configuration may want anything
        raise ConfigError(
            f"--smoke can make no tiny model of model.family = {family} for this stream "
            f"({type(error).__name__}: {first_line(error)}). Give another family, or a small "
            "model of your own as model.id without --smoke"
        ) from error


def _write_model(family: str, stream: Stream | TextStream, folder: Path, templated: bool) -> None:
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    from stockpot.streams.text import TextStream

    if family not in CONFIG_MAPPING_NAMES:
        raise ConfigError(
            f"model.family = {family!r} is none{nearest(family, CONFIG_MAPPING_NAMES)}"
        )
    defaults = CONFIG_MAPPING[family]()
    sizes = {key: value for key, value in _SIZES.items() if hasattr(defaults, key)}
    if isinstance(stream, TextStream):
        tokenizer = _tokenizer(stream, bool(defaults.is_encoder_decoder))
        if templated:
            tokenizer.chat_template = _TEMPLATE
        tokenizer.save_pretrained(folder)
        sizes |= {
            # Some families add tokens of their own when the tokenizer is read again.
            "vocab_size": len(tokenizer) + 64,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "decoder_start_token_id": tokenizer.pad_token_id,
        }
        kind: Any = (
            transformers.AutoModelForSeq2SeqLM
            if defaults.is_encoder_decoder
            else transformers.AutoModelForCausalLM
        )
    else:
        processor = {
            "do_resize": True,
            "size": {"height": sizes["image_size"], "width": sizes["image_size"]},
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        kind = transformers.AutoModelForImageClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind.from_config(CONFIG_MAPPING[family](**sizes)).save_pretrained(folder)


def _tokenizer(stream: TextStream, encoder_decoder: bool) -> Any:
    """Byte-level BPE, trained on the stream's own texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(_texts(stream), _TEXTS), trainer)
    if encoder_decoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _texts(stream: TextStream) -> Iterator[str]:
    examples = chain.from_iterable(zip(*(task.train for task in stream.tasks), strict=False))
    return (message.content for example in examples for message in example.messages)
