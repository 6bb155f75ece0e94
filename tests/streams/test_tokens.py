"""Ragged token tensors and their batches against lists in plain Python."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from stockpot.streams.data import Mixture, Stream, Task, digest_of
from stockpot.streams.tokens import IGNORED, Ragged, TextData

PAD = 7
quickly = hypothesis_settings(max_examples=100, deadline=None)

Rows = list[list[tuple[int, bool]]]
"""Examples of (token, whether it is learned)."""

tokens = st.tuples(st.integers(0, 40), st.booleans())
examples = st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=6)
answers = st.lists(st.integers(0, 40), min_size=1, max_size=5)
pairs = st.lists(st.tuples(answers, answers), min_size=1, max_size=6)


def causal(rows: Rows) -> TextData:
    learned = torch.tensor([mark for row in rows for _, mark in row], dtype=torch.bool)
    return TextData(Ragged.of([[t for t, _ in row] for row in rows]), learned, None, PAD)


def seq2seq(rows: list[tuple[list[int], list[int]]]) -> TextData:
    return TextData(Ragged.of([a for a, _ in rows]), None, Ragged.of([b for _, b in rows]), PAD)


def batch_of(rows: Rows, pad: int = PAD) -> dict[str, Any]:
    """A padded batch, written down again."""
    width = max(map(len, rows))
    short = any(len(row) < width for row in rows)
    return {
        "input_ids": [[t for t, _ in row] + [pad] * (width - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        if short
        else None,
        "labels": [
            [t if mark else IGNORED for t, mark in row] + [IGNORED] * (width - len(row))
            for row in rows
        ],
    }


def plain(batch: dict[str, Tensor | None]) -> dict[str, Any]:
    for value in batch.values():
        assert value is None or value.dtype == torch.int64
    return {name: None if value is None else value.tolist() for name, value in batch.items()}


def seen(batch: dict[str, Tensor | None]) -> list[tuple[list[int], list[int]]]:
    """What a model sees of each example: the tokens that are not masked, and the labels."""
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert ids is not None
    assert labels is not None
    mask = torch.ones_like(ids) if mask is None else mask
    return [
        (row[there.bool()].tolist(), [t for t in own.tolist() if t != IGNORED])
        for row, there, own in zip(ids, mask, labels, strict=True)
    ]


@quickly
@given(rows=examples, data=st.data())
def test_batches_are_padded_on_the_right(rows, data):
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    made = causal(rows)
    for indices in (picked, torch.tensor(picked)):
        assert plain(made.__getitems__(indices)) == batch_of([rows[n] for n in picked])
    assert plain(made[picked[0]]) == batch_of([rows[picked[0]]])
    assert made.lengths().tolist() == [len(row) for row in rows]
    assert len(made) == len(rows)


@quickly
@given(rows=pairs, data=st.data())
def test_batches_of_an_encoder_and_a_decoder(rows, data):
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    made = seq2seq(rows)
    batch = plain(made.__getitems__(picked))
    inputs = batch_of([[(t, True) for t in rows[n][0]] for n in picked])
    labels = batch_of([[(t, True) for t in rows[n][1]] for n in picked])
    assert batch == {**inputs, "labels": labels["labels"]}
    assert made.lengths().tolist() == [len(a) + len(b) for a, b in rows]


def test_an_encoder_may_read_nothing():
    batch = seq2seq([([], [1]), ([], [2, 3])]).__getitems__([0, 1])
    assert batch["input_ids"].shape == (2, 0)
    assert plain(batch)["labels"] == [[1, IGNORED], [2, 3]]


@quickly
@given(rows=examples, data=st.data())
def test_subsets_of_subsets(rows, data):
    made, expected = causal(rows), rows
    for _ in range(2):
        index = st.integers(0, len(expected) - 1)
        picked = data.draw(st.lists(index, min_size=1, max_size=6))
        made, expected = made.subset(torch.tensor(picked)), [expected[n] for n in picked]
    assert plain(made.__getitems__(range(len(expected)))) == batch_of(expected)
    assert made.lengths().tolist() == [len(row) for row in expected]


def test_a_subset_shares_its_tensors():
    made = causal([[(1, True)], [(2, False), (3, True)]])
    part = made.subset(torch.tensor([1]))
    assert part.inputs.values is made.inputs.values
    assert part.learned is made.learned


# Several as one.


@quickly
@given(parts=st.lists(examples, min_size=1, max_size=3), data=st.data())
def test_a_mixture_holds_the_examples_of_its_parts(parts, data):
    whole = [row for part in parts for row in part]
    mixture = Mixture([causal(part) for part in parts])
    picked = data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=8))
    # Within a batch the examples of one part stand together, in the order asked for.
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)
    owner = {n: int(torch.searchsorted(ends, n, right=True)) for n in picked}
    expected = [whole[n] for n in sorted(picked, key=owner.__getitem__)]
    batch = mixture.__getitems__(picked)
    assert seen(batch) == [
        ([t for t, _ in row], [t for t, mark in row if mark]) for row in expected
    ]
    assert batch["labels"].tolist() == batch_of(expected)["labels"]
    assert mixture.lengths().tolist() == [len(row) for row in whole]
    part = mixture.subset(torch.tensor(picked))
    assert part.lengths().tolist() == [len(row) for row in expected]
    assert seen(part.__getitems__(range(len(picked)))) == seen(batch)


@quickly
@given(parts=st.lists(pairs, min_size=1, max_size=3))
def test_a_mixture_of_encoders_and_decoders(parts):
    whole = [row for part in parts for row in part]
    batch = Mixture([seq2seq(part) for part in parts]).__getitems__(range(len(whole)))
    assert seen(batch) == whole


def test_joined_batches_are_as_wide_as_the_widest():
    made = causal([[(1, True)], [(2, True), (3, True), (4, True)]])
    joined = made.joined([made.__getitems__([0]), made.__getitems__([1])])
    assert plain(joined) == {
        "input_ids": [[1, 0, 0], [2, 3, 4]],
        "attention_mask": [[1, 0, 0], [1, 1, 1]],
        "labels": [[1, IGNORED, IGNORED], [2, 3, 4]],
    }
    same = made.joined([made.__getitems__([1]), made.__getitems__([1])])
    assert same["attention_mask"] is None


# What the data are.

ROWS = [[(1, True), (2, False)], [(3, True)], [(4, True), (5, True), (6, False)]]
CHANGES: dict[str, Callable[[], TextData]] = {
    "a token": lambda: causal([[(1, True), (9, False)], *ROWS[1:]]),
    "what is learned": lambda: causal([[(1, True), (2, True)], *ROWS[1:]]),
    "one example more": lambda: causal([*ROWS, [(0, True)]]),
    "one example less": lambda: causal(ROWS[:2]),
    "another order": lambda: causal([ROWS[1], ROWS[0], ROWS[2]]),
    "the same tokens, cut elsewhere": lambda: causal(
        [ROWS[0][:1], [ROWS[0][1], *ROWS[1]], ROWS[2]]
    ),
    "a subset": lambda: causal(ROWS).subset(torch.tensor([0, 1])),
    "a subset in another order": lambda: causal(ROWS).subset(torch.tensor([0, 2, 1])),
    "for a decoder": lambda: seq2seq([([t for t, _ in row], [1]) for row in ROWS]),
    "another answer": lambda: seq2seq([([t for t, _ in row], [2]) for row in ROWS]),
    "answers cut elsewhere": lambda: seq2seq([([1], [1, 1]), ([2], [1]), ([3], [1])]),
    "and elsewhere": lambda: seq2seq([([1], [1]), ([2], [1, 1]), ([3], [1])]),
}


def test_every_change_changes_the_fingerprint():
    prints = {name: make().fingerprint() for name, make in CHANGES.items()}
    prints["as it was"] = causal(ROWS).fingerprint()
    assert len(set(prints.values())) == len(prints)
    assert causal(ROWS).fingerprint() == prints["as it was"]


def test_fingerprints_of_mixtures_and_streams():
    one, two = causal(ROWS), causal(ROWS[:2])
    prints = {
        data.fingerprint() for data in (Mixture([one, two]), Mixture([two, one]), Mixture([one]))
    }
    assert len(prints) == 3

    def stream(train: TextData, test: TextData) -> str:
        return Stream("s", "domain-incremental", (Task("t", train, test),)).fingerprint()

    assert len({stream(one, two), stream(two, one), stream(one, one)}) == 3


@pytest.mark.parametrize("shared", [False, True])
def test_a_part_of_a_tensor_is_not_taken_for_the_whole(shared):
    """Rows of two tasks may be views of one order that begin at one place."""
    order = torch.arange(10)
    known: dict[int, bytes] | None = {} if shared else None
    whole = digest_of([order, order], known)
    assert digest_of([order, order[:5]], known) != whole
    assert digest_of([order, order[::2]], known) != digest_of([order, order[:5]], known)
    assert digest_of([order, order.clone()], known) == whole
