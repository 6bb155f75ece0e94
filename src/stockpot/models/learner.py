"""A model as the program sees it: from a batch to predictions, and its weights by name."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stockpot.errors import ConfigError, NonFiniteError, StockpotError

if TYPE_CHECKING:
    from stockpot.streams.data import Stream

__all__ = [
    "ImageLearner",
    "Learner",
    "Predictions",
    "check_finite",
    "check_learner",
    "checkpoint_activations",
    "conv",
    "copy_weights",
    "evaluating",
    "load_weights_",
    "mlp",
    "named_weights",
    "save_config",
    "to_device",
    "to_unit_range",
]


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 images as floats in [0, 1]; floats as they are."""
    return torch.div(images, 255) if images.dtype == torch.uint8 else images


class Predictions(NamedTuple):
    """What a model says of a batch, at every place where it is asked something.

    An image is one place; a text has one for each token to be learned.
    """

    logits: Tensor
    """(P, V), one row a place."""
    targets: Tensor
    """(P,) int64, what would be right."""
    example: Tensor
    """(P,) int64, the example of the batch that a place belongs to."""

    def losses(self) -> Tensor:
        """(P,) float32: ``-log p(target)`` at each place, in nats."""
        return F.cross_entropy(self.logits.float(), self.targets, reduction="none")


class Learner(ABC):
    """A module, and how a batch of its stream becomes predictions."""

    module: nn.Module

    @abstractmethod
    def predictions(self, batch: Any, module: nn.Module | None = None) -> Predictions:
        """The logits and targets of a batch that is on the module's device.

        Args:
            batch: what the data set gives.
            module: the module as a trainer has wrapped it; by default the module itself.
        """

    @abstractmethod
    def count(self, batch: Any) -> int:
        """How many places a batch has, without asking the model."""

    def loss(self, batch: Any, module: nn.Module | None = None) -> Tensor:
        """Cross-entropy in nats, its mean over the places of the batch."""
        logits, targets, _ = self.predictions(batch, module)
        return F.cross_entropy(logits.float(), targets)

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, and not the weights themselves."""
        return False

    # The model's weights. With adapters these are not the module's own tensors.

    def weights(self) -> dict[str, Tensor]:
        """A copy of all weights (parameters and persistent buffers) in host memory."""
        return copy_weights(self.module)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Write ``weights`` into the model, in place.

        Raises:
            StockpotError: if a name or a shape does not match.
        """
        load_weights_(self.module, weights)

    def parameter_names(self) -> set[str]:
        """Which of the weights are parameters, and not buffers."""
        return {name for name, _ in self.module.named_parameters()}

    def describe(self, folder: Path) -> None:
        """Write beside the weights what ``from_pretrained`` needs, if it is a model of its kind."""
        save_config(self.module, folder)


@dataclass(frozen=True)
class ImageLearner(Learner):
    """A module from a batch of images to logits.

    Args:
        module: takes what ``preprocess`` returns; gives logits (B, labels), or an object that has
            them as ``logits``.
        preprocess: from a batch of images as the data set holds them, (B, C, H, W) in uint8 or in
            [0, 1], to the module's input.
    """

    module: nn.Module
    preprocess: Callable[[Tensor], Tensor] = to_unit_range
    processor: Any = None
    """The image processor of Transformers that ``preprocess`` does the work of, if there is one."""

    def describe(self, folder: Path) -> None:
        """Write the model's configuration and its image processor's."""
        super().describe(folder)
        if self.processor is not None:
            self.processor.save_pretrained(folder)

    def logits(
        self, images: Tensor, allowed: Tensor | None = None, module: nn.Module | None = None
    ) -> Tensor:
        """(B, labels); labels that an example may not choose have -inf."""
        return self.select((module or self.module)(self.preprocess(images)), allowed)

    def predictions(self, batch: Any, module: nn.Module | None = None) -> Predictions:
        """One place an image."""
        logits = self.logits(batch["pixel_values"], batch["allowed"], module)
        labels = batch["labels"]
        return Predictions(logits, labels, torch.arange(len(labels), device=labels.device))

    def count(self, batch: Any) -> int:
        """One place an image."""
        return len(batch["labels"])

    @staticmethod
    def select(output: Any, allowed: Tensor | None) -> Tensor:
        """The logits in a module's output, masked to the allowed labels."""
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        if allowed is None:
            return logits
        return logits.masked_fill(~allowed, float("-inf"))


def checkpoint_activations(module: Any) -> None:
    """Let a Transformers model compute its activations twice instead of keeping them."""
    # Renamed in Transformers 5.
    enable = getattr(module, "activation_checkpointing_enable", None)
    (enable or module.gradient_checkpointing_enable)({"use_reentrant": False})


def save_config(module: Any, folder: Path) -> None:
    """Write the ``config.json`` of a Transformers model; of another module nothing."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "save_pretrained"):
        if not config.architectures:
            config.architectures = [type(module).__name__]
        config.save_pretrained(folder)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards every part in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def mlp(image_shape: tuple[int, int, int], hidden: tuple[int, ...], labels: int) -> nn.Module:
    """Flatten, then Linear and ReLU per hidden layer, then Linear to the labels."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = image_shape[0] * image_shape[1] * image_shape[2]
    for units in hidden:
        layers += [nn.Linear(width, units), nn.ReLU()]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, labels))


def conv(
    image_shape: tuple[int, int, int],
    channels: tuple[int, ...],
    labels: int,
    norm: Literal["none", "batch"] = "none",
) -> nn.Module:
    """Blocks of 3x3 convolution (and BatchNorm), ReLU, 2x2 max-pooling; then Linear to the labels.

    Raises:
        ConfigError: if the image is too small for so many poolings.
    """
    depth, height, width = image_shape
    if min(height, width) >> len(channels) < 1:
        raise ConfigError(
            f"model.channels has {len(channels)} blocks, each halving the image, and the images "
            f"are only {height}x{width}; use fewer blocks"
        )
    layers: list[nn.Module] = []
    for number in channels:
        layers.append(nn.Conv2d(depth, number, 3, padding=1))
        if norm == "batch":
            layers.append(nn.BatchNorm2d(number))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        depth, height, width = number, height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(depth * height * width, labels))


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a tied tensor once."""
    persistent = set(module.state_dict(keep_vars=True))
    named: dict[str, Tensor] = dict(module.named_parameters())
    named.update((n, b) for n, b in module.named_buffers() if n in persistent)
    return named


def copy_weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights (parameters and persistent buffers) in host memory."""
    return {
        name: tensor.detach().to("cpu", copy=True) for name, tensor in named_weights(module).items()
    }


@torch.no_grad()
def load_weights_(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write ``weights`` into the module, in place.

    Raises:
        StockpotError: if a name or a shape does not match.
    """
    own = named_weights(module)
    if own.keys() != weights.keys():
        missing, extra = own.keys() - weights.keys(), weights.keys() - own.keys()
        raise StockpotError(
            "these weights belong to another model: "
            + "; ".join(
                f"{what} {', '.join(sorted(names)[:3])}"
                for what, names in (("missing", missing), ("not in the model", extra))
                if names
            )
        )
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise StockpotError(
                f"weight {name!r} has shape {tuple(weights[name].shape)}; the model needs "
                f"{tuple(tensor.shape)}"
            )
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def to_device(batch: Any, device: torch.device | str) -> Any:
    """A batch with all its tensors on ``device``."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def check_learner(learner: Learner, stream: Stream, device: torch.device) -> Tensor:
    """Try the model on some examples before anything is trained; returns their logits.

    Raises:
        ConfigError: if it has nothing to train, fails, or gives logits of another shape.
    """
    if not any(p.requires_grad for p in learner.module.parameters()):
        raise ConfigError("the model has no trainable parameters: there is nothing to fine-tune")
    rows = torch.arange(min(16, len(stream.tasks[0].train)))
    batch: Any = to_device(stream.tasks[0].train.__getitems__(rows), device)
    what, tensor = next(iter(batch.items()))
    with evaluating(learner.module), torch.no_grad():
        try:
            # Labels that a task does not allow are no matter of the model.
            logits = learner.predictions({**batch, "allowed": None}).logits
        except Exception as error:  # the module may be anyone's
            what = "images" if what == "pixel_values" else what
            raise ConfigError(
                f"the model fails on {what} of shape {tuple(tensor.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
    if stream.labels is not None and logits.shape != (len(rows), stream.labels):
        raise ConfigError(
            f"the model gives logits of shape {tuple(logits.shape)} for {len(rows)} images; this "
            f"stream needs {(len(rows), stream.labels)}, one for each of its {stream.labels} labels"
        )
    return logits


def check_finite(module: nn.Module, where: str) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        NonFiniteError: naming the first such weight and ``where`` it was found.
    """
    for name, tensor in named_weights(module).items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"{where}: weight {name!r} is not finite; nothing of it was saved. Lower "
                "training.learning_rate or set training.max_grad_norm"
            )
