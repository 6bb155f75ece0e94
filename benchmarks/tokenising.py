r"""What tokenising and batching cost, against TRL's SFTTrainer on the same examples.

    STOCKPOT_DATA=folder python benchmarks/tokenising.py --write benchmarks/results/tokenising.md

The examples are those of meta-math/MetaMathQA (prompt and response), the tokenizer is byte-level
BPE with 16,000 tokens trained on them, so that nothing is downloaded. Each part runs in a fresh
process, with all cores to itself, and the two by turns; medians of the rounds.

tokenising   from strings in memory to what batches are made of. For SFTTrainer: its constructor on
             all rows less its constructor on eight (loading a model is no part of it), as it is by
             default, without a cache of earlier runs
batching     one epoch of batches of 16 from the training loader, nothing done with them. Ours
             groups by length, which is our default; theirs does not
memory       peak anonymous memory of the process above what it had before its part: rows that lie
             on disk, as SFTTrainer keeps them, are not counted against it
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BATCH = 16
LONGEST = 512


def examples() -> list[dict[str, str]]:
    """Prompts and responses of the data set."""
    from stockpot.streams.settings import STREAMS

    settings = STREAMS["domains"].model_validate(
        {"name": "domains", "tasks": ["math"], "benchmarks": []}
    )
    task = settings.load().tasks[0]
    return [
        {"prompt": example.messages[0].content, "completion": " " + example.messages[1].content}
        for example in task.train
    ]


def make_model(folder: Path) -> None:
    """A tiny model, and a tokenizer trained on the examples."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = examples()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def anonymous() -> int:
    """Bytes of memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


@contextmanager
def measured(result: dict[str, float], name: str) -> Iterator[None]:
    """Wall seconds, CPU seconds and peak anonymous memory of a stretch of work."""
    peak, stop = [anonymous()], threading.Event()
    before = peak[0]

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    begin, cpu = time.perf_counter(), os.times()
    yield
    after = os.times()
    result[f"{name} seconds"] = time.perf_counter() - begin
    result[f"{name} CPU seconds"] = sum(after[:4]) - sum(cpu[:4])
    stop.set()
    thread.join()
    result[f"{name} memory"] = max(peak[0], anonymous()) - before


def ours(folder: Path) -> dict[str, float]:
    """Our way."""
    from stockpot.models.language import _format
    from stockpot.models.settings import HuggingFace
    from stockpot.streams.text import exchange
    from stockpot.training.batches import BatchLoader, ShuffledBatches, as_fetched

    rows = [exchange(row["prompt"], row["completion"][1:]) for row in examples()]
    _, form = _format(HuggingFace(id=str(folder), max_length=LONGEST))
    form.data(rows[:8])
    result: dict[str, float] = {}
    with measured(result, "tokenising"):
        data, _ = form.data(rows)
    sampler: Any = ShuffledBatches(len(data), BATCH, 0, data.lengths())
    with measured(result, "batching"):
        count(result, BatchLoader(data, batch_sampler=sampler, collate_fn=as_fetched))
    return result


def theirs(folder: Path) -> dict[str, float]:
    """SFTTrainer's."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(examples())

    def trainer(rows: datasets.Dataset) -> SFTTrainer:
        return SFTTrainer(
            AutoModelForCausalLM.from_pretrained(folder),
            SFTConfig(
                str(folder / "out"),
                max_length=LONGEST,
                per_device_train_batch_size=BATCH,
                completion_only_loss=True,
                report_to=[],
                use_cpu=True,
            ),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(folder),
        )

    small: dict[str, float] = {}
    trainer(whole.select(range(8)))
    with measured(small, "tokenising"):
        trainer(whole.select(range(8, 16)))
    result: dict[str, float] = {}
    with measured(result, "tokenising"):
        made = trainer(whole)
    for key in ("tokenising seconds", "tokenising CPU seconds"):
        result[key] -= small[key]
    loader = made.get_train_dataloader()
    with measured(result, "batching"):
        count(result, loader)
    return result


def count(result: dict[str, float], loader: Any) -> None:
    """Go through the batches and add up what they hold."""
    tokens = places = learned = 0
    for batch in loader:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        places += ids.numel()
        tokens += ids.numel() if mask is None else int(mask.sum())
        learned += int((batch["labels"] != -100).sum())
    result |= {"tokens": tokens, "learned": learned, "padding": 1 - tokens / places}


def report(rounds: dict[str, list[dict[str, float]]]) -> str:
    """The results as Markdown."""
    import trl

    def median(who: str, key: str) -> float:
        return statistics.median(one[key] for one in rounds[who])

    lines = [
        "# Tokenising and batching against SFTTrainer",
        "",
        f"`python benchmarks/tokenising.py`, {platform.machine()}, {os.cpu_count()} cores, "
        f"TRL {trl.__version__}, Python {platform.python_version()}; "
        f"medians of {len(rounds['ours'])} rounds by turns.",
        "",
        "| | ours | SFTTrainer | theirs / ours |",
        "|---|---:|---:|---:|",
    ]
    for part in ("tokenising", "batching"):
        for key, unit, scale in (
            ("seconds", "s", 1),
            ("CPU seconds", "s", 1),
            ("memory", "MB", 1e-6),
        ):
            a, b = (median(who, f"{part} {key}") * scale for who in ("ours", "theirs"))
            name = "wall time" if key == "seconds" else "CPU time" if scale == 1 else key
            ratio = f"{b / a:.1f}" if a > 0 else "-"
            lines.append(f"| {part}, {name} | {a:.2f} {unit} | {b:.2f} {unit} | {ratio} |")
    for key in ("tokens", "learned"):
        a, b = median("ours", key), median("theirs", key)
        lines.append(f"| {key} in an epoch | {a:,.0f} | {b:,.0f} | {b / a:.4f} |")
    a, b = (100 * median(who, "padding") for who in ("ours", "theirs"))
    lines.append(f"| padding in batches of {BATCH} | {a:.1f} % | {b:.1f} % | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the parts in fresh processes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    parser.add_argument("--part", choices=["model", "ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "model":
        make_model(options.folder)
        return
    if options.part:
        result = {"ours": ours, "theirs": theirs}[options.part](options.folder)
        print("RESULT " + json.dumps(result))
        return
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:

        def part(name: str) -> str:
            command = [sys.executable, __file__, "--part", name, "--folder", folder]
            # A cache of its own, so that no earlier run has done the work.
            with tempfile.TemporaryDirectory() as cache:
                environment = {**os.environ, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
                done = subprocess.run(
                    command, env=environment, check=True, stdout=subprocess.PIPE, text=True
                )
            return done.stdout

        part("model")
        for _ in range(options.rounds):
            for who, results in rounds.items():
                (line,) = [x for x in part(who).splitlines() if x.startswith("RESULT ")]
                results.append(json.loads(line.removeprefix("RESULT ")))
    text = report(rounds)
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
