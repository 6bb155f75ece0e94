"""Optimizers that keep the true weights themselves: the writers for those known, refusals else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stockpot.averaging.weights.names import named_trainable
from stockpot.averaging.weights.plain import Piece, Weights
from stockpot.errors import StockpotError

__all__ = ["find", "refuse_unsupported", "unwrap_optimizer"]

_SHELLS = {"AcceleratedOptimizer", "DeepSpeedOptimizerWrapper", "LightningOptimizer"}


def unwrap_optimizer(optimizer: object | None) -> Any:
    """The optimizer inside accelerate's and Lightning's shells."""
    while optimizer is not None and type(optimizer).__name__ in _SHELLS:
        optimizer = getattr(optimizer, "optimizer", None)
    # LightningOptimizer takes the name of what it wraps: LightningAdamW.
    inner = getattr(optimizer, "_optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def refuse_unsupported(model: nn.Module, optimizer: object | None) -> None:
    """Refuse an optimizer under which an average cannot be written, or means nothing.

    Raises:
        StockpotError: with the reason and what would work.
    """
    optimizer = unwrap_optimizer(optimizer)
    if isinstance(optimizer, list | tuple):
        for one in optimizer:
            refuse_unsupported(model, one)
        return
    kind = type(optimizer).__name__
    if reason := _reason(optimizer):
        raise StockpotError(f"SFA cannot average under {kind}: {reason}")
    for name, parameter in named_trainable(model).items():
        if getattr(parameter, "_in_backward_optimizers", None):
            raise StockpotError(
                f"SFA cannot average {name!r}: an optimizer steps it inside the backward pass, so "
                "there is no moment at which all weights belong to one step. Step the optimizer "
                "after the backward pass."
            )
    if isinstance(optimizer, torch.optim.Optimizer):
        _refuse_foreign(model, optimizer)


def _reason(optimizer: Any) -> str | None:
    kind = type(optimizer).__name__.lower()
    groups = getattr(optimizer, "param_groups", None) or [{}]
    if "schedulefree" in kind.replace("_", "") or "train_mode" in groups[0]:
        return (
            "it is schedule-free: the weights in memory are an interpolation, and the model is "
            "derived from a second sequence in the optimizer. Use an optimizer with a "
            "learning-rate schedule."
        )
    if "layerwise" in kind or "lomo" in kind or "inbackward" in kind:
        return (
            "it steps layer by layer inside the backward pass, so there is no moment at which all "
            "weights belong to one step. Use the optimizer's plain form."
        )
    if "lookahead" in kind:
        return (
            "it keeps slow weights of its own and pulls the model back to them, which undoes "
            "averages. Use the optimizer inside it: SFA already averages."
        )
    return None


def _refuse_foreign(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """An optimizer that steps copies of the weights and not the weights."""
    if _known_store(optimizer) is not None:
        return
    own = {id(p) for p in model.parameters()}
    stepped = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    trainable = named_trainable(model)
    # FSDP1 shows flat parameters or views of them; ZeRO steps its partitions. Both have writers.
    missing = {name: p for name, p in trainable.items() if id(p) not in stepped}
    foreign = {
        (tuple(p.shape), p.dtype) for key, p in stepped.items() if key not in own and p.numel() > 0
    }
    for name, parameter in missing.items():
        if any(
            shape == tuple(parameter.shape) and (dtype != parameter.dtype or not own & set(stepped))
            for shape, dtype in foreign
        ):
            raise StockpotError(
                f"SFA cannot average under {type(optimizer).__name__}: it steps a copy of "
                f"{name!r} and not the model's own parameter, so an average written to the model "
                "would be undone. Give the optimizer that holds model.parameters(), or train "
                "without its master copies."
            )


def _known_store(optimizer: Any) -> type[Weights] | None:
    if hasattr(optimizer, "param_groups_master"):
        return ApexMasters
    if hasattr(optimizer, "param_d2h_map"):
        return HostCopies
    if hasattr(optimizer, "reload_model_params"):
        return MegatronMasters
    if hasattr(optimizer, "set_scaled_state") and getattr(optimizer, "master_weights", False):
        return TransformerEngineMasters
    return None


def find(model: nn.Module, optimizer: object | None) -> Weights:
    """The writer for parameters that look plain: plain, unless the optimizer is a known store."""
    optimizer = unwrap_optimizer(optimizer)
    store = _known_store(optimizer) or Weights
    return store(model, optimizer)


class MasterCopies(Weights):
    """Parameters whose truth is a copy that the optimizer keeps: both are written."""

    def _masters(self) -> Mapping[nn.Parameter, Tensor]:
        raise NotImplementedError

    def _find(self) -> Iterator[Piece]:
        masters = self._masters()
        for piece in super()._find():
            master = masters.get(piece.parameter)
            values = piece.values if master is None else master.detach()
            yield Piece(**{**vars(piece), "values": values})

    def publish(self, pieces: Mapping[str, Piece]) -> None:
        """Round the masters into the parameters."""
        for piece in pieces.values():
            piece.parameter.detach().copy_(piece.values.view(piece.shape))

    def live(self, piece: Piece) -> Tensor:
        """The parameter."""
        return piece.parameter.detach().view(piece.values.shape)


class ApexMasters(MasterCopies):
    """``apex.optimizers.FusedAdam(master_weights=True)``."""

    kind: ClassVar[str] = "apex master weights"

    def _masters(self) -> Mapping[nn.Parameter, Tensor]:
        optimizer: Any = self.optimizer
        return {
            parameter: master
            for group, copies in zip(
                optimizer.param_groups, optimizer.param_groups_master, strict=True
            )
            for parameter, master in zip(group["params"], copies["params"], strict=True)
            if master is not None
        }


class HostCopies(MasterCopies):
    """torchao's ``CPUOffloadOptimizer``: the optimizer steps a copy in host memory."""

    kind: ClassVar[str] = "torchao CPU offload"

    def _masters(self) -> Mapping[nn.Parameter, Tensor]:
        optimizer: Any = self.optimizer
        return dict(optimizer.param_d2h_map)


class TransformerEngineMasters(MasterCopies):
    """``transformer_engine.pytorch.optimizers.FusedAdam(master_weights=True)`` in float32."""

    kind: ClassVar[str] = "TransformerEngine master weights"

    def __init__(self, model: nn.Module, optimizer: object | None = None) -> None:
        super().__init__(model, optimizer)
        inner: Any = optimizer
        if getattr(inner, "store_param_remainders", False) or (
            getattr(inner, "master_weight_dtype", torch.float32) != torch.float32
        ):
            raise StockpotError(
                "SFA cannot average under TransformerEngine's FusedAdam with scaled or split "
                "master weights: set master_weight_dtype=torch.float32 and "
                "store_param_remainders=False"
            )

    def _masters(self) -> Mapping[nn.Parameter, Tensor]:
        state = getattr(self.optimizer, "state", {})
        return {
            parameter: values["master_param"]
            for parameter, values in state.items()
            if isinstance(values.get("master_param"), Tensor)
        }


class MegatronMasters(Weights):
    """Megatron's mixed-precision optimizers: written to the model, then told to the optimizer."""

    kind: ClassVar[str] = "Megatron master weights"

    def publish(self, pieces: Mapping[str, Piece]) -> None:
        """``reload_model_params()``: Megatron's call for weights changed outside the optimizer."""
        optimizer: Any = self.optimizer
        optimizer.reload_model_params()
