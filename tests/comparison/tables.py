"""Items of two models that make a given table of lost and won, as rows and as results."""

import numpy as np

from stockpot.comparison.rows import ItemScore, Row, compare
from stockpot.comparison.verdict import Pairing, judge


def table(lost, won, n, right=0):
    """Items before and after with so many lost and won; ``right`` of the others stay right."""
    same = n - lost - won
    kept = [1] * right + [0] * (same - right)
    before = np.array([1] * lost + [0] * won + kept, float)
    after = np.array([0] * lost + [1] * won + kept, float)
    return before, after


def row(before, after, task="t", seeds=(0,), **about):
    """A row of one model, or of a list of models, one per seed."""
    befores, afters = (x if isinstance(x, list) else [x] for x in (before, after))
    found = compare(
        (task, about.pop("score", "accuracy")),
        [ItemScore(np.asarray(x, float), **about) for x in befores],
        [ItemScore(np.asarray(x, float), **about) for x in afters],
        seeds,
    )
    assert isinstance(found, Row), found
    return found


def loss(before, after, task="t"):
    return row(before, after, task, better="lower", score="loss")


def judged(rows, limit=None, left=()):
    pairing = Pairing("a", "b", None, (0,), tuple(rows), tuple(left))
    return judge([pairing], "a", "b", limit)
