"""SFACallback in a user's own Trainer: its merge events in the trackers that report_to names."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from stockpot.integrations.transformers import SFACallback
from stockpot.tracking.callbacks import Reporters
from support.launch import call_in_processes
from support.trackers import Series, events, mlflow_series, wandb_records, wandb_series

STEPS = 8
NAMES = ("beta", "distance_before", "distance_after", "seconds")


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x) - labels).square().mean()}


def train(folder: Path, callback: SFACallback, **changes: Any) -> None:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "save_strategy": "no",
        "logging_steps": 3,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    data: Any = [{"x": torch.randn(5), "labels": torch.randn(3)} for _ in range(64)]
    arguments = TrainingArguments(**{**settings, **changes})
    Trainer(Regression(), arguments, train_dataset=data, callbacks=[callback]).train()


def assert_merges(found: Series, callback: SFACallback) -> None:
    assert [event.step for event in callback.events] == [2, 4, 6, 8]
    assert {name for name in found if "merge" in name} == {f"merge/{name}" for name in NAMES}
    for name in NAMES:
        series = found[f"merge/{name}"]
        assert [step for step, _ in series] == [2, 4, 6, 8]
        made = [getattr(event, name) for event in callback.events]
        assert [value for _, value in series] == pytest.approx(made, rel=1e-6)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }.items():
        monkeypatch.setenv(name, value)


def test_merges_are_in_every_tracker_that_the_trainer_reports_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import wandb

    wandb.teardown()  # it asks for its mode once
    client = mlflow.MlflowClient()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "own")
    number = client.create_experiment("own", f"{tmp_path}/artifacts")
    callback = SFACallback(p=0.25, beta=0.4)
    train(tmp_path / "out", callback, report_to=["tensorboard", "wandb", "mlflow"])
    wandb.finish()

    (run,) = client.search_runs([number])
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    in_tensorboard = events(tmp_path / "out")
    in_wandb = wandb_series(wandb_records(file))
    in_mlflow = mlflow_series(client, run.info.run_id)
    for found in (in_tensorboard, in_wandb, in_mlflow):
        assert_merges(found, callback)
    # Trainer's own logs are there as ever.
    assert [step for step, _ in in_tensorboard["train/loss"]] == [3, 6]
    assert [step for step, _ in in_wandb["train/loss"]] == [3, 6]
    assert [step for step, _ in in_mlflow["loss"]] == [3, 6]


def test_merges_are_logged_by_trl_too(stories: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, max_length=16,
        save_strategy="no", logging_steps=4, report_to="tensorboard", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    callback = SFACallback(p=0.25, beta=0.4)
    trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32),
        arguments,
        train_dataset=Dataset.from_dict({"text": ["Once upon a time there was a cat."] * 16}),
        processing_class=tokenizer,
        callbacks=[callback],
    ).train()
    found = events(tmp_path)
    assert_merges(found, callback)
    assert [step for step, _ in found["train/loss"]] == [4, 8]


def worker(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    callback = SFACallback(p=0.25, beta=0.4)
    train(Path(folder), callback, report_to="tensorboard")
    made = [{name: getattr(event, name) for name in NAMES} for event in callback.events]
    Path(folder, f"rank{rank}.json").write_text(json.dumps(made))
    torch.distributed.destroy_process_group()


def test_of_two_processes_the_main_one_logs(tmp_path: Path) -> None:
    call_in_processes(worker, str(tmp_path))
    both = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert len(both[0]) == len(both[1]) == 4
    found = events(tmp_path)
    for name in NAMES:
        assert [step for step, _ in found[f"merge/{name}"]] == [2, 4, 6, 8]
        values = [value for _, value in found[f"merge/{name}"]]
        assert values == pytest.approx([made[name] for made in both[0]], rel=1e-6)
    assert [made["seconds"] for made in both[0]] != [made["seconds"] for made in both[1]]


def test_without_trackers_and_without_a_trainer_nothing_is_logged(tmp_path: Path) -> None:
    callback = SFACallback(p=0.25, beta=0.4)
    train(tmp_path, callback, report_to="none")
    assert len(callback.events) == 4
    assert not list(tmp_path.rglob("events*"))
    Reporters.of_caller().log({"merge/beta": 0.5}, 1)


def test_a_tracker_that_fails_does_not_stop_the_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reporters = Reporters([TensorBoardCallback(tb_writer=object())])
    with caplog.at_level(logging.WARNING, logger="stockpot"):
        for step in (1, 2):
            reporters.log({"merge/beta": 0.5}, step)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("TensorBoardCallback: merge events are not logged from here on")
