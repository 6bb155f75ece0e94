"""The public data sets of the paper's language tasks, and how their rows are asked.

Prompts are our own wording, put so that what is long comes first: a prompt that does not fit the
model loses its beginning, never the question.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from stockpot.errors import StockpotError
from stockpot.streams.draws import held_out
from stockpot.streams.rows import Rows, rows_of_split
from stockpot.streams.text import Example, Question, exchange

__all__ = [
    "BENCHMARKS",
    "DOMAINS",
    "DOMAIN_SETS",
    "HELD_OUT",
    "INSTRUCTIONS",
    "INSTRUCTION_SETS",
    "PROBLEMS",
    "Item",
    "PublicSet",
    "chosen_columns",
    "constraint",
]

HELD_OUT = 500
"""Prompts held out of Math and of Code, or 5 % of them if that is fewer."""

Row = Mapping[str, Any]


class Item(NamedTuple):
    """A row of a public set as it is asked."""

    prompt: str
    response: str
    question: Question | None
    stratum: str = ""

    @property
    def example(self) -> Example:
        """What is trained on."""
        return exchange(self.prompt, self.response)


@dataclass(frozen=True)
class PublicSet:
    """A public data set: which of its columns are read, and how a row is asked.

    Args:
        id: on the hub.
        columns: from the names that ``ask`` uses to those that versions of the set have used.
        ask: makes a prompt and a response, or a question, of a row.
        config: of the set, where it has several.
        test: the split to test on; where a copy lacks it, rows of ``train`` are held out.
    """

    id: str
    columns: Mapping[str, tuple[str, ...]]
    ask: Callable[[Row], tuple[str, str] | Question]
    config: str | None = None
    test: str | None = "test"

    def items(self, splits: Mapping[str, Any], split: str) -> list[Item]:
        """The rows of one split; those in which something is empty are left out."""
        rows = rows_of_split(self.id, splits, split)
        items = []
        for number, row in enumerate(chosen_columns(rows, self.columns)):
            if any(value is None or str(value).strip() == "" for value in row.values()):
                continue
            try:
                asked = self.ask(row)
            except (KeyError, TypeError, ValueError) as error:
                raise StockpotError(f"{rows.place(number)}: {error}") from error
            if isinstance(asked, Question):
                answer = asked.choices[asked.answer]
                items.append(Item(asked.prompt, answer, asked, str(asked.answer)))
            else:
                items.append(Item(*asked, None))
        return [item for item in items if item.response]

    def divided(
        self, splits: Mapping[str, Any], held: float | None, seed: int
    ) -> tuple[list[Item], list[Item]]:
        """What is trained and what is tested on: the set's own split, or a seeded share of it.

        Args:
            splits: of the opened set.
            held: prompts to hold out where there is no test split (a whole number) or their share;
                None: :data:`HELD_OUT` or 5 %, whichever is fewer. Of each answer to a question in
                proportion.
            seed: of the draw.
        """
        train = self.items(splits, "train")
        if self.test is not None and self.test in splits:
            test = self.items(splits, self.test)
            asked = {item.prompt for item in test}
            return [item for item in train if item.prompt not in asked], test
        prompts = [item.prompt for item in train]
        all_prompts = len(set(prompts))
        if held is None:
            held = max(1, min(HELD_OUT, all_prompts // 20))
        count = held if isinstance(held, int) else max(1, round(held * all_prompts))
        kept, out = held_out(prompts, count, seed, [item.stratum for item in train])
        return [train[n] for n in kept], [train[n] for n in out]


def chosen_columns(rows: Rows, columns: Mapping[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """The rows with the columns asked for, under our names."""
    values = []
    for names in columns.values():
        name = next((name for name in names if name in rows.columns), None)
        if name is None:
            raise StockpotError(
                f"data set {rows.source!r} has no column {' or '.join(map(repr, names))} (it has "
                f"{', '.join(rows.columns)})"
            )
        values.append(rows.column(name))
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


# How rows are asked.


def _said(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(f"{name!r} is {type(value).__name__}; expected text")
    return value.strip()


def _number(row: Row, choices: int) -> int:
    """The label, a whole number or its digits."""
    label = str(row["label"]).strip()
    if label not in map(str, range(choices)):
        raise ValueError(f"the label is {row['label']!r}; expected 0 to {choices - 1}")
    return int(label)


def _math(row: Row) -> tuple[str, str]:
    return f"Question: {_said(row, 'query')}\nAnswer:", _said(row, "response")


def _code(row: Row) -> tuple[str, str]:
    return _said(row, "instruction"), _said(row, "response")


def _casehold(row: Row) -> Question:
    choices = tuple(_said(row, f"holding_{n}") for n in range(5))
    prompt = (
        f"{_said(row, 'citing_prompt')}\n\n"
        "What did the court hold in the case cited at (<HOLDING>)?\nHolding:"
    )
    return Question(prompt, choices, _number(row, 5))


def _yes_or_no(row: Row, said: str, question: str) -> Question:
    prompt = f"{said}: {_said(row, 'text')}\n\n{question}\nAnswer (yes or no):"
    return Question(prompt, ("no", "yes"), _number(row, 2))


def _tos(row: Row) -> Question:
    question = "Is this clause from the terms of an online service potentially unfair to consumers?"
    return _yes_or_no(row, "Clause", question)


def _overruling(row: Row) -> Question:
    question = "Does this sentence from a court's opinion overrule an earlier decision?"
    return _yes_or_no(row, "Sentence", question)


def _simplification(row: Row) -> tuple[str, str]:
    text = _said(row, "source")
    prompt = f"Sentence: {text}\n\nRewrite this sentence in simpler words.\nSimpler:"
    return prompt, _said(row, "target")


def _curious(row: Row) -> tuple[str, str]:
    """The source is: context [SEP] sentence [SEP] the words asked about [SEP] kind of question."""
    parts = [part.strip() for part in _said(row, "source").split("[SEP]")]
    if len(parts) < 3:
        raise ValueError(
            "'source' has fewer than three parts; expected context [SEP] sentence [SEP] words"
        )
    context, sentence, words = parts[:3]
    before = "" if context in ("", "NO_CONTEXT") else f"Context: {context}\n"
    prompt = (
        f"{before}Sentence: {sentence}\n\n"
        f'Ask what a curious reader would want to know about "{words}" in this sentence.\n'
        "Question:"
    )
    return prompt, _said(row, "target")


def constraint(headline: str) -> str:
    """The word that a headline must contain: one of its words of four letters or more.

    Which one is decided by the SHA-256 of the headline alone, so that every machine and every seed
    sets the same constraint. A headline without such a word gives its longest.
    """
    words = re.findall(r"\b[^\W\d_]+\b", headline) or headline.split()
    words = [word for word in words if len(word) >= 4] or [max(words, key=len)]
    return words[int(hashlib.sha256(headline.encode()).hexdigest(), 16) % len(words)]


def _headline(row: Row) -> tuple[str, str]:
    """Headline generation with a constraint, after Scialom et al. 2022 (HGen): contain a word.

    Their articles are Gigaword's, which is licensed; XSum's one-sentence summaries stand in, and
    the word is :func:`constraint`'s.
    """
    document, headline = _said(row, "document"), _said(row, "summary")
    prompt = (
        f"Article: {document}\n\n"
        f'Write a headline for this article that contains the word "{constraint(headline)}".\n'
        "Headline:"
    )
    return prompt, headline


def _covid_fact(row: Row) -> tuple[str, str]:
    answers = {"entailment": "yes", "supported": "yes", "not_entailment": "no", "refuted": "no"}
    label = _said(row, "label").lower()
    if label not in answers:
        raise ValueError(f"the label is {row['label']!r}; expected {' or '.join(answers)}")
    prompt = (
        f"Evidence: {_said(row, 'evidence')}\nClaim: {_said(row, 'claim')}\n\n"
        "Does the evidence support the claim?\nAnswer (yes or no):"
    )
    return prompt, answers[label]


def _covid_qa(row: Row) -> tuple[str, str]:
    answer = row["answer"]
    if isinstance(answer, Mapping):  # SQuAD's way, which the hub's copy follows
        answer = (answer["text"] or [""])[0]
    prompt = (
        f"Text: {_said(row, 'context')}\n\n"
        f"Answer from the text.\nQuestion: {_said(row, 'question')}\nAnswer:"
    )
    return prompt, _said({"answer": answer}, "answer")


# The sets.

_HOLDINGS = {f"holding_{n}": (f"holding_{n}",) for n in range(5)}
_TEXT = ("text", "sentence", "sentence1")

DOMAINS: dict[str, dict[str, PublicSet]] = {
    "math": {
        "metamath": PublicSet(
            "meta-math/MetaMathQA",
            {"query": ("query",), "response": ("response",)},
            _math,
            test=None,
        )
    },
    "law": {
        "casehold": PublicSet(
            "casehold/casehold",
            {"citing_prompt": ("citing_prompt",), **_HOLDINGS, "label": ("label",)},
            _casehold,
            config="all",
        ),
        "tos": PublicSet("LawInformedAI/claudette_tos", {"text": _TEXT, "label": ("label",)}, _tos),
        "overruling": PublicSet(
            "LawInformedAI/overruling", {"text": _TEXT, "label": ("label",)}, _overruling
        ),
    },
    "code": {
        "magicoder": PublicSet(
            "ise-uiuc/Magicoder-Evol-Instruct-110K",
            {"instruction": ("instruction",), "response": ("response",)},
            _code,
            test=None,
        )
    },
}
"""What each domain is trained on; Law is one mixture of three sets."""

BENCHMARKS: dict[str, tuple[str, ...]] = {
    "math": ("gsm8k",),
    "law": ("casehold", "tos", "overruling"),
    "code": ("humaneval",),
}
"""What each domain is scored on beside its held-out loss (Table 8)."""

PROBLEMS: dict[str, tuple[str, str | None]] = {
    "gsm8k": ("openai/gsm8k", "main"),
    "humaneval": ("openai/openai_humaneval", None),
}
"""The data sets of the benchmarks that are not held out of what is trained on: id and config."""

INSTRUCTIONS: dict[str, PublicSet] = {
    "simplification": PublicSet(
        "GEM/wiki_auto_asset_turk",
        {"source": ("source",), "target": ("target",)},
        _simplification,
        test="test_asset",
    ),
    "questions": PublicSet(
        "inquisitive/inquisitive", {"source": ("source",), "target": ("target",)}, _curious
    ),
    "headlines": PublicSet(
        "EdinburghNLP/xsum", {"document": ("document",), "summary": ("summary",)}, _headline
    ),
    "covid-fact": PublicSet(
        "covidfact/covidfact",
        {"evidence": ("evidence",), "claim": ("claim",), "label": ("label",)},
        _covid_fact,
    ),
    "covid-qa": PublicSet(
        "deepset/covid_qa_deepset",
        {"context": ("context",), "question": ("question",), "answer": ("answer", "answers")},
        _covid_qa,
    ),
}
"""The instruction tasks of A.4; Twitter stylometry comes from the user's own file."""

DOMAIN_SETS = tuple(
    [public.id for parts in DOMAINS.values() for public in parts.values()]
    + [source for source, _ in PROBLEMS.values()]
)
INSTRUCTION_SETS = tuple(public.id for public in INSTRUCTIONS.values())
