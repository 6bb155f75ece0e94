"""Which tasks are scored after which: all, the latest, or a sample of the earlier ones."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from stockpot.evaluation.settings import EvaluationSettings

quick = hypothesis_settings(max_examples=200, deadline=None)
thinnings = st.builds(
    EvaluationSettings,
    tasks=st.sampled_from(["all", "recent", "sample"]),
    tasks_limit=st.integers(1, 12),
    every_tasks=st.integers(1, 7),
)


def test_by_default_everything_is_scored_after_every_task():
    settings = EvaluationSettings()
    assert not settings.thinned
    for current in range(5):
        assert settings.tasks_after(current, 5, seed=3) == [0, 1, 2, 3, 4]
        assert settings.tasks_during(current, 5, seed=3) == [0, 1, 2, 3, 4]
    assert settings.tasks_at_start(5) == [0, 1, 2, 3, 4]


def test_recent_by_hand():
    settings = EvaluationSettings(tasks="recent", tasks_limit=3)
    assert settings.thinned
    assert [settings.tasks_after(t, 6, 0) for t in range(6)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [0, 1, 2, 3, 4, 5],
    ]
    assert settings.tasks_during(5, 6, 0) == [3, 4, 5]
    assert settings.tasks_at_start(6) == [0]


def test_every_second_task_by_hand():
    settings = EvaluationSettings(every_tasks=2)
    everything = [0, 1, 2, 3, 4]
    found = [settings.tasks_after(t, 5, 0) for t in range(5)]
    assert found == [[0], everything, [2], everything, everything]
    assert settings.tasks_during(4, 5, 0) == [4]
    assert settings.tasks_at_start(5) == everything
    both = EvaluationSettings(tasks="recent", tasks_limit=2, every_tasks=3)
    assert [both.tasks_after(t, 7, 0) for t in range(6)] == [[0], [1], [1, 2], [3], [4], [4, 5]]


@quick
@given(thinnings, st.integers(1, 40), st.integers(0, 2**31), st.data())
def test_what_always_holds(settings, count, seed, data):
    current = data.draw(st.integers(0, count - 1))
    chosen = settings.tasks_after(current, count, seed)
    assert chosen == sorted(set(chosen))
    assert current in chosen
    assert set(settings.tasks_during(current, count, seed)) <= set(chosen)
    if current == count - 1:
        assert chosen == list(range(count))
    elif settings.tasks != "all" or (current + 1) % settings.every_tasks:
        assert max(chosen) == current  # none that is still to come
        assert len(chosen) <= settings.tasks_limit or len(chosen) == 1
        if (current + 1) % settings.every_tasks == 0:
            assert len(chosen) == min(current + 1, settings.tasks_limit)
    # A longer stream scores the same after its first tasks.
    if current < count - 1:
        longer = settings.tasks_after(current, count + 5, seed)
        assert longer[: len(chosen)] == chosen


def test_a_sample_is_the_same_each_time_and_another_for_each_seed_and_task():
    settings = EvaluationSettings(tasks="sample", tasks_limit=10)
    drawn = {
        (seed, t): tuple(settings.tasks_after(t, 400, seed)[:-1])
        for seed in range(5)
        for t in (200, 201)
    }
    assert len(set(drawn.values())) == len(drawn)
    again = EvaluationSettings(tasks="sample", tasks_limit=10)
    assert all(
        tuple(again.tasks_after(t, 400, seed)[:-1]) == found for (seed, t), found in drawn.items()
    )


def test_a_sample_favours_no_task():
    settings = EvaluationSettings(tasks="sample", tasks_limit=5)
    seen: Counter[int] = Counter()
    for seed in range(3000):
        seen.update(settings.tasks_after(20, 100, seed)[:-1])
    assert set(seen) == set(range(20))
    # Counts of draws without replacement vary less than multinomial ones: p is on the safe side.
    assert stats.chisquare([seen[task] for task in range(20)]).pvalue > 1e-3


@pytest.mark.parametrize(
    "wrong", [{"tasks": "latest"}, {"tasks_limit": 0}, {"every_tasks": 0}, {"every_tasks": 1.5}]
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        EvaluationSettings(**wrong)
