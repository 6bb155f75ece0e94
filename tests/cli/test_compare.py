"""`stockpot compare` as its users meet it: output, Markdown, JSON and exit codes."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from stockpot.cli.app import app
from support.experiments import run_file, write_experiment
from support.text import write_model, write_tasks

ENVIRONMENT = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}


def stockpot(*words, **more):
    return subprocess.run(
        [sys.executable, "-m", "stockpot", "compare", *map(str, words)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
        **more,
    )


def compare(*words):
    """In this process, for what needs no process of its own."""
    return CliRunner().invoke(app, ["compare", *map(str, words)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    path = write_experiment(folder, "[sequential, {name: sfa, p: 0.5}]", seeds="[0, 1]")
    run_file(path, folder / "digits")
    return folder / "digits"


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "digits")


def set_items(folder, **tables):
    """Items of sequential-seed0 before and after its last task: (lost, won, n) of each task."""
    run = folder / "runs" / "sequential-seed0" / "items"
    for place, stage in enumerate(("stage-0001", "stage-0002")):
        tensors = load_file(run / f"{stage}.safetensors")
        for task, (lost, won, n) in tables.items():
            right = [1] * lost + [0] * won if place == 0 else [0] * lost + [1] * won
            right += [1] * (n - lost - won)
            tensors[f"{task[1:].replace('_', '-')}/accuracy"] = np.array(right, np.float32)
        save_file(tensors, run / f"{stage}.safetensors")
    return f"{folder}/runs/sequential-seed0@1", f"{folder}/runs/sequential-seed0"


def test_the_table_is_all_that_stands_on_stdout(folder):
    sides = set_items(folder, t0_1=(60, 10, 200), t2_3=(0, 0, 1000), t4_5=(2, 0, 20))
    result = stockpot(*sides)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    numbers = next(line for line in lines if line[:1] == ["0-1"])
    assert numbers[1:5] == ["200", "95.0", "70.0", "25.0"]
    assert numbers[-1] == "forgotten"
    assert "2-3" in result.stdout
    assert next(line for line in lines if line[:1] == ["2-3"])[-3:] == ["no", "change", "seen"]
    assert next(line for line in lines if line[:1] == ["4-5"])[-3:] == ["too", "few", "items"]
    assert "1 of 3 tasks was forgotten: 0-1 (25.0 points)." in result.stdout
    assert "p is corrected for 3 tests (Holm)" in result.stdout


@pytest.mark.parametrize(
    ("tables", "words", "code", "said"),
    [
        ({"t0_1": (60, 10, 200)}, [], 1, "Failed: 0-1 (25.0 points) is forgotten by more than"),
        ({"t0_1": (60, 10, 200)}, ["--strict"], 1, "Failed"),
        ({"t0_1": (2, 0, 20)}, [], 3, "but 20 items cannot tell this from the limit (about"),
        ({"t0_1": (1, 0, 200)}, [], 0, "Passed: every measured drop is within the limit of 2.0"),
        ({"t0_1": (1, 0, 200)}, ["--strict"], 3, "may have dropped by as much as"),
        ({"t0_1": (1, 0, 2000)}, ["--strict"], 0, "Passed: the interval of every drop ends within"),
        ({"t0_1": (0, 50, 200)}, ["--strict"], 0, "Passed"),
    ],
)
def test_the_exit_code_says_what_became_of_the_limit(folder, tables, words, code, said):
    others = dict.fromkeys(("t2_3", "t4_5"), (0, 0, 2000))
    sides = set_items(folder, **others, **tables)
    result = compare(*sides, "--max-forgetting", 0.02, *words)
    assert (result.exit_code, result.stderr) == (code, "")
    assert said in " ".join(result.stdout.split())


def test_ten_points_of_twenty_items_fail_nothing_in_a_real_process(folder):
    sides = set_items(folder, t0_1=(2, 0, 20), t2_3=(3, 1, 20), t4_5=(11, 9, 20))
    result = stockpot(*sides, "--max-forgetting", "0", "--json")
    said = json.loads(result.stdout)
    assert result.returncode == said["exit_code"] == 3
    assert {task["verdict"] for task in said["comparisons"][0]["tasks"]} == {"too few items"}
    assert all(task["drop"] == pytest.approx(0.1) for task in said["comparisons"][0]["tasks"])
    assert said["limit"]["outcome"] == "undecided"


def test_json_has_what_the_table_has(finished):
    result = compare(f"{finished}:sequential", f"{finished}:sfa", "--json")
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert set(said) == {
        *("before", "after", "verdict", "summary", "alpha", "tests", "limit", "exit_code"),
        *("comparisons", "notes"),
    }
    (comparison,) = said["comparisons"]
    assert (comparison["seeds"], said["tests"], said["limit"]) == ([0, 1], 3, None)
    for task in comparison["tasks"]:
        assert task["interval"][0] <= task["drop"] <= task["interval"][1]
        assert task["p"] <= task["p_corrected"] <= 1
        assert task["before"] - task["after"] == pytest.approx(task["drop"])
        assert set(task["drop_by_seed"]) == {"0", "1"}


def test_a_whole_experiment_is_shown_setting_by_setting(finished):
    result = compare(f"{finished}@start", finished, "--markdown")
    assert result.exit_code == 0
    assert re.findall(r"^#### (.*)", result.stdout, re.M) == [
        "sequential",
        "sfa-p0.5-beta0.5",
    ]
    assert "corrected for 6 tests" in result.stdout


# Markdown.


def test_markdown_alone_is_printed(folder):
    sides = set_items(folder, t0_1=(60, 10, 200))
    for words in (["--markdown"], ["--markdown", "-"], ["--markdown", "--max-forgetting", "0.02"]):
        result = compare(*sides, *words)
        assert result.stdout.startswith("### sequential-seed0, after 2-3 → sequential-seed0, after")
        assert "**forgotten**" in result.stdout
    assert "**Failed: 0-1 (25.0 points) is forgotten" in result.stdout
    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert len({line.count("|") for line in table}) == 1


def test_markdown_is_written_beside_the_table(folder, tmp_path):
    sides = set_items(folder, t0_1=(60, 10, 200))
    result = compare(*sides, "--markdown", tmp_path / "pr.md")
    assert "forgotten" in result.stdout
    assert not result.stdout.startswith("#")
    assert (tmp_path / "pr.md").read_text() == compare(*sides, "--markdown").stdout


def test_what_a_model_wrote_cannot_break_the_markdown(folder):
    sides = set_items(folder, t0_1=(60, 10, 200))
    wild = "</pre></details>\n\n# | `a` <script>alert(1)</script> *b*"
    for stage in ("stage-0001", "stage-0002"):
        text = json.dumps({"task": "0-1", "score": "accuracy", "answer": wild})
        path = folder / "runs" / "sequential-seed0" / "items" / f"{stage}.jsonl"
        path.write_text(f"{text}\n" * 200)
    page = compare(*sides, "--markdown").stdout
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert page.count("</details>") == page.count("<details>") == 1
    assert page.count("<pre>") == page.count("</pre>") == 12
    assert re.search(r"\*\*0-1 accuracy, item 0, lost\*\* \(1 → 0\)\n\nbefore:\n\n<pre>", page)


# What is wrong.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{f}:sfa@start", "{f}:sfa", "--strict"], "give --max-forgetting, too"),
        (["{f}:sfa@start", "{f}:sfa", "--max-forgetting", "2"], "2 points are 0.02"),
        (["{f}:sfa@start", "{f}:sfa", "--max-forgetting", "-1"], "give a number from 0"),
        (["{f}:sfa@start", "{f}:sfa", "--max-forgetting", "nan"], "give a number from 0"),
        (["{f}:sfa@start", "{f}:sfa", "--limit", "3"], "--limit: is for two models"),
        (["{f}:sfa@start", "{f}:sfa", "--run-programs"], "--run-programs: is for two models"),
        (["{f}:sfa@start", "{f}:sfa", "--markdown", "--json"], "both print on stdout"),
        (["{f}:sfa@start", "{f}:sfa", "--markdown", ""], "the file's name is empty"),
        (["{f}:sfa@start", "{f}:sfa", "--markdown", "{f}"], "is a folder; give a file"),
        (["{f}:sfa@start", "{f}:sfa", "--markdown", "{f}/no/x.md"], "there is no folder"),
        (["a", "b", "--task", "x.jsonl", "--markdown", "no/x.md"], "there is no folder 'no'"),
        (["{f}:", "{f}:sfa"], "there is no setting after ':'"),
        (["{f}:@start", "{f}:sfa"], "there is no setting after ':'"),
        (["{f}:sfa@", "{f}:sfa"], "there is no stage after '@'"),
        (["{f}:zzz", "{f}:sfa"], "'zzz'. There are: sequential, sfa-p0.5-beta0.5"),
        (["{f}:sequential", "{f}:sfa", "--task", "x.jsonl"], "give the folder of a run"),
        (["a", "b", "--task", "x.jsonl", "--stream", "y.yaml"], "give one of them"),
        (["a", "b", "--task", "x.jsonl", "--same-items"], "--same-items is for runs"),
        (["{f}:sfa", "{f}:sfa"], "BEFORE and AFTER are the same"),
        (["{f}:sfaa", "{f}:sfa"], "there is no finished run of 'sfaa'"),
        (["{f}", "nowhere"], "AFTER: there is no folder 'nowhere'"),
        (["{f}"], "Missing argument"),
    ],
)
def test_a_wrong_command_is_code_2(finished, words, message):
    result = stockpot(*(word.format(f=finished) for word in words)) if len(words) == 1 else None
    if result is None:
        result = in_main([word.format(f=finished) for word in words])
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def in_main(words):
    """Through the program's own entry, where errors become messages, without a new process."""
    import contextlib
    import io

    from stockpot.cli import app as entry

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["stockpot", "compare", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            entry.main()
        code = 0
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@pytest.mark.parametrize(
    "setting",
    ["sfa p=0.5 beta=0.5", "sfa beta=0.5 p=0.5", "sfa, beta=0.5, p=0.5", "sfa-beta0.5-p0.5"],
)
def test_a_setting_may_be_written_in_any_order(finished, setting):
    result = compare(f"{finished}:{setting}@start", f"{finished}:{setting}", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["after"] == "sfa-p0.5-beta0.5, after 4-5"


def test_damage_is_code_2_and_not_the_1_of_forgetting(folder):
    path = folder / "runs" / "sequential-seed0" / "items" / "stage-0002.safetensors"
    path.write_bytes(path.read_bytes()[:99])
    result = stockpot(f"{folder}:sequential@0", f"{folder}:sequential", "--max-forgetting", "0")
    assert (result.returncode, result.stdout) == (2, "")
    assert "stage-0002.safetensors is damaged" in result.stderr
    assert "Traceback" not in result.stderr


def test_nothing_to_compare_is_code_2(folder):
    run = folder / "runs" / "sequential-seed0" / "items" / "stage-0002.safetensors"
    save_file({k: v * np.float32("nan") for k, v in load_file(run).items()}, run)
    result = in_main([f"{folder}:sequential-seed0@0", f"{folder}:sequential-seed0"])
    assert result.returncode == 2
    assert "nothing can be compared: 0-1 accuracy: 30 of 30 items of AFTER" in result.stderr


def test_a_task_that_cannot_be_compared_is_said_and_is_no_pass(folder):
    sides = set_items(folder, t0_1=(0, 0, 500), t2_3=(0, 0, 500))
    run = folder / "runs" / "sequential-seed0" / "items" / "stage-0002.safetensors"
    tensors = load_file(run)
    save_file({**tensors, "4-5/accuracy": tensors["4-5/accuracy"] * np.float32("nan")}, run)
    result = compare(*sides, "--max-forgetting", 0.1)
    assert result.exit_code == 3
    said = " ".join(result.stdout.split())
    assert "not compared: 4-5 accuracy (30 of 30 items of AFTER are not finite numbers)" in said
    assert "Undecided: 4-5 accuracy could not be compared" in said


# As a program.


def test_comparing_runs_loads_no_torch(finished):
    code = (
        "import sys; from stockpot.cli.app import main\n"
        "try: main()\nexcept SystemExit as e: assert e.code == 0, e.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    sides = [f"{finished}:sequential@0", f"{finished}:sequential"]
    result = subprocess.run(
        [sys.executable, "-c", code, "compare", *sides], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_help_explains_sides_and_exit_codes():
    text = " ".join(compare("--help").stdout.split())
    for words in ("BEFORE", "FOLDER:SETTING", "--max-forgetting", "Exit codes: 0 passed", "3 the"):
        assert words in text


@pytest.mark.parametrize("plain", [True, False])
def test_colours_on_a_terminal_respect_no_color(folder, plain):
    sides = set_items(folder, t0_1=(60, 10, 200))
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "NO_COLOR"}
    environment |= {"TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if plain else {})
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "stockpot", "compare", *sides],
        stdout=follower,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 4096):
            shown += chunk
    except OSError:  # the end, on Linux
        pass
    assert process.wait(60) == 0
    os.close(leader)
    assert b"forgotten" in shown
    assert (re.search(rb"\x1b\[1?;?31m", shown) is None) == plain


def test_two_models_on_a_file(tmp_path):
    write_model(tmp_path / "a", "gpt2")
    write_model(tmp_path / "b", "gpt2", n_head=4)
    write_tasks(tmp_path, ("tea",), rows=20)
    result = stockpot(
        *(
            "a",
            "b",
            "--task",
            "tea.jsonl",
            "--max-forgetting",
            "0.5",
            "--all",
            "--markdown",
            "x.md",
        ),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("before: a\nafter:  b\n")
    assert "labels accuracy_norm" in result.stdout
    assert "Passed" in result.stdout
    page = (tmp_path / "x.md").read_text()
    assert page.startswith("### a → b\n")
