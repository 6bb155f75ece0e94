"""Diagonal Fisher information of a checkpoint on disk, from a data set: ``stockpot fisher``.

F[j] = 1/N sum_n E_y (d log p(y | x_n) / d theta[j])^2, the square taken per example (Martens 2014).
For a language model an example is a sequence, y its tokens (those of the response, where there is a
prompt), and log p(y | x) their sum.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stockpot.errors import ConfigError, NonFiniteError, StockpotError, nearest
from stockpot.merging.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from stockpot.merging.dtypes import FLOATING
from stockpot.streams.source import resolve_source

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["fisher_of_checkpoint"]

Labels = Literal["sampled", "true", "exact"]
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_COLUMNS = "'text', 'prompt' and 'response', 'text' and 'label', or 'image' and 'label'"


def fisher_of_checkpoint(
    model: str,
    data: str,
    samples: int | None = 256,
    labels: Labels = "sampled",
    max_length: int = 512,
    split: str = "train",
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Fisher values by the names in the checkpoint's files, float32, on the CPU.

    Args:
        model: folder or hub id of a model with a causal language, sequence classification or image
            classification head.
        data: JSONL, CSV or parquet file, folder or hub id, with the columns ``text``; ``prompt``
            and ``response``; ``text`` and ``label``; or ``image`` and ``label``.
        samples: examples used, drawn without replacement; None: all.
        labels: ``sampled`` draws y from the model's own distribution, ``true`` takes the data's
            (the empirical Fisher), ``exact`` sums over all labels (classifiers only).
        max_length: of sequences, in tokens; longer ones are cut.
        split: of the data set.
        seed: of the draws.
        device: where to compute.
        progress: called with the examples done and their number.

    Returns:
        A tensor for each floating tensor of the checkpoint; 0 for those that are no parameters.

    Raises:
        ConfigError: for a model or data that do not fit.
        NonFiniteError: if a value is not finite.
    """
    import torch

    checkpoint = open_checkpoint(model)
    module = _load(checkpoint).to(device).eval()
    rows = _rows(data, split)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[:samples].tolist()
    examples = _examples(checkpoint, module, (rows[n] for n in chosen), max_length)
    totals = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in module.named_parameters()}
    count = 0
    for inputs, target in examples:
        inputs = {name: value.to(device) for name, value in inputs.items()}
        logits = module(**inputs).logits[0].float()
        for wanted, weight in _targets(logits, target.to(device), labels, generator):
            module.zero_grad(set_to_none=True)
            chosen_logits, chosen_target = _aligned(logits, wanted)
            loss = torch.nn.functional.cross_entropy(chosen_logits, chosen_target, reduction="sum")
            loss.backward(retain_graph=labels == "exact")
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    totals[name].add_(parameter.grad.float().square(), alpha=weight)
        count += 1
        if progress is not None:
            progress(count, len(chosen))
    if not count:
        raise ConfigError(f"{data}: no example has anything to predict")
    return _named(checkpoint, module, {n: (t / count).cpu() for n, t in totals.items()})


def _load(checkpoint: Checkpoint) -> torch.nn.Module:
    import transformers

    architectures = checkpoint.config.get("architectures") or [""]
    for ending, kind in (
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("LMHeadModel", "AutoModelForCausalLM"),
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
        ("ForImageClassification", "AutoModelForImageClassification"),
    ):
        if architectures[0].endswith(ending):
            module: torch.nn.Module = getattr(transformers, kind).from_pretrained(
                checkpoint.folder, dtype="float32"
            )
            return module
    raise ConfigError(
        f"{checkpoint.source}: config.json names the architecture {architectures[0]!r}; known are "
        "those for causal language models, sequence and image classification"
    )


def _rows(data: str, split: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    path = Path(data)
    try:
        if path.is_file():
            if path.suffix not in _READERS:
                raise ConfigError(f"{data}: give a file that ends in {', '.join(_READERS)}")
            rows = datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(resolve_source(data), split=split)
    except StockpotError:
        raise
    except Exception as error:  # the library raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StockpotError(f"cannot load the data {data!r}, split {split!r}: {reason}") from error
    if not len(rows):
        raise ConfigError(f"{data} has no rows")
    return rows


def _examples(
    checkpoint: Checkpoint, module: Any, rows: Iterable[dict[str, Any]], max_length: int
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Inputs of one example, and its target: a label, or a row of tokens with -100 elsewhere."""
    import torch

    if "pixel_values" in getattr(module, "main_input_name", ""):
        yield from _images(checkpoint, module, rows)
        return
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{checkpoint.source} has no tokenizer: {error}") from error
    causal = type(module).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    for row in rows:
        prompt, text = _texts(row, causal)
        start = tokenizer(prompt)["input_ids"] if prompt else []
        ids = tokenizer(text, add_special_tokens=not start)["input_ids"]
        if causal and start and tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        tokens = torch.tensor([(start + ids)[:max_length]])
        if not causal:
            yield {"input_ids": tokens}, torch.tensor(int(row["label"]))
            continue
        target = tokens[0].clone()
        target[: max(1, len(start))] = -100
        if (target != -100).any():
            yield {"input_ids": tokens}, target


def _texts(row: dict[str, Any], causal: bool) -> tuple[str, str]:
    if causal and {"prompt", "response"} <= row.keys():
        return str(row["prompt"]), str(row["response"])
    if "text" in row and (causal or "label" in row):
        return "", str(row["text"])
    raise ConfigError(f"the data has the columns {', '.join(row)}; needed are {_COLUMNS}")


def _images(
    checkpoint: Checkpoint, module: Any, rows: Iterable[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], Any]]:
    import numpy as np
    import torch

    from stockpot.models.huggingface import image_processing, preprocess_images

    settings = image_processing(str(checkpoint.folder), None, module.config)
    for row in rows:
        label = next((row[key] for key in ("label", "fine_label") if key in row), None)
        image = row.get("image", row.get("img"))
        if image is None or label is None:
            raise ConfigError(f"the data has the columns {', '.join(row)}; needed are {_COLUMNS}")
        mode = "RGB" if settings["channels"] == 3 else "L"
        pixels = torch.from_numpy(np.array(image.convert(mode)))
        pixels = pixels.unsqueeze(-1) if pixels.dim() == 2 else pixels
        batch = preprocess_images(pixels.permute(2, 0, 1).unsqueeze(0), **settings)
        yield {"pixel_values": batch}, torch.tensor(int(label))


def _targets(
    logits: Tensor, target: Tensor, labels: Labels, generator: torch.Generator
) -> list[tuple[Tensor, float]]:
    """What to take the gradient of log p for, each with the weight of its square."""
    import torch

    if labels == "true":
        return [(target, 1.0)]
    probabilities = torch.softmax(logits.detach(), dim=-1).cpu()
    if target.dim() == 0:
        if labels == "exact":
            options = enumerate(probabilities.tolist())
            return [(torch.full_like(target, y), p) for y, p in options if p > 0.0]
        return [(torch.multinomial(probabilities, 1, generator=generator)[0].to(target), 1.0)]
    if labels == "exact":
        raise ConfigError("labels 'exact' sums over all sequences; use sampled or true")
    drawn = target.clone()
    places = (target != -100).nonzero().flatten().cpu()
    # The token at a place is predicted from the one before.
    tokens = torch.multinomial(probabilities[places - 1], 1, generator=generator).flatten()
    drawn[places.to(target.device)] = tokens.to(target)
    return [(drawn, 1.0)]


def _aligned(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and what they predict: of sequences, the next token."""
    if target.dim() == 0:
        return logits.unsqueeze(0), target.unsqueeze(0)
    return logits[:-1], target[1:]


def _named(checkpoint: Checkpoint, module: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of the files, where Fisher merging looks for them.

    A model may call its parameters otherwise than its files do. The library that renames them when
    it saves is let do so: with the values in the parameters' place.
    """
    import torch
    from safetensors.torch import load_file

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])
        for buffer in module.buffers():
            buffer.zero_()  # no parameters: their values are 0
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        saved: dict[str, Tensor] = {}
        for path in Path(folder).glob("*.safetensors"):
            saved |= load_file(path)
    found = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype not in FLOATING:
            continue
        # Tied weights that the checkpoint holds twice are saved once.
        known = saved.get(name, module.state_dict().get(name))
        found[name] = torch.zeros(info.shape) if known is None else known.float().clone()
        if not bool(torch.isfinite(found[name]).all()):
            raise NonFiniteError(f"the Fisher values of {name!r} are not finite")
    if lost := [name for name in saved if name not in found]:
        raise CheckpointError(
            f"{checkpoint.source} does not hold the parameter {lost[0]!r} under that name"
            f"{nearest(lost[0], found)}: it was saved by another version; load and save it once "
            f"with {type(module).__name__}"
        )
    return found
