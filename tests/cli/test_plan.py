"""`stockpot plan`, and the Slurm script that it prints, submitted to a small Slurm of the tests."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from stockpot.cli.app import app, main
from stockpot.experiment.plan import Plan, Run, Stage
from stockpot.experiment.slurm_script import prefix_waves
from stockpot.methods.sequential import Sequential
from support.experiments import die_before_deleting, lines, record_of, run_file, write_experiment
from support.launch import call_until_killed, launch
from support.slurm import Slurm

METHODS = "[sequential, {name: sfa, p: 0.5, beta: 0.3}, {name: task-arithmetic, scale: [0.3, 0.5]}]"


def plan(*words):
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def the_same(folder):
    """A record without the order in which runs were finished, and without Slurm's logs."""
    record = record_of(folder)
    for log in ("scores", "merges", "stages"):
        record[log] = sorted(record[log], key=lambda line: json.dumps(line, sort_keys=True))
    of_its_own = ("slurm/", "figures/", "prefixes/", "scratch/", "results.", "report.html")
    record["files"] = [name for name in record["files"] if not name.startswith(of_its_own)]
    return record


def test_it_says_what_a_dry_run_says(tmp_path):
    path = write_experiment(tmp_path, METHODS)
    for more in ((), ("--json",)):
        said = plan(path, *more)
        dry = CliRunner().invoke(app, ["run", str(path), "--dry-run", *more])
        assert said.exit_code == dry.exit_code == 0
        assert said.stdout == dry.stdout
    found = json.loads(said.stdout)
    assert [run["run"] for run in found["plan"]][:2] == [
        "sequential-seed0",
        "sfa-p0.5-beta0.3-seed0",
    ]
    assert found["steps"] - found["steps_to_train"] == found["steps_saved"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--time", "1:00:00"], "need --slurm"),
        (["--max-parallel", "2"], "need --slurm"),
        (["--slurm", "--json"], "one of them"),
        (["--slurm", "--sbatch", "--comment='a"], "--sbatch"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, words, said):
    result = plan(write_experiment(tmp_path, METHODS), *words)
    assert result.exit_code != 0
    assert said in str(result.exception)


def options_of(job):
    return {k: v for k, v in job["options"].items() if k not in ("parsable", "output")}


def test_the_jobs_give_the_record_of_a_local_run_and_go_on_after_a_kill(tmp_path, monkeypatch):
    folder = tmp_path / 'it\'s $HOME, "quoted", 100%job'
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = write_experiment(
        folder,
        METHODS.replace("]}]", "]}, {name: l2, strength: 1e30}]"),  # which diverges on task 2
        name="Tom's `best` $HOME",
        resources="{cpus: 1, memory: 2 GiB, gpus: 0.5}",
    )
    settings = ["training.optimizer=sgd", "training.epochs=100"]
    local = run_file(path, tmp_path / "local", settings)
    assert set(local.failures) == {"l2-strength1e+30-seed0"}

    words = ["--slurm", "--time", "1:00:00", "--partition", "a b", "--sbatch", "--qos=high"]
    result = plan(path.name, *settings, "-o", "my record", *words, "--max-parallel", 2)
    assert result.exit_code == 0, result.output
    script = result.stdout
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    slurm = Slurm(tmp_path / "slurm")
    path.rename(folder / "hidden.yaml")
    assert subprocess.run(["bash"], input=script, text=True, env=slurm.environment).returncode == 2
    assert not slurm.jobs(), "a wrong file is found before anything waits in a queue"
    (folder / "hidden.yaml").rename(path)
    assert "job 1003 is the last" in slurm.submit(script)
    text = path.read_text()
    path.write_text("changed: while the jobs wait")

    first, second, runs, last = slurm.jobs()
    common = {
        "job_name": "stockpot-Tom-s--best---HOME", "nodes": "1", "ntasks": "1",
        "cpus_per_task": "1", "gres": "gpu:1", "mem": "2048M", "time": "1:00:00",
        "partition": "a b", "qos": "high",
    }  # fmt: skip
    kill = {"kill_on_invalid_dep": "yes"}
    assert options_of(first) == {**common, "array": "0-0%2"}
    assert options_of(second) == {
        **common, **kill, "array": "0-0%2", "dependency": "afterok:1000"
    }  # fmt: skip
    assert options_of(runs) == {**common, **kill, "array": "0-4%2", "dependency": "afterok:1001"}
    assert options_of(last) == {**common, "dependency": "afterany:1002"}

    out = folder / "my record"
    began = out / "jobs" / "sfa-p0.5-beta0.3-seed0" / "stage-0000.json"

    def kill_in_the_second_task(process, job, task):
        while job is not None and job["id"] == 1002 and task == 1 and process.poll() is None:
            if began.exists():
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)

    slurm.run_all(kill_in_the_second_task)
    codes = {job: list(tasks.values()) for job, tasks in slurm.done.items()}
    assert codes == {1000: [0], 1001: [0], 1002: [0, -signal.SIGKILL, 0, 0, 1], 1003: [1]}
    failures = json.loads((out / "failures.json").read_text())
    assert set(failures) == {"l2-strength1e+30-seed0", "sfa-p0.5-beta0.3-seed0"}
    assert "the loss is" in failures["l2-strength1e+30-seed0"]
    assert "Submit the script again" in failures["sfa-p0.5-beta0.3-seed0"]
    before = lines(out / "stages.jsonl")
    assert [line["stage"] for line in before if line["run"].startswith("sfa")] == [0]
    assert (out / "report.html").exists()
    said = (out / "slurm" / "1002_0.log").read_text()
    assert re.search(r"\[1/1\] sequential-seed0: average \d+\.\d %", said)
    assert "sfa" not in said

    path.write_text(text)
    slurm.submit(script)
    slurm.run_all()
    again = {job: list(tasks.values()) for job, tasks in slurm.done.items() if job > 1003}
    assert again == {1004: [0], 1005: [0], 1006: [0, 0, 0, 0, 1], 1007: [1]}
    assert lines(out / "stages.jsonl")[: len(before)] == before, "nothing is done again"
    assert "is finished" in (out / "slurm" / "1006_0.log").read_text()
    assert the_same(out) == the_same(tmp_path / "local")
    trained = [line for line in lines(out / "stages.jsonl") if line["trained_here"]]
    keys = [line["key"] for line in trained if line["stage"] == 0]
    assert len(keys) == len(set(keys)), "what runs share is trained once"


def job_that_dies(words, runs, after):
    die_before_deleting(runs, after)
    sys.argv = ["stockpot", *map(str, words)]
    main()


@pytest.mark.parametrize("after", [4, 5])
def test_a_job_killed_after_its_last_stage_is_completed_when_all_is_gathered(tmp_path, after):
    """Before the weights to keep are put in their place; before the others are deleted."""
    path, out = write_experiment(tmp_path, "[sequential]"), tmp_path / "out"
    words = ["run", path, "-q", "-o", out, "--job"]
    assert launch(1, "stockpot", [*words, ":open"]).returncode == 0
    call_until_killed(job_that_dies, [*words, "sequential-seed0"], out / "runs", after)
    gathered = launch(1, "stockpot", [*words, ":gather"])
    assert gathered.returncode == 0, gathered.stderr
    run_file(path, tmp_path / "local")
    assert the_same(out) == the_same(tmp_path / "local")


def test_a_run_over_several_gpus_is_started_by_torchrun(tmp_path):
    path = write_experiment(tmp_path, "[sequential]", resources="{gpus: 2, cpus: 3}")
    script = plan(path, "--slurm", "-o", tmp_path / "out").stdout
    slurm = Slurm(tmp_path / "slurm")
    slurm.submit(script)
    runs, _ = slurm.jobs()
    assert runs["options"]["gres"] == "gpu:2"
    assert runs["options"]["cpus_per_task"] == "6"
    assert "dependency" not in runs["options"], "nothing is shared"
    assert "-m torch.distributed.run --standalone --nproc-per-node=2 -m stockpot" in runs["script"]
    slurm.run_all()
    said = "".join(log.read_text() for log in (tmp_path / "out" / "slurm").iterdir())
    assert slurm.done == {1000: {0: 0}, 1001: {0: 0}}, said
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())) == 1
    environment = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert environment["processes of a run"] == 2


def test_many_runs_are_several_arrays(tmp_path):
    path = write_experiment(tmp_path, "[sequential, {name: sfa, p: 0.5}]", seeds=list(range(600)))
    slurm = Slurm(tmp_path / "slurm")
    script = plan(path, "--slurm", "-o", tmp_path / "out").stdout
    slurm.submit(script.replace(f"{path} -o {tmp_path / 'out'} --job :open", f"{path} --dry-run"))
    arrays = [job["options"].get("array") for job in slurm.jobs()]
    assert arrays == ["0-599", "0-999", "0-199", None]
    assert slurm.jobs()[3]["options"]["dependency"] == "afterany:1001:1002"
    runs = [re.search(r"runs=\((.*)\)", job["script"])[1].split() for job in slurm.jobs()[:3]]
    assert len(runs[0]) == len(set(runs[0])) == 600
    assert len(set(runs[1] + runs[2])) == 1200


@st.composite
def plans(draw):
    """Runs that share what they train in any way that a plan may have."""
    runs = []
    for number in range(draw(st.integers(1, 6))):
        keys = [f"{stage}-{draw(st.integers(0, 3))}" for stage in range(draw(st.integers(1, 4)))]
        stages = tuple(Stage(n, (n,), n, 1, "", key, key) for n, key in enumerate(keys))
        runs.append(Run(f"run{number}", Sequential(), 0, stages))
    return Plan(tuple(runs), "")


@given(plans())
def test_in_waves_nothing_shared_is_trained_twice(plan):
    runs = {run.id: run for run in plan.runs}
    stored, done, trained = set(), dict.fromkeys(runs, 0), []
    for wave in [*prefix_waves(plan), [(run.id, len(run.stages)) for run in plan.runs]]:
        assert len(dict(wave)) == len(wave), "a run once"
        new = []
        for run, until in wave:
            for stage in runs[run].stages[done[run] : until]:
                if stage.trained not in stored:
                    trained.append(stage.trained)
                    new.append(stage.trained)
            done[run] = max(done[run], until)
        stored |= set(new)
    assert all(done[run.id] == len(run.stages) for run in plan.runs)
    assert len(trained) == len(set(trained))
