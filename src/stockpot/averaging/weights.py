"""Where a model's true weights live, and how to write them so that they stay written.

This release writes plain parameters (float32, or bf16 and fp16 without master copies). Parameters
whose truth lives elsewhere are refused rather than written in vain: such a write looks right in
memory and is undone by the next optimizer step.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stockpot.errors import StockpotError

__all__ = ["trainable_weights"]

# Wrappers put these into names; a checkpoint and an anchor should agree on plain ones.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _plain_name(model: nn.Module, name: str) -> str:
    # "module." is a wrapper's only where a wrapper stands; elsewhere it is the user's own name.
    inner: object = model
    while True:
        if isinstance(inner, DistributedDataParallel | DataParallel):
            name, inner = name.removeprefix("module."), inner.module
        elif isinstance(compiled := getattr(inner, "_orig_mod", None), nn.Module):
            name, inner = name.removeprefix("_orig_mod."), compiled
        else:
            break
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def trainable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable floating-point parameters by plain name, each once (a tied tensor is one).

    Raises:
        StockpotError: if a parameter is sharded, so that writing to it would not last.
    """
    weights: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            _refuse_sharded(name, parameter)
            weights[_plain_name(model, name)] = parameter
    return weights


def _refuse_sharded(name: str, parameter: Tensor) -> None:
    kind = type(parameter).__name__
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        kind = "DeepSpeed ZeRO"
    elif "DTensor" not in kind and "FlatParameter" not in kind:
        return
    raise StockpotError(
        f"parameter {name!r} is a {kind} parameter: its true weights live in shards or in the "
        "optimizer, and an average written here would be undone. This release averages plain "
        "parameters on one process; train without FSDP and DeepSpeed."
    )
