"""The command line as its users meet it: real processes, their output and exit codes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.experiments import lines, record_of, run_file, write_experiment
from support.launch import launch
from support.text import write_model

METHODS = "[sequential, {name: sfa, p: [0.5, 1], beta: 0.3}]"


def stockpot(*words, fresh=False):
    return launch(1, "stockpot", words, {"COLUMNS": "200", "NO_COLOR": "1"}, fresh=fresh)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return write_experiment(tmp_path_factory.mktemp("cli"), METHODS, seeds="[0, 1]")


@pytest.fixture(scope="module")
def done(experiment, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli-out") / "out"
    return stockpot("run", experiment, "-o", out, fresh=True), out


def test_help_names_the_verbs():
    result = stockpot("--help", fresh=True)
    assert result.returncode == 0
    for verb in ("run", "list", "report"):
        assert re.search(rf"\b{verb}\b", result.stdout)
    assert "Traceback" not in stockpot("run", "--help").stderr


def test_version():
    import stockpot as package

    assert stockpot("--version", fresh=True).stdout.strip() == f"stockpot {package.__version__}"


@pytest.mark.parametrize(
    "code",
    [
        "import stockpot",
        "import stockpot; dir(stockpot)",
        "from stockpot.cli.app import app",
        "import stockpot.methods, stockpot.streams, stockpot.models, stockpot.training",
    ],
)
def test_light_imports(code):
    check = "; import sys; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code + check], check=True)


def test_every_public_name_is_there():
    import stockpot as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_run_prints_the_table_and_the_report(done):
    result, out = done
    assert result.returncode == 0, result.stderr
    for label in ("sequential", "sfa p=0.5 beta=0.3", "sfa p=1 beta=0.3"):
        assert label in result.stdout
    for head in ("average", "forgotten", "BWT", "FWT", "L2 to anchor", "time", "peak memory"):
        assert head in result.stdout
    assert "Mean over 2 seeds" in result.stdout
    assert str(out / "report.html") in result.stderr.replace("\n", "")
    assert "[6/6]" in result.stderr


def test_run_writes_figures_tables_and_page(done):
    _, out = done
    for name in ("plane.png", "plane.svg", "accuracy_matrix.png", "accuracy_matrix.svg"):
        assert (out / "figures" / name).stat().st_size > 2000
    assert "<svg" in (out / "report.html").read_text()
    assert (out / "results.md").read_text().count("\n") == 2 + 3
    assert (out / "results.csv").read_text().count("\n") == 1 + 3


def test_json_is_the_summary(done, experiment):
    _, out = done
    result = stockpot("run", experiment, "-o", out, "--json")
    summary = json.loads(result.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert {run["method"] for run in summary} == {"sequential", "sfa"}


def test_quiet_says_nothing(done, experiment):
    _, out = done
    result = stockpot("run", experiment, "-o", out, "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_overrides_reach_the_run(experiment, tmp_path):
    result = stockpot(
        "run", experiment, "training.epochs=1", "methods=[l2]", "seeds=[4]", "-o", tmp_path / "o",
        "--json",
    )  # fmt: skip
    (run,) = json.loads(result.stdout)
    assert (run["method"], run["seed"], run["metrics"]["steps"]) == ("l2", 4, 9)


def test_dry_run_counts_and_runs_nothing(experiment, tmp_path):
    result = stockpot("run", experiment, "--dry-run", "-o", tmp_path / "o")
    assert result.returncode == 0
    assert not (tmp_path / "o").exists()
    # 2 seeds x 3 methods x 3 tasks x 6 steps; one first task instead of three per seed.
    text = " ".join(result.stdout.split())
    assert "6 runs, 108 optimizer steps" in text
    assert "saves 24 and leaves 84" in text
    as_json = json.loads(stockpot("run", experiment, "--dry-run", "--json").stdout)
    assert (as_json["steps"], as_json["steps_to_train"], as_json["steps_saved"]) == (108, 84, 24)


def test_names_with_brackets_are_shown_as_they_are(tmp_path):
    names = ("a[b]", "[/b] c")
    for name in names:
        rows = [{"text": f"{i} is fine", "label": str(i % 2)} for i in range(20)]
        (tmp_path / f"{names.index(name)}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = [{"name": name, "train": str(tmp_path / f"{i}.jsonl")} for i, name in enumerate(names)]
    described = {
        "stream": {"name": "tasks", "tasks": tasks},
        "model": {"id": str(write_model(tmp_path / "model", "gpt2"))},
        "training": {"steps": 1, "batch_size": 2},
        "methods": ["sequential", "sfa"],
        "output": str(tmp_path / "[red]"),
    }
    (tmp_path / "e.yaml").write_text(json.dumps(described))  # JSON is YAML
    result = stockpot("run", tmp_path / "e.yaml", "--dry-run")
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "a[b] (18 to train, 2 to test), [/b] c (18 to train, 2 to test)" in text
    assert "a[b]" in text.partition("earlier run")[2]  # as what is shared
    assert "[red]" in text


def test_dry_run_is_what_happens(done, experiment):
    _, out = done
    promised = json.loads(stockpot("run", experiment, "--dry-run", "--json").stdout)
    trained = sum(s["steps"] for s in lines(out / "stages.jsonl") if s["trained_here"])
    assert trained == promised["steps_to_train"]


def test_report_again(done):
    result, out = done
    page = (out / "report.html").read_text()
    again = stockpot("report", out)
    assert again.returncode == 0
    assert again.stdout == result.stdout
    assert (out / "report.html").read_text() == page


@pytest.mark.parametrize("what", ["streams", "models", "methods", "training", None])
def test_list(what):
    result = stockpot("list", *([what] if what else []))
    assert result.returncode == 0
    expected = {
        "streams": ["digits", "mnist", "even-odd", "permuted", "scenario"],
        "models": ["mlp", "conv", "huggingface", "factory"],
        "methods": ["sfa", "beta", "0.5", "ewc", "strength", "fraction", "per_tensor"],
        "training": ["epochs", "learning_rate", "0.001"],
    }
    for section, words in expected.items():
        for word in words:
            assert (word in result.stdout) >= (what in (section, None))


def test_list_json_has_every_default():
    listed = json.loads(stockpot("list", "--json").stdout)
    assert listed["methods"]["sfa"]["settings"]["beta"]["default"] == 0.5
    assert listed["methods"]["rehearsal"]["settings"]["fraction"]["default"] == 0.05
    assert all(
        setting["about"] and setting["type"]
        for section in listed.values()
        for entry in section.values()
        for setting in entry["settings"].values()
    )


# What goes wrong.


def test_wrong_key_is_refused_with_code_2_before_anything_is_loaded(tmp_path):
    path = write_experiment(tmp_path, "[sequential]", trainning="{}")
    begin = time.monotonic()
    result = stockpot("run", path, "-o", tmp_path / "o")
    assert time.monotonic() - begin < 3, "PyTorch alone takes longer than this to load"
    assert result.returncode == 2
    assert "did you mean 'training'?" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=nobody/nothing", "cannot load the model 'nobody/nothing'"),
        ("model=no.such.module:f", "cannot be imported"),
        ("model={factory: 'builtins:dict'}", "returned dict, not a torch.nn.Module"),
        ("model={name: conv, channels: [4, 4, 4, 4]}", "use fewer blocks"),
        ("stream={name: mnist, path: nobody/nothing}", "cannot load the data set"),
    ],
)
def test_what_cannot_be_loaded(experiment, tmp_path, override, message):
    result = stockpot("run", experiment, override, "-o", tmp_path / "o")
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_failed_run_gives_code_1_and_the_others_results(experiment, tmp_path):
    bad = "methods=[sequential, {name: l2, strength: 1.0e+30}]"
    result = stockpot("run", experiment, bad, "training.optimizer=sgd", "-o", tmp_path / "o")
    assert result.returncode == 1
    assert "failed: l2-strength1e+30-seed0" in result.stderr
    assert "learning_rate" in result.stderr
    assert "sequential" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_report_of_no_record(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    result = stockpot("report", tmp_path / folder)
    assert result.returncode == 1
    assert "no run folder" in result.stderr


def test_watching_begins_before_the_first_score(done, tmp_path):
    _, out = done
    folder = tmp_path / "[b]run"
    folder.mkdir()
    shutil.copy(out / "experiment.json", folder)
    words = [sys.executable, "-m", "stockpot", "report", str(folder), "--watch", "1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        first = run.stderr.readline()
        assert "nothing to report" in first
        assert "Waiting for the first scores" in first
        shutil.copytree(out, folder, dirs_exist_ok=True)
        printed, said = run.communicate(timeout=60)
    assert run.returncode == 0, said
    assert str(folder / "report.html") in said.replace("\n", "")
    assert "average" in printed


def test_watching_ends_when_what_is_left_has_failed(tmp_path):
    path = write_experiment(tmp_path, "[sequential, {name: l2, strength: 1e30}]")
    outcome = run_file(path, tmp_path / "out", ["training.optimizer=sgd"])
    assert len(outcome.failures) == 1
    result = stockpot("report", tmp_path / "out", "--watch", "1")
    assert result.returncode == 0
    assert "1 of 2 runs failed." in result.stderr
    assert "not finished" not in result.stderr


def test_watching_no_record_is_an_error(tmp_path):
    result = stockpot("report", tmp_path, "--watch", "1")
    assert result.returncode == 1
    assert "is no run folder" in result.stderr


def test_unknown_verb_and_option():
    assert stockpot("rnu").returncode == 2
    assert stockpot("run", "x.yaml", "--dryrun").returncode == 2


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_stopped_run_goes_on(tmp_path, signal_):
    """A real command, stopped in the middle, and the same command again."""
    path = write_experiment(tmp_path, METHODS, seeds="[0, 1]")
    long = ["training.epochs=60", "training.checkpoint_seconds=0.2"]
    command = [sys.executable, "-m", "stockpot", "run", path, *long, "-o", tmp_path / "out"]
    environment = {**os.environ, "NO_COLOR": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    stages = tmp_path / "out" / "stages.jsonl"
    deadline = time.monotonic() + 120
    while len(lines(stages)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal_)
    _, errors = process.communicate(timeout=60)
    stopped_at = len(lines(stages))
    assert 4 <= stopped_at < 18
    if signal_ is signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on from there" in errors
        assert "Traceback" not in errors
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    run_file(path, tmp_path / "whole", long)
    ours, whole = record_of(tmp_path / "out"), record_of(tmp_path / "whole")
    drawn = ("figures/", "report.html", "results.")
    ours["files"] = [name for name in ours["files"] if not name.startswith(drawn)]
    assert ours == whole


def test_interrupt_inside_generated_code_is_still_exit_code_130(experiment, tmp_path):
    """CPython would let ``python -m`` die of the signal; dataclasses and pydantic run such code."""
    (tmp_path / "interrupted.py").write_text(
        """
import rich.console, rich.text  # imported later they would hide it
import stockpot.cli.run as run
from stockpot.cli import main

code = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
run._load_and_run = lambda *_: exec(code)
main()
"""
    )
    result = subprocess.run(
        [sys.executable, "-m", "interrupted", "run", str(experiment)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 130, result.stderr


def test_runs_from_the_installed_command():
    script = Path(sys.executable).with_name("stockpot")
    assert subprocess.run([script, "--help"], capture_output=True).returncode == 0
