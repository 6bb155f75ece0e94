"""Trainer on a model that from_pretrained shards with FSDP2, in two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.launch import call_in_processes

T, BETA = 4, 0.4


def worker(rank: int, stories: str, folder: str, store: str) -> None:
    from transformers import (
        AutoModelForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    from transformers.distributed import DistributedConfig

    from stockpot.integrations.transformers import SFACallback

    arguments = TrainingArguments(
        folder,
        max_steps=T,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        save_steps=T,
        save_only_model=True,
        eval_strategy="steps",
        eval_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(
        stories, dtype=torch.float32, distributed_config=DistributedConfig(fsdp_size=2)
    )
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 400, (12,), generator=generator) for _ in range(16)]
    data: Any = [{"input_ids": row, "labels": row} for row in tokens]

    class Record(TrainerCallback):
        """Full float64 weights around the merge step, seen before and after SFA."""

        def __init__(self, into: dict[int, dict[str, torch.Tensor]]) -> None:
            self.into = into

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for module in kwargs["model"].modules():
                if hasattr(module, "reshard"):
                    module.reshard()
            self.into[state.global_step] = {
                n: p.detach().full_tensor().double() for n, p in kwargs["model"].named_parameters()
            }

    before: dict[int, dict[str, torch.Tensor]] = {}
    after: dict[int, dict[str, torch.Tensor]] = {}
    start = {n: p.detach().full_tensor().double() for n, p in model.named_parameters()}
    callback = SFACallback(p=0.5, beta=BETA, store=store)  # type: ignore[arg-type]
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=[Record(before), callback, Record(after)],
    )
    trainer.train()
    for step in range(1, T + 1):
        for name, weight in before[step].items():
            expected = BETA * start[name] + (1 - BETA) * weight if step in (2, 4) else weight
            torch.testing.assert_close(after[step][name], expected, rtol=1e-6, atol=1e-7)
    square = sum(float((before[4][n] - start[n]).square().sum()) for n in start)
    assert abs(callback.events[-1].distance_before - square**0.5) < 1e-5 * square**0.5
    if rank == 0:
        from transformers import AutoModelForCausalLM as Auto

        saved = Auto.from_pretrained(f"{folder}/checkpoint-{T}", dtype=torch.float32)
        for name, weight in saved.named_parameters():
            expected = after[T][name]
            torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-7)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_averages_reach_the_shards_and_the_checkpoint(
    stories: Path, tmp_path: Path, store: str
) -> None:
    call_in_processes(worker, str(stories), str(tmp_path), store)
