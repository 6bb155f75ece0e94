"""One task's training, shared by several processes (``training.parallel``).

Each process takes its rows of every micro-batch; gradients are averaged so that they are those of
the whole batch. ``spread`` says where weights and optimizer are meanwhile, one way a file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from stockpot.errors import ConfigError
from stockpot.training.settings import TrainingSettings

if TYPE_CHECKING:
    from stockpot.methods.base import Method

__all__ = ["check_parallel", "own_settings"]

_LAUNCHER = {
    "ACCELERATE_USE_FSDP": ("FSDP", "fsdp2"),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "zero2 or zero3"),
}
"""What ``accelerate launch`` may ask for, and the setting that does it."""
_REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


@contextlib.contextmanager
def own_settings(settings: TrainingSettings, world: int) -> Iterator[None]:
    """The settings decide, not what ``accelerate launch`` has left in the environment.

    Raises:
        ConfigError: if it was asked for something that the settings do not say.
    """
    if world > 1:
        check_launcher(settings)
    hidden = {n: value for n, value in os.environ.items() if n.startswith("ACCELERATE_")}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def check_launcher(settings: TrainingSettings) -> None:
    """Refuse a launcher that asks for another way of sharing than ``training.parallel``.

    Raises:
        ConfigError: naming the setting that does what the launcher was asked for.
    """
    for name, (what, modes) in _LAUNCHER.items():
        if _asked(name) and settings.parallel not in modes:
            raise ConfigError(
                f"training.parallel = {settings.parallel}, and accelerate launch was told to use "
                f"{what} ({name} is set). Set training.parallel to {modes}, which does the same "
                "and needs nothing of accelerate's configuration, or launch without it"
            )
    for name, what in _REFUSED.items():
        if _asked(name):
            raise ConfigError(
                f"accelerate launch was told to use {what} ({name} is set), which training does "
                "not do. Launch without it; training.parallel says how processes share a run"
            )


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() in {"1", "true", "yes", "on", "y", "t"}


def check_parallel(
    method: Method, module: nn.Module, settings: TrainingSettings, world: int
) -> None:
    """Refuse, before anything trains, what so many processes cannot train in this way.

    Args:
        method: what is to be trained with.
        module: the model.
        settings: ``parallel`` and ``precision`` matter.
        world: how many processes share the run; one can always train.

    Raises:
        ConfigError: with the reason, and which settings work.
    """
    if world == 1:
        return
    check_launcher(settings)
    _check_statistics(module, world)
    if settings.parallel == "ddp":
        return
    _check_method(method, settings)
    if settings.parallel == "fsdp2":
        _check_fsdp2(module)
    else:
        _check_zero(module, settings)


def _check_statistics(module: nn.Module, world: int) -> None:
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) or (
            getattr(part, "running_mean", None) is not None
        ):
            raise ConfigError(
                f"{world} processes cannot train {name!r} ({type(part).__name__}) as one does: its "
                "statistics are those of the batch, and each process sees a share of it. Use a "
                "model without them (model.norm: none, LayerNorm or GroupNorm), or one process"
            )


def _check_method(method: Method, settings: TrainingSettings) -> None:
    from stockpot.methods.base import Method

    own = type(method)
    if own.take_parts is not Method.take_parts:
        return
    for hook in ("before_step", "after_step"):
        if getattr(own, hook) is not getattr(Method, hook):
            raise ConfigError(
                f"training.parallel = {settings.parallel}: each process holds a part of the "
                f"weights, and {method.name} has {hook} but no take_parts, which would say what "
                "it does to parts. Use training.parallel: ddp"
            )


def _check_fsdp2(module: nn.Module) -> None:
    kinds = {p.dtype for p in module.parameters() if p.requires_grad}
    if len(kinds) > 1:
        raise ConfigError(
            "training.parallel = fsdp2 shards weights of one precision, and those that train have "
            f"{', '.join(sorted(map(str, kinds)))}: set model.dtype, or use training.parallel: ddp"
        )
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(
                f"training.parallel = fsdp2 cannot shard {name!r}, which is a single number: use "
                "training.parallel: ddp"
            )


def _check_zero(module: nn.Module, settings: TrainingSettings) -> None:
    mode = settings.parallel
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"training.parallel = {mode} needs DeepSpeed: pip install 'stockpot[deepspeed]'"
        )
    if settings.precision == "float16":
        raise ConfigError(
            f"training.parallel = {mode} trains in float32 and bfloat16: float16 scales the loss, "
            "and DeepSpeed does that in another way than one process. Use precision: bfloat16, or "
            "training.parallel: fsdp2"
        )
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and str(parameter.dtype) != "torch.float32":
            raise ConfigError(
                f"training.parallel = {mode} keeps weights in float32, and {name!r} is "
                f"{parameter.dtype}, which one process would train as it is: set model.dtype: "
                "float32, or use training.parallel: fsdp2"
            )
