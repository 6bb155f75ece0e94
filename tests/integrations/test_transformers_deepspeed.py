"""SFACallback in a real Trainer over DeepSpeed ZeRO: two processes, what the checkpoint holds."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support.launch import call_in_processes

pytest.importorskip("deepspeed")

BETA, STEPS = 0.25, 4


def train(stories: Path, folder: Path, stage: int, callbacks: list[Any]) -> Any:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_steps=STEPS,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": stage,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        },
    )
    rows = [{"input_ids": [1, 5 + i, 6, 7, 9 + i], "labels": [1, 5, 6, 7, 9]} for i in range(16)]
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)  # type: ignore[arg-type]
    trainer.train()
    return trainer


def worker(rank: int, stories: str, folder: str, stage: int) -> None:
    os.environ["LOCAL_SIZE"] = "2"
    from stockpot.integrations.transformers import SFACallback

    train(Path(stories), Path(folder, "plain"), stage, [])
    callback = SFACallback(p=1.0, beta=BETA)
    train(Path(stories), Path(folder, "sfa"), stage, [callback])
    assert [event.step for event in callback.events] == [STEPS]


def weights(folder: Path) -> dict[str, Tensor]:
    return {n: w.double() for n, w in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("stage", [2, 3])
def test_the_checkpoint_holds_the_average(stories: Path, tmp_path: Path, stage: int) -> None:
    call_in_processes(worker, str(stories), str(tmp_path), stage)
    start = weights(stories)
    start["lm_head.weight"] = start["model.embed_tokens.weight"]  # tied; stage 2 writes both names
    plain, ours = (weights(tmp_path / n / f"checkpoint-{STEPS}") for n in ("plain", "sfa"))
    assert ours.keys() == plain.keys()
    moved = 0.0
    for name, weight in ours.items():
        moved += float((plain[name] - start[name]).norm())
        expected = BETA * start[name] + (1 - BETA) * plain[name]
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    assert moved > 0.1
