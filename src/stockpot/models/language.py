"""Hugging Face language models, causal and encoder-decoder, whole or with low-rank adapters."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from stockpot.errors import ConfigError, StockpotError, first_line
from stockpot.models.learner import (
    Learner,
    Predictions,
    checkpoint_activations,
    copy_weights,
    load_weights_,
    named_weights,
    save_config,
)
from stockpot.models.rendering import Format
from stockpot.models.settings import resolve_model
from stockpot.streams.data import Stream, Task
from stockpot.streams.text import TextStream
from stockpot.streams.tokens import IGNORED

if TYPE_CHECKING:
    from stockpot.models.settings import HuggingFace

__all__ = ["TextLearner", "encode_stream", "load_language_model"]

_ADAPTER = "default"
_LONGEST = 2048
"""Tokens of an example where neither the settings nor the model say how many."""


@dataclass(frozen=True)
class TextLearner(Learner):
    """A language model with its tokenizer.

    Args:
        module: a causal or an encoder-decoder model of Transformers, perhaps with adapters of PEFT.
        form: how examples become its tokens.
    """

    module: nn.Module
    form: Format

    def predictions(self, batch: Any, module: nn.Module | None = None) -> Predictions:
        """One place for each token that is learned."""
        called: Any = module or self.module
        tokens, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        if self.form.encoder_decoder:
            start = self.module.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
            logits = called(
                input_ids=tokens, attention_mask=mask, decoder_input_ids=start, use_cache=False
            ).logits
        else:
            labels = labels[:, 1:]  # each token is said by the one before
            # Of a long prompt nothing is learned, and its logits are the largest tensor there is.
            asked = (labels != IGNORED).any(dim=0).nonzero().flatten()
            some = {"logits_to_keep": asked} if self._keeps_some and len(asked) else {}
            logits = called(input_ids=tokens, attention_mask=mask, use_cache=False, **some).logits
            if some:
                labels = labels[:, asked]
            else:
                logits = logits[:, :-1]
        example, place = (labels != IGNORED).nonzero(as_tuple=True)
        return Predictions(logits[example, place], labels[example, place], example)

    @functools.cached_property
    def _keeps_some(self) -> bool:
        """Whether the model can be asked for the logits of some places alone."""
        module: Any = self.module
        base = module.get_base_model() if self.adapted else module
        return "logits_to_keep" in inspect.signature(base.forward).parameters

    def count(self, batch: Any) -> int:
        """Tokens that are learned."""
        labels = batch["labels"]
        return int((labels if self.form.encoder_decoder else labels[:, 1:]).ne(IGNORED).sum())

    # With adapters, the weights are those of the model that base and adapters make together. A
    # task begins with fresh adapters, which change nothing, on the weights of the task before.

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, and not the weights themselves."""
        return hasattr(self.module, "peft_config")

    def weights(self) -> dict[str, Tensor]:
        """All weights, adapters merged in, by the names of the model without adapters."""
        if not self.adapted:
            return copy_weights(self.module)
        weights = {
            _plain(n): w for n, w in copy_weights(self.module).items() if not _is_low_rank(n)
        }
        for name, layer in self._adapted_layers():
            key = f"{_plain(name)}.weight"
            delta = layer.get_delta_weight(_ADAPTER).detach().to("cpu", torch.float32)
            weights[key] = (weights[key].float() + delta).to(weights[key].dtype)
        return weights

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Write ``weights`` into the model; adapters begin anew, drawn by torch's generator."""
        if not self.adapted:
            load_weights_(self.module, weights)
            return
        own = named_weights(self.module)
        low_rank = {name: weight for name, weight in own.items() if _is_low_rank(name)}
        names = {_plain(name): name for name in own if name not in low_rank}
        renamed = {names.get(name, name): weight for name, weight in weights.items()}
        load_weights_(self.module, {**renamed, **low_rank})
        for _, layer in self._adapted_layers():
            layer.reset_lora_parameters(_ADAPTER, init_lora_weights=True)

    def parameter_names(self) -> set[str]:
        """The parameters of the model without adapters."""
        return {_plain(n) for n, _ in self.module.named_parameters() if not _is_low_rank(n)}

    def describe(self, folder: Path) -> None:
        """Write the model's configuration and its tokenizer."""
        module: Any = self.module
        save_config(module.get_base_model() if self.adapted else module, folder)
        self.form.tokenizer.save_pretrained(folder)

    def _adapted_layers(self) -> Iterator[tuple[str, Any]]:
        for name, layer in self.module.named_modules():
            if hasattr(layer, "get_delta_weight") and (
                _ADAPTER in layer.lora_A or _ADAPTER in layer.lora_embedding_A
            ):
                yield name, layer


def _is_low_rank(name: str) -> bool:
    return ".lora_" in name


def _plain(name: str) -> str:
    return re.sub(r"\.base_layer\b", "", name.removeprefix("base_model.model."))


# Loading.


def load_language_model(settings: HuggingFace) -> TextLearner:
    """``AutoModelForCausalLM`` or, where its config says so, ``AutoModelForSeq2SeqLM``.

    Raises:
        ConfigError: if the model or its tokenizer cannot be had, or weights of it are missing.
    """
    config, form = _format(settings)
    module = _load_module(settings, config, form.encoder_decoder)
    rows = module.get_input_embeddings().weight.shape[0]
    if len(form.tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer of {settings.id!r} has {len(form.tokenizer)} tokens and its model "
            f"only {rows}: they do not belong together"
        )
    if settings.gradient_checkpointing:
        checkpoint_activations(module)
    if settings.lora is not None:
        module = _with_adapters(module, settings, form.encoder_decoder)
    return TextLearner(module, form)


def _load_module(settings: HuggingFace, config: Any, encoder_decoder: bool) -> Any:
    import transformers

    kind = (
        transformers.AutoModelForSeq2SeqLM if encoder_decoder else transformers.AutoModelForCausalLM
    )
    dtype = getattr(torch, settings.dtype)
    try:
        if not settings.pretrained:
            return kind.from_config(config, dtype=dtype, attn_implementation=settings.attention)
        module, loaded = kind.from_pretrained(
            resolve_model(settings.id),
            revision=settings.revision,
            config=config,
            dtype=dtype,
            attn_implementation=settings.attention,
            output_loading_info=True,
        )
    except ImportError as error:
        raise ConfigError(f"model.attention = {settings.attention}: {first_line(error)}") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _cannot_load("model", settings.id, error) from error
    missing = sorted(loaded["missing_keys"]) + [key[0] for key in loaded["mismatched_keys"]]
    if missing:
        raise ConfigError(
            f"the checkpoint {settings.id!r} lacks weights of the model, or has them in another "
            f"shape ({', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}); it is "
            "damaged or of another architecture than its config.json says"
        )
    return module


def _with_adapters(module: Any, settings: HuggingFace, encoder_decoder: bool) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("model.lora needs PEFT: pip install 'stockpot[peft]'") from error
    assert settings.lora is not None
    targets = settings.lora.target_modules
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM",
        r=settings.lora.r,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules="all-linear" if targets is None else list(targets),
    )
    try:
        adapted = peft.get_peft_model(module, config)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"model.lora: {error}") from error
    _refuse_tied(adapted)
    if settings.gradient_checkpointing:
        module.enable_input_require_grads()
    return adapted


def _refuse_tied(adapted: Any) -> None:
    """An adapter on one use of a weight that has two could not be merged into the weight."""
    uses: dict[int, list[str]] = {}
    for name, parameter in adapted.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    for names in uses.values():
        for name in names:
            if len(names) > 1 and ".base_layer." in name:
                raise ConfigError(
                    f"model.lora.target_modules: {_plain(name)!r} is tied to "
                    f"{', '.join(repr(_plain(n)) for n in names if n != name)}; an adapter on one "
                    "of them cannot be merged into the weight that they share. Name other layers"
                )


def _cannot_load(what: str, source: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot load the {what} of {source!r}: {first_line(error)}. Without a network, give a "
        "local folder that holds config.json, model.safetensors and the tokenizer's files"
    )


def _format(settings: HuggingFace) -> tuple[Any, Format]:
    from transformers import AutoConfig, AutoTokenizer

    source = resolve_model(settings.id)
    try:
        config = AutoConfig.from_pretrained(source, revision=settings.revision)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load("configuration", settings.id, error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=settings.revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _cannot_load("tokenizer", settings.id, error) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{settings.id!r} has no fast tokenizer (tokenizer.json), which tells which tokens "
            "belong to the response"
        )
    template = settings.chat_template
    if template and tokenizer.chat_template is None:
        raise ConfigError(f"model.chat_template: the tokenizer of {settings.id!r} has none")
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    limits = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length)
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    positions = limits[0]
    if settings.max_length and isinstance(positions, int) and settings.max_length > positions:
        raise ConfigError(
            f"model.max_length = {settings.max_length}: {settings.id!r} has {positions} positions "
            "(max_position_embeddings in its config.json)"
        )
    longest = settings.max_length or min([*known, _LONGEST])
    return config, Format(
        tokenizer,
        encoder_decoder,
        longest,
        tokenizer.chat_template is not None if template is None else template,
        context=min(known, default=max(longest, _LONGEST)),
    )


# Streams.


def encode_stream(stream: TextStream, settings: HuggingFace) -> Stream:
    """The stream as the model's tokens.

    Raises:
        ConfigError: if the tokenizer cannot be had.
        StockpotError: if an example leaves nothing to learn.
    """
    _, form = _format(settings)
    tasks, notes = [], []
    for task in stream.tasks:
        parts = {}
        for split, examples in (("train", task.train), ("test", task.test)):
            data, cut = form.data(examples)
            if (note := cut.note(f"{task.name} ({split})", form.max_length)) is not None:
                notes.append(note)
            parts[split] = data
            _check_learned(task.name, split, data, form)
        tasks.append(Task(task.name, parts["train"], parts["test"], task.benchmarks))
    return Stream(stream.name, "domain-incremental", tuple(tasks), notes=tuple(notes))


def _check_learned(task: str, split: str, data: Any, form: Format) -> None:
    for rows in torch.arange(len(data)).split(4096):
        labels = data.__getitems__(rows)["labels"]
        if not form.encoder_decoder:
            labels = labels[:, 1:]
        empty = (labels == IGNORED).all(dim=1).nonzero()
        if len(empty):
            raise StockpotError(
                f"task {task!r}, {split} example {int(rows[empty[0]])}: nothing of it is learned, "
                "its response has no tokens"
            )
