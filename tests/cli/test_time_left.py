"""The time left, against schedules made by hand and a clock that is moved by hand."""

import pytest

from stockpot.cli.time_left import TimeLeft, Work, clock_text, duration_text, work_left
from stockpot.experiment.observer import Row, There
from stockpot.experiment.plan import Plan, Run, Stage
from stockpot.methods.ewc import EWC
from stockpot.methods.sequential import Sequential

ROW = Row({"a": 0.5, "b": 0.5}, "accuracy", "higher")


class Clock:
    """Seconds, as they are set."""

    now = 100.0

    def __call__(self):
        return self.now


def run_of(name, *stages, method=None, seed=0):
    """Stages are (trained key, steps, deployed key)."""
    laid_out = tuple(
        Stage(number, (number,), number, steps, "", trained, deployed)
        for number, (trained, steps, deployed) in enumerate(stages)
    )
    return Run(name, method or Sequential(), seed, laid_out)


def play(left, clock, run, number, steps, per_step, rest, every=1):
    """A stage whose steps take ``per_step`` seconds each and everything else ``rest``."""
    stage = run.stages[number]
    left.stage_begins(run, stage)
    clock.now += rest / 2
    for step in range(1, steps + 1, every):
        left.step(run, step)
        clock.now += per_step * (step < steps)
    clock.now += rest / 2
    left.stage_ends(run, stage, trained=bool(steps))


def test_work_counts_what_is_shared_once():
    first = run_of("first", ("A", 10, "A"), ("B", 20, "B"))
    second = run_of("second", ("A", 10, "A"), ("C", 20, "C*"))
    third = run_of("third", ("A", 10, "A"), ("C", 20, "C**"), seed=0)
    other_seed = run_of("other", ("A2", 10, "A2"), ("B2", 20, "B2"), seed=1)
    runs = (first, second, third, other_seed)
    work = [(w.steps, w.passes) for _, w in work_left(runs, (), ())]
    # The first stage scores the starting model too; equal weights are scored once a seed.
    assert work == [(10, 2), (20, 1), (0, 0), (20, 1), (0, 0), (0, 1), (10, 2), (20, 1)]
    assert sum(steps for steps, _ in work) == Plan(runs, "").steps_to_train == 80


def test_work_leaves_out_what_is_there():
    run = run_of("run", ("A", 10, "A"), ("B", 20, "B"), ("C", 30, "C"))
    work = dict(work_left([run], {("run", 0)}, {"B"}))
    assert work == {("run", 1): Work("sequential", 0, 1), ("run", 2): Work("sequential", 30, 1)}


def test_no_number_without_a_basis():
    clock = Clock()
    run = run_of("run", ("A", 100, "A"), ("B", 100, "B"))
    left = TimeLeft(Plan((run,), ""), There(), clock)
    assert left.left() is None
    left.stage_begins(run, run.stages[0])
    clock.now += 60  # however long it takes to get ready
    assert left.left() is None
    left.step(run, 1)
    assert left.left() is None, "one step has no duration"
    clock.now += 0.5
    left.step(run, 2)
    assert left.left() is None, "half a second says little"


def test_before_anything_was_scored_the_number_is_of_training_alone():
    clock = Clock()
    run = run_of("run", ("A", 100, "A"), ("B", 100, "B"))
    left = TimeLeft(Plan((run,), ""), There(), clock)
    left.stage_begins(run, run.stages[0])
    left.step(run, 1)
    clock.now += 18
    left.step(run, 10)  # 2 s a step
    estimate = left.left()
    assert estimate.seconds == pytest.approx(190 * 2)
    assert not estimate.whole
    assert estimate.text() == "about 6 min and scoring left"


def test_the_estimate_of_a_schedule_is_its_rest():
    """Two runs that share their first task; 2 s a step, 30 s a model that is scored."""
    clock = Clock()
    first = run_of("first", ("A", 11, "A"), ("B", 21, "B"))
    second = run_of("second", ("A", 11, "A"), ("C", 21, "C"))
    left = TimeLeft(Plan((first, second), ""), There(), clock)
    assert left.steps == 11 + 21 + 21
    # The starting model and the first task's: two models, 60 s. Of 11 steps 10 are timed.
    play(left, clock, first, 0, 11, 2.0, 60)
    assert left.left().seconds == pytest.approx(2 * (21 * 2 + 30))
    assert left.left().whole
    play(left, clock, first, 1, 21, 2.0, 30)
    assert left.left().seconds == pytest.approx(21 * 2 + 30)
    play(left, clock, second, 0, 0, 0.0, 0.0)
    assert left.left().seconds == pytest.approx(21 * 2 + 30)
    play(left, clock, second, 1, 21, 2.0, 30)
    assert left.left().seconds == 0
    assert left.steps == 0


def test_it_counts_down_within_a_stage():
    clock = Clock()
    run = run_of("run", ("A", 101, "A"), ("B", 101, "B"))
    left = TimeLeft(Plan((run,), ""), There(), clock)
    play(left, clock, run, 0, 101, 1.0, 40)  # two models: 20 s each
    assert left.left().seconds == pytest.approx(101 + 20)
    left.stage_begins(run, run.stages[1])
    left.step(run, 1)
    clock.now += 50
    left.step(run, 51)
    assert left.left().seconds == pytest.approx(50 + 20)
    clock.now += 50
    left.step(run, 101)
    assert left.left().seconds == pytest.approx(20)
    clock.now += 15  # scoring
    assert left.left().seconds == pytest.approx(5)
    clock.now += 500  # longer than the last time; still not negative
    assert left.left().seconds == 0


def test_methods_have_their_own_rates():
    clock = Clock()
    plain = run_of("plain", ("A", 11, "A"))
    slow = run_of("slow", ("B", 11, "B"), method=EWC(strength=1.0))
    again = run_of("slow again", ("C", 11, "C"), method=EWC(strength=1.0), seed=1)
    left = TimeLeft(Plan((plain, slow, again), ""), There(), clock)
    play(left, clock, plain, 0, 11, 1.0, 2)
    # EWC has not been seen: the best guess is what there is. Its scores: the model's, and in the
    # other seed the starting model's too.
    assert left.left().seconds == pytest.approx(22 * 1.0 + 3 * 1.0)
    play(left, clock, slow, 0, 11, 5.0, 7)
    assert left.left().seconds == pytest.approx(11 * 5.0 + 2 * 7.0)


def test_the_first_stage_says_little():
    """Its 100 s are of imports and the like; the others take 2 s."""
    clock = Clock()
    run = run_of("run", *((f"{n}", 11, f"{n}") for n in range(12)))
    left = TimeLeft(Plan((run,), ""), There(), clock)
    play(left, clock, run, 0, 11, 1.0, 100)
    assert left.left().seconds == pytest.approx(11 * (11 + 50)), "there is nothing better yet"
    play(left, clock, run, 1, 11, 1.0, 2)
    per_model = (0.9 * 0.1 * 100 + 2) / (0.9 * 0.1 * 2 + 1)
    assert left.left().seconds == pytest.approx(10 * (11 + per_model))


def test_a_machine_that_became_faster():
    """After 30 slow stages and 10 fast ones the old speed counts less than the new one."""
    clock = Clock()
    run = run_of("run", *((f"{n}", 11, f"{n}") for n in range(41)))
    left = TimeLeft(Plan((run,), ""), There(), clock)
    for number in range(40):
        play(left, clock, run, number, 11, 3.0 if number < 30 else 1.0, 0)
    weights = [0.9 ** (39 - number) * (1 if number else 0.1) for number in range(40)]
    speeds = [3.0] * 30 + [1.0] * 10
    rate = sum(w * s for w, s in zip(weights, speeds, strict=True)) / sum(weights)
    assert left.left().seconds == pytest.approx(11 * rate)
    assert rate < 2


def test_a_resumed_experiment_counts_what_is_left():
    clock = Clock()
    run = run_of("run", ("A", 50, "A"), ("B", 50, "B"), ("C", 51, "C"))
    there = There({("run", 0): ROW}, frozenset({"B"}))
    left = TimeLeft(Plan((run,), ""), there, clock)
    assert left.steps == 51
    left.stage_begins(run, run.stages[1])
    clock.now += 10
    left.stage_ends(run, run.stages[1], trained=False)
    left.stage_begins(run, run.stages[2])
    left.step(run, 31)  # from a checkpoint
    clock.now += 10
    left.step(run, 36)
    assert left.left().seconds == pytest.approx(15 * 2 + 10)


def test_what_a_failed_run_would_have_trained_falls_to_the_next():
    clock = Clock()
    first = run_of("first", ("A", 11, "A"), ("B", 1000, "B"))
    second = run_of("second", ("A", 11, "A"), ("C", 21, "C"))
    left = TimeLeft(Plan((first, second), ""), There(), clock)
    assert left.steps == 11 + 1000 + 21
    left.stage_begins(first, first.stages[0])
    left.step(first, 1)
    left.run_failed(first)
    assert left.steps == 11 + 21
    play(left, clock, second, 0, 11, 1.0, 6)
    assert left.left().seconds == pytest.approx(21 + 3)


def at_a_time(left, clock, runs, number, steps, per_step, rest):
    """The same stage of several runs at the same time, each as in ``play``."""
    for run in runs:
        left.stage_begins(run, run.stages[number])
    for step in range(1, steps + 1):
        for run in runs:
            left.step(run, step)
        clock.now += per_step * (step < steps)
    clock.now += rest
    for run in runs:
        left.stage_ends(run, run.stages[number], trained=True)


def test_several_runs_at_a_time_share_what_is_left():
    """Six runs of two stages, 20 s of steps and 5 s of scores each, three at a time."""
    clock = Clock()
    runs = [
        run_of(f"run{n}", (f"A{n}", 11, f"A{n}"), (f"B{n}", 11, f"B{n}"), seed=n) for n in range(6)
    ]
    left = TimeLeft(Plan(tuple(runs), ""), There(), clock)
    at_a_time(left, clock, runs[:3], 0, 11, 2.0, 10)  # two models each: 5 s a model
    at_a_time(left, clock, runs[:3], 1, 11, 2.0, 5)
    # Three runs are left, of 22 steps and three models each, and three can run at a time.
    assert left.left().seconds == pytest.approx(22 * 2 + 3 * 5)


def test_no_run_takes_less_than_its_own_time():
    clock = Clock()
    short = [run_of(f"short{n}", (f"A{n}", 11, f"A{n}"), seed=n) for n in range(4)]
    stages = [(f"L{n}", 11, f"L{n}") for n in range(10)]
    long = run_of("long", *stages, seed=9)
    left = TimeLeft(Plan((*short, long), ""), There(), clock)
    at_a_time(left, clock, short, 0, 11, 1.0, 4)
    # 110 steps and eleven models at 2 s, one after another: a second process is of no help.
    assert left.left().seconds == pytest.approx(110 + 11 * 2)


def test_it_counts_down_while_several_run():
    clock = Clock()
    runs = [
        run_of(f"run{n}", (f"A{n}", 101, f"A{n}"), (f"B{n}", 101, f"B{n}"), seed=n)
        for n in range(2)
    ]
    left = TimeLeft(Plan(tuple(runs), ""), There(), clock)
    at_a_time(left, clock, runs, 0, 101, 1.0, 40)
    for run in runs:
        left.stage_begins(run, run.stages[1])
        left.step(run, 1)
        clock.now += 25
    left.step(runs[0], 51)
    left.step(runs[1], 26)
    # 101 steps of 1 s and a model of 20 s each, less 51 and 26 steps: the second takes longest.
    assert left.left().seconds == pytest.approx(101 - 26 + 20)


def test_what_another_run_trained_in_the_meantime_is_not_left():
    clock = Clock()
    first = run_of("first", ("A", 11, "A"), ("B", 21, "B"))
    second = run_of("second", ("A", 11, "A"), ("C", 31, "C"))
    left = TimeLeft(Plan((first, second), ""), There(), clock)
    assert left.steps == 11 + 21 + 31
    play(left, clock, second, 0, 11, 1.0, 2)
    assert left.steps == 21 + 31


def test_a_run_whose_process_was_lost_begins_its_stage_again():
    clock = Clock()
    run = run_of("run", ("A", 11, "A"), ("B", 101, "B"))
    left = TimeLeft(Plan((run,), ""), There(), clock)
    play(left, clock, run, 0, 11, 1.0, 40)
    left.stage_begins(run, run.stages[1])
    left.step(run, 1)
    clock.now += 50
    left.step(run, 51)
    left.run_stops(run)
    assert left.left().seconds == pytest.approx(101 + 20)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (99.4, "99 s"),
        (100, "2 min"),
        (99 * 60, "99 min"),
        (6000, "1 h 40 min"),
        (47.99 * 3600, "47 h 59 min"),
        (100 * 3600, "4 d 4 h"),
    ],
)
def test_durations_are_no_more_exact_than_an_estimate(seconds, text):
    assert duration_text(seconds) == text


def test_clock():
    assert [clock_text(s) for s in (0, 8.9, 61, 3599, 3661)] == [
        "0:00", "0:08", "1:01", "59:59", "1:01:01",
    ]  # fmt: skip
