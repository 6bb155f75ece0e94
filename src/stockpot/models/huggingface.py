"""Hugging Face image classifiers, with their image processor's work done on batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from stockpot.errors import ConfigError, first_line
from stockpot.models.learner import ImageLearner, to_unit_range

__all__ = ["image_processing", "load_image_classifier", "preprocess_images"]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Errors only: that the head is fresh is meant, and said in the docs."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@_quietly()
def load_image_classifier(
    source: str, revision: str | None, pretrained: bool, labels: int
) -> ImageLearner:
    """``AutoModelForImageClassification`` with a head for ``labels`` labels.

    A head of another size is replaced by a fresh one; everything else must load.

    Raises:
        ConfigError: if the model cannot be had.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

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
        line = first_line(error)
        raise ConfigError(
            f"cannot load the model {source!r}: {line}. Without a network, give a local folder "
            "that holds config.json and model.safetensors"
        ) from error
    try:
        processor = _image_processor(source, revision)
        processing = _processing_of(processor, config)
    except (OSError, ImportError, LookupError, ValueError, TypeError, AttributeError) as error:
        line = first_line(error)
        raise ConfigError(
            f"the preprocessor_config.json of {source!r} cannot be used: {line}"
        ) from error
    return ImageLearner(module, partial(preprocess_images, **processing), processor)


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
    """What the model's image processor does to an image, as arguments of :func:`preprocess_images`.

    The processor's own class fills in what an old ``preprocessor_config.json`` leaves out. On one
    image, its answer is compared with that of :func:`preprocess_images`: what a processor does
    beyond resizing, cropping, scaling and normalising is noticed by that, whatever it is called. A
    model without a processor gets its images in [0, 1], resized to its ``image_size``.

    Raises:
        ValueError: if the processor does something else to an image.
    """
    return _processing_of(_image_processor(source, revision), config)


def _processing_of(processor: Any, config: Any) -> dict[str, Any]:
    channels = getattr(config, "num_channels", 3)
    if processor is None:
        side = getattr(config, "image_size", None)
        size = (side, side) if isinstance(side, int) else side
        return {"resize": {"size": tuple(size)} if size else None, "channels": channels}
    settings = {name: value for name, value in processor.to_dict().items() if value is not None}
    processing = _processing(settings, channels)
    _compare(processor, processing, settings, channels)
    return processing


def _image_processor(source: str, revision: str | None) -> Any:
    """The model's image processor; None if it has none."""
    from transformers import AutoImageProcessor
    from transformers.utils import cached_file

    found = any(
        cached_file(
            source,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        for name in ("preprocessor_config.json", "processor_config.json")
    )
    return AutoImageProcessor.from_pretrained(source, revision=revision) if found else None


_FOLLOWED = frozenset(
    {
        *("do_resize", "size", "resample", "crop_pct", "default_to_square"),
        *("do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
        *("do_normalize", "image_mean", "image_std"),
        *("do_convert_rgb", "do_reduce_labels"),  # of segmentation maps
        *("image_processor_type", "feature_extractor_type", "processor_class"),
        *("data_format", "input_data_format", "return_tensors", "device"),
    }
)
"""The settings of a processor that are followed here, or change nothing."""
_MODES = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that PyTorch has too."""


def _processing(settings: dict[str, Any], channels: int) -> dict[str, Any]:
    """The arguments of :func:`preprocess_images` that a processor's settings stand for."""
    crop = None
    if settings.get("do_center_crop"):
        crop = _height_width(settings["crop_size"])
    resize, crop = _resizing(settings, crop) if settings.get("do_resize") else (None, crop)
    mean: Any = (0.0,)
    deviation: Any = (1.0,)
    if settings.get("do_normalize"):
        mean, deviation = (
            (value,) if isinstance(value, int | float) else tuple(value)
            for value in (settings["image_mean"], settings["image_std"])
        )
    if not {len(mean), len(deviation)} <= {1, channels}:
        raise ValueError(
            f"image_mean = {list(mean)} and image_std = {list(deviation)} do not fit a model of "
            f"{channels} channels"
        )
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale") else 1.0
    return {
        "channels": channels,
        "resize": resize,
        "crop": crop,
        "scale": 255 * factor,
        "mean": mean,
        "deviation": deviation,
    }


def _resizing(
    settings: dict[str, Any], crop: tuple[int, int] | None
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """How to resize, and what to cut from the middle then."""
    number = int(settings.get("resample", 2))
    if number not in _MODES:
        raise ValueError(f"resample = {number} cannot be followed; 2 (bilinear) or 3 (bicubic) can")
    resize: dict[str, Any] = {"mode": _MODES[number]}
    size = settings["size"]
    edge, share = size.get("shortest_edge"), settings.get("crop_pct")
    if edge is None or "longest_edge" in size:
        return {"size": _height_width(size), **resize}, crop
    if share is None:
        return {"edge": edge, **resize}, crop
    if edge >= 384 and crop is None:  # ConvNeXt's rule: large images are not cropped
        return {"size": (edge, edge), **resize}, None
    return {"edge": int(edge / share), **resize}, crop or (edge, edge)


def _height_width(size: dict[str, int]) -> tuple[int, int]:
    if not {"height", "width"} <= set(size):
        raise ValueError(
            f"a size of {dict(size)} cannot be followed; it must have height and width, or "
            "shortest_edge alone"
        )
    return size["height"], size["width"]


def _compare(
    processor: Any, processing: dict[str, Any], settings: dict[str, Any], channels: int
) -> None:
    """Whether processor and :func:`preprocess_images` agree on one image that is not square."""
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(40), indexing="ij")
    # No black and no white: where a filter overshoots, Pillow's result depends on its version.
    image = torch.stack([64 + (3 * rows + (k + 2) * columns) % 128 for k in range(channels)])
    image = image.to(torch.uint8)
    ours = preprocess_images(image.unsqueeze(0), **processing)[0]
    theirs = processor(image.numpy(), input_data_format="channels_first", return_tensors="pt")
    if "pixel_values" in theirs:
        other = torch.as_tensor(theirs["pixel_values"])[0]
        tolerance = 3 / 255 * processing["scale"] / min(processing["deviation"])
        if ours.shape == other.shape and (ours - other).abs().max() <= tolerance:
            return
    beyond = [f"{name} = {value}" for name, value in settings.items() if name not in _FOLLOWED]
    kind = type(processor).__name__.removesuffix("Pil")
    raise ValueError(
        f"{kind} does more than resize, crop, scale and normalise"
        + (f" ({', '.join(beyond)})" if beyond else "")
        + "; choose a model with a plainer image processor, or give your own as model.factory"
    )


def preprocess_images(
    images: Tensor,
    channels: int,
    resize: dict[str, Any] | None = None,
    crop: tuple[int, int] | None = None,
    scale: float = 1.0,
    mean: tuple[float, ...] = (0.0,),
    deviation: tuple[float, ...] = (1.0,),
) -> Tensor:
    """Images (B, C, H, W) as the model takes them, (B, channels, H', W') float32.

    Resizing is Pillow's, which image processors use: a filter that widens when it reduces, first
    along the rows, then along the columns. Pillow rounds to whole levels after each of the two;
    here nothing is rounded, so a pixel may differ by a level of 255. (Pillow 13 begins with the
    columns where that is less work, which shows only where the bicubic filter overshoots black or
    white.)

    Args:
        images: uint8, or float in [0, 1].
        channels: of the model; a grey image is repeated.
        resize: ``size`` (height, width), or ``edge`` for the shorter side with the proportions
            kept, and ``mode``, bilinear or bicubic.
        crop: height and width cut from the middle; what is not there is black.
        scale: what 1.0 becomes before mean and deviation.
        mean: for each channel or for all.
        deviation: for each channel or for all.
    """
    pixels = to_unit_range(images)
    if pixels.shape[1] == 1 and channels > 1:
        pixels = pixels.expand(-1, channels, -1, -1)
    if resize is not None:
        pixels = _resized(pixels, **resize)
    if crop is not None:
        pixels = _cropped(pixels, crop)
    centre = pixels.new_tensor(mean).view(1, -1, 1, 1)
    return (pixels * scale - centre) / pixels.new_tensor(deviation).view(1, -1, 1, 1)


def _resized(
    pixels: Tensor,
    size: tuple[int, int] | None = None,
    edge: int | None = None,
    mode: str = "bilinear",
) -> Tensor:
    height, width = int(pixels.shape[-2]), int(pixels.shape[-1])
    if size is None:
        assert edge is not None
        longer = int(edge * max(height, width) / min(height, width))
        size = (longer, edge) if width <= height else (edge, longer)
    for step in ((height, size[1]), size):
        if tuple(pixels.shape[-2:]) != step:
            pixels = F.interpolate(pixels, step, mode=mode, antialias=True, align_corners=False)
            if mode == "bicubic":  # it overshoots
                pixels = pixels.clamp(0, 1)
    return pixels


def _cropped(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle; an image that is too small gets a black border, the odd row on top."""
    height, width = int(pixels.shape[-2]), int(pixels.shape[-1])
    more = [max(0, size[0] - height), max(0, size[1] - width)]
    if any(more):
        top, left = -(-more[0] // 2), -(-more[1] // 2)
        pixels = F.pad(pixels, (left, more[1] - left, top, more[0] - top))
    top, left = (max(0, height - size[0]) // 2, max(0, width - size[1]) // 2)
    return pixels[..., top : top + size[0], left : left + size[1]]
