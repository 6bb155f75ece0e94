"""What Trainer is told, and what it must not do by itself."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from stockpot.training.arguments import make_optimizer, training_arguments
from stockpot.training.settings import TrainingSettings


def test_several_gpus_are_not_taken_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer wraps a model in DataParallel when it finds several: no autocast, other sums."""
    original = TrainingArguments.__post_init__

    def as_with_two_gpus(self: TrainingArguments) -> None:
        original(self)
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", as_with_two_gpus)
    run = SimpleNamespace(total_steps=3, seed=0, device=torch.device("cpu"))
    settings = TrainingSettings(device="cpu", batch_size=4)
    arguments = training_arguments(run, settings, tmp_path)  # type: ignore[arg-type]
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 4


def test_a_gradient_scaler_takes_an_optimizer_that_is_not_fused() -> None:
    """PyTorch leaves the mark of the fused kernel on a group that is switched off later."""
    settings = TrainingSettings(optimizer="sgd", learning_rate=0.5, momentum=0.9)
    weight = nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = make_optimizer([weight], settings, fused=False)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    assert weight.tolist() == [0.5, 0.5, 0.5]
