"""The settings of training in the terms of PyTorch and ``transformers.Trainer``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler

from stockpot.methods.base import TaskRun
from stockpot.training.settings import TrainingSettings

__all__ = ["learning_rate_at", "make_optimizer", "training_arguments"]


def make_optimizer(
    parameters: list[nn.Parameter], settings: TrainingSettings, fused: bool = True
) -> torch.optim.Optimizer:
    """A fresh optimizer over ``parameters`` in one group, by PyTorch's fused kernel or not."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=rate, momentum=settings.momentum, weight_decay=decay, fused=fused
        )
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=rate, weight_decay=decay, fused=fused)


def training_arguments(
    run: TaskRun, settings: TrainingSettings, scratch: Path
) -> TrainingArguments:
    """What ``Trainer`` is told; it logs, saves and reports nothing by itself."""
    schedule, warmup = _schedule(settings, run.total_steps)
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=run.total_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=warmup,
        max_grad_norm=settings.max_grad_norm or 0.0,
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
        seed=run.seed % 2**32,
        use_cpu=run.device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        # A NaN loss must be seen, not replaced by the mean of the earlier ones.
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
    )
    # The settings decide, not what a launcher has left in the environment.
    names = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    arguments.mixed_precision = names[settings.precision]
    if arguments.n_gpu > 1:
        # Trainer would spread each batch over all GPUs by torch's DataParallel, which autocasts
        # nothing and gives other sums. Several GPUs are several processes here.
        arguments._n_gpu = 1
    return arguments


def _schedule(settings: TrainingSettings, total_steps: int) -> tuple[str, int]:
    """The schedule by the Trainer's own name, and its warm-up in steps."""
    name: str = settings.schedule
    if settings.warmup and name == "constant":
        name = "constant_with_warmup"
    return name, round(settings.warmup * total_steps)


def learning_rate_at(settings: TrainingSettings, total_steps: int) -> Callable[[int], float]:
    """The learning rate that step 1, 2, ... of a task is made with, by the schedule.

    (With float16 a step may be skipped and the schedule with it; that is not seen here.)
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    name, warmup = _schedule(settings, total_steps)
    scheduler = get_scheduler(name, optimizer, warmup, total_steps)
    factor = scheduler.lr_lambdas[0]
    return lambda step: float(settings.learning_rate * factor(step - 1))
