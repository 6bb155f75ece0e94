"""GSM8K: what to ask, and which number of an answer counts.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168. The outcome is
that of the task ``gsm8k`` of lm-evaluation-harness 0.4, version 3, item by item.

The data set's answers end in ``#### number``. The outcome ``strict`` takes the first number written
in this form, ``flexible`` the last number in the answer, whatever is around it. A model that was
tuned on MetaMathQA ends with "The answer is: number" and is judged by the latter alone: its strict
score is near zero and says nothing of its mathematics.
"""

from __future__ import annotations

import re

__all__ = ["flexible", "gold", "is_correct", "prompt", "strict"]

_NOTHING_FOUND = "[invalid]"
_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_MARK = "#### "


def prompt(question: str) -> str:
    """What the model continues."""
    return f"Question: {question}\nAnswer:"


def gold(answer: str) -> str:
    """The number that the data set's own answer ends with, as it is compared."""
    return _compared(answer)


def strict(text: str) -> str:
    """The first number after ``####`` and one space, as written; ``[invalid]`` if there is none."""
    found = _MARKED.search(text)
    return found[1] if found else _NOTHING_FOUND


def flexible(text: str) -> str:
    """The last number as written, ``$``, commas and full stops included; or ``[invalid]``.

    Two or more signs of these count as a number even without a digit: an ellipsis after the number
    hides it.
    """
    found = _NUMBER.findall(text)
    return str(found[-1]) if found else _NOTHING_FOUND


def is_correct(extracted: str, gold: str) -> bool:
    """Whether what was found in an answer is the right number.

    The same text, that is, without commas, dollars and a full stop at the end: ``18.0`` is not
    ``18``.

    Args:
        extracted: what :func:`strict` or :func:`flexible` found.
        gold: as the function of this name gives it.
    """
    return _compared(extracted) == gold


def _compared(text: str) -> str:
    """Without separators, without what comes before the mark and one full stop, in lower case."""
    text = text.replace(",", "").replace("$", "").rpartition(_MARK)[2]
    body, newline = (text[:-1], "\n") if text.endswith("\n") else (text, "")
    return (body.removesuffix(".") + newline).lower()
