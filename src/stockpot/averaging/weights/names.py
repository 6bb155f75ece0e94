"""Parameters by the names that a checkpoint has for them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stockpot.errors import StockpotError

__all__ = ["aliases", "named_trainable", "plain_name", "trainable_weights", "unwrap"]

# Wrappers put these into names; a checkpoint and an anchor should agree on plain ones.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_flat_param"}


def _inner(model: nn.Module) -> tuple[str, nn.Module] | None:
    """What a wrapper wraps and under which name; None if this is no wrapper."""
    # "module." is a wrapper's only where a wrapper stands; elsewhere it is the user's own name.
    if isinstance(model, DistributedDataParallel | DataParallel):
        return "module", model.module
    if isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
        return "_orig_mod", compiled
    # DeepSpeedEngine, known by what it must have, so that deepspeed need not be imported.
    engine = getattr(model, "module", None)
    if isinstance(engine, nn.Module) and hasattr(model, "zero_optimization_stage"):
        return "module", engine
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, ``torch.compile`` and DeepSpeed's engine."""
    while (inner := _inner(model)) is not None:
        model = inner[1]
    return model


def plain_name(model: nn.Module, name: str) -> str:
    """The name without what wrappers put into it."""
    while (inner := _inner(model)) is not None:
        name, model = name.removeprefix(f"{inner[0]}."), inner[1]
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def aliases(model: nn.Module) -> dict[nn.Parameter, tuple[str, ...]]:
    """All names of each parameter: the first, those of its ties, and those without PEFT's parts.

    A checkpoint holds a tied tensor once, under any of its names, and was often written before an
    adapter was put around the model.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(plain_name(model, raw))
    return {p: tuple(dict.fromkeys([*own, *map(_without_peft, own)])) for p, own in names.items()}


def _without_peft(name: str) -> str:
    parts = name.removeprefix("base_model.model.").split(".")
    if "modules_to_save" in parts:  # ...modules_to_save.<adapter>.weight
        at = parts.index("modules_to_save")
        parts = parts[:at] + parts[at + 2 :]
    return ".".join(part for part in parts if part != "base_layer")


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable floating-point parameters by plain name, each once (a tied tensor is one)."""
    return {
        plain_name(model, name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    }


def trainable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Like :func:`named_trainable`, for arithmetic that needs whole parameters.

    Raises:
        StockpotError: if a parameter is sharded.
    """
    weights = named_trainable(model)
    for name, parameter in weights.items():
        kind = type(parameter).__name__
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            kind = "DeepSpeed ZeRO"
        elif "DTensor" not in kind and "FlatParameter" not in kind:
            continue
        raise StockpotError(
            f"parameter {name!r} is a {kind} parameter: this process holds a part of it, or a copy "
            "that the optimizer overwrites, and this method needs whole weights. Only SFA works "
            "on sharded models; train without FSDP and DeepSpeed."
        )
    return weights
