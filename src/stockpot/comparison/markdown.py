"""A result as Markdown for a pull request."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stockpot.comparison.verdict import Comparison, Judged, Result
from stockpot.comparison.wording import (
    HEADS,
    cells,
    common_score,
    footnotes,
    limit_sentence,
    sentences,
)

__all__ = ["to_markdown"]

_LONGEST = 300
"""Characters of a text that is quoted."""
_MOST = 12
"""Items that are quoted."""
_ORDER = {"forgotten": 0, "learned": 1}


def to_markdown(result: Result, every_score: bool = False) -> str:
    """A sentence, a table, footnotes, and examples of items to unfold.

    Args:
        result: what to write.
        every_score: also those that do not count for a task.
    """
    parts = [f"### {_plain(result.before)} → {_plain(result.after)}"]
    if result.limit is not None:
        parts.append(f"**{_plain(limit_sentence(result))}**")
    for comparison in result.comparisons:
        if len(result.comparisons) > 1:
            parts.append(f"#### {_plain(comparison.pairing.setting or comparison.pairing.before)}")
        parts += [_plain(" ".join(sentences(comparison))), _table(comparison, every_score)]
        parts += [
            f"Not compared: {_plain(left.task)} {_plain(left.score)} ({_plain(left.reason)})."
            for left in comparison.pairing.left
            if left.judged or every_score
        ]
    parts.append("\n".join(f"- <sub>{_plain(note)}</sub>" for note in footnotes(result)))
    parts += [text for comparison in result.comparisons if (text := _details(comparison))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(comparison: Comparison, every_score: bool) -> str:
    rows = [*comparison.tasks, *(comparison.aside if every_score else ())]
    if not rows:
        return ""
    measure = common_score(rows)
    kept = [n for n, head in enumerate(HEADS) if head != "score" or measure is None]
    heads = [HEADS[n] for n in kept]
    lines = [f"Score: {_plain(measure)}.\n"] if measure else []
    lines.append(_row([*heads, "verdict"]))
    lines.append(
        "|" + "".join("---|" if h in ("task", "score") else "---:|" for h in heads) + "---|"
    )
    for judged in rows:
        own = cells(judged)
        lines.append(_row([*(_plain(own[n]) for n in kept), _verdict(judged)]))
    return "\n".join(lines)


def _verdict(judged: Judged) -> str:
    strong = judged.verdict in ("forgotten", "learned")
    return f"**{judged.verdict}**" if strong else judged.verdict


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is, also in a table."""
    text = html.escape(text, quote=False).replace("\n", " ")
    return re.sub(r"[\\`*_\[\]|~@]", lambda sign: f"&#{ord(sign[0])};", text)


def _details(comparison: Comparison) -> str:
    """Items that were lost and won, with their texts, folded away."""
    ranked = sorted(comparison.tasks, key=lambda j: _ORDER.get(j.verdict, len(_ORDER)))
    told = [(judged, example) for judged in ranked for example in judged.row.examples]
    if not told:
        return ""
    parts = ["<details><summary>Items that changed most</summary>"]
    for judged, example in told[:_MOST]:
        name = f"{_plain(judged.row.task)} {_plain(judged.row.score)}"
        values = f"{example['before']:.3g} → {example['after']:.3g}"
        parts.append(f"**{name}, item {example['item']}, {example['what']}** ({values})")
        parts += _quoted(example)
    if len(told) > _MOST:
        parts.append(f"And {len(told) - _MOST} more.")
    return "\n\n".join([*parts, "</details>"])


def _quoted(example: Mapping[str, Any]) -> list[str]:
    # A line that begins with <pre> ends Markdown up to </pre>.
    named = (("prompt", "asked"), ("text_before", "before"), ("text_after", "after"))
    return [
        text
        for key, head in named
        if key in example
        for text in (f"{head}:", f"<pre>{html.escape(_shortened(example[key]), quote=False)}</pre>")
    ]


def _shortened(text: str) -> str:
    """The end, where the question and the answer stand."""
    text = text.strip()
    return text if len(text) <= _LONGEST else f"... {text[-_LONGEST:]}"
