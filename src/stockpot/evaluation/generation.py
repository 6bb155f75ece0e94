"""Texts that a language model writes after prompts, greedily or by sampling."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stockpot.evaluation.score import Progress, silent
from stockpot.models.language import TextLearner
from stockpot.models.learner import evaluating
from stockpot.processes import ALONE, Processes

__all__ = ["generate"]


@torch.inference_mode()
def generate(
    learner: TextLearner,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int,
    device: torch.device | str = "cpu",
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> list[str]:
    """What the model writes after each prompt, up to the first stop string (not included).

    A prompt that leaves no room for the answer loses its beginning; prompts and answers have half
    of what the model takes at least. Prompts of similar length share a batch, padded on the left.

    Args:
        learner: model and tokenizer.
        prompts: as the task words them.
        max_new_tokens: the longest answer, in tokens.
        stop: strings that end an answer.
        batch_size: prompts at a time.
        device: where the model is.
        temperature: 0 takes the likeliest token; else tokens are drawn at this temperature.
        seed: of the draws; torch's generators are left as they were.
        raw: give the prompt as it is, without the model's chat template.
        progress: called after each batch.
        processes: share the batches; all get all answers.
    """
    form = learner.form
    tokenizer = form.tokenizer
    written = [prompt if raw else form.prompt(prompt) for prompt in prompts]
    plain = raw or not form.template
    encoded = tokenizer(written, add_special_tokens=plain, verbose=False)["input_ids"]
    if plain and not form.encoder_decoder:
        encoded = [form.unended(ids) for ids in encoded]
    context = form.context or form.max_length
    limit = form.max_length if form.encoder_decoder else max(context - max_new_tokens, context // 2)
    room = max_new_tokens if form.encoder_decoder else min(max_new_tokens, context - limit)
    cut = [_cut(ids, limit, tokenizer.bos_token_id) or [form.pad] for ids in encoded]
    answers = [""] * len(prompts)
    size = processes.share_size(len(prompts), batch_size)
    order = sorted(range(len(cut)), key=lambda n: -len(cut[n]))
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with evaluating(learner.module), torch.random.fork_rng(devices=devices):
        for begin in processes.mine(range(0, len(order), size)):
            torch.manual_seed(seed + begin)  # whichever process draws this batch, and in what order
            rows = order[begin : begin + size]
            texts = _batch(learner, [cut[n] for n in rows], room, list(stop), temperature, device)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = _until(text, stop)
            progress(min(begin + size, len(order)), len(order))
    # Every answer is empty in all processes but one.
    return ["".join(parts) for parts in zip(*processes.gather(answers), strict=True)]


def _batch(
    learner: TextLearner,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: list[str],
    temperature: float,
    device: torch.device | str,
) -> list[str]:
    form = learner.form
    width = max(map(len, prompts))
    ids = torch.tensor([[form.pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    module: Any = learner.module
    with _plainly(module, temperature):
        tokens = module.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=form.pad,
            stop_strings=stop or None,
            tokenizer=form.tokenizer,
        )
    written = _decoded(form.tokenizer, tokens if form.encoder_decoder else tokens[:, width:])
    if form.encoder_decoder:
        return written
    # Decoded alone a text may lose the space that it begins with, the first of an indentation.
    asked, whole = _decoded(form.tokenizer, ids), _decoded(form.tokenizer, tokens)
    return [
        after.removeprefix(before) if after.startswith(before) else text
        for before, after, text in zip(asked, whole, written, strict=True)
    ]


@contextlib.contextmanager
def _plainly(module: Any, temperature: float) -> Iterator[None]:
    """Greedy, or drawn at a temperature, and nothing else.

    A model may ship penalties, beams or filters of its own in ``generation_config.json``; two
    models are compared without them. Only its special tokens are kept.
    """
    from transformers import GenerationConfig

    own = module.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    module.generation_config = GenerationConfig(**{n: getattr(own, n) for n in names}, **how)
    try:
        yield
    finally:
        module.generation_config = own


def _decoded(tokenizer: Any, tokens: torch.Tensor) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts


def _cut(ids: list[int], limit: int, bos: int | None) -> list[int]:
    """The end of a prompt, where the question stands, after its first token if that begins it."""
    if len(ids) <= limit:
        return ids
    head = ids[:1] if ids[0] == bos else []
    return head + ids[len(ids) - limit + len(head) :]


def _until(text: str, stop: Sequence[str]) -> str:
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(places)] if places else text
