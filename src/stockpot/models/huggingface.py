"""Hugging Face image classifiers, with their image processor's work done on batches."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from stockpot.errors import ConfigError
from stockpot.models.learner import ImageLearner, to_unit_range

__all__ = ["image_processing", "load_image_classifier", "preprocess_images"]


def load_image_classifier(
    source: str, revision: str | None, pretrained: bool, labels: int
) -> ImageLearner:
    """``AutoModelForImageClassification`` with a head for ``labels`` labels.

    A head of another size is replaced by a fresh one; everything else must load.

    Raises:
        ConfigError: if the model cannot be had.
    """
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the fresh head is meant, and said in the docs
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, num_labels=labels)
        if pretrained:
            module, loaded = AutoModelForImageClassification.from_pretrained(
                source,
                revision=revision,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            _check_body(source, module, loaded)
        else:
            module = AutoModelForImageClassification.from_config(config)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"cannot load the model {source!r}: {line}. Without a network, give a local folder "
            "that holds config.json and model.safetensors"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    try:
        processing = image_processing(source, revision, config)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the preprocessor_config.json of {source!r} cannot be used: {error}"
        ) from error
    return ImageLearner(module, partial(preprocess_images, **processing))


def _check_body(source: str, module: Any, loaded: dict[str, Any]) -> None:
    """Only the head may be fresh: a body that did not load would be trained from noise."""
    prefix = f"{module.base_model_prefix}."
    fresh = [*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])]
    body = sorted(name for name in fresh if name.startswith(prefix))
    if body:
        raise ConfigError(
            f"the checkpoint {source!r} lacks weights of its body, or has them in another shape "
            f"({', '.join(body[:3])}{' and more' if len(body) > 3 else ''}); it is damaged or of "
            "another architecture than its config.json says"
        )


def image_processing(source: str, revision: str | None, config: Any) -> dict[str, Any]:
    """Size, mean and deviation from the model's image processor, as far as it has one."""
    from transformers.utils import cached_file

    found = cached_file(
        source,
        "preprocessor_config.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    settings = json.loads(Path(found).read_text()) if found else {}
    size = settings.get("size", getattr(config, "image_size", None))
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        size = (size.get("height", side), size.get("width", side))
    elif isinstance(size, int):
        size = (size, size)
    normalised = settings.get("do_normalize", bool(settings))
    return {
        "size": tuple(size) if size and settings.get("do_resize", True) else None,
        "mean": tuple(settings.get("image_mean", (0.5,))) if normalised else (0.0,),
        "deviation": tuple(settings.get("image_std", (0.5,))) if normalised else (1.0,),
        "channels": getattr(config, "num_channels", 3),
    }


def preprocess_images(
    images: Tensor,
    size: tuple[int, int] | None,
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
    channels: int,
) -> Tensor:
    """Images (B, C, H, W) as the model takes them: channels, size, mean and deviation."""
    pixels = to_unit_range(images)
    if pixels.shape[1] == 1 and channels > 1:
        pixels = pixels.expand(-1, channels, -1, -1)
    if size is not None and tuple(pixels.shape[-2:]) != size:
        pixels = F.interpolate(
            pixels, size=size, mode="bilinear", antialias=True, align_corners=False
        )
    centre = pixels.new_tensor(mean).view(1, -1, 1, 1)
    return (pixels - centre) / pixels.new_tensor(deviation).view(1, -1, 1, 1)
