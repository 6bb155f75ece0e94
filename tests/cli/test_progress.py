"""What a person sees while an experiment runs: real commands in real pseudo-terminals."""

import io
import json
import math
import re
import shlex
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from stockpot.cli.app import app
from stockpot.cli.progress import LineObserver
from stockpot.cli.progress_state import History, Progress
from stockpot.cli.progress_view import ProgressView, sparkline
from stockpot.experiment.observer import Row, There
from stockpot.experiment.plan import Plan, Run, Stage
from stockpot.methods.multitask import Multitask
from stockpot.methods.sequential import Sequential
from stockpot.methods.sfa import SFA
from support.experiments import lines, run_and_kill, run_file, write_experiment
from support.terminal import Terminal

METHODS = "[sequential, {name: sfa, p: 0.25, beta: 0.5}]"
# 1,500 steps a task, 60 runs: long enough to be watched, and never at its end meanwhile.
LONG = ("training.epochs=500", f"seeds={list(range(30))}")
CURSOR_MOVES = re.compile(rb"\x1b\[\d*[A-HJKST]|\x1b\[\?25|\r(?!\n)")
COLOURS = re.compile(rb"\x1b\[[\d;]*\b(3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")


@pytest.fixture
def path(tmp_path):
    return write_experiment(tmp_path, METHODS, name="Three pairs of digits", seeds="[0, 1]")


@pytest.fixture
def terminal():
    opened = []

    def open_(columns, lines, *words, **options):
        opened.append(Terminal(columns, lines, words, **options))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def seen_in_the_middle(text):
    """The second setting trains its second task or later, and there is a loss."""
    return "sfa" in text and re.search(r"task [23] of 3: [24]-[35]", text) and "loss" in text


def check_clean_after_ctrl_c(terminal):
    terminal.type(b"\x03")
    assert terminal.wait_for_the_end() == 130
    assert not terminal.screen.cursor.hidden
    assert "samecommandgoeson" in "".join(terminal.text.split())
    for left_over in ("loss", "task", "━", "so far", "runs", "Traceback"):
        assert left_over not in terminal.text


def test_at_80_by_24(terminal, path, tmp_path):
    window = terminal(80, 24, "run", path, *LONG, "-o", tmp_path / "out")
    text = window.wait_for(lambda text: seen_in_the_middle(text) and " left" in text)
    assert "Three pairs of digits" in text
    assert re.search(r"\d+ of 60 runs done", text)
    assert re.search(r"0:\d\d so far, about \d+ (s|min) left", text)
    assert re.search(r"sfa p=0.25 beta=0.5, seed \d", text)
    assert re.search(r"[\d,]+ of 1,500 steps", text) or "scoring" in text
    assert re.search(r"loss \d\.?\d* [▁▂▃▄▅▆▇█]+", text)
    assert re.search(r"^1 0-1 +\d+\.\d", text, re.MULTILINE), "the score of the first task"
    assert re.search(r"^sequential +\d of 30 +\d+\.\d ", text, re.MULTILINE), "the first result"
    assert window.screen.cursor.hidden
    assert COLOURS.search(window.written)
    check_clean_after_ctrl_c(window)


def test_at_40_by_10(terminal, path, tmp_path):
    window = terminal(40, 10, "run", path, *LONG, "-o", tmp_path / "out")
    text = window.wait_for(
        lambda text: seen_in_the_middle(text) and " left" in text and "best" in text
    )
    shown = text.splitlines()
    assert len(shown) <= 10
    first = next(n for n, line in enumerate(shown) if line.startswith("Three pairs"))
    assert re.fullmatch(r"\d+/60 runs +\d+ (s|min) left", shown[first + 1])
    assert shown[first + 2].startswith("sfa p=0.25 beta=0.5, seed")
    assert re.match(r"task [23] of 3: ", shown[first + 3])
    assert "/1,500" in shown[first + 4] or "scoring" in shown[first + 4]
    assert shown[first + 5].startswith("loss ")
    assert re.match(r"scores  0-1 \d+\.\d", shown[first + 6])
    assert shown[first + 7].startswith("best so far")
    assert re.search(r"(sequential|sfa p=0.25 beta=0.5) +\d+\.\d$", text, re.MULTILINE)
    assert all(len(line) < 40 for line in shown[first:])
    check_clean_after_ctrl_c(window)


def test_at_200_by_50_and_resized_on_the_way(terminal, path, tmp_path):
    window = terminal(200, 50, "run", path, *LONG, "-o", tmp_path / "out")
    text = window.wait_for(lambda text: seen_in_the_middle(text) and "merge" in text)
    for part in ("so far, about", "accuracy, %  this run", "after", "best so far"):
        assert part in text
    assert "from L2" in text
    for columns, height, reflow in (
        (120, 40, True), (60, 35, True), (60, 16, False), (40, 10, False), (100, 30, False),
    ):  # fmt: skip
        window.resize(columns, height, reflow)
        time.sleep(0.6)  # until it has been drawn anew
        text = window.wait_for(lambda text: "seed" in text and "left" in text)
        assert text.count("Three pairs of digits") == 1, f"twice on the screen:\n{text}"
        assert len(re.findall(r"60 runs", text)) == 1
        view = text[text.index("Three pairs") :].splitlines()
        assert len(view) < height
        assert all(len(line) < columns for line in view)
    check_clean_after_ctrl_c(window)


def test_a_terminal_that_takes_no_output_does_not_stop_the_experiment(terminal, path, tmp_path):
    window = terminal(80, 24, "run", path, *LONG, "-o", tmp_path / "out")
    window.wait_for(lambda text: "task 2 of 3" in text)
    window.type(b"\x13")  # Ctrl-S
    time.sleep(0.6)  # the next frame is held up
    held, stages = len(window.written), tmp_path / "out" / "stages.jsonl"
    begun = len(lines(stages))
    deadline = time.monotonic() + 60
    while len(lines(stages)) < begun + 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(lines(stages)) >= begun + 3
    window.type(b"\x11")  # Ctrl-Q
    window.wait_for(lambda text: len(window.written) > held and "runs done" in text)
    check_clean_after_ctrl_c(window)


def test_the_end_without_colours(terminal, path, tmp_path):
    out = tmp_path / "out"
    window = terminal(300, 40, "run", path, "-o", out, env={"NO_COLOR": "1"})
    assert window.wait_for_the_end() == 0
    shown = window.text.splitlines()
    report = f"Report: {out / 'report.html'}"
    assert report in shown
    at = shown.index(report)
    assert "Without old data" in " ".join(shown[:at])
    assert any("average" in line for line in shown[:at])
    (below,) = shown[at + 1 :]
    assert below == f"Task by task: stockpot compare {out}:sequential {out}:sfa-p0.25-beta0.5"
    words = shlex.split(below.removeprefix("Task by task: stockpot "))
    compared = CliRunner().invoke(app, words)
    assert compared.exit_code == 0, compared.output
    for task in ("0-1", "2-3", "4-5"):
        assert task in compared.output
    for left_over in ("━", "so far", "loss ", "runs done"):
        assert left_over not in window.text
    assert not window.screen.cursor.hidden
    assert CURSOR_MOVES.search(window.written), "there was a live view"
    assert f"file://{out / 'report.html'}".encode() in window.written, "the path can be clicked"
    assert not COLOURS.search(window.written)


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"CI": "true"}])
def test_plain_lines_where_nobody_could_watch(terminal, path, tmp_path, env):
    window = terminal(100, 40, "run", path, "-o", tmp_path / "out", env=env)
    assert window.wait_for_the_end() == 0
    assert not CURSOR_MOVES.search(window.written)
    assert re.search(r"\[4/4\] sfa-\S+-seed1: average \d+\.\d %  \(\d+\.\d s\)", window.text)


def test_json_alone_on_stdout(terminal, path, tmp_path):
    stdout = tmp_path / "stdout"
    window = terminal(80, 24, "run", path, "--json", "-o", tmp_path / "out", stdout=stdout)
    assert window.wait_for_the_end() == 0
    summary = json.loads(stdout.read_text())
    assert {run["label"] for run in summary} == {"sequential", "sfa p=0.25 beta=0.5"}
    assert CURSOR_MOVES.search(window.written), "the live view went to the terminal"
    assert "average" not in window.text


# Without a terminal.


def two_runs(steps=50):
    """A plan of two methods on two tasks, one seed, that share nothing."""
    runs = []
    for method in (Sequential(), SFA(p=0.25)):
        keys = [f"{method.name}{task}" for task in (0, 1)]
        stages = tuple(Stage(n, (n,), n, steps, "", key, key) for n, key in enumerate(keys))
        runs.append(Run(f"{method.name}-seed0", method, 0, stages))
    return Plan(tuple(runs), "")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_lines_of_a_long_run_and_no_control_characters():
    clock, out = Clock(), io.StringIO()
    observer = LineObserver(Console(file=out, width=40), "An \x1b[31mexperiment\n", clock)
    plan, names = two_runs(), ("first", "se\x07cond")
    observer.experiment_begins(plan, names, There())
    for run in plan.runs:
        observer.run_begins(run, 0)
        for stage in run.stages:
            observer.stage_begins(run, stage, [])
            for step in range(1, stage.steps + 1):
                clock.now += 1
                observer.step(run, step, 0.25 if step % 5 == 0 else None)
            clock.now += 10
            observer.scoring(run, "first", 50, 100)
            observer.stage_ends(run, stage, True, Row(dict.fromkeys(names, 0.5), "loss", "lower"))
        observer.run_ends(run)
    observer.close()
    text = out.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    lines = text.splitlines()
    assert lines[0] == "An  [31mexperiment : 2 runs over 2 tasks, 200 optimizer steps to train"
    # The first line that can say more: steps take 1 s, 190 of 200 are left, nothing was scored.
    assert lines[1] == (
        "sequential-seed0, task 1 of 2 (first): step 10 of 50, loss 0.25, "
        "about 3 min and scoring left"
    )
    (done,) = (line for line in lines if line.startswith("[1/2]"))
    # Two stages of 49 timed steps at 1 s; the rest, 1 s and 10 s each, is three scored models.
    left = 100 + 2 * 22 / 3
    assert done == (
        f"[1/2] sequential-seed0: average 0.500 nats  (120.0 s, about {round(left / 60)} min left)"
    )
    assert lines[-1] == "[2/2] sfa-seed0: average 0.500 nats  (120.0 s)"
    waits = len(lines) - 3
    assert 240 / 11 <= waits <= 240 / 5, "a line every few seconds"


class Recorder(Progress):
    """Remembers what was to be trained when the experiment began."""

    def experiment_begins(self, plan, task_names, there):
        super().experiment_begins(plan, task_names, there)
        self.steps_at_first = self.time_left.steps
        self.found = dict(there.rows)


def test_a_resumed_experiment_knows_what_was_done(tmp_path):
    path = write_experiment(tmp_path, "[sequential, sfa, l2]", seeds="[0, 1]")
    out = tmp_path / "out"
    # Stage 2 comes first in the first run; that run, and the second's first stages, are shared.
    run_and_kill(path, out, stage=2, step=3)
    before = lines(out / "stages.jsonl")
    assert [line["stage"] for line in before] == [0, 1]
    progress = Recorder("x")
    outcome = run_file(path, out, observer=progress)
    assert set(progress.found) == {(line["run"], line["stage"]) for line in before}
    trained = sum(line["steps"] for line in lines(out / "stages.jsonl")[2:] if line["trained_here"])
    assert progress.steps_at_first == trained
    assert progress.time_left.steps == 0
    assert progress.time_left.left().seconds == 0

    again = Recorder("x")
    run_file(path, out, observer=again)
    assert again.steps_at_first == 0
    for one in (progress, again):
        for label, setting in one.settings.items():
            runs = [run for run in outcome.summary if run["label"] == label]
            averages = [run["metrics"]["average"] for run in runs]
            assert setting.averages == pytest.approx(averages, abs=1e-12)
            assert setting.forgotten == pytest.approx(
                [run["metrics"]["forgetting"] for run in runs], abs=1e-12
            )
            assert setting.planned == 2
        assert len(one.settings) == 3


# The view's parts.


def watched(tasks, trained, joint=False, seeds=1):
    """A run in its middle: ``trained`` tasks are done, the next one is at step 5 of 10."""
    progress = Progress("An experiment", Clock())
    method = Multitask() if joint else Sequential()
    runs = []
    for seed in range(seeds):
        stages = tuple(
            Stage(n, (n,), n, 10, "", f"{seed}-{n}", f"{seed}-{n}") for n in range(len(tasks))
        )
        if joint:
            every = tuple(range(len(tasks)))
            stages = (Stage(0, every, len(tasks) - 1, 10, "", "joint", "joint"),)
        runs.append(Run(f"run-{seed}", method, seed, stages))
    progress.experiment_begins(Plan(tuple(runs), ""), tuple(tasks), There())
    scores = np.random.default_rng(0).random((len(tasks), len(tasks)))
    for number, run in enumerate(runs):
        last = number == len(runs) - 1
        progress.run_begins(run, 0)
        for stage in run.stages:
            progress.stage_begins(run, stage, [{"distance_before": 2.0, "distance_after": 1.0}])
            for step in (1, 3, 5):
                progress.step(run, step, 1 / step)
            if last and stage.row >= trained:
                return progress, scores
            row = Row(dict(zip(tasks, scores[stage.row], strict=True)), "accuracy", "higher")
            progress.stage_ends(run, stage, True, row)
        progress.run_ends(run)
    return progress, scores


def drawn(progress, width, height, encoding="utf-8"):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    console = Console(file=out, width=width, height=height, force_terminal=True, no_color=True)
    console.print(ProgressView(progress))
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    return re.sub(r"\x1b\[[\d;]*m", "", text).removesuffix("\n\n").split("\n")


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 220),
    height=st.integers(1, 60),
    names=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=25, unique=True),
    done=st.floats(0, 1),
    joint=st.booleans(),
)
def test_the_view_fits_any_terminal(width, height, names, done, joint):
    progress, _ = watched(names, int(done * (len(names) - 1)), joint and len(names) > 1, seeds=2)
    lines = drawn(progress, width, height)
    assert len(lines) <= max(1, height - 1)
    for line in lines:
        assert cell_len(line) <= max(1, width - 1)
        assert line.isprintable()


def test_a_terminal_without_unicode_gets_ascii():
    progress, _ = watched(["größe", "zwei"], 1)
    text = "\n".join(drawn(progress, 80, 24, "ascii"))
    assert text.isascii()
    assert "\\" not in text, "what cannot be written is not spelt out"
    assert "task 2 of 2: zwei" in text


# Several runs at a time.


def several(names, at_work, finished=2, clock=None):
    """Runs of five settings that go on at a time: those of even numbers have a loss."""
    progress = Progress("An experiment", clock or Clock())
    runs = []
    for number in range(finished + at_work):
        keys = [f"{number}-{task}" for task in range(len(names))]
        stages = tuple(Stage(n, (n,), n, 10, "", key, key) for n, key in enumerate(keys))
        method = SFA(p=(1 + number % 5) / 10, beta=0.5)
        runs.append(Run(f"run-{number}", method, number // 5, stages))
    progress.experiment_begins(Plan(tuple(runs), ""), tuple(names), There())
    row = Row(dict.fromkeys(names, 0.5), "accuracy", "higher")
    for run in runs:
        progress.run_begins(run, 0)
        progress.stage_begins(run, run.stages[0], [])
    for run in runs[:finished]:
        for stage in run.stages:
            progress.stage_begins(run, stage, [])
            progress.stage_ends(run, stage, True, row)
        progress.run_ends(run)
    for number, run in enumerate(runs[finished:]):
        if number % 2 == 0:
            progress.step(run, 1 + number % 9, 0.25)
    return progress, runs


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 220),
    height=st.integers(1, 60),
    names=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=9, unique=True),
    at_work=st.integers(0, 40),
    finished=st.integers(0, 12),
)
def test_the_view_of_several_runs_fits_any_terminal(width, height, names, at_work, finished):
    progress, _ = several(names, at_work, finished)
    lines = drawn(progress, width, height)
    assert len(lines) <= max(1, height - 1)
    for line in lines:
        assert cell_len(line) <= max(1, width - 1)
        assert line.isprintable()


def test_each_run_has_a_line_with_its_own_numbers():
    progress, _ = several(["one", "two"], 4)
    lines = drawn(progress, 80, 24)
    assert re.fullmatch(r"An experiment +2 of 6 runs done, 4 running", lines[0])
    expected = {
        "sfa p=0.3 beta=0.5, seed 0": "10 %  loss 0.25",
        "sfa p=0.4 beta=0.5, seed 0": "0 %  starting",
        "sfa p=0.5 beta=0.5, seed 0": "30 %  loss 0.25",
        "sfa p=0.1 beta=0.5, seed 1": "0 %  starting",
    }
    shown = [line for line in lines if re.search(r", seed \d +1/2 one ", line)]
    assert len(shown) == 4
    for line, (name, numbers) in zip(shown, expected.items(), strict=True):
        assert line.startswith(name)
        assert line.rstrip().endswith(f" {numbers}")
    assert len({line.index("%") for line in shown}) == 1, "one below the other"
    assert any(line.startswith("sfa p=0.2 beta=0.5 ") and "1 of 1" in line for line in lines)


def test_of_many_runs_some_are_shown_and_the_others_counted():
    progress, _ = several(["one", "two"], 40)
    lines = drawn(progress, 80, 24)
    shown = sum(", seed" in line for line in lines)
    assert f"and {40 - shown} more running" in lines
    assert shown >= 8
    tall = drawn(progress, 80, 60)
    assert sum(", seed" in line for line in tall) == 40


def test_a_run_that_waits_for_another_has_no_line_until_it_goes_on():
    progress, runs = several(["one", "two"], 2)
    row = Row({"one": 0.5, "two": 0.5}, "accuracy", "higher")
    waits = runs[2]
    progress.stage_ends(waits, waits.stages[0], True, row)
    assert sum(", seed" in line for line in drawn(progress, 80, 24)) == 1
    progress.run_begins(waits, 1)
    progress.stage_begins(waits, waits.stages[1], [])
    assert sum(", seed" in line for line in drawn(progress, 80, 24)) == 2
    progress.step(waits, 10, 0.1)
    # Of four runs two are done, one is at its end, and one has done nothing.
    assert progress.share_done() == pytest.approx((2 + 1 + 0 / 20) / 4)


def test_lines_of_several_runs_are_of_one_run_each():
    clock, out = Clock(), io.StringIO()
    observer = LineObserver(Console(file=out, width=40), "x", clock)
    plan = two_runs()
    observer.experiment_begins(plan, ("first", "second"), There())
    one, other = plan.runs
    for run in plan.runs:
        observer.run_begins(run, 0)
    rows = {one.id: Row({"first": 0.25, "second": 0.25}, "accuracy", "higher")}
    rows[other.id] = Row({"first": 0.75, "second": 0.75}, "accuracy", "higher")
    for stages in zip(one.stages, other.stages, strict=True):
        for run, stage in zip(plan.runs, stages, strict=True):
            observer.stage_begins(run, stage, [])
        for step in range(1, 51):
            clock.now += 1
            observer.step(one, step, 1.0)
            observer.step(other, max(1, step // 2), 2.0)
        for run, stage in zip(plan.runs, stages, strict=True):
            observer.stage_ends(run, stage, True, rows[run.id])
    for run in plan.runs:
        observer.run_ends(run)
    said = out.getvalue().splitlines()
    of_one = [line for line in said if line.startswith("sequential-seed0, task")]
    of_other = [line for line in said if line.startswith("sfa-seed0, task")]
    assert min(len(of_one), len(of_other)) >= 5, "in turn"
    for lines_, loss in ((of_one, "loss 1"), (of_other, "loss 2")):
        assert all(loss in line for line in lines_)
    assert max(int(re.search(r"step (\d+) of 50", line)[1]) for line in of_one) > 25
    assert max(int(re.search(r"step (\d+) of 50", line)[1]) for line in of_other) <= 25
    assert "[1/2] sequential-seed0: average 25.0 %  (100.0 s)" in said[-2].replace(
        ", about 1 s left", ""
    )
    assert said[-1] == "[2/2] sfa-seed0: average 75.0 %  (100.0 s)"


def test_two_at_a_time_in_a_terminal(terminal, path, tmp_path):
    window = terminal(80, 24, "run", path, "--jobs", 2, *LONG, "-o", tmp_path / "out")
    text = window.wait_for(
        lambda text: "2 running" in text and "best so far" in text and " left" in text
    )
    running = re.findall(r"^(?:sequential|sfa p=0.25 beta=0.5), seed \d+ +\d/3 \d-\d", text, re.M)
    assert len(running) == len(set(running)) == 2
    assert re.search(r"\d+ of 60 runs done, 2 running", text)
    window.resize(40, 10)
    text = window.wait_for(lambda text: re.search(r"\d+/60 runs, 2 running", text))
    assert all(len(line) < 40 for line in text.splitlines()[-8:])
    window.resize(80, 24)
    check_clean_after_ctrl_c(window)


def test_few_tasks_are_shown_as_a_triangle():
    progress, R = watched(["one", "two", "three", "four"], 3)
    lines = drawn(progress, 80, 40)
    at = next(n for n, line in enumerate(lines) if line.startswith("after"))
    assert lines[at].split() == ["after", "1", "2", "3", "4"]
    for task in range(3):
        shown = [float(cell) for cell in lines[at + 1 + task].split()[2:]]
        np.testing.assert_allclose(shown, 100 * R[task:3, task], atol=0.0501)
    assert lines[at + 4].split() == ["4", "four"]


def test_many_tasks_are_shown_by_what_fits():
    progress, R = watched([f"task-{n}" for n in range(20)], 12)
    text = "\n".join(drawn(progress, 80, 24))
    (mean,) = re.findall(r"mean of 12 tasks +(\S+)", text)
    assert float(mean) == pytest.approx(100 * R[11, :12].mean(), abs=0.0501)
    (newest,) = re.findall(r"newest: task-11 +(\S+)", text)
    assert float(newest) == pytest.approx(100 * R[11, 11], abs=0.0501)
    (lost,) = re.findall(r"forgotten on average +(\S+)", text)
    before, now = (np.mean([R[i, i] - R[last, i] for i in range(last)]) * 100 for last in (10, 11))
    assert float(lost) == pytest.approx(now, abs=0.0501)
    assert f"{'up' if now > before else 'down'} from {before:.1f}" in text
    (each,) = re.findall(r"each task now +(\S+)", text)
    assert len(each) == 12
    assert "▁▂▃▄▅▆▇█".index(each[3]) == round(7 * R[11, 3])
    wide = drawn(progress, 200, 60)
    assert any(line.startswith("20 task-19") for line in wide), "all of them where there is room"


def test_a_high_narrow_terminal_shows_when_learned_and_the_latest():
    progress, R = watched([f"task-{n}" for n in range(20)], 12)
    lines = drawn(progress, 60, 60)
    at = next(n for n, line in enumerate(lines) if "learned" in line)
    after = [int(cell) for cell in lines[at].split()[1:]]
    assert after == list(range(after[0], 13))
    assert len(after) >= 4
    for task in range(12):
        cells = [float(cell) / 100 for cell in lines[at + 1 + task].split()[2:]]
        rows = range(max(task, after[0] - 1), 12)
        np.testing.assert_allclose(cells, [R[task, task], *R[rows, task]], atol=0.000501)


def test_losses_are_forgotten_when_they_rise():
    progress = Progress("x", Clock())
    plan = two_runs()
    progress.experiment_begins(plan, ("a", "b"), There())
    run = plan.runs[0]
    progress.run_begins(run, 0)
    for stage, losses in zip(run.stages, ((1.0, 3.0), (1.75, 2.0)), strict=True):
        progress.stage_begins(run, stage, [])
        row = Row(dict(zip("ab", losses, strict=True)), "loss", "lower")
        progress.stage_ends(run, stage, True, row)
    progress.run_ends(run)
    assert progress.settings["sequential"].forgotten == [0.75]
    assert re.search(
        r"^sequential +1 of 1 +1\.875 +0\.750$", "\n".join(drawn(progress, 80, 24)), re.M
    )


def test_settings_are_ranked_with_their_seeds():
    """Lower is better for losses; the interval is Student's."""
    from scipy import stats

    progress = Progress("x", Clock())
    stage = Stage(0, (0,), 0, 1, "", "a", "a")
    values = {"sequential": [2.0, 2.5, 2.4], "sfa": [1.0, 1.5]}
    methods = {"sequential": Sequential(), "sfa": SFA(p=0.25, beta=0.5)}
    runs = [
        (Run(f"{name}{seed}", methods[name], seed, (stage,)), value)
        for name, own in values.items()
        for seed, value in enumerate(own)
    ]
    progress.experiment_begins(Plan(tuple(run for run, _ in runs), ""), ("only",), There())
    for run, value in runs:
        progress.run_begins(run, 0)
        progress.stage_begins(run, stage, [])
        progress.stage_ends(run, stage, True, Row({"only": value}, "loss", "lower"))
        progress.run_ends(run)
    first, second = progress.ranked()
    assert (first.label, second.label) == ("sfa p=0.25 beta=0.5", "sequential")
    low, high = stats.t.interval(
        0.95, 2, loc=np.mean(values["sequential"]), scale=stats.sem(values["sequential"])
    )
    assert second.average.mean == pytest.approx((low + high) / 2)
    assert second.average.half_width == pytest.approx((high - low) / 2)
    text = "\n".join(drawn(progress, 80, 24))
    assert re.search(r"^sfa p=0.25 beta=0.5 +2 of 2 +1\.250 ±", text, re.MULTILINE)
    assert text.index("sfa") < text.index("sequential")


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=4, max_size=4),
    st.sampled_from([1, -1]),
)
def test_history_against_numpy(rows, sign):
    history = History("x", 0, False, dict(enumerate(rows)))
    R = np.array(rows)
    np.testing.assert_allclose(history.mean_so_far(), [R[t, : t + 1].mean() for t in range(4)])
    expected = [np.mean(sign * (np.diag(R)[:t] - R[t, :t])) for t in range(1, 4)]
    np.testing.assert_allclose(history.forgotten_so_far(sign), expected, atol=1e-12)


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([3.0, 3.0], 5) == "▁▁"
    assert sparkline([0.5], 5, 0, 1) in "▄▅"
    assert sparkline([math.nan, 1, math.inf, 2], 9) == "▁█"
    assert sparkline([], 5) == sparkline([1, 2], 0) == ""
