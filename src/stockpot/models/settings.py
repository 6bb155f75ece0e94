"""What an experiment may say about its model: typed, checked before anything is loaded."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from stockpot.errors import ConfigError, nearest

if TYPE_CHECKING:
    from stockpot.models.learner import Learner
    from stockpot.streams.data import Stream

__all__ = ["MODELS", "ModelSettings", "expand_model"]


class ModelSettings(BaseModel):
    """Base of all models' settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str

    def build(self, stream: Stream) -> Learner:
        """Make the model for the stream's images and labels, with fresh or pre-trained weights."""
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
        from stockpot.models.learner import Learner, mlp

        return Learner(mlp(stream.image_shape, self.hidden, stream.labels))


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
        from stockpot.models.learner import Learner, conv

        return Learner(conv(stream.image_shape, self.channels, stream.labels, self.norm))


class HuggingFace(ModelSettings):
    """Any Hugging Face image-classification model, by hub id or local folder."""

    name: Literal["huggingface"] = "huggingface"
    id: str = Field(description="hub id, or a local folder that holds config.json")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    pretrained: bool = Field(True, description="load the weights; false: fresh ones of this shape")

    @field_validator("id")
    @classmethod
    def _id_or_folder(cls, value: str) -> str:
        known = re.fullmatch(r"[\w.-]+/[\w.-]+", value) or Path(value).is_dir()
        if not known:
            raise ValueError(
                f"unknown model {value!r}: it is no local folder, no hub id (organisation/name) "
                f"and none of this program's models{nearest(value, MODELS)}"
            )
        return value

    def build(self, stream: Stream) -> Learner:
        """The model with a head for the stream's labels; images as its processor wants them."""
        from stockpot.models.huggingface import load_image_classifier

        return load_image_classifier(self.id, self.revision, self.pretrained, stream.labels)


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

        from stockpot.models.learner import Learner

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
        return Learner(module)


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
