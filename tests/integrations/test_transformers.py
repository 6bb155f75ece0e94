"""SFACallback in a real Trainer: when it averages, what is saved, and how it goes on."""

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from stockpot.errors import StockpotError
from stockpot.integrations.transformers import SFACallback
from support.launch import call_until_killed

ROWS, STEPS = 64, 8


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.body(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "x": torch.randn(5, generator=generator),
            "labels": torch.randn(3, generator=generator),
        }
        for _ in range(ROWS)
    ]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "optim": "adamw_torch",
    }
    return TrainingArguments(**{**settings, **changes})


def trainer(
    folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **changes: Any
) -> Trainer:
    data = rows()
    return Trainer(
        model or Regression(),
        arguments(folder, **changes),
        train_dataset=data,  # type: ignore[arg-type]
        eval_dataset=data[:16],  # type: ignore[arg-type]
        callbacks=list(callbacks),
    )


def weights_of(source: nn.Module | Path) -> dict[str, Tensor]:
    if isinstance(source, Path):
        return load_file(source / "model.safetensors")
    return {name: p.detach().clone() for name, p in source.named_parameters()}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class ByHand(TrainerCallback):
    """Algorithm 1 in float64, without the library."""

    def __init__(self, steps: set[int], beta: float) -> None:
        self.steps, self.beta = steps, beta
        self.anchor: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.anchor = {n: p.detach().double() for n, p in kwargs["model"].named_parameters()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            for name, p in kwargs["model"].named_parameters():
                mean = self.beta * self.anchor[name] + (1 - self.beta) * p.detach().double()
                p.data.copy_(mean)


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(folder: str, step: int, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    trainer(Path(folder), SFACallback(**settings), KillAt(step)).train()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_it_averages_at_the_merge_steps_of_algorithm_1(tmp_path: Path, accumulation: int) -> None:
    changes = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5}
    callback = SFACallback(p=0.25, beta=0.4)
    ours = trainer(tmp_path / "a", callback, **changes)
    ours.train()
    hand = trainer(tmp_path / "b", ByHand({2, 4, 6, 8}, 0.4), **changes)
    hand.train()
    assert [event.step for event in callback.events] == [2, 4, 6, 8]
    for name, weight in weights_of(ours.model).items():
        expected = weights_of(hand.model)[name]
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    # The checkpoint of a merge step, the last one included, holds the average.
    assert_same_bits(weights_of(tmp_path / "a" / "checkpoint-8"), weights_of(ours.model))
    plain = trainer(tmp_path / "c", **changes)
    plain.train()
    moved = weights_of(plain.model)["body.0.weight"] - weights_of(hand.model)["body.0.weight"]
    assert moved.norm() > 0.1


@pytest.mark.parametrize("store", ["device", "cpu", "disk"])
@pytest.mark.parametrize("killed", [3, 4, 7])
def test_killed_and_resumed_ends_at_the_same_bits(tmp_path: Path, store: str, killed: int) -> None:
    settings: dict[str, Any] = {"p": 0.25, "beta": 0.4, "store": store}
    whole = SFACallback(**settings)
    undisturbed = trainer(tmp_path / "whole", whole)
    undisturbed.train()
    folder = tmp_path / "killed"
    call_until_killed(run_and_die, str(folder), killed, settings)
    callback = SFACallback(**settings)
    resumed = trainer(folder, callback)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights_of(resumed.model), weights_of(undisturbed.model))
    assert [e.step for e in callback.events] == [e.step for e in whole.events] == [2, 4, 6, 8]
    for one, other in zip(callback.events, whole.events, strict=True):
        assert one.distance_before == other.distance_before


def test_a_resumed_run_refuses_another_anchor_and_other_settings(tmp_path: Path) -> None:
    trainer(tmp_path, SFACallback(p=0.5), max_steps=4, save_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    other = tmp_path / "other"
    trainer(other, max_steps=1, save_steps=1).train()
    refused = [
        (SFACallback(p=0.5, anchor=other / "checkpoint-1"), "fingerprint"),
        (SFACallback(p=0.5, beta=0.3), "beta was 0.5 and is 0.3"),
    ]
    for callback, word in refused:
        again = trainer(tmp_path, callback, max_steps=4)
        with pytest.raises(StockpotError, match=word):
            again.train(resume_from_checkpoint=checkpoint)
        assert_same_bits(weights_of(again.model), weights_of(Path(checkpoint)))
    (tmp_path / "sfa-anchor" / "anchor.safetensors").unlink()
    with pytest.raises(StockpotError, match=r"anchor .* is gone"):
        trainer(tmp_path, SFACallback(p=0.5), max_steps=4).train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_written_without_sfa_is_no_anchor(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=4, save_steps=2).train()
    with pytest.raises(StockpotError, match="written without it"):
        trainer(tmp_path, SFACallback(), max_steps=4).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_an_averaged_final_checkpoint_is_not_averaged_again(tmp_path: Path) -> None:
    callback = SFACallback(p=0.5)
    trainer(tmp_path, callback, max_steps=4).train()
    again = SFACallback(p=0.5)
    trainer(tmp_path, again, max_steps=4).train(resume_from_checkpoint=True)
    assert [event.step for event in again.events] == [2, 4]


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == 5


def test_early_stopping_averages_in_memory_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = SFACallback(p=0.5, beta=0.5)
    stopped = trainer(tmp_path, callback, Stop(), save_steps=1)
    with caplog.at_level(logging.WARNING, logger="stockpot"):
        stopped.train()
    assert [event.step for event in callback.events] == [4, 5]
    assert "trainer.save_model()" in caplog.text
    saved = weights_of(tmp_path / "checkpoint-5")
    anchor = load_file(tmp_path / "sfa-anchor" / "anchor.safetensors")
    for name, weight in weights_of(stopped.model).items():
        torch.testing.assert_close(weight, (saved[name] + anchor[name]) / 2)


def test_the_best_checkpoint_is_averaged_once(tmp_path: Path) -> None:
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    callback = SFACallback(p=0.5, beta=0.5)
    best = trainer(tmp_path, callback, EarlyStoppingCallback(20), **changes)
    best.train()
    step = best.state.best_global_step
    saved = weights_of(tmp_path / f"checkpoint-{step}")
    anchor = load_file(tmp_path / "sfa-anchor" / "anchor.safetensors")
    for name, weight in weights_of(best.model).items():
        whole = saved[name] if step in (4, 8) else (saved[name] + anchor[name]) / 2
        torch.testing.assert_close(weight, whole)
    assert [e.step for e in callback.events] == [4, 8] + ([] if step in (4, 8) else [step])


class OutOfMemoryOnce(TrainerCallback):
    def __init__(self) -> None:
        self.raised = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and not self.raised:
            self.raised = True
            raise RuntimeError("CUDA out of memory.")


def test_an_out_of_memory_retry_keeps_the_first_anchor(tmp_path: Path) -> None:
    model = Regression()
    start = weights_of(model)
    callback = SFACallback(p=1.0, beta=1.0)  # beta 1 puts the anchor back: it can be read off
    retried = trainer(
        tmp_path,
        callback,
        OutOfMemoryOnce(),
        model=model,
        auto_find_batch_size=True,
        max_steps=-1,
        num_train_epochs=1,
    )
    retried.train()
    assert_same_bits(weights_of(model), start)
    assert [event.step for event in callback.events] == [retried.state.max_steps]
    assert retried.state.max_steps != ROWS // 8


def test_two_callbacks_at_once_are_refused(tmp_path: Path) -> None:
    model = Regression()
    start = weights_of(model)
    with pytest.raises(StockpotError, match="another SFA is attached"):
        trainer(tmp_path, SFACallback(), SFACallback(), model=model).train()
    assert_same_bits(weights_of(model), start)


def test_a_second_training_takes_a_new_anchor(tmp_path: Path) -> None:
    callback = SFACallback(p=1.0, beta=0.5)
    model = Regression()
    trainer(tmp_path / "a", callback, model=model).train()
    middle = weights_of(model)
    trainer(tmp_path / "b", callback, model=model).train()
    anchor = load_file(tmp_path / "b" / "sfa-anchor" / "anchor.safetensors")
    assert_same_bits(anchor, middle)


def test_restoring_callbacks_from_the_checkpoint_changes_nothing(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a", SFACallback(p=0.25))
    whole.train()
    state = json.loads((tmp_path / "a" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["stockpot.SFA"]["step"] == 4
    resumed = trainer(
        tmp_path / "a", SFACallback(p=0.25), restore_callback_states_from_checkpoint=True
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))


def test_without_checkpoints_nothing_is_written(tmp_path: Path) -> None:
    trainer(tmp_path, SFACallback(), save_strategy="no").train()
    assert not (tmp_path / "sfa-anchor").exists()
