"""SFA in TRL's SFTTrainer, on a real language model, with and without an adapter."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stockpot.integrations.transformers import SFACallback

TEXTS = [
    "Once upon a time there was a little cat who liked to sleep in the sun.",
    "Tom had a red ball. He threw it high and it fell into the river.",
    "The big dog ran after the bird, but the bird flew away.",
    "Lily saw a tree with many apples and asked her mom for one.",
] * 4


def sft(
    stories: Path, folder: Path, callback: SFACallback | None, model: Any = None, **extra: Any
) -> Any:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=32,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return trl.SFTTrainer(
        model or AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32),
        arguments,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        callbacks=[] if callback is None else [callback],
        **extra,
    )


def test_one_average_at_the_end_is_halfway_between_the_model_and_its_start(
    stories: Path, tmp_path: Path
) -> None:
    plain = sft(stories, tmp_path / "plain", None)
    start = {n: p.detach().double().clone() for n, p in plain.model.named_parameters()}
    plain.train()
    callback = SFACallback(p=1.0, beta=0.25)
    ours = sft(stories, tmp_path / "sfa", callback)
    ours.train()
    assert [event.step for event in callback.events] == [4]
    saved = load_file(tmp_path / "sfa" / "checkpoint-4" / "model.safetensors")
    trained = dict(plain.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        expected = 0.25 * start[name] + 0.75 * trained[name].detach().double()
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-7)
        if name in saved:
            assert torch.equal(saved[name], weight.detach())


def test_a_fresh_adapter_is_averaged_by_its_product(stories: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    merged = {}
    for name, callback in (("plain", None), ("sfa", SFACallback(p=1.0, beta=0.25))):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
        trainer = sft(stories, tmp_path / name, callback, peft_config=config)
        trainer.train()
        whole = trainer.model.merge_and_unload()
        merged[name] = {n: p.detach().double() for n, p in whole.named_parameters()}
    base = sft(stories, tmp_path / "base", None).model
    moved = 0.0
    for name, weight in base.named_parameters():
        start, trained = weight.detach().double(), merged["plain"][name]
        moved += float((trained - start).norm())
        expected = 0.25 * start + 0.75 * trained
        torch.testing.assert_close(merged["sfa"][name], expected, rtol=1e-5, atol=1e-6)
    assert moved > 0.01


def test_a_continued_adapter_is_merged_restarted_and_resumed_exactly(
    stories: Path, tmp_path: Path
) -> None:
    """Two tasks with one adapter; the second is stopped half-way and goes on in new objects."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    sft(stories, tmp_path / "first", None, peft_config=config).train()
    first = tmp_path / "first" / "checkpoint-4"

    def second_task(folder: Path) -> Any:
        base = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, first, is_trainable=True)
        callback = SFACallback(p=0.25, beta=0.25, lora="merge-and-restart")
        trainer = sft(stories, folder, callback, model=model)
        trainer.args.save_steps = 2
        return trainer

    def whole(model: Any) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in model.merge_and_unload().named_parameters()}

    undisturbed = second_task(tmp_path / "whole")
    undisturbed.train()
    stopped = second_task(tmp_path / "stopped")
    stopped.train()
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-4")
    resumed = second_task(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    expected = whole(undisturbed.model)
    for name, weight in whole(resumed.model).items():
        assert torch.equal(weight, expected[name]), name
