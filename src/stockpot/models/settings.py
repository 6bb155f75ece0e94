"""What an experiment may say about its model: typed, checked before anything is loaded."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from stockpot.errors import ConfigError, nearest

if TYPE_CHECKING:
    from stockpot.models.learner import Learner
    from stockpot.streams.data import Stream
    from stockpot.streams.text import TextStream

__all__ = ["MODELS", "ModelSettings", "expand_model", "resolve_model"]


def resolve_model(source: str) -> str:
    """Where to read a model from: ``STOCKPOT_MODELS``, a folder of models, goes before the hub."""
    mirror = os.environ.get("STOCKPOT_MODELS")
    if mirror and not Path(source).exists() and (Path(mirror) / source).is_dir():
        return str((Path(mirror) / source).resolve())
    return source


class ModelSettings(BaseModel):
    """Base of all models' settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str

    of_text: ClassVar[frozenset[str]] = frozenset()
    """The settings that mean nothing for images."""

    def encode(self, stream: Stream | TextStream) -> Stream:
        """The stream as this model takes it; a stream of images stays as it is.

        Raises:
            ConfigError: if it is text and the model has no tokenizer.
        """
        from stockpot.streams.text import TextStream

        if isinstance(stream, TextStream):
            raise ConfigError(
                f"model: {self.name} classifies images and stream {stream.name!r} is text: give a "
                "language model, by its hub id or local folder"
            )
        return stream

    def build(self, stream: Stream) -> Learner:
        """Make the model for the encoded stream, with fresh or pre-trained weights."""
        raise NotImplementedError(f"{type(self).__name__}.build")


class Mlp(ModelSettings):
    """Fully connected network with ReLU: pixels, hidden layers, labels."""

    name: Literal["mlp"] = "mlp"
    hidden: tuple[int, ...] = Field((128,), description="width of each hidden layer")

    @field_validator("hidden")
    @classmethod
    def _positive(cls, hidden: tuple[int, ...]) -> tuple[int, ...]:
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden = {list(hidden)}: every layer needs at least one unit")
        return hidden

    def build(self, stream: Stream) -> Learner:
        """Pixels in [0, 1], flattened; PyTorch's default initialisation."""
        from stockpot.models.learner import ImageLearner, mlp

        return ImageLearner(mlp(*_image_task(stream, self.hidden)))


class Conv(ModelSettings):
    """Small convolutional network: blocks of 3x3 convolution, ReLU and 2x2 pooling, then labels."""

    name: Literal["conv"] = "conv"
    channels: tuple[int, ...] = Field((16, 32), description="channels of each block")
    norm: Literal["none", "batch"] = Field("none", description="normalisation after a convolution")

    @field_validator("channels")
    @classmethod
    def _some(cls, channels: tuple[int, ...]) -> tuple[int, ...]:
        if not channels or any(width < 1 for width in channels):
            raise ValueError(f"channels = {list(channels)}: at least one block, 1 channel or more")
        return channels

    def build(self, stream: Stream) -> Learner:
        """Pixels in [0, 1]; PyTorch's default initialisation."""
        from stockpot.models.learner import ImageLearner, conv

        return ImageLearner(conv(*_image_task(stream, self.channels), self.norm))


def _image_task(
    stream: Stream, widths: tuple[int, ...]
) -> tuple[tuple[int, int, int], tuple[int, ...], int]:
    """Image shape, the network's widths and the number of labels."""
    assert stream.image_shape is not None
    assert stream.labels is not None
    return stream.image_shape, widths, stream.labels


class Lora(BaseModel):
    """Low-rank adapters (Hu et al. 2021), trained in place of the weights; needs PEFT."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    r: int = Field(8, ge=1, description="rank of an adapter")
    alpha: int = Field(16, ge=1, description="an adapter's product counts alpha / r times")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on an adapter's input")
    target_modules: tuple[str, ...] | None = Field(
        None, description="names of the layers that get one; null: every linear layer but the head"
    )


class HuggingFace(ModelSettings):
    """Any Hugging Face model, by hub id or local folder, as the stream needs it.

    For images an image classifier; for text a causal or encoder-decoder language model.
    """

    name: Literal["huggingface"] = "huggingface"
    of_text: ClassVar[frozenset[str]] = frozenset(
        {"max_length", "chat_template", "dtype", "attention", "lora"}
    )
    id: str = Field(description="hub id, or a local folder that holds config.json")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    pretrained: bool = Field(True, description="load the weights; false: fresh ones of this shape")
    family: str | None = Field(
        None,
        description="the architecture as Transformers calls it (llama, qwen2, t5, vit): --smoke "
        "makes a tiny model of it without asking the hub",
    )
    max_length: int | None = Field(
        None,
        ge=8,
        description="text: longest example in tokens, longer ones are cut and counted (prompt and "
        "response each for an encoder-decoder); null: what the model takes, at most 2048",
    )
    chat_template: bool | None = Field(
        None, description="text: use the tokenizer's chat template; null: if it has one"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="what the weights are kept in; bfloat16 halves the memory and rounds every "
        "step and every average (training.precision: bfloat16 computes in it and does not)",
    )
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = Field(
        None, description="how attention is computed; null: what Transformers chooses"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations twice instead of keeping them: less memory"
    )
    lora: Lora | None = Field(
        None,
        description="train low-rank adapters: a mapping with r, alpha, dropout, target_modules. "
        "After each task they are merged into the weights and the next task begins fresh ones",
    )

    @field_validator("id")
    @classmethod
    def _id_or_folder(cls, value: str) -> str:
        known = re.fullmatch(r"[\w.-]+/[\w.-]+", value) or Path(resolve_model(value)).is_dir()
        if not known:
            raise ValueError(
                f"unknown model {value!r}: it is no local folder, no hub id (organisation/name) "
                f"and none of this program's models{nearest(value, MODELS)}"
            )
        return value

    def known_family(self) -> str:
        """The architecture: as the settings say, else as the model's config.json does.

        Raises:
            ConfigError: if neither says so.
        """
        if self.family is not None:
            return self.family
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(resolve_model(self.id), revision=self.revision)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"--smoke makes a tiny model of the family of {self.id!r}, whose config.json "
                "cannot be had: name the family, as in model.family=llama"
            ) from error
        return str(config.model_type)

    def encode(self, stream: Stream | TextStream) -> Stream:
        """Text as the model's tokens."""
        from stockpot.streams.text import TextStream

        if not isinstance(stream, TextStream):
            return stream
        from stockpot.models.language import encode_stream

        return encode_stream(stream, self)

    def build(self, stream: Stream) -> Learner:
        """A language model for text; for images one with a head for the stream's labels."""
        if stream.labels is None:
            from stockpot.models.language import load_language_model

            return load_language_model(self)
        from stockpot.models.huggingface import load_image_classifier
        from stockpot.models.learner import checkpoint_activations

        learner = load_image_classifier(
            resolve_model(self.id), self.revision, self.pretrained, stream.labels
        )
        if self.gradient_checkpointing:
            checkpoint_activations(learner.module)
        return learner


class Factory(ModelSettings):
    """Your own model: a function that returns a module from images in [0, 1] to logits."""

    name: Literal["factory"] = "factory"
    factory: str = Field(
        description='"package.module:function", called as function(image_shape=(C, H, W), '
        "labels=n, **arguments)"
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="more keyword arguments for the function"
    )

    @field_validator("factory")
    @classmethod
    def _module_and_function(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.]+:[\w.]+", value):
            raise ValueError(f'factory = {value!r} is not of the form "package.module:function"')
        return value

    def build(self, stream: Stream) -> Learner:
        """Import the function and call it.

        Raises:
            ConfigError: if it cannot be imported or does not return a module.
        """
        from torch import nn

        from stockpot.models.learner import ImageLearner

        module_name, _, function_name = self.factory.partition(":")
        try:
            function: Any = importlib.import_module(module_name)
            for part in function_name.split("."):
                function = getattr(function, part)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"model.factory = {self.factory!r} cannot be imported: {error}. The module must be "
                "on the path (an installed package, or PYTHONPATH=folder)"
            ) from error
        try:
            module = function(
                image_shape=stream.image_shape, labels=stream.labels, **self.arguments
            )
        except Exception as error:  # it is anyone's code
            raise ConfigError(
                f"model.factory = {self.factory!r} failed when called with image_shape="
                f"{stream.image_shape}, labels={stream.labels}"
                + "".join(f", {key}={value!r}" for key, value in self.arguments.items())
                + f": {type(error).__name__}: {error}"
            ) from error
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"model.factory = {self.factory!r} returned {type(module).__name__}, not a "
                "torch.nn.Module"
            )
        return ImageLearner(module)


MODELS: dict[str, type[ModelSettings]] = {
    "mlp": Mlp,
    "conv": Conv,
    "huggingface": HuggingFace,
    "factory": Factory,
}


def expand_model(value: Any) -> Any:
    """The long form of a model written as a string: ``mlp``, ``pkg.mod:function`` or a hub id."""
    if isinstance(value, str):
        if value in MODELS:
            return {"name": value}
        if re.fullmatch(r"[\w.]+:[\w.]+", value):
            return {"name": "factory", "factory": value}
        return {"name": "huggingface", "id": value}
    if isinstance(value, dict) and "name" not in value:
        for key, name in (("factory", "factory"), ("id", "huggingface")):
            if key in value:
                return {"name": name, **value}
    return value
