"""The run folder: what is in it, and what happens when it is damaged, full or someone else's."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from safetensors.torch import load_file, save_file

from stockpot.errors import ConfigError, DamagedRecordError, StockpotError
from stockpot.experiment import load_experiment
from stockpot.files import exclusive, sha256
from support.experiments import lines, record_of, run_and_kill, run_file, write_experiment

METHODS = "[sequential, {name: sfa, p: 0.5, beta: 0.3}]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    path = write_experiment(folder, METHODS)
    run_file(path, folder / "out")
    return path, folder / "out"


@pytest.fixture
def half(made, tmp_path):
    """A record whose second run was killed in its last task."""
    path, _ = made
    out = tmp_path / "half"
    run_and_kill(path, out, ["methods=[{name: sfa, p: 0.5, beta: 0.3}]"], stage=2, step=3)
    return path, out


def test_files_of_a_finished_record(made):
    _, out = made
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    runs = ("sequential-seed0", "sfa-p0.5-beta0.3-seed0")
    assert names == {
        ".lock",
        "environment.json",
        "experiment.json",
        "experiment.yaml",
        "merges.jsonl",
        "scores.jsonl",
        "plan.json",
        "start.json",
        "stages.jsonl",
        "summary.json",
        *(f"runs/{run}/{file}" for run in runs for file in ("manifest.json", "model.safetensors")),
        *(
            f"runs/{run}/items/{name}.safetensors"
            for run in runs
            for name in ("start", "stage-0000", "stage-0001", "stage-0002")
        ),
    }


def test_scores_and_merges_say_what_the_design_asks(made):
    _, out = made
    scores = lines(out / "scores.jsonl")
    assert len(scores) == 2 * (1 + 3) * 3  # runs x (theta_0 and three tasks) x tasks
    assert {"run", "trained", "step", "task", "metric", "value", "n", "stderr"} <= scores[0].keys()
    for line in scores:
        p, n = line["value"], line["n"]
        assert n == 30
        assert line["stderr"] == pytest.approx((p * (1 - p) / n) ** 0.5)
        assert p * n == pytest.approx(round(p * n))
    merges = lines(out / "merges.jsonl")
    assert [(line["stage"], line["step"]) for line in merges] == [(1, 3), (1, 6), (2, 3), (2, 6)]
    for line in merges:
        assert line["beta"] == 0.3
        assert line["distance_after"] == pytest.approx(0.7 * line["distance_before"], rel=1e-5)
        assert line["seconds"] > 0


def test_manifest_holds_the_hashes(made):
    _, out = made
    for manifest in out.glob("runs/*/manifest.json"):
        for name, entry in json.loads(manifest.read_text()).items():
            assert sha256(manifest.parent / name) == entry["sha256"]
            assert (manifest.parent / name).stat().st_size == entry["bytes"]


def test_environment_says_on_what_it_ran(made):
    _, out = made
    environment = json.loads((out / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["hardware"]["cores"] == os.cpu_count()
    assert environment["seeds"] == [0]


def test_summary_is_computed_from_the_scores(made):
    _, out = made
    summary = json.loads((out / "summary.json").read_text())
    scores = lines(out / "scores.jsonl")
    for run in summary:
        found = {(s["stage"], s["task"]): s["value"] for s in scores if s["run"] == run["run"]}
        assert run["R"] == [[found[t, task] for task in run["tasks"]] for t in range(3)]
        assert run["b"] == [found[-1, task] for task in run["tasks"]]
        assert run["metrics"]["average"] == pytest.approx(sum(run["R"][2]) / 3)
        assert set(run) >= {"method", "settings", "seed", "R", "b", "metrics"}


def test_a_finished_record_is_left_as_it_is(made):
    path, out = made
    before = record_of(out)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    outcome = run_file(path, out)
    assert len(outcome.summary) == 2
    assert record_of(out) == before
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == stamps


def test_methods_and_seeds_may_be_added(made, tmp_path):
    path, out = made
    shutil.copytree(out, tmp_path / "grown")
    outcome = run_file(path, tmp_path / "grown", ["methods=[sequential, l1]", "seeds=[0, 3]"])
    assert {run["run"] for run in outcome.summary} == {
        "sequential-seed0", "sequential-seed3", "l1-strength1-seed0", "l1-strength1-seed3"
    }  # fmt: skip
    assert len(lines(tmp_path / "grown" / "stages.jsonl")) == 2 * 3 + 3 * 3


@pytest.mark.parametrize("keep", ["final", "all", "none"])
def test_weights_kept(made, tmp_path, keep):
    path, _ = made
    run_file(path, tmp_path / "out", [f"record.weights={keep}", "methods=[sequential]"])
    names = {p.name for p in (tmp_path / "out").glob("runs/*/*.safetensors")}
    stages = {f"stage-{n:04d}.safetensors" for n in range(3)}
    expected = {
        "final": {"model.safetensors"},
        "all": {"model.safetensors", *stages},
        "none": set(),
    }
    assert names == expected[keep]


@pytest.mark.parametrize("deleted", range(6))
def test_what_a_kill_left_to_be_deleted_is_deleted(made, tmp_path, deleted):
    """Three notes of stages that are ready to be scored, and the weights of three stages."""
    path, _ = made
    settings = ["methods=[sequential]", "training.checkpoint_seconds=null"]
    run_file(path, tmp_path / "whole", settings)
    run_and_kill(path, tmp_path / "out", settings, deleted=deleted)
    run_file(path, tmp_path / "out", settings)
    assert record_of(tmp_path / "out") == record_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("training.epochs=1", "training.epochs: 2 there, 1 now"),
        ("model.hidden=[4]", "model.hidden"),
        ("stream.train_limit=20", "stream.train_limit"),
    ],
)
def test_another_experiment_in_the_folder_is_refused(made, override, place):
    path, out = made
    before = record_of(out)
    with pytest.raises(ConfigError, match="holds another experiment") as caught:
        run_file(path, out, [override])
    assert place in str(caught.value)
    assert record_of(out) == before


def test_checkpoint_interval_and_threads_may_change(half):
    path, out = half
    methods = "methods=[{name: sfa, p: 0.5, beta: 0.3}]"
    assert len(run_file(path, out, [methods, "training.checkpoint_seconds=9"]).summary) == 1


def test_a_folder_with_something_else_is_refused(made, tmp_path):
    path, _ = made
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        run_file(path, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_output_that_cannot_be_made(made, tmp_path):
    path, _ = made
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot make the run folder"):
        run_file(path, tmp_path / "file" / "out")


def test_two_processes_do_not_share_a_folder(made, tmp_path):
    path, _ = made
    (tmp_path / "out").mkdir()
    code = textwrap.dedent(f"""
        from pathlib import Path
        from stockpot.files import exclusive
        with exclusive(Path({str(tmp_path / "out")!r})):
            print("held", flush=True)
            input()
    """)
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StockpotError, match="another stockpot process"):
        run_file(path, tmp_path / "out")
    holder.kill()
    holder.wait()
    with exclusive(tmp_path / "out"):  # the lock went with the process
        pass


# Damage.

RESUME = ["methods=[{name: sfa, p: 0.5, beta: 0.3}]"]


def damaged(path, out):
    with pytest.raises(DamagedRecordError) as caught:
        run_file(path, out, RESUME)
    return str(caught.value)


def test_half_a_line_at_the_end_is_a_kill_and_not_damage(half):
    path, out = half
    with (out / "scores.jsonl").open("a") as file:
        file.write('{"run": "sfa-p0.5-beta0.3-seed0", "stage": 2, "tr')
    assert len(run_file(path, out, RESUME).summary) == 1


def test_broken_line_in_the_middle(half):
    path, out = half
    text = (out / "scores.jsonl").read_text().splitlines(keepends=True)
    text[4] = text[4][:20] + "\n"
    (out / "scores.jsonl").write_text("".join(text))
    assert "scores.jsonl:5: damaged line" in damaged(path, out)


def test_scores_that_were_cut(half):
    path, out = half
    text = (out / "scores.jsonl").read_text().splitlines(keepends=True)
    (out / "scores.jsonl").write_text("".join(text[:6]))
    assert "lacks the scores of run 'sfa-p0.5-beta0.3-seed0', stage 1" in damaged(path, out)


def test_missing_scores(half):
    path, out = half
    (out / "scores.jsonl").unlink()
    assert "scores.jsonl is missing" in damaged(path, out)


def test_changed_weights(half):
    path, out = half
    file = next(out.glob("runs/*/stage-0001.safetensors"))
    weights = load_file(file)
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1
    save_file(weights, file)
    message = damaged(path, out)
    assert "stage-0001.safetensors" in message
    assert "SHA-256" in message


def test_missing_weights(half):
    path, out = half
    next(out.glob("runs/*/stage-0001.safetensors")).unlink()
    assert "stage-0001.safetensors is missing" in damaged(path, out)


def test_damaged_experiment_file(half):
    path, out = half
    (out / "experiment.json").write_text("{")
    assert "experiment.json is damaged" in damaged(path, out)


def test_damaged_checkpoint_within_a_task_is_trained_again(made, tmp_path):
    path, reference = made
    every_step = ["training.checkpoint_seconds=0", "methods=[sequential]"]
    run_and_kill(path, tmp_path / "out", every_step, stage=1, step=5)
    checkpoint = next((tmp_path / "out").rglob("checkpoint-*/model.safetensors"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    run_file(path, tmp_path / "out", every_step)
    model = "runs/sequential-seed0/model.safetensors"
    assert sha256(tmp_path / "out" / model) == sha256(reference / model)


# A full disk.

FULL_DISK = """
import sys
from support.experiments import run_file
from stockpot.errors import DiskFullError
try:
    run_file({path!r}, {out!r}, {overrides!r})
except DiskFullError as error:
    print(error)
    sys.exit(7)
"""


@pytest.fixture
def tiny_disk(tmp_path):
    """A real file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.parametrize(("checkpoints", "ballast_kib"), [("null", 900), ("0", 700)])
def test_full_disk_loses_nothing(made, tiny_disk, tmp_path, checkpoints, ballast_kib):
    from pathlib import Path

    path, _ = made
    out = tiny_disk / "out"
    ballast = tiny_disk / "ballast"
    overrides = [
        "model.hidden=[200]",
        "methods=[sequential]",
        "record.weights=all",
        f"training.checkpoint_seconds={checkpoints}",
    ]
    ballast.write_bytes(b"x" * ballast_kib * 1024)
    code = FULL_DISK.format(path=Path(path), out=Path(out), overrides=overrides)
    code = "from pathlib import Path, PosixPath\n" + code
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert "no space left on the disk" in done.stdout
    assert "Everything finished before is intact" in done.stdout
    finished = lines(out / "stages.jsonl")
    ballast.unlink()  # make room, and the same command goes on
    run_file(path, out, overrides)
    assert lines(out / "stages.jsonl")[: len(finished)] == finished
    run_file(path, tmp_path / "roomy", overrides)
    model = "runs/sequential-seed0/model.safetensors"
    assert sha256(out / model) == sha256(tmp_path / "roomy" / model)


# Runs that fail.


def test_non_finite_loss_stops_the_run_and_not_the_others(made, tmp_path):
    path, _ = made
    overrides = [
        "training.optimizer=sgd", "training.learning_rate=1.0e+30", "methods=[sequential, l2]"
    ]  # fmt: skip
    outcome = run_file(path, tmp_path / "out", overrides)
    assert set(outcome.failures) == {"sequential-seed0", "l2-strength1-seed0"}
    message = outcome.failures["sequential-seed0"]
    assert "task '0-1'" in message
    assert "learning_rate" in message
    assert not lines(tmp_path / "out" / "stages.jsonl")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_failure_in_a_later_task_keeps_the_earlier_ones(made, tmp_path):
    path, _ = made
    # Sound on the first task; the penalty's own step diverges on the second.
    overrides = [
        "training.optimizer=sgd",
        "methods=[sequential, {name: l2, strength: 1.0e+30}]",
    ]
    outcome = run_file(path, tmp_path / "out", overrides)
    assert set(outcome.failures) == {"l2-strength1e+30-seed0"}
    assert "task '2-3'" in outcome.failures["l2-strength1e+30-seed0"]
    assert [run["run"] for run in outcome.summary] == ["sequential-seed0"]
    assert [s["stage"] for s in lines(tmp_path / "out" / "stages.jsonl") if "l2" in s["run"]] == [0]
    last = next((tmp_path / "out").glob("runs/l2*/stage-0000.safetensors"))
    assert all(weight.isfinite().all() for weight in load_file(last).values())


def test_experiment_object_runs_from_python(made, tmp_path):
    import stockpot

    path, out = made
    outcome = stockpot.run_experiment(load_experiment(path, output=tmp_path / "out"))
    assert record_of(outcome.folder) == record_of(out)


# What a record was made with may not change under it.


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()

    def write(scale="1.0", extra=""):
        (folder / "own_model.py").write_text(
            "from torch import nn\n"
            "def make(image_shape, labels):\n"
            f"    {extra or 'pass'}\n"
            "    module = nn.Sequential(nn.Flatten(), nn.Linear(64, labels))\n"
            f"    module[1].weight.data.mul_({scale})\n"
            "    return module\n"
        )
        sys.modules.pop("own_model", None)
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)

    monkeypatch.syspath_prepend(folder)
    write()
    return write


OWN = ["model=own_model:make", "methods=[sequential]"]


def test_changed_model_code_does_not_go_on_silently(made, tmp_path, own_model):
    path, _ = made
    run_file(path, tmp_path / "out", OWN)
    own_model(scale="2.0")
    with pytest.raises(ConfigError, match="starts from other weights"):
        run_file(path, tmp_path / "out", [*OWN[:1], "methods=[sequential, l2]"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("raise ValueError('no')", "failed when called with image_shape"),
        ("labels = 9", r"needs \(16, 2\)"),
        ("return nn.Sequential(nn.Flatten(), nn.Linear(3, labels))", "the model fails on images"),
        ("return nn.Flatten()", "no trainable parameters"),
    ],
)
def test_models_that_do_not_fit(made, tmp_path, own_model, extra, message):
    path, _ = made
    own_model(extra=extra)
    with pytest.raises(ConfigError, match=message):
        run_file(path, tmp_path / "out", OWN)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_changed_data_does_not_go_on_silently(made, tmp_path, monkeypatch):
    import stockpot.streams.digits as digits

    path, _ = made
    run_file(path, tmp_path / "out", ["methods=[sequential]"])
    real = digits.load_digits

    def other():
        data = real()
        data.train_images[0] += 0.5
        return data

    monkeypatch.setattr(digits, "load_digits", other)
    with pytest.raises(ConfigError, match="are not those that"):
        run_file(path, tmp_path / "out", ["methods=[sequential, l2]"])


def test_summary_while_running(made, tmp_path, monkeypatch):
    from stockpot.experiment import runner

    monkeypatch.setattr(runner, "_SUMMARY_SECONDS", 0.0)
    path, _ = made
    run_and_kill(path, tmp_path / "out", ["methods=[sequential, sfa]"], stage=2, step=2)
    with pytest.raises(KeyboardInterrupt):
        run_file(path, tmp_path / "out", observer=_Interrupter())
    (run,) = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert run["method"] == "sequential"


class _Interrupter:
    """Ctrl-C as the second run begins."""

    def __getattr__(self, name):
        return lambda *args: None

    def run_begins(self, run, finished):
        if run.method.name == "sfa":
            raise KeyboardInterrupt


@pytest.mark.parametrize(("world", "said"), [("2", "RANK is not set"), ("two", "no number")])
def test_half_a_launcher_is_refused(made, tmp_path, monkeypatch, world, said):
    path, _ = made
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match=said):
        run_file(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
