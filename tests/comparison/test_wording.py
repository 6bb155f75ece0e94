"""What is said of a result."""

import numpy as np

from comparison.tables import judged, loss, row, table
from stockpot.comparison.markdown import to_markdown
from stockpot.comparison.verdict import Pairing, judge
from stockpot.comparison.wording import footnotes, limit_sentence, sentences


def said(result):
    return " ".join(sentences(result.comparisons[0]))


def test_losses_are_in_nats_and_a_rise_is_a_drop():
    old = np.linspace(1, 3, 60)
    noise = np.random.default_rng(0).normal(0, 0.02, 60)
    result = judged([loss(old, old + 0.5 + noise, "math"), loss(old, old - 0.25 + noise, "law")])
    assert "1 of 2 tasks was forgotten: math (0.5" in said(result)
    assert "1 of 2 tasks was learned: law (0.2" in said(result)
    assert "nats" in said(result)
    assert "AFTER is 0.1" in said(result)
    assert "nats worse (" in said(result)
    assert any("mean over texts" in note for note in footnotes(result))


def test_a_gain_and_its_interval_are_said_as_gains():
    result = judged([row(*table(0, 40, 100), task=t) for t in "ab"])
    assert "AFTER is 40.0 points better (" in said(result)
    assert "-" not in said(result).split("better")[1]


def test_no_difference_is_neither_worse_nor_better():
    result = judged([row(*table(5, 5, 100), task=t) for t in "ab"])
    assert "AFTER is as good as BEFORE (drop -" in said(result)


def test_identical_items_are_noticed():
    same = judged([row(*table(0, 0, 50), task=t) for t in "ab"])
    assert "Every item has the same score before and after." in footnotes(same)
    other = judged([row(*table(0, 0, 50)), row(*table(1, 0, 50), task="u")])
    assert "Every item has the same score before and after." not in footnotes(other)


def test_seeds_that_disagree_are_noticed():
    """Two seeds lost 60 of 200 items, the third won 2."""
    before, after = table(60, 0, 200)
    better = before.copy()
    before[100:102], after[100:102], better[100:102] = 0, 0, 1
    rows = [row([before] * 3, [after, after, better], seeds=(0, 1, 2))]
    result = judge([Pairing("a", "b", None, (0, 1, 2), tuple(rows), ())], "a", "b")
    assert result.verdict == "forgotten"
    assert "The seeds disagree on which way it went: t." in footnotes(result)
    assert any(note.startswith("Seeds 0, 1, 2: ") for note in footnotes(result))


def test_a_long_list_of_tasks_is_cut_and_counted():
    result = judged([row(*table(40 + n, 0, 100), task=f"task {n}") for n in range(9)])
    assert "9 of 9 tasks were forgotten: task 8 (48.0 points)" in said(result)
    assert "task 5 (45.0 points) and 5 more." in said(result)


def test_an_impossible_limit_says_that_no_number_of_items_will_do():
    from stockpot.comparison.verdict import Limit

    result = judged([row(*table(1, 0, 50))], Limit(0.02, strict=True))
    assert "no number of items could tell them apart" in limit_sentence(result)


def test_names_cannot_break_the_markdown():
    result = judged([row(*table(40, 0, 100), task="a|b*c_[x](y)<i>")])
    lines = [line for line in to_markdown(result).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "a&#124;b&#42;c&#95;&#91;x&#93;(y)&lt;i&gt;" in lines[-1]
