"""Tiny language models with tokenizers, and tasks of text as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

TEXTS = (
    "Once upon a time there was a small red boat.\n\nIt sailed over the sea to the sun.",
    "Question: how many apples has Lily? Answer: seven, and Tom has three of them.",
    "user assistant system: be kind. <def> f(x): return x + 1 # é ü 漢字 😀 done",
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""One turn as it stands, whatever follows it."""
STRIPPING = CHATML.replace(
    "{% generation %}{{ m['content']",
    "{% generation %}{{ (m['content'] if loop.last else m['content'].split('|')[-1])",
)
"""Earlier answers lose what stands before a bar, as templates take off earlier thoughts."""


def byte_tokenizer(template: str | None = None, ends: bool = False, size: int = 400) -> Any:
    """Byte-level BPE on a few texts; ``ends``: it ends every text, as T5's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    made.chat_template = template
    return made


SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "t5": {
        "d_model": 32,
        "d_ff": 64,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
    },
}


def write_model(folder: Path, family: str, template: str | None = None, **sizes: Any) -> Path:
    """A random model of a family with its tokenizer, as a folder that Transformers reads."""
    import transformers

    seq2seq = family == "t5"
    tokenizer = byte_tokenizer(template, ends=seq2seq)
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        decoder_start_token_id=0,
        **{**SIZES[family], **sizes},
    )
    kind = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(config)
    if family == "t5":  # its own initialisation answers everything alike
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


WORDS = ["boat", "sea", "sun", "red", "tree", "dog", "cat", "hill", "bird", "moon", "star", "lake"]


def write_tasks(
    folder: Path,
    names: Sequence[str] = ("tea", "sky"),
    columns: tuple[str, str] = ("text", "label"),
    rows: int = 14,
) -> list[Path]:
    """JSON lines of a few words and an answer each: one file a task."""
    generator = torch.Generator().manual_seed(3)
    files = []
    for number, name in enumerate(names):
        labels = [("yes", "no", "maybe"), ("up", "down"), ("hot", "cold")][number % 3]
        lines = []
        for row in range(rows):
            picked = torch.randint(len(WORDS), (2 + row % 5,), generator=generator).tolist()
            text = f"{name} {row} " + " ".join(WORDS[n] for n in picked)
            lines.append(
                json.dumps(dict(zip(columns, (text, labels[row % len(labels)]), strict=True)))
            )
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("\n".join(lines) + "\n")
    return files


def write_text_experiment(
    folder: Path, tasks: Sequence[Path], model: str, methods: str, **sections: str
) -> Path:
    """A tiny experiment's file: four steps a task."""
    named = ", ".join(f"{{name: {path.stem}, train: {path}}}" for path in tasks)
    given = {
        "training": "{steps: 4, batch_size: 4, learning_rate: 0.005, threads: 1, device: cpu}",
        **sections,
    }
    if "training" in sections:
        base = given["training"].strip("{}")
        more = "batch_size: 4, learning_rate: 0.005, threads: 1, device: cpu"
        given["training"] = f"{{{base}, {more}}}"
    text = f"stream: {{name: tasks, test_share: 0.3, tasks: [{named}]}}\nmodel: {model}\n"
    text += f"methods: {methods}\n" + "".join(f"{k}: {v}\n" for k, v in given.items())
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path
