"""From examples of text to tokens: the chat template or a plain prompt, and what of it is learned.

Only the assistant's turns are learned. With a chat template a turn ends as the template ends it;
without one the prompt and the response follow each other, a space between them unless the prompt
ends in white space, and the end-of-sequence token ends the response. A prompt looks the same when
it is trained on, when choices are scored and when text is generated; white space at its end is the
model's to say, for many tokens begin with it.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from stockpot.errors import StockpotError
from stockpot.streams.text import Example, Message, Question
from stockpot.streams.tokens import Ragged, TextData

__all__ = ["Cut", "Format", "Rendered"]

_DAY = datetime.date(2025, 1, 1)
"""Today, for templates that write the date: the same examples are the same tokens tomorrow."""
_BATCH = 2000
"""Examples that are tokenised at a time: enough for all threads, little beside the result."""


class Rendered(NamedTuple):
    """An example as one text, and the characters of it that are learned."""

    text: str
    spans: tuple[tuple[int, int], ...]
    end: bool
    """Whether the end-of-sequence token is to follow."""


class Cut(NamedTuple):
    """How many examples did not fit."""

    examples: int
    """Of how many."""
    prompts: int
    """Lost the beginning of their prompt."""
    responses: int
    """Lost the end of their response (and the beginning of a long prompt)."""

    def note(self, name: str, max_length: int) -> str | None:
        """A sentence for the user, or None if everything fitted."""
        if not self.prompts + self.responses:
            return None
        parts = []
        if self.prompts:
            parts.append(f"{self.prompts:,} lost the beginning of their prompt")
        if self.responses:
            parts.append(f"{self.responses:,} lost the end of their response")
        return (
            f"{name}: of {self.examples:,} examples {' and '.join(parts)}: they are longer than "
            f"model.max_length = {max_length} tokens"
        )


@dataclass(frozen=True)
class Format:
    """How one model's tokenizer writes examples.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        encoder_decoder: whether the prompt goes to an encoder and the response to a decoder.
        max_length: longest example in tokens; for an encoder-decoder, prompt and response each.
        template: whether the tokenizer's chat template is used.
        context: the longest prompt and answer together that the model takes; None: ``max_length``.
    """

    tokenizer: Any
    encoder_decoder: bool
    max_length: int
    template: bool
    context: int | None = None

    @property
    def pad(self) -> int:
        """The token that fills up batches; masked wherever it is used."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def unended(self, tokens: list[int]) -> list[int]:
        """Without the end-of-sequence token that some tokenizers put after every text."""
        eos = self.tokenizer.eos_token_id
        return tokens[:-1] if tokens and tokens[-1] == eos else tokens

    # As text.

    def prompt(self, text: str) -> str:
        """A prompt as the model is asked it."""
        return self._asked((Message("user", text),))

    def _asked(self, messages: Sequence[Message]) -> str:
        if self.template:
            return self._templated(messages, ask=True)
        return "\n\n".join(message.content for message in messages).rstrip()

    @functools.cached_property
    def _dateless_template(self) -> str | None:
        """The chat template, with one day for today."""
        template = self.tokenizer.chat_template
        if not isinstance(template, str):
            return None

        def fixed(call: re.Match[str]) -> str:
            return repr(_DAY.strftime(call[2]))

        return re.sub(r"""strftime_now\((["'])(.*?)\1\)""", fixed, template)

    def _templated(self, messages: Sequence[Message], ask: bool) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self._dateless_template,
                tokenize=False,
                add_generation_prompt=ask,
            )
        except Exception as error:  # templates are anyone's code, and refuse what they do not take
            roles = ", ".join(message.role for message in messages)
            raise StockpotError(
                f"the model's chat template refuses a conversation of {roles}: {error}. Set "
                "model.chat_template: false for a plain prompt"
            ) from error
        return text

    def rendered(self, example: Example) -> Rendered:
        """An example to train on."""
        messages = example.messages
        if not self.template:
            return self._plain(messages)
        whole = self._templated(messages, ask=False)
        spans = []
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            begin = self._templated(messages[:number], ask=True)
            end = self._templated(messages[: number + 1], ask=False)
            # Some templates write earlier turns otherwise than the last; those are not learned.
            if whole.startswith(end) and end.startswith(begin):
                spans.append((len(begin), len(end)))
        if not spans:
            begin = self._templated(messages[:-1], ask=True)
            return Rendered(begin + messages[-1].content, ((len(begin), 2**62),), end=True)
        return Rendered(whole, tuple(spans), end=False)

    def _plain(self, messages: Sequence[Message]) -> Rendered:
        text, spans, asked = "", [], False
        last = len(messages) - 1
        for number, message in enumerate(messages):
            if message.role == "assistant":
                begin = len(text.rstrip() if asked else text)
                text += (_separator(text) if asked else "") + message.content
                if number < last:
                    text += self.tokenizer.eos_token or ""
                spans.append((begin, len(text)))
                asked = False
            else:
                text += ("\n\n" if text else "") + message.content
                asked = True
        ends = messages[-1].role == "assistant"
        return Rendered(text, tuple(spans), ends)

    def answered(self, prompt: str, answer: str) -> Rendered:
        """A prompt and one possible answer, to be scored: nothing follows the answer."""
        asked = self.prompt(prompt)
        text = (asked if self.template else prompt + _separator(prompt)) + answer
        return Rendered(text, ((len(asked), len(text)),), end=False)

    # As tokens.

    def data(self, examples: Sequence[Example]) -> tuple[TextData, Cut]:
        """Examples to train on, and how many did not fit."""
        if self.encoder_decoder:
            # The decoder says the last turn; the encoder reads all before it.
            turns = [example.messages for example in examples]
            return self._pairs([(self._asked(m[:-1]), m[-1].content) for m in turns], end=True)
        return self._causal(self.rendered(example) for example in examples)

    def choices(self, questions: Sequence[Question]) -> TextData:
        """Every choice of every question, one after the other; as long as the model's context."""
        wide = replace(self, max_length=self.context or self.max_length)
        asked = [(q.prompt, choice) for q in questions for choice in q.choices]
        if self.encoder_decoder:
            return wide._pairs([(self.prompt(p), c) for p, c in asked], end=False)[0]
        return wide._causal(self.answered(*pair) for pair in asked)[0]

    def _causal(self, rendered: Iterator[Rendered]) -> tuple[TextData, Cut]:
        import numpy as np

        rows: list[Any] = []
        marks: list[Any] = []
        cut = [0, 0]
        for batch in _batches(rendered):
            for item, encoding in zip(batch, self._encoded([i.text for i in batch]), strict=True):
                tokens = np.array(encoding.ids, dtype=np.int32)
                learned = np.zeros(len(tokens), dtype=bool)
                for begin, end in item.spans:
                    first = _token_at(encoding, begin, len(item.text))
                    last = _token_at(encoding, min(end, len(item.text)), len(item.text))
                    learned[first:last] = True
                eos = self.tokenizer.eos_token_id
                if not (item.end or self.template):
                    # Some tokenizers end every text; nothing ends this one.
                    kept = len(self.unended(encoding.ids))
                    tokens, learned = tokens[:kept], learned[:kept]
                if item.end and eos is not None and (not len(tokens) or tokens[-1] != eos):
                    tokens = np.append(tokens, np.int32(eos))
                    learned = np.append(learned, True)
                if len(tokens) > self.max_length:
                    tokens, learned, response = self._fitted(tokens, learned)
                    cut[response] += 1
                rows.append(tokens)
                marks.append(learned)
        begins = torch.tensor([0, *map(len, rows)]).cumsum(0)
        whole = torch.from_numpy(np.concatenate(rows)) if rows else torch.zeros(0).int()
        mask = torch.from_numpy(np.concatenate(marks)) if marks else torch.zeros(0).bool()
        data = TextData(Ragged(whole, begins), mask, None, self.pad)
        return data, Cut(len(rows), *cut)

    def _fitted(self, tokens: Any, learned: Any) -> tuple[Any, Any, bool]:
        """The example in ``max_length`` tokens, and whether its response was cut.

        The beginning of the prompt goes first, for the question stands at its end; the prompt keeps
        half of the room if it needs it, and only then goes the end of the response.
        """
        import numpy as np

        first = int(learned.argmax())
        response = self.max_length - min(first, self.max_length // 2)
        shortened = len(tokens) - first > response
        rest = slice(first, min(len(tokens), first + response))
        head = int(first > 0 and tokens[0] == self.tokenizer.bos_token_id)
        room = self.max_length - (rest.stop - rest.start) - head
        kept = np.r_[0:head, first - room : first, rest]
        return tokens[kept], learned[kept], shortened

    def _pairs(self, pairs: Sequence[tuple[str, str]], end: bool) -> tuple[TextData, Cut]:
        prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
        sides: list[list[list[int]]] = []
        cut = []
        for texts in (prompts, responses):
            side = []
            for begin in range(0, len(texts), _BATCH):
                side += [e.ids for e in self._encoded(texts[begin : begin + _BATCH], plain=True)]
            if texts is responses and not end:
                side = [self.unended(ids) for ids in side]
            cut.append(sum(len(ids) > self.max_length for ids in side))
            # The end of a prompt holds the question, and the token that ends the sequence.
            kept = slice(-self.max_length, None) if texts is prompts else slice(self.max_length)
            sides.append([ids[kept] for ids in side])
        data = TextData(Ragged.of(sides[0]), None, Ragged.of(sides[1]), self.pad)
        return data, Cut(len(pairs), *cut)

    def _encoded(self, texts: list[str], plain: bool = False) -> Any:
        """Encodings; a template has written its special tokens itself."""
        with _all_threads():
            return self.tokenizer(
                texts,
                add_special_tokens=plain or not self.template,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            ).encodings


def _separator(text: str) -> str:
    return "" if not text or text[-1].isspace() else " "


def _token_at(encoding: Any, place: int, length: int) -> int:
    """The first token that holds a character at ``place`` or after it."""
    while place < length:
        token = encoding.char_to_token(place)
        if token is not None:
            return int(token)
        place += 1
    return len(encoding.ids)


def _batches(items: Iterator[Rendered]) -> Iterator[list[Rendered]]:
    batch: list[Rendered] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


@contextlib.contextmanager
def _all_threads() -> Iterator[None]:
    """Let the tokenizer use all cores for a while; nothing else runs meanwhile."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
